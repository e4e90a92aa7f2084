"""Fetches one model from the Hugging Face hub, in a process of its own that may use the network.

    python -P -m npc_runtime.engine.hub_process ORG/NAME REVISION

Prints one JSON map a line: `{fraction}` while it goes on, then `{folder}` or `{error, hint}`. Only configuration,
tokenizer and safetensors files are fetched, one after the other: whoever is stopped loses one file at most.
"""

import errno
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npc_runtime.engine.base_folder import INDEX, TOKENIZERS, choose_weights, read_index, read_raw_config
from npc_runtime.errors import StartupError

__all__ = ["Fetcher", "explain", "main"]

TEXTS = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a base needs beside its weights; nothing else of a repository is fetched, code least of all."""

LIST_TIMEOUT_S = 10.0
REPORT_S = 0.1
SPARE_BYTES = 64 << 20
"""Left on the disk for others."""


@dataclass(slots=True)
class Fetcher:
    """Fetches into the hub's cache, file by file."""

    repo: str
    revision: str
    report: Callable[[float], None]
    total: int = 0  # bytes
    done: int = 0
    reported_at: float = field(default=0.0)

    def fetch(self) -> Path:
        """Return the folder with all files. The model is refused before its weights are fetched, if it is to be."""
        self._list_files(self.revision)  # fails at once where there is no network; the client tries files for long
        folder = self._fetch_file("config.json", self.revision).parent
        read_raw_config(folder)
        commit = folder.name  # from here on all is of one commit, whatever is pushed meanwhile
        sizes = self._list_files(commit)
        texts = [name for name in TEXTS if name in sizes]
        weights = self._choose_weights(sizes, commit)
        self._make_room(folder, {name: sizes[name] for name in (*texts, *weights)})
        for name in (*texts, *weights):
            before = self.done
            self._fetch_file(name, commit)
            self.advance(before + sizes[name] - self.done)
        return folder

    def advance(self, num_bytes: int) -> None:
        """Count bytes that have come, and now and then say so."""
        self.done += num_bytes
        now = time.monotonic()
        if self.total and now - self.reported_at >= REPORT_S:
            self.reported_at = now
            self.report(max(0.0, min(self.done / self.total, 1.0)))

    def _list_files(self, revision: str) -> dict[str, int]:
        """The sizes of the files at the top of the repository."""
        from huggingface_hub import HfApi

        listed = HfApi().model_info(self.repo, revision=revision, files_metadata=True, timeout=LIST_TIMEOUT_S).siblings
        sizes = {file.rfilename: file.size or 0 for file in listed or [] if "/" not in file.rfilename}
        if "config.json" not in sizes:
            what = f"{self.repo} has no config.json: it is no model that transformers could read."
            raise StartupError(what, "GGUF files are not loaded; look for the original of the model.")
        if not any(name in sizes for name in TOKENIZERS):
            raise StartupError(f"{self.repo} has no tokenizer.", "Take a repository that has a tokenizer.json.")
        return sizes

    def _choose_weights(self, sizes: dict[str, int], commit: str) -> list[str]:
        index = read_index(self._fetch_file(INDEX, commit)) if INDEX in sizes else None
        names = choose_weights(sizes, index)
        strange = [name for name in names if name not in sizes or not name.endswith(".safetensors")]
        if strange:
            raise StartupError(f"{self.repo}: {INDEX} names {strange[0]}, which is no safetensors file of it.")
        if not names:
            raise StartupError(
                f"{self.repo} has no *.safetensors file.",
                "Weights in pickle formats (.bin, .pt) and GGUF files are not loaded; look for another copy of it.",
            )
        return names

    def _make_room(self, folder: Path, sizes: dict[str, int]) -> None:
        """See that what is still to come fits on the disk."""
        self.total = sum(sizes.values())
        needed = sum(size for name, size in sizes.items() if not (folder / name).is_file())
        free = shutil.disk_usage(folder).free - SPARE_BYTES
        if needed > free:
            raise StartupError(
                f"{self.repo} needs {needed / 1e9:.1f} GB in {folder.parents[3]}, which has {max(free, 0) / 1e9:.1f}.",
                "Make room, or set HF_HOME to a folder that has it.",
            )

    def _fetch_file(self, name: str, revision: str) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.repo, name, revision=revision, tqdm_class=_meter(self.advance)))


def _meter(advance: Callable[[int], None]) -> Any:
    """A progress bar class as the hub's client wants one, which shows nothing and counts."""
    from tqdm.auto import tqdm

    class Meter(tqdm):  # type: ignore[misc]
        """Bytes that are on the disk; what came over the wire is another number with the hub's Xet protocol."""

        def __init__(self, *positional: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*positional, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            advance(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Nothing: see above."""

    return Meter


def explain(repo: str, revision: str, error: Exception) -> StartupError:
    """What to tell the user of an error of the hub's client."""
    from huggingface_hub import constants

    causes = list(_causes(error))
    for cause in causes:
        told = _explain_answer(repo, revision, cause) or _explain_disk(cause)
        if told is not None:
            return told
    first = causes[-1]
    return StartupError(
        f"{constants.ENDPOINT} cannot be reached for {repo} ({type(first).__name__}: {str(first)[:200]}).",
        "Look at the network and try again, what is complete is kept; or name the folder of a model.",
    )


def _explain_answer(repo: str, revision: str, error: BaseException) -> StartupError | None:
    """What the hub said; None if it did not say this."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    hub_url, page = constants.ENDPOINT, f"{constants.ENDPOINT}/{repo}"
    login = "run: hf auth login (or set HF_TOKEN)"
    match error:
        case hub.GatedRepoError():
            return StartupError(f"{repo} is gated: its owner wants to be asked.", f"Ask at {page}, then {login}.")
        case hub.RevisionNotFoundError():
            return StartupError(f"{repo} has no revision '{revision}'.", f"{page} lists its branches and tags.")
        case hub.RepositoryNotFoundError():
            what = f"There is no folder {repo}, and no model of that name on {hub_url}."
            return StartupError(what, f"Look at its spelling; if it is private, {login}.")
        case hub.HFValidationError():
            return StartupError(f"{repo} is no name of a model.", "One is ORG/NAME, or ORG/NAME@REVISION.")
        case hub.HfHubHTTPError() if error.response.status_code in (401, 403):
            return StartupError(f"{hub_url} refuses access to {repo}.", f"For access {login}.")
        case hub.HfHubHTTPError():
            what = f"{hub_url} cannot serve {repo} now (HTTP {error.response.status_code})."
            return StartupError(what, "Try again later; what is complete is kept.")
    return None


def _explain_disk(error: BaseException) -> StartupError | None:
    """What is wrong on our side; None if it is something else."""
    from huggingface_hub import constants

    match error:
        case StartupError():
            return error
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return StartupError(f"The disk is full: {constants.HF_HUB_CACHE}.", "Make room, or set HF_HOME.")
        case PermissionError():
            return StartupError(f"{error.filename} cannot be written.", "Set HF_HOME to a folder of your own.")
    return None


def _causes(error: BaseException) -> Iterable[BaseException]:
    """The error and what led to it, the latest first."""
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        seen.append(found)
        found = found.__cause__ or found.__context__
    return seen


def main(repo: str, revision: str) -> None:
    """Fetch, and say so on stdout."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves through all `finally`s
    try:
        folder = Fetcher(repo, revision, lambda fraction: _say({"fraction": round(fraction, 5)})).fetch()
        _say({"folder": str(folder)})
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(1)
    except Exception as error:
        told = explain(repo, revision, error)
        _say({"error": told.message, "hint": told.hint})
        sys.exit(1)


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
