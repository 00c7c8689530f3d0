"""Numbers in sentences."""

from __future__ import annotations


def count_of(number: int, noun: str) -> str:
    """``1 task``, ``2 tasks``, ``1,000 tasks``; ``noun`` is the singular."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
