"""What an evaluation found, and the one line of JSON that says all of it."""

import json
import statistics
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from npc_runtime.evaluation.checks import Finding
from npc_runtime.evaluation.losses import LossMatrix, Margin

__all__ = ["CaseResult", "Evaluation", "Lines", "SpokenLine"]


@dataclass(frozen=True, slots=True)
class SpokenLine:
    """A generated line and what was found wrong with it."""

    persona: str
    player: str
    reply: str
    seed: int
    is_cut: bool  # it came to the persona's `hard_tokens`
    findings: tuple[Finding, ...]
    attributed: str | None  # whose it would be by the classifier; None: the persona has no authored lines

    @property
    def num_words(self) -> int:
        """Words of the reply."""
        return len(self.reply.split())


@dataclass(frozen=True, slots=True)
class Lines:
    """All generated lines; `human_accuracy` is the classifier's on the authors' own, cross-validated."""

    lines: tuple[SpokenLine, ...]
    human_accuracy: float | None

    @property
    def personas(self) -> list[str]:
        """Who spoke, in order."""
        return list(dict.fromkeys(line.persona for line in self.lines))

    def of(self, persona: str) -> "Lines":
        """One persona's lines."""
        return Lines(tuple(line for line in self.lines if line.persona == persona), self.human_accuracy)

    @property
    def accuracy(self) -> float | None:
        """The share of lines that are attributed to who said them; None where nobody can be."""
        judged = [line.attributed == line.persona for line in self.lines if line.attributed is not None]
        return sum(judged) / len(judged) if judged else None

    @property
    def ended(self) -> float:
        """The share of lines that ended by themselves."""
        return sum(not line.is_cut for line in self.lines) / max(len(self.lines), 1)

    @property
    def clean(self) -> float:
        """The share of lines with nothing found."""
        return sum(not line.findings for line in self.lines) / max(len(self.lines), 1)

    @property
    def mean_words(self) -> float:
        """Words of a line."""
        return statistics.fmean(line.num_words for line in self.lines) if self.lines else 0.0

    @property
    def max_words(self) -> int:
        """Words of the longest line."""
        return max((line.num_words for line in self.lines), default=0)

    @property
    def num_found(self) -> Counter[str]:
        """Lines with a finding, by check."""
        return Counter(check for line in self.lines for check in {finding.check for finding in line.findings})


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One sample of one test; green if nothing failed."""

    persona: str
    number: int  # of the test in its file, from 1
    player: str
    reply: str
    seed: int
    failures: tuple[str, ...]

    @property
    def is_green(self) -> bool:
        """Whether the test passed."""
        return not self.failures


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything; a part that was not asked for, or had nothing to do, is None or empty."""

    base: str
    backend: str
    matrix: LossMatrix | None
    lines: Lines | None
    tests: tuple[CaseResult, ...]

    @property
    def is_green(self) -> bool:
        """Whether every test passed; the exit status of the command."""
        return all(result.is_green for result in self.tests)

    def to_json(self) -> str:
        """One line of JSON."""
        body = {
            "base": self.base,
            "backend": self.backend,
            "matrix": None if self.matrix is None else _matrix_body(self.matrix),
            "lines": None if self.lines is None else _lines_body(self.lines),
            "tests": [{**asdict(result), "green": result.is_green} for result in self.tests],
            "green": self.is_green,
        }
        return json.dumps(body, ensure_ascii=False, allow_nan=False)


def _matrix_body(matrix: LossMatrix) -> dict[str, Any]:
    return {
        "unit": "nats per reply token",
        "rows": list(matrix.rows),
        "columns": list(matrix.columns),
        "losses": [[round(matrix.loss(row, column), 4) for column in matrix.columns] for row in matrix.rows],
        "personas": {column: _column_body(matrix, column) for column in matrix.columns},
    }


def _column_body(matrix: LossMatrix, column: str) -> dict[str, Any]:
    return {
        "lines": len(matrix.scores[matrix.rows[0], column]),
        "tokens": sum(score.num_tokens for score in matrix.scores[matrix.rows[0], column]),
        "best": matrix.best(column),
        "own_is_best": matrix.is_own_best(column),
        "over_next": _margin_body(matrix.over_next(column)),
        "over_base": _margin_body(matrix.over_base(column)),
    }


def _margin_body(margin: Margin | None) -> dict[str, Any] | None:
    if margin is None:
        return None
    error = None if margin.error == float("inf") else round(margin.error, 4)
    return {"over": margin.over, "nats": round(margin.nats, 4), "standard_error": error}


def _lines_body(lines: Lines) -> dict[str, Any]:
    return {
        "human_accuracy": _rounded(lines.human_accuracy),
        "accuracy": _rounded(lines.accuracy),
        "personas": {persona: _summary(lines.of(persona)) for persona in lines.personas},
        "lines": [asdict(line) for line in lines.lines],
    }


def _summary(lines: Lines) -> dict[str, Any]:
    return {
        "lines": len(lines.lines),
        "accuracy": _rounded(lines.accuracy),
        "ended": _rounded(lines.ended),
        "clean": _rounded(lines.clean),
        "mean_words": round(lines.mean_words, 1),
        "max_words": lines.max_words,
        "found": dict(lines.num_found),
    }


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)
