"""What a check found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
SAID = 5  #: findings of one kind that are listed; the rest is counted


_TASK = re.compile(r"task '[^']*': ")  #: how errors of an episode begin


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        level: ``error``: training can't use it, or learns the wrong thing from it; ``warning``: probably not meant;
            ``note``: a fact.
        kind: short name, the same for all findings of a kind.
        where: file, line and field, or the task; empty where it is about the whole.
        text: what is wrong.
        remedy: what to do; empty where nothing has to be done.
    """

    level: Level
    kind: str
    where: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.text}{f'; {self.remedy}' if self.remedy else ''}"


def grouped(findings: Sequence[Finding]) -> list[Finding]:
    """The findings, one cause told once: those that differ in their place alone become one, which names the first
    places and how many there are.
    """
    alike: dict[Finding, list[Finding]] = {}
    for finding in findings:
        text = _TASK.sub("", finding.text.removeprefix(f"{finding.where}: "))
        alike.setdefault(replace(finding, where="", text=text), []).append(finding)
    found = []
    for finding, same in alike.items():
        more = f" and {len(same) - 4} more" if len(same) > 4 else ""
        places = ", ".join(one.where for one in same[:4] if one.where) + more
        alone = len(same) == 1 and not same[0].where  # then its text alone may name the task
        found.append(same[0] if alone else replace(finding, where=places))
    return found


def listed(findings: Sequence[Finding]) -> list[str]:
    """Lines of text, the gravest first; of each kind the first few, then how many more there are."""
    lines = []
    for level in LEVELS:
        kinds = dict.fromkeys(finding.kind for finding in findings if finding.level == level)
        for kind in kinds:
            found = [finding for finding in findings if (finding.level, finding.kind) == (level, kind)]
            lines += [f"{level} [{kind}] {finding}" for finding in found[:SAID]]
            if len(found) > SAID:
                lines.append(f"{level} [{kind}] … and {len(found) - SAID} more (--json has all)")
    return lines
