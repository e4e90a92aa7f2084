"""What the commands show people: progress bars on stderr, one-line errors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ["StepBar", "progress_bars", "stderr", "step_bar"]


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


class StepBar:
    """A bar for work in equal steps, with a word about each; on no terminal now and then a line."""

    def __init__(self, console: Console, progress: Progress, label: str) -> None:
        self._console = console
        self._progress = progress
        self._label = label
        self._task = progress.add_task(label, total=None, note="", left="")
        self._num_seen = 0

    def step(self, done: int, total: int, note: str, seconds_left: float) -> None:
        """So many of all steps are done."""
        left = f"{seconds_left / 60:.0f} min left" if seconds_left > 90 else f"{seconds_left:.0f} s left"
        self._progress.update(self._task, completed=done, total=total, note=note, left=left)
        self._num_seen += 1
        if self._num_seen == 3 and not self._console.is_terminal:  # the first steps say little of the others
            self.say(f"{self._label}: {total} steps, {left}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        with suppress(OSError):
            self._console.print(text, markup=False)


@contextmanager
def step_bar(console: Console, label: str) -> Iterator[StepBar]:
    """Show a bar while the work goes on."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    texts = (TextColumn("{task.fields[note]}"), TextColumn("{task.fields[left]}"))
    with Progress(
        *columns, *texts, console=console, disable=not console.is_terminal, redirect_stdout=False
    ) as progress:
        yield StepBar(console, progress, label)
