"""What was found out about an installation: data, from checks that may fail but never raise."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from npc_runtime.errors import NpcError

__all__ = ["Check", "Finding", "Level", "Report", "examine"]

Level = Literal["ok", "slow", "wrong"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `wrong`: the daemon would not start, or a persona could not speak."""

    topic: str
    level: Level
    text: str
    remedy: str = ""  # one line


Check = Callable[[], Iterable[Finding]]
"""Looks at something. Whatever it raises is a finding too."""


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, in the order in which things were looked at."""

    version: str
    findings: tuple[Finding, ...]

    @property
    def is_well(self) -> bool:
        """Whether nothing is wrong; slow is not wrong."""
        return not self.of("wrong")

    def of(self, level: Level) -> list[Finding]:
        """The findings of a level."""
        return [finding for finding in self.findings if finding.level == level]

    def to_json(self) -> str:
        """One line of JSON."""
        findings = [asdict(finding) for finding in self.findings]
        return json.dumps({"version": self.version, "is_well": self.is_well, "findings": findings}, ensure_ascii=False)


def examine(checks: Iterable[tuple[str, Check]]) -> list[Finding]:
    """Make each check, given with its topic; one that raises is a finding, and the others are made all the same."""
    findings: list[Finding] = []
    for topic, check in checks:
        try:
            findings += check()
        except NpcError as error:
            findings.append(Finding(topic, "wrong", error.message, error.hint))
        except Exception as error:  # whatever the machine, a library or a file has in store
            what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            findings.append(Finding(topic, "wrong", f"This could not be looked at ({what}).", _advice(error)))
    return findings


def _advice(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "Install npc-runtime again, in an environment of its own."
    return "If the daemon starts all the same, this is a defect of ours; please report it."
