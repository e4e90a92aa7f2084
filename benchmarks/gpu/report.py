"""What a run found: floors of the table's cells, the table for people, and the one JSON line."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PROOFS", "Report", "with_floors"]

PROOFS = ("kernels", "independence bf16", "independence int4", "parity", "graphs")
"""Parts that prove."""

COLUMNS: tuple[tuple[str, str, str], ...] = (
    *(("B", "rows", "d"), ("step ms", "step_ms", ".3f"), ("tokens/s", "tokens_per_s", ".0f")),
    *(("floor ms", "floor_ms", ".3f"), ("+ nodes", "floor_and_nodes_ms", ".3f")),
    *(
        ("× floor", "to_floor", ".2f"),
        ("× both", "to_floor_and_nodes", ".2f"),
        ("graph", "graph_to_floor_and_nodes", ".2f"),
    ),
    *(("over base", "over_base", "+.1%"), ("base/off", "base_to_pool_off", ".3f")),
    *(("× one by one", "times_one_at_a_time", ".2f"), ("× PEFT", "times_peft", ".1f")),
)


def with_floors(row: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """A cell with what its bytes take at the copy bandwidth, its launches at an empty node's time, and the ratios."""
    speed, node_ms = machine.get("copy_gb_s"), machine.get("node_us", 0.0) / 1000
    if not speed or "step_ms" not in row:
        return row
    floor = (row["base_bytes"] + row["adapter_bytes"] + row["kv_bytes"]) / speed / 1e6
    both = floor + row["launches"] * node_ms
    return {
        **row,
        "floor_ms": round(floor, 4),
        "floor_and_nodes_ms": round(both, 4),
        "to_floor": round(row["step_ms"] / floor, 3),
        "to_floor_and_nodes": round(row["step_ms"] / both, 3),
        "graph_to_floor_and_nodes": round(row["graph_ms"] / both, 3),
    }


@dataclass(slots=True)
class Report:
    """Results as they come, by part."""

    planned: dict[str, list[str]]  # part: its items
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    compiled: dict[str, Any] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)  # parts that ended before their last item, and why

    def add(self, part: str, result: dict[str, Any]) -> None:
        """Take a line of a part's process."""
        if "compiled" in result:
            self.compiled[part] = result["compiled"]
        else:
            self.results.setdefault(part, []).append(result)

    @property
    def machine(self) -> dict[str, Any]:
        """Its numbers, or nothing yet."""
        return next((result["numbers"] for result in self._of("machine")), {})

    @property
    def proofs(self) -> list[dict[str, Any]]:
        """All that came, and those that a crash kept from coming, which failed."""
        found = [_flat(result) for result in self._of("proof")]
        for part in PROOFS:
            reason = self.ended.get(part)
            if reason:
                found += [{"item": item, "passed": False, "skipped": reason} for item in self._missing(part)]
        return found

    @property
    def table(self) -> list[dict[str, Any]]:
        """Cells with floors; at PEFT's own cell, its steps as a multiple of ours."""
        rows = [with_floors(_flat(result), self.machine) for result in self._of("table")]
        peers = [_flat(result) for result in self._of("peft") if not result["skipped"]]
        for row in rows:
            for peer in peers:
                if "step_ms" in row and row["item"].partition(", ")[2] == peer["item"].split("bf16, ")[1]:
                    row["times_peft"] = round(peer["step_ms"] / row["step_ms"], 2)
        return sorted(rows, key=lambda row: (row["item"].startswith("bf16"), *_place_of(row["item"])))

    @property
    def not_reached(self) -> list[str]:
        """Items that nobody got to."""
        failed = {proof["item"] for proof in self.proofs}
        return [item for part in self.planned for item in self._missing(part) if item not in failed]

    @property
    def is_good(self) -> bool:
        """Whether all proofs passed; one that was skipped for lack of memory or time is not a failure."""
        verdicts = [proof["passed"] for proof in self.proofs]
        return False not in verdicts and (True in verdicts or not set(PROOFS) & set(self.planned))

    def body(self) -> dict[str, Any]:
        """The JSON line."""
        return {
            "gpu": self.machine,
            "proofs": self.proofs,
            "table": self.table,
            "prefill": [_flat(result) for result in self._of("prefill")],
            "loading": [_flat(result) for result in self._of("loading")],
            "peft": [_flat(result) for result in self._of("peft")],
            "compiled": self.compiled,
            "not_reached": self.not_reached,
        }

    def lines(self) -> Iterable[str]:
        """Everything for people."""
        machine = self.machine
        yield ", ".join(f"{name} {value}" for name, value in machine.items())
        for proof in self.proofs:
            verdict = {True: "passed", False: "FAILED", None: "skipped"}[proof["passed"]]
            reason = proof["skipped"] or _short(proof) if proof["passed"] is not True else ""
            yield f"{verdict}  {proof['item']}  {reason}".rstrip()
        yield from self._table_lines()
        for kind in ("prefill", "loading", "peft"):
            yield from (
                f"{_flat(result)['item']}: {result['skipped'] or _short(_flat(result))}" for result in self._of(kind)
            )
        if self.not_reached:
            yield f"not reached: {len(self.not_reached)} items, listed below"

    def _table_lines(self) -> Iterable[str]:
        title = ""
        for row in self.table:
            heading = row["item"].rpartition(", ")[0]
            if heading != title:
                title = heading
                yield f"\n{title}"
                yield "".join(f"{name:>13}" for name, _, _ in COLUMNS)
            if row["skipped"]:
                yield f"{row['item'].rpartition(' ')[2]:>13}  skipped: {row['skipped']}"
            else:
                yield "".join(f"{_format(row.get(key), form):>13}" for _, key, form in COLUMNS)
        if title:
            yield ""

    def _of(self, kind: str) -> list[dict[str, Any]]:
        return [result for results in self.results.values() for result in results if result["kind"] == kind]

    def _missing(self, part: str) -> list[str]:
        came = {result["item"] for result in self.results.get(part, [])}
        return [item for item in self.planned[part] if item not in came]


def _place_of(item: str) -> tuple[int, str, int]:
    """Prompt, ranks and rows of a cell's title; a cell that was skipped has nothing else."""
    _, prompt, ranks, rows = (part.split()[-1] for part in item.split(", "))
    return int(prompt), ranks, int(rows)


def _flat(result: dict[str, Any]) -> dict[str, Any]:
    kept = {name: result[name] for name in ("item", "skipped", "seconds")}
    if result["kind"] == "proof":
        kept["passed"] = result["passed"]
    return {**kept, **result["numbers"]}


def _short(result: dict[str, Any]) -> str:
    hidden = ("item", "skipped", "seconds", "passed")
    return ", ".join(f"{name} {value}" for name, value in result.items() if name not in hidden)


def _format(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)
