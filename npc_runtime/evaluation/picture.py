"""An evaluation as one PNG: the matrix as a heat map, and bars for the generated lines. Needs Pillow.

A cell's colour is how far its loss lies above the best one of its column, since columns differ more by their authors
than by adapters. The colours run from light to dark (ColorBrewer's YlGnBu), so that they keep their order in grey print
and for every kind of colour blindness; the best of a column also has a frame.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from npc_runtime.errors import StartupError
from npc_runtime.evaluation.losses import LossMatrix
from npc_runtime.evaluation.report import Evaluation, Lines

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["check_pillow", "draw_evaluation"]

MARGIN, GAP = 48, 64
CELL_WIDTH, CELL_HEIGHT, SPACE = 148, 76, 4
LEGEND_WIDTH, BAR_WIDTH, BAR_HEIGHT = 26, 300, 24
TITLE, TEXT, SMALL = 34, 26, 21  # font sizes, in pixels as all of these; shown at half the size, it is sharp

INK, FAINT, PAPER, TRACK = "#1b1f24", "#5b6570", "#ffffff", "#e9ecef"
SOUNDS_BAR, CLEAN_BAR = "#225ea8", "#41b6c4"
COLOURS = ("#ffffe5", "#eef8b8", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#1f3a83")  # from the best on
NUM_PALETTE = 200

NO_ADAPTER = "no adapter"
MIN_SPAN = 0.2
"""Nats from the lightest to the darkest colour, at least: smaller differences are not to look large."""


class _Point(NamedTuple):
    """Pixels from the left and the top."""

    x: int
    y: int


def check_pillow() -> None:
    """Raise `StartupError` where Pillow is missing; asked before anything is computed."""
    try:
        import PIL.ImageFont
    except ImportError as error:
        raise StartupError("Drawing needs the package pillow.", "pip install 'npc-runtime[evaluate]'") from error
    assert PIL.ImageFont


def draw_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write the picture of what there is, matrix or lines or both; nothing if there is neither."""
    panels = [
        panel
        for panel in (
            _MatrixPanel(evaluation.matrix, evaluation.base) if evaluation.matrix is not None else None,
            _LinesPanel(evaluation.lines) if evaluation.lines is not None else None,
        )
        if panel is not None
    ]
    if not panels:
        return
    width = 2 * MARGIN + max(panel.width for panel in panels)
    height = 2 * MARGIN + sum(panel.height for panel in panels) + GAP * (len(panels) - 1)
    canvas = _Canvas.blank(width, height)
    y = MARGIN
    for panel in panels:
        panel.draw(canvas, _Point(MARGIN, y))
        y += panel.height + GAP
    canvas.save(path)


@dataclass(frozen=True)
class _Canvas:
    """A picture, and the few things that are drawn into it."""

    image: "Image"
    pen: Any  # ImageDraw

    @classmethod
    def blank(cls, width: int, height: int) -> "_Canvas":
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (width, height), PAPER)
        return cls(image, ImageDraw.Draw(image))

    def text(self, at: _Point, text: str, *, size: int = TEXT, colour: str = INK, anchor: str = "lm") -> None:
        """`anchor`: l, m or r of the text, and a, m or s of its height, stand at the point."""
        from PIL import ImageFont

        self.pen.text(at, text, font=ImageFont.load_default(size), fill=colour, anchor=anchor)

    def box(self, at: _Point, width: int, height: int, colour: str) -> None:
        self.pen.rectangle((*at, at.x + width - 1, at.y + height - 1), fill=colour)

    def frame(self, at: _Point, width: int, height: int, *, thick: int, colour: str = INK) -> None:
        self.pen.rectangle((*at, at.x + width - 1, at.y + height - 1), outline=colour, width=thick)

    def save(self, path: Path) -> None:
        """Few colours make a small file."""
        from PIL import Image

        self.image.quantize(NUM_PALETTE, dither=Image.Dither.NONE).save(path, optimize=True)


