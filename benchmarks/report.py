"""Entries of a race as tables for people and rows for the JSON line."""

import statistics
from typing import Any

from place import AVX2
from race import Entry
from workload import Cell

__all__ = ["best_peer", "results_of", "skipped_of", "tables_of"]

OURS = "npc-runtime"


def results_of(entries: list[Entry]) -> list[dict[str, Any]]:
    """A row for each entry that was measured; of a peer's variants the faster."""
    return [_row(entry) for entry in entries if entry.samples and not entry.is_slower_variant]


def skipped_of(entries: list[Entry]) -> list[dict[str, Any]]:
    """What was not measured, or not to the end, and why."""
    names = ("npcs", "rank", "prompt_tokens")
    return [
        {
            "system": entry.system.name,
            **{name: getattr(entry.cell, name) for name in names},
            "reason": entry.reason,
        }
        for entry in entries
        if entry.reason
    ]


def best_peer(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest of a cell's rows that is not ours."""
    peers = [row for row in rows if not row["system"].startswith(OURS)]
    return max(peers, key=lambda row: row["tokens_per_s"], default=None)


def tables_of(entries: list[Entry], cell: Cell) -> str:
    """The cell's table, with each system's ratio to the best peer."""
    mine = [entry for entry in entries if entry.group == cell]
    best = best_peer(results_of([entry for entry in mine if entry.cell == cell]))
    rounds = max((len(entry.samples) for entry in mine), default=0)
    lines = [f"\n{cell.title}, {cell.new_tokens} new tokens; {rounds} round{'s, medians' if rounds > 1 else ''}"]
    lines.append(f"  {'system':<36}{'tokens/s':>10}{'last line':>11}{'first text':>12}{'× best peer':>13}")
    for entry in mine:
        if not entry.samples:
            lines.append(f"  {entry.title:<36}skipped: {entry.reason}")
            continue
        row = _row(entry)
        first = "–" if row["ttft_p50_ms"] is None else f"{row['ttft_p50_ms']:.0f} ms"
        ratio = "–" if best is None else f"{row['tokens_per_s'] / best['tokens_per_s']:.2f}"
        noise = f"   others took {max(entry.foreign):.0%}" if row["others_share"] > 0.1 else ""
        lines.append(
            f"  {entry.title:<36}{row['tokens_per_s']:>10.1f}{row['last_line_s']:>9.2f} s{first:>12}{ratio:>13}{noise}"
        )
    return "\n".join(lines)


def _row(entry: Entry) -> dict[str, Any]:
    cell = entry.cell
    last_line_s = statistics.median(sample.last_line_s for sample in entry.samples)
    firsts = [statistics.median(sample.first_text_s) for sample in entry.samples if sample.first_text_s]
    row = {
        "system": entry.system.name,
        "npcs": cell.npcs,
        "adapters": len(cell.adapters),
        "rank": cell.rank,
        "prompt_tokens": entry.samples[-1].prompt_tokens,
        "new_tokens": cell.new_tokens,
        "tokens_per_s": round(cell.npcs * cell.new_tokens / last_line_s, 1),
        "last_line_s": round(last_line_s, 3),
        "ttft_p50_ms": round(1000 * statistics.median(firsts), 1) if firsts else None,
        "rounds": len(entry.samples),
        "others_share": round(max(entry.foreign), 2),
    }
    if entry.system.variant == "AVX2":
        row["env"] = " ".join(f"{name}={value}" for name, value in AVX2.items())
    elif entry.system.variant:
        row["variant"] = entry.system.variant
    return row
