"""What is installed: Python, the packages that we need, torch, and what Triton needs for a GPU."""

import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

from npc_runtime.doctor.finding import Finding

__all__ = ["GpuTools", "check_gpu_tools", "check_packages", "check_python", "check_torch", "installed_version", "needs"]

MIN_PYTHON = (3, 11)
NAMED = ("transformers", "huggingface-hub", "numba")
"""Packages whose versions are worth a look when something is odd; torch and Triton have rows of their own."""


def check_python(version: Sequence[int] = sys.version_info[:3]) -> Iterator[Finding]:
    """Which Python, and on what."""
    text = f"{'.'.join(map(str, version))} on {platform.system()} {platform.machine()}, {sys.prefix}"
    if tuple(version) < MIN_PYTHON:
        remedy = f"Install npc-runtime with Python {'.'.join(map(str, MIN_PYTHON))} or newer."
        yield Finding("python", "wrong", text, remedy)
    else:
        yield Finding("python", "ok", text)


def needs() -> list[str]:
    """What our package says it needs, as pip reads it; nothing if we run from a folder that was never installed."""
    try:
        return metadata.requires("npc-runtime") or []
    except metadata.PackageNotFoundError:
        return []


def installed_version(name: str) -> str | None:
    """The version of a package, if it is installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_packages(
    requirements: Iterable[str], version_of: Callable[[str], str | None] = installed_version
) -> Iterator[Finding]:
    """Compare what is needed with what is there; extras are nobody's need."""
    from packaging.requirements import Requirement

    num_fine, named = 0, []
    for text in requirements:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        found = version_of(need.name)
        if found is None or not need.specifier.contains(found, prereleases=True):
            what = "is missing" if found is None else f"{found} is installed, and {need.specifier} is needed"
            remedy = f'{sys.executable} -m pip install "{need.name}{need.specifier}"'
            yield Finding("packages", "wrong", f"{need.name}: {what}.", remedy)
            continue
        num_fine += 1
        named += [f"{need.name} {found}"] if need.name in NAMED else []
    if num_fine:
        yield Finding("packages", "ok", f"{num_fine} of the right versions, {', '.join(named)}")
    else:
        yield Finding("packages", "ok", "what is needed is not known: npc-runtime runs from a folder")


def check_torch() -> Iterator[Finding]:
    """Import it, which fails where its libraries do not fit the machine."""
    import torch

    build = "for the CPU" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    yield Finding("torch", "ok", f"{torch.__version__}, built {build}")


@dataclass(frozen=True, slots=True)
class GpuTools:
    """What Triton compiles with."""

    has_gpu: bool
    triton: str | None  # its version
    compiler: str | None  # its path
    is_windows: bool = sys.platform == "win32"

    @classmethod
    def look(cls) -> "GpuTools":
        """See what is there."""
        import torch

        names = ("cc", "gcc", "clang")
        compiler = next(filter(None, map(shutil.which, names)), None)
        triton = installed_version("triton") or installed_version("triton-windows")
        return cls(torch.cuda.is_available(), triton, compiler)


def check_gpu_tools(tools: GpuTools) -> Iterator[Finding]:
    """Whether the kernels of the GPU can be compiled; without them torch computes there, far slower."""
    if not tools.has_gpu:
        yield Finding("triton", "ok", "not needed: the GPU's kernels alone are compiled with it")
        return
    if tools.triton is None:
        package = "triton-windows" if tools.is_windows else "triton"
        what = "missing: on the GPU torch computes instead of our kernels, far slower"
        yield Finding("triton", "slow", what, f"{sys.executable} -m pip install {package}")
        return
    if tools.compiler is None and not tools.is_windows:  # triton-windows brings one along
        what = f"{tools.triton}, but it has no C compiler: torch computes instead of our kernels, far slower"
        yield Finding("triton", "slow", what, "On Debian and Ubuntu: apt install gcc")
        return
    yield Finding("triton", "ok", tools.triton)