class _MatrixPanel:
    """The heat map with its legend."""

    LABELS, HEAD, FOOT = 190, 150, 92

    def __init__(self, matrix: LossMatrix, base: str) -> None:
        self._matrix = matrix
        self._base = base
        self._span = max(MIN_SPAN, *(self._above_best(row, column) for row, column in matrix.scores))
        self.width = max(self.LABELS + CELL_WIDTH * len(matrix.columns) + 150, 760)
        self.height = self.HEAD + CELL_HEIGHT * len(matrix.rows) + self.FOOT

    def draw(self, canvas: _Canvas, at: _Point) -> None:
        """Draw with the upper left corner at the point."""
        matrix = self._matrix
        canvas.text(_Point(at.x, at.y + 16), "Held-out loss of every adapter", size=TITLE)
        note = f"nats per reply token on {self._base}, lower is better; framed: the best adapter for these replies"
        canvas.text(_Point(at.x, at.y + 58), note, size=SMALL, colour=FAINT)
        left, top = at.x + self.LABELS, at.y + self.HEAD
        canvas.text(_Point(left - 18, top - 26), "adapter", size=SMALL, colour=FAINT, anchor="rm")
        for number, column in enumerate(matrix.columns):
            canvas.text(_Point(left + CELL_WIDTH * number + CELL_WIDTH // 2, top - 26), _short(column), anchor="mm")
        for number, row in enumerate(matrix.rows):
            y = top + CELL_HEIGHT * number
            canvas.text(_Point(left - 18, y + CELL_HEIGHT // 2), _short(row or NO_ADAPTER), anchor="rm")
            for place, column in enumerate(matrix.columns):
                self._draw_cell(canvas, _Point(left + CELL_WIDTH * place, y), row, column)
        self._draw_margins(canvas, _Point(left, top + CELL_HEIGHT * len(matrix.rows) + 34))
        self._draw_legend(canvas, _Point(left + CELL_WIDTH * len(matrix.columns) + 36, top))

    def _draw_cell(self, canvas: _Canvas, at: _Point, row: str | None, column: str) -> None:
        share = self._above_best(row, column) / self._span
        inner = _Point(at.x + SPACE // 2, at.y + SPACE // 2)
        width, height = CELL_WIDTH - SPACE, CELL_HEIGHT - SPACE
        canvas.box(inner, width, height, _colour(share))
        if self._matrix.best(column) == row:
            canvas.frame(inner, width, height, thick=5)
        middle = _Point(at.x + CELL_WIDTH // 2, at.y + CELL_HEIGHT // 2)
        canvas.text(middle, f"{self._matrix.loss(row, column):.2f}", anchor="mm", colour=_ink_on(_colour(share)))

    def _draw_margins(self, canvas: _Canvas, at: _Point) -> None:
        """Below each column: how far the persona's own adapter is below the next best."""
        margins = [self._matrix.over_next(column) for column in self._matrix.columns]
        if not any(margins):
            return
        canvas.text(_Point(at.x - 18, at.y), "own below next", size=SMALL, colour=FAINT, anchor="rm")
        for number, margin in enumerate(margins):
            text = "-" if margin is None else f"{margin.nats:.2f} ±{margin.error:.2f}"
            x = at.x + CELL_WIDTH * number + CELL_WIDTH // 2
            canvas.text(_Point(x, at.y), text, size=SMALL, colour=FAINT, anchor="mm")

    def _draw_legend(self, canvas: _Canvas, at: _Point) -> None:
        height = CELL_HEIGHT * len(self._matrix.rows) - SPACE
        for y in range(height):
            canvas.box(_Point(at.x, at.y + y), LEGEND_WIDTH, 1, _colour(y / max(height - 1, 1)))
        canvas.frame(at, LEGEND_WIDTH, height, thick=1, colour=FAINT)
        marks = ((0.0, "best"), (0.5, f"+{self._span / 2:.2f}"), (1.0, f"+{self._span:.2f}"))
        for share, text in marks:
            y = at.y + 12 + round(share * (height - 24))
            canvas.text(_Point(at.x + LEGEND_WIDTH + 12, y), text, size=SMALL, colour=FAINT)

    def _above_best(self, row: str | None, column: str) -> float:
        return self._matrix.loss(row, column) - self._matrix.loss(self._matrix.best(column), column)


class _LinesPanel:
    """For each persona two bars: lines that sound like it, and lines with nothing wrong."""

    LABELS, HEAD, STEP = 190, 112, 46

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self.width = 2 * self.LABELS + 2 * BAR_WIDTH
        self.height = self.HEAD + self.STEP * len(lines.personas)

    def draw(self, canvas: _Canvas, at: _Point) -> None:
        """Draw with the upper left corner at the point."""
        num_lines = len(self._lines.lines)
        canvas.text(_Point(at.x, at.y + 16), f"{num_lines} generated lines", size=TITLE)
        for number, heading in enumerate(("sound like the persona", "nothing found by the checks")):
            canvas.text(_Point(self._bar_x(at, number), at.y + 78), heading, size=SMALL, colour=FAINT)
        for number, persona in enumerate(self._lines.personas):
            own = self._lines.of(persona)
            y = at.y + self.HEAD + self.STEP * number + 16
            canvas.text(_Point(at.x + self.LABELS - 18, y), _short(persona), anchor="rm")
            for place, (share, colour) in enumerate(((own.accuracy, SOUNDS_BAR), (own.clean, CLEAN_BAR))):
                _draw_bar(canvas, _Point(self._bar_x(at, place), y - BAR_HEIGHT // 2), share, colour)

    def _bar_x(self, at: _Point, number: int) -> int:
        return at.x + self.LABELS + number * (BAR_WIDTH + 110)


def _draw_bar(canvas: _Canvas, at: _Point, share: float | None, colour: str) -> None:
    middle = at.y + BAR_HEIGHT // 2
    if share is None:
        canvas.text(_Point(at.x, middle), "no lines of its own to compare", size=SMALL, colour=FAINT)
        return
    canvas.box(at, BAR_WIDTH, BAR_HEIGHT, TRACK)
    if share > 0:
        canvas.box(at, max(round(BAR_WIDTH * share), 2), BAR_HEIGHT, colour)
    canvas.text(_Point(at.x + BAR_WIDTH + 12, middle), f"{share:.0%}", size=SMALL)


def _short(name: str) -> str:
    """A name that fits beside a cell."""
    return name if len(name) <= 12 else f"{name[:11]}."


def _colour(share: float) -> str:
    """A colour between those listed; 0 is the first."""
    place = min(max(share, 0.0), 1.0) * (len(COLOURS) - 1)
    low = min(int(place), len(COLOURS) - 2)
    parts = zip(_channels(COLOURS[low]), _channels(COLOURS[low + 1]), strict=True)
    return "#" + "".join(f"{round(first + (second - first) * (place - low)):02x}" for first, second in parts)


def _channels(colour: str) -> Iterator[int]:
    return (int(colour[at : at + 2], 16) for at in (1, 3, 5))


def _ink_on(colour: str) -> str:
    """White on what is darker than a middle blue (relative luminance of WCAG 2), else black; at least 3.2 : 1."""
    linear = [(value / 255) ** 2.2 for value in _channels(colour)]
    luminance = sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return INK if luminance > 0.27 else PAPER
