"""Draws the table as one SVG: the time of a step by the number of rows, above what its bytes and launches must take.

Colours are of middle lightness, for there is no background: the page behind may be white or nearly black.
"""

from collections.abc import Callable, Iterable
from typing import Any
from xml.sax.saxutils import escape

__all__ = ["draw"]

WIDTH, MARGIN, HEAD, FOOT = 940, 20, 92, 44
PANEL_GAP, PANEL_HEIGHT, ROW_GAP = 34, 190, 74
TEXT, OURS, BASE, FLOOR = "#717b87", "#2f81f7", "#c26a1b", "#8c959f"
FONT = "-apple-system, BlinkMacSystemFont, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
CURVES = (
    ("step_ms", OURS, "", "each with an adapter of its own"),
    ("base_ms", BASE, "", "without adapters"),
    ("floor_and_nodes_ms", FLOOR, "6 4", "floor: bytes and launches"),
    ("floor_ms", FLOOR, "1.5 3", "floor: bytes"),
)


def draw(body: dict[str, Any]) -> str:
    """The picture of a run's JSON: a panel for each base, length of prompt and ranks."""
    panels: dict[tuple[int, int], dict[str, list[dict[str, Any]]]] = {}
    for row in body["table"]:
        if "floor_ms" in row:
            panels.setdefault((row["bits"], row["prompt"]), {}).setdefault(row["ranks"], []).append(row)
    parts, top = _head(body["gpu"]), float(HEAD)
    for (bits, prompt), by_rank in sorted(panels.items()):
        parts.append(_text(MARGIN, top, f"{'int4' if bits == 4 else 'bf16'} base, prompt {prompt}", weight=600))
        width = (WIDTH - 2 * MARGIN - PANEL_GAP * (len(by_rank) - 1)) / len(by_rank)
        longest = max(row["step_ms"] for rows in by_rank.values() for row in rows)
        for number, (ranks, rows) in enumerate(by_rank.items()):
            left = MARGIN + number * (width + PANEL_GAP)
            parts += _panel(f"rank {ranks}", sorted(rows, key=_rows_of), left, top + 34, width, longest)
        top += PANEL_HEIGHT + ROW_GAP
    height = round(top + FOOT)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="{escape(FONT)}">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _head(machine: dict[str, Any]) -> list[str]:
    words = f"Llama-3.2-3B's shapes on {machine.get('name')}, torch {machine.get('torch')}; milliseconds, medians"
    parts = [_text(MARGIN, 24, "A step: one token for every NPC", size=17, weight=600), _text(MARGIN, 44, words)]
    left = float(MARGIN)
    for _, color, dashes, label in CURVES:
        parts.append(_line([(left, 62), (left + 26, 62)], color, dashes))
        parts.append(_text(left + 32, 66, label, size=12))
        left += 62 + 6.6 * len(label)
    return parts


def _panel(
    title: str, rows: list[dict[str, Any]], left: float, top: float, width: float, longest: float
) -> Iterable[str]:
    """Curves over the number of rows, which doubles from mark to mark; time begins at zero."""
    bottom = top + PANEL_HEIGHT - 30

    def across(number: int) -> float:
        return left + 34 + (width - 44) * (number / max(len(rows) - 1, 1))

    def up(milliseconds: float) -> float:
        return bottom - (bottom - top) * milliseconds / longest

    yield _text(left + 34, top - 8, title)
    yield from _marks(left, width, up, longest)
    for number, row in enumerate(rows):
        yield _text(across(number), bottom + 17, str(row["rows"]), size=11, anchor="middle")
    yield _text(left + width - 10, bottom + 31, "NPCs", size=11, anchor="end")
    for key, color, dashes, _ in CURVES:
        yield _line([(across(number), up(row[key])) for number, row in enumerate(rows)], color, dashes)
    for number, row in enumerate(rows):
        yield f'<circle cx="{across(number):.1f}" cy="{up(row["step_ms"]):.1f}" r="3" fill="{OURS}"/>'


def _marks(left: float, width: float, up: Callable[[float], float], longest: float) -> Iterable[str]:
    """Lines at round times."""
    step = next(size * 10.0**power for power in range(-4, 6) for size in (1, 2, 5) if size * 10.0**power * 4 >= longest)
    for number in range(int(longest / step) + 1):
        y = up(number * step)
        yield _line([(left + 34, y), (left + width - 10, y)], FLOOR, "", width=0.4)
        yield _text(left + 28, y + 4, f"{number * step:.6g}", size=11, anchor="end")


def _line(points: list[tuple[float, float]], color: str, dashes: str, *, width: float = 1.8) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"{dashed}/>'


def _text(x: float, y: float, words: str, *, size: int = 13, weight: int = 400, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{TEXT}">{escape(words)}</text>'
    )


def _rows_of(row: dict[str, Any]) -> int:
    return int(row["rows"])
