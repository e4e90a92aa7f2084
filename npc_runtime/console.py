"""What the commands show people: progress bars on stderr, one-line errors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def report(label: str, fraction: float) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=1.0)
                if not console.is_terminal:
                    console.print(f"{label} …")
            progress.update(tasks[label], completed=fraction)

        yield report
