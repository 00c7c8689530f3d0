"""Plain Python callables as tools: schemas, refusals, the check of arguments, and results as text."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import numpy as np
import pydantic
import pytest

from pact_nemo.environments.base import check_schema
from pact_nemo.environments.own.classes import Offered
from pact_nemo.environments.own.signatures import ArgumentFault, as_json, as_text, signature
from pact_nemo.errors import ConfigError


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Item:
    """One line of an order."""

    title: str
    count: int = 1
    note: str | None = None


class Address(typing.TypedDict):
    street: str
    lines: typing.NotRequired[list[Item]]


class Order(pydantic.BaseModel):
    total: Annotated[float, pydantic.Field(ge=0, description="in euros")]
    items: list[Item] = []


ITEM = {
    "type": "object",
    "description": "One line of an order.",
    "properties": {"title": {"type": "string"}, "count": {"type": "integer", "default": 1}, "note": {"type": "string"}},
    "required": ["title"],
}


def google(sku: str, count: int = 1, note: Optional[str] = None, kind: Literal["a", "b"] = "a") -> dict[str, int]:  # noqa: UP045
    """Price of an article.

    Prices are
    in euros.

    Args:
        sku: number of the
            article
        count (int): how many

    Returns:
        dict: the price.
    """
    return {}


def numpy_style(sku: str, count: int = 1) -> None:
    """Price of an article.

    Parameters
    ----------
    sku : str
        number of the article
    count : int
        how many
    """


def sphinx(sku: str, count: int = 1) -> None:
    """Price of an article.

    :param sku: number of the article
    :param count: how many
    """


def nested(item: Item, to: Address, order: Order, grid: list[list[float]], extra: dict[str, int]) -> None:
    """Send."""


def simple(
    colour: Colour,
    day: datetime.date,
    at: datetime.datetime | None = None,
    ids: int | str = 3,
    items: list[Item] | None = None,
    anything: Any = None,
    flag: bool = False,
    size: Literal[1, 2, None] = None,
) -> None:
    """Simple."""


WORDS = {"sku": "number of the article", "count": "how many"}
EXPECTED: list[tuple[Callable[..., Any], str, dict[str, Any], list[str]]] = [
    (
        google,
        "Price of an article.\n\nPrices are\nin euros.",
        {
            "sku": {"type": "string", "description": WORDS["sku"]},
            "count": {"type": "integer", "default": 1, "description": WORDS["count"]},
            "note": {"type": "string"},
            "kind": {"type": "string", "enum": ["a", "b"], "default": "a"},
        },
        ["sku"],
    ),
    *(
        (
            function,
            "Price of an article.",
            {
                "sku": {"type": "string", "description": WORDS["sku"]},
                "count": {"type": "integer", "default": 1, "description": WORDS["count"]},
            },
            ["sku"],
        )
        for function in (numpy_style, sphinx)
    ),
    (
        nested,
        "Send.",
        {
            "item": ITEM,
            "to": {
                "type": "object",
                "properties": {"street": {"type": "string"}, "lines": {"type": "array", "items": ITEM}},
                "required": ["street"],
            },
            "order": {
                "type": "object",
                "properties": {
                    "total": {"type": "number", "minimum": 0, "description": "in euros"},
                    "items": {"type": "array", "items": ITEM, "default": []},
                },
                "required": ["total"],
            },
            "grid": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
            "extra": {"type": "object", "additionalProperties": {"type": "integer"}},
        },
        ["item", "to", "order", "grid", "extra"],
    ),
    (
        simple,
        "Simple.",
        {
            "colour": {"type": "string", "enum": ["red", "blue"]},
            "day": {"type": "string", "format": "date"},
            "at": {"type": "string", "format": "date-time"},
            "ids": {"anyOf": [{"type": "integer"}, {"type": "string"}], "default": 3},
            "items": {"type": "array", "items": ITEM},
            "anything": {},
            "flag": {"type": "boolean", "default": False},
            "size": {"enum": [1, 2]},
        },
        ["colour", "day"],
    ),
]


@pytest.mark.parametrize(("function", "description", "properties", "required"), EXPECTED)
def test_schemas(
    function: Callable[..., Any], description: str, properties: dict[str, Any], required: list[str]
) -> None:
    schema = signature(function, "tool", "file.py:tool").schema
    assert schema == {
        "name": "tool",
        "description": description,
        "parameters": {"type": "object", "properties": properties, "required": required},
    }
    check_schema(schema)


def test_what_makes_a_tool_worse_is_a_warning() -> None:
    def bare(sku: str) -> None: ...

    def wrong(sku: str) -> None:
        """Price.

        Args:
            number: of it
        """

    assert signature(bare, "bare", "a.py:bare").warnings == (
        "a.py:bare has no docstring; the model sees its name only",
    )
    assert signature(wrong, "wrong", "a.py:wrong").warnings == (
        "a.py:wrong: its docstring describes 'number', which is no argument",
    )


REFUSED = [
    ("*skus: str", "\\*skus takes any number of arguments"),
    ("**skus: str", "\\*\\*skus takes any number of arguments"),
    ("sku: str, /", "argument 'sku' is positional-only.*leave the / out"),
    ("sku", "argument 'sku' has no type hint.*write e.g. sku: str"),
    ("sku: Own", "argument 'sku' has a type that JSON has no form for, .*Own"),
    ("sku: Callable[[int], int]", "argument 'sku' has a type that JSON has no form for"),
    ("sku: Tree", "argument 'sku' has a type.*Tree holds itself"),
    ("sku: NoSuchName", "its type hints can't be read: NameError: name 'NoSuchName'"),
]
HEAD = """
from __future__ import annotations
import dataclasses
from collections.abc import Callable
class Own:
    pass
@dataclasses.dataclass
class Tree:
    parts: list[Tree]
