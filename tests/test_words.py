"""Numbers in sentences."""

from __future__ import annotations

from pact_nemo.runtime.words import count_of


def test_one_is_singular() -> None:
    assert [count_of(n, "held-out task") for n in (0, 1, 2, 1000)] == [
        "0 held-out tasks",
        "1 held-out task",
        "2 held-out tasks",
        "1,000 held-out tasks",
    ]
