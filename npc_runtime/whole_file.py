"""A file that is written at once: whoever reads sees the old one or the new one, never a part."""

import os
import tempfile
import time
from pathlib import Path

__all__ = ["replace_file"]

NUM_TRIES = 5
PAUSE_S = 0.02
"""Windows lets nobody replace a file that somebody reads at that moment, and our own hot reload does."""


def replace_file(path: Path, data: bytes) -> None:
    """Put the file in place; one that was there keeps its permissions. Raises `OSError`, and then leaves nothing."""
    file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False)  # noqa: SIM115 - closed below
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the new name with nothing in it
        os.chmod(file.name, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        _rename(file.name, path)
    except BaseException:
        Path(file.name).unlink(missing_ok=True)
        raise


def _rename(name: str, path: Path) -> None:
    for is_last in (*[False] * (NUM_TRIES - 1), True):
        try:
            return os.replace(name, path)
        except PermissionError:
            if is_last:
                raise
            time.sleep(PAUSE_S)