"""


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_refusals_name_file_method_and_argument(tmp_path: Path, arguments: str, words: str) -> None:
    file = tmp_path / "shop.py"
    file.write_text(f"{HEAD}class Shop:\n    def lookup(self, {arguments}):\n        'Price.'\n")
    with pytest.raises(ConfigError, match=f"^{file}:Shop.lookup: {words}"):
        Offered(f"{file}:Shop")


def test_tools_that_are_left_out_may_be_anything(tmp_path: Path) -> None:
    file = tmp_path / "shop.py"
    file.write_text("class Shop:\n    def odd(self, *x): ...\n    def good(self, x: int): 'Good.'\n")
    assert [tool["name"] for tool in Offered(f"{file}:Shop", ["good"]).schemas] == ["good"]


def test_arguments_become_what_the_hints_say() -> None:
    bound = signature(nested, "nested", "x").bind(
        {
            "item": {"title": "cup"},
            "to": {"street": "A", "lines": [{"title": "b"}]},
            "order": {"total": 3},
            "grid": [[1, 2.5]],
            "extra": {"a": 1},
        }
    )
    assert bound["item"] == Item("cup") and bound["to"]["lines"] == [Item("b")] and bound["order"] == Order(total=3.0)
    assert bound["grid"] == [[1.0, 2.5]] and isinstance(bound["grid"][0][0], float)
    bound = signature(simple, "simple", "x").bind(
        {"colour": "blue", "day": "2026-01-31", "at": "2026-01-31T10:00:00", "ids": "7", "size": None}
    )
    assert bound["colour"] is Colour.BLUE and bound["day"] == datetime.date(2026, 1, 31)
    assert bound["at"] == datetime.datetime(2026, 1, 31, 10) and bound["ids"] == "7" and bound["size"] is None


FAULTS = [
    ({"sku": 3}, 'argument "sku": Input should be a valid string'),
    ({"sku": "a", "count": "3"}, 'argument "count": Input should be a valid integer'),
    ({"sku": "a", "count": True}, 'argument "count": Input should be a valid integer'),
    ({"sku": "a", "count": None}, 'argument "count": Input should be a valid integer'),
    ({"sku": "a", "kind": "c"}, "argument \"kind\": Input should be 'a' or 'b'"),
    ({"count": 3}, 'argument "sku": it is missing'),
    ({"sku": "a", "skus": 1}, 'unknown argument "skus"; arguments: sku, count, note, kind'),
    ({"sku": 1, "x" * 99: 2}, f'argument "sku": Input should be a valid string\nunknown argument "{"x" * 60}"'),
    ({"sku": "a", "count": 10**5000}, 'argument "count": Exceeds the limit'),
]


@pytest.mark.parametrize(("arguments", "text"), FAULTS)
def test_arguments_that_do_not_fit_are_told_in_a_line_each(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentFault) as caught:
        signature(google, "google", "x").bind(arguments)
    assert str(caught.value).startswith(text)


def test_a_whole_number_with_a_point_is_an_integer_as_in_json_schema() -> None:
    def tool(count: int, ratio: float, rows: list[int], either: int | str = 0) -> None:
        """Take numbers."""

    bound = signature(tool, "tool", "t.py:tool").bind({"count": 80.0, "ratio": 3.0, "rows": [1.0, 2], "either": 4.0})
    assert bound == {"count": 80, "ratio": 3.0, "rows": [1, 2], "either": 4}
    assert [type(bound[name]) for name in ("count", "ratio", "either")] == [int, float, int]
    for value in (80.5, "80", 1e300, True):
        with pytest.raises(ArgumentFault):
            signature(tool, "tool", "t.py:tool").bind({"count": value, "ratio": 1.0, "rows": []})


def test_many_faults_stay_short() -> None:
    with pytest.raises(ArgumentFault) as caught:
        signature(nested, "nested", "x").bind({"grid": [["a"] * 50] * 50, "to": {"lines": [{"title": 3}]}})
    lines = str(caught.value).split("\n")
    assert lines[0] == 'argument "grid"[0][0]: Input should be a valid number' and len(lines) == 6
    assert lines[5].startswith("and ") and all(len(line) <= 300 for line in lines)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        (None, "null"),
        (True, "true"),
        ({"a": [1, None, "é"]}, '{"a": [1, null, "é"]}'),
        (Item("cup"), '{"title": "cup", "count": 1, "note": null}'),
        ([Order(total=1)], '[{"total": 1.0, "items": []}]'),
        ({"day": datetime.date(2026, 1, 31)}, '{"day": "2026-01-31"}'),
        (datetime.date(2026, 1, 31), "2026-01-31"),
        (Colour.RED, "red"),
        ({"n": np.int64(3), "x": np.ones(2)}, '{"n": 3, "x": [1.0, 1.0]}'),
        (float("nan"), "NaN"),
        ({"what": ValueError("no")}, '{"what": "no"}'),
        (b"\xff", "b'\\xff'"),
    ],
)
def test_results_become_text(value: Any, text: str) -> None:
    assert as_text(value) == text


def test_states_are_json_values_and_sets_are_sorted() -> None:
    state = {"items": (Item("a"),), "seen": {3, 1, 2}, "day": datetime.date(2026, 1, 31), 5: {frozenset({"b", "a"})}}
    assert as_json(state) == {
        "items": [{"title": "a", "count": 1, "note": None}],
        "seen": [1, 2, 3],
        "day": "2026-01-31",
        "5": [["a", "b"]],
    }
    for value, words in (
        (object(), "object has no JSON form"),
        (float("nan"), "finite"),
        ({"a": "\ud800"}, "surrogate"),
    ):
        with pytest.raises(ValueError, match=words):
            as_json(value)
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError):
        as_json(endless)
