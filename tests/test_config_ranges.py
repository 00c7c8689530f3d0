"""Every numeric setting has a range, and a number outside it is refused by its key."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from pact_nemo.config.load import load_config
from pact_nemo.config.ranges import ANY, RANGES, Ranges, check_ranges, inside, range_of
from pact_nemo.config.schema import Config
from pact_nemo.environments.registry import ENVIRONMENTS, environment_spec
from pact_nemo.errors import ConfigError
from pact_nemo.methods.registry import METHODS, method_class
from pact_nemo.tracking.registry import built_in


def numbers(cls: type, below: str = "") -> Iterator[tuple[str, bool]]:
    """Dotted key of each numeric field, and whether it is a list of numbers."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from numbers(typing.cast(type, hint), f"{below}{field.name}.")
        elif {int, float} & {hint, *typing.get_args(hint)}:
            yield below + field.name, typing.get_origin(hint) is list


def outside(allowed: str) -> list[str]:
    """Numbers that are just not in a range."""
    bounds = [float(word) for word in re.findall(r"-?\d+(?:\.\d+)?", allowed)]
    return [f"{near:.0f}" for bound in bounds for near in (bound - 1, bound, bound + 1) if not inside(near, allowed)]


OWN: list[tuple[list[str], str, type]] = [
    *(
        ([f"environment={name}"], environment_spec(name).section, environment_spec(name).config)
        for name in ENVIRONMENTS
    ),
    *(([f"method={name}"], "method_config", method_class(name).Config) for name in METHODS),
    *(([], f"tracking.trackers.{name}", tracker.Settings) for name, tracker in built_in().items()),
]
SECTIONS: list[tuple[list[str], str, Any, Ranges]] = [
    ([], "", Config, RANGES),
    *((words, f"{key}.", cls, getattr(cls, "ranges", {})) for words, key, cls in OWN),
]
CASES = [(words, prefix, key, many, ranges) for words, prefix, cls, ranges in SECTIONS for key, many in numbers(cls)]


@pytest.mark.parametrize(
    ("words", "prefix", "key", "many", "ranges"),
    CASES,
    ids=[f"{''.join(case[0])} {case[1]}{case[2]}" for case in CASES],
)
def test_every_number_has_a_range_and_is_refused_by_key_outside_it(
    words: list[str], prefix: str, key: str, many: bool, ranges: Ranges
) -> None:
    allowed = range_of(key, ranges)
    assert allowed is not None, f"{prefix}{key} has no range: give it one, or {ANY!r}"
    whole = f"{prefix}{key}"
    for number in outside(allowed)[:1]:  # what the others are, the next tests say
        value = f"[{number}, {number}]" if many else number
        said = rf"{re.escape(whole)}={number}(\.0)?: must be {re.escape(allowed)}"
        with pytest.raises(ConfigError, match=said):
            load_config(None, [*words, f"{whole}={value}"])
    assert outside(allowed) or allowed == ANY


def test_no_range_is_of_a_setting_that_does_not_exist() -> None:
    for _, _, cls, ranges in SECTIONS:
        assert set(ranges) == {key for key, _ in numbers(cls)}
    free = [key for key in RANGES if range_of(key, RANGES) == ANY]
    assert free == ["run.seed", "tasks.split_seed", "traces.min_score", "warmup.seed"]


def test_the_ends_of_a_range_belong_to_it_where_it_says_so() -> None:
    assert (
        inside(0, "in [0, 1)") and not inside(1, "in [0, 1)") and not inside(0, "in (0, 1]") and inside(1, "in (0, 1]")
    )
    assert inside(1, ">= 1") and not inside(0, "> 0") and inside(0, "exactly 0") and not inside(0.1, "exactly 0")
    with pytest.raises(ValueError, match="no range"):
        inside(1, "above 0")
    check_ranges({"a": None, "b": {"c": True}}, "s", {"a": ">= 1", "b.c": ">= 2"})


def test_replayed_traces_have_scores_and_rewards_have_a_scale_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"traces\.min_score=2\.0: must be in \[0, 1\]"):
        load_config(None, ["traces.min_score=2"])
    assert load_config(None, ["traces.min_score=2", "traces.verify=reward"]).traces.min_score == 2.0
