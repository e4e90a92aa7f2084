"""Puts the checks together, and shows what they found."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from npc_runtime import __version__
from npc_runtime.discovery import project_of, read_endpoint, runtime_file
from npc_runtime.doctor.finding import Check, Finding, Level, Report, examine
from npc_runtime.doctor.machine import (
    Cpu,
    Gpu,
    check_cpu,
    check_disk,
    check_folder,
    check_gpu,
    check_memory,
    free_bytes,
)
from npc_runtime.doctor.project import (
    EMBEDDED_DISK_BYTES,
    Base,
    check_base,
    check_daemon,
    check_personas_of,
    check_port,
)
from npc_runtime.doctor.software import GpuTools, check_gpu_tools, check_packages, check_python, check_torch, needs
from npc_runtime.engine.embedded import EMBEDDED_BASE, cache_folder
from npc_runtime.project_lock import holder_of, is_held
from npc_runtime.running import Target, ask_health

__all__ = ["Subject", "examine_all", "show"]

STYLES: dict[Level, tuple[str, str]] = {"ok": ("ok", "green"), "slow": ("slow", "yellow"), "wrong": ("wrong", "red")}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be looked at besides the machine."""

    base: str
    personas: Path
    project: str | None
    port: int


def examine_all(subject: Subject) -> Report:
    """Look at everything; takes a few seconds, most of them for importing torch."""
    checks: list[tuple[str, Check]] = [
        ("python", check_python),
        ("packages", lambda: check_packages(needs())),
        ("torch", check_torch),
        ("triton", lambda: check_gpu_tools(GpuTools.look())),
        ("gpu", partial(_gpu, subject)),
        ("cpu", _cpu),
        ("memory", partial(_memory, subject)),
        ("base", lambda: check_base(subject.base, Base.find(subject.base))),
        ("personas", partial(_personas, subject)),
        ("daemon", partial(_daemon, subject)),
        ("folders", partial(_folders, subject)),
        ("disk", partial(_disk, subject)),
    ]
    return Report(__version__, tuple(examine(checks)))


def _gpu(subject: Subject) -> Iterator[Finding]:
    from npc_runtime.engine.device import explain_unused_gpu

    unused = explain_unused_gpu()
    base = _known_base(subject)
    needed = base.gpu_memory() if base else None
    return check_gpu(Gpu.look(), (unused.what, unused.remedy) if unused else None, needed)


def _cpu() -> Iterator[Finding]:
    return check_cpu(Cpu.look(), is_used=Gpu.look() is None)


def _memory(subject: Subject) -> Iterator[Finding]:
    import psutil

    base = _known_base(subject)
    is_cpu = Gpu.look() is None
    needed = base.main_memory(has_bfloat16=Cpu.look().has_bfloat16) if base and is_cpu else None
    memory = psutil.virtual_memory()
    return check_memory(memory.total, memory.available, needed)


def _personas(subject: Subject) -> Iterator[Finding]:
    from npc_runtime.persona import Library

    return check_personas_of(Library.load(subject.personas), _known_base(subject))


def _daemon(subject: Subject) -> Iterator[Finding]:
    project = subject.project or project_of(subject.personas)
    endpoint, lock = read_endpoint(project), runtime_file(project).with_suffix(".lock")
    health = ask_health(Target(f"ws://127.0.0.1:{endpoint.port}/v1", None)) if endpoint else None
    holder = holder_of(lock) if is_held(lock) else None
    yield from check_daemon(endpoint, health, holder)
    if holder is None and (health is None or health.state == "gone"):
        yield from check_port(subject.port)


def _folders(subject: Subject) -> Iterator[Finding]:
    import platformdirs

    runtime = runtime_file(subject.project or project_of(subject.personas)).parent
    logs = platformdirs.user_log_path("npc-runtime", appauthor=False)
    yield from check_folder("cache", cache_folder(), "Set NPC_RUNTIME_CACHE to a folder of yours.", is_vital=True)
    yield from check_folder("runtime file", runtime, "Clients must then be told port and token.", is_vital=False)
    yield from check_folder("log", logs, "Make it a folder of yours; the log is on stderr too.", is_vital=False)


def _disk(subject: Subject) -> Iterator[Finding]:
    is_to_be_made = subject.base == EMBEDDED_BASE and Base.find(subject.base) is None
    folder = cache_folder()
    return check_disk(folder, free_bytes(folder), EMBEDDED_DISK_BYTES if is_to_be_made else 0)


def _known_base(subject: Subject) -> Base | None:
    """The base, if it is here; what is wrong with it has a finding of its own."""
    try:
        return Base.find(subject.base)
    except Exception:
        return None


def show(report: Report, console: Console) -> None:
    """Print all findings, then those that matter with what to do about them."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for finding in report.findings:
        word, style = STYLES[finding.level]
        table.add_row(Text(word, style=style), finding.topic, Text(finding.text))
    console.print(f"npc-runtime {report.version}\n", style="bold")
    console.print(table)
    _show_remedies(report.of("slow"), "What would be slow", console)
    _show_remedies(report.of("wrong"), "What is wrong", console)
    if not report.of("slow") and report.is_well:
        console.print("\nAll is well.", style="green")


def _show_remedies(findings: list[Finding], title: str, console: Console) -> None:
    if findings:
        console.print(f"\n{title}, and what to do", style="bold")
    for finding in findings:
        console.print(Text(f"  {finding.topic}: {finding.text}"), soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"    → {finding.remedy}", style="cyan"), soft_wrap=True)
