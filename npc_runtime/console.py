"""What the commands show people: progress bars on stderr, one-line errors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ["progress_bars", "stderr"]


def stderr() -> Console:
    """A console for chatter; data goes to stdout."""
    return Console(stderr=True, highlight=False)


@contextmanager
def progress_bars(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Yield `report(label, fraction)`: a bar for each label on a terminal, else one line when it begins."""
    tasks: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    is_shown = console.is_terminal
    # Redirecting would send what is printed on stdout, the daemon's endpoint among it, to this console.
    with Progress(*columns, console=console, disable=not is_shown, redirect_stdout=False) as progress:

        def report(label: str, fraction: float) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=1.0)
                if not is_shown:
                    with suppress(OSError):  # whoever started us may have closed the pipe
                        console.print(f"{label} …")
            progress.update(tasks[label], completed=fraction)

        yield report
