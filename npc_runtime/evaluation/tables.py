"""An evaluation as tables for people."""

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from npc_runtime.evaluation.checks import CHECKS
from npc_runtime.evaluation.losses import LossMatrix, Margin
from npc_runtime.evaluation.report import CaseResult, Evaluation, Lines, SpokenLine

__all__ = ["print_tables"]

NO_ADAPTER = "none, prompt only"


def print_tables(evaluation: Evaluation, console: Console) -> None:
    """Print every part that there is: each a table, and below it whatever was found, line by line."""
    for part in _parts(evaluation):
        console.print(part)


def _parts(evaluation: Evaluation) -> Iterator[RenderableType]:
    if evaluation.matrix is not None:
        yield _matrix_table(evaluation.matrix)
        yield ""
    if evaluation.lines is not None:
        yield _lines_table(evaluation.lines)
        yield from _findings(evaluation.lines)
        yield ""
    if evaluation.tests:
        yield from _test_lines(evaluation.tests)
        num_green = sum(result.is_green for result in evaluation.tests)
        yield Text(
            f"{num_green} of {len(evaluation.tests)} tests passed", style="green" if evaluation.is_green else "bold red"
        )
    yield Text(f"{evaluation.base}, {evaluation.backend}", style="dim")


def _matrix_table(matrix: LossMatrix) -> Table:
    table = Table(title="Held-out loss, nats per reply token; lowest in bold", title_justify="left")
    table.add_column("adapter", no_wrap=True)
    for column in matrix.columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in matrix.rows:
        table.add_row(row or NO_ADAPTER, *(_loss(matrix, row, column) for column in matrix.columns))
    table.add_section()
    table.add_row("own is best", *(_own_is_best(matrix, column) for column in matrix.columns))
    table.add_row("below the next best", *(_margin(matrix.over_next(column)) for column in matrix.columns))
    table.add_row("below none", *(_margin(matrix.over_base(column)) for column in matrix.columns))
    return table


def _loss(matrix: LossMatrix, row: str | None, column: str) -> Text:
    return Text(f"{matrix.loss(row, column):.3f}", style="bold" if matrix.best(column) == row else "")


def _own_is_best(matrix: LossMatrix, column: str) -> Text:
    is_best = matrix.is_own_best(column)
    if is_best is None:
        return Text("–", style="dim")
    return Text("yes", style="green") if is_best else Text("NO", style="bold red")


def _margin(margin: Margin | None) -> str:
    return "–" if margin is None else f"{margin.nats:.3f} ± {margin.error:.3f}"


def _lines_table(lines: Lines) -> Table:
    caption = "attributed: the share of lines that a classifier takes for the persona's own"
    if lines.human_accuracy is not None:
        caption += f"; of the authors' lines, cross-validated, {lines.human_accuracy:.0%}"
    table = Table(title="Generated lines", title_justify="left", caption=caption, caption_justify="left")
    table.add_column("persona", no_wrap=True)
    for heading in ("lines", "attributed", "words", "longest", "ended"):
        table.add_column(heading, justify="right", no_wrap=True)
    checks = [check for check in CHECKS if check != "cut off"]
    for check in checks:
        table.add_column(check, justify="right", no_wrap=True)
    for persona in lines.personas:
        own = lines.of(persona)
        accuracy = "–" if own.accuracy is None else f"{own.accuracy:.0%}"
        counts = [f"{own.num_found[check]}" for check in checks]
        words = (f"{own.mean_words:.0f}", f"{own.max_words}")
        table.add_row(persona, f"{len(own.lines)}", accuracy, *words, f"{own.ended:.0%}", *counts)
    return table


def _findings(lines: Lines) -> Iterator[Text]:
    """Every line with something wrong, and every one that sounds like somebody else."""
    for line in lines.lines:
        for finding in line.findings:
            yield _complaint(line, f"{finding.check}: “{finding.quote}”", "yellow")
        if line.attributed not in (None, line.persona):
            yield _complaint(line, f"sounds like {line.attributed}", "cyan")


def _complaint(line: SpokenLine, what: str, style: str) -> Text:
    return Text.assemble((f"{line.persona}, {what}", style), f"  {line.reply}", (f"  seed {line.seed}", "dim"))


def _test_lines(results: tuple[CaseResult, ...]) -> Iterator[Text]:
    for result in results:
        mark = ("✓ ", "green") if result.is_green else ("✗ ", "bold red")
        title = f"{result.persona} {result.number}  {result.player}"
        yield Text.assemble(mark, title, (f"  seed {result.seed}", "dim"))
        yield Text.assemble("    ", result.reply)
        for failure in result.failures:
            yield Text.assemble("    ", (failure, "red"))
