"""Results and states of tools that are no plain JSON."""

from __future__ import annotations

import collections
import dataclasses

from pact_nemo.environments.own.signatures import as_json


def test_equal_sets_are_equal_json_wherever_they_are() -> None:
    """Two states are compared: a set that was filled in another order is the same one."""

    @dataclasses.dataclass
    class Box:
        numbers: set[int]

    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other)  # they fall into the same place of the table
    for wrap in (set, Box, lambda found: [Box(found)], lambda found: collections.defaultdict(set, {"x": found})):
        assert as_json(wrap(one)) == as_json(wrap(other))
    assert as_json(Box({8, 0})) == {"numbers": [0, 8]} and as_json({8, 0}) == [0, 8]
