"""Descriptions of tools in rows: the same from every dress, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pact_nemo.environments.base import check_schema
from pact_nemo.environments.python_tools import tool_schema

WITH_X = {"type": "object", "properties": {"x": {"type": "integer"}}}


def test_a_tools_description_comes_out_the_same_from_every_dress() -> None:
    properties = {
        "n": {"type": "integer", "default": 3, "enum": [1, 3]},
        "x": {"type": "number", "default": 3.0},
        "s": {"default": None},
    }
    wanted = {"name": "f", "description": "", "parameters": {"type": "object", "properties": properties}}
    floats = {
        "n": {"type": "integer", "default": 3.0, "enum": [1.0, 3.0], "items": None},
        "x": properties["x"],
        "s": properties["s"],
        "other": None,
    }
    for dressed in (
        wanted,
        {"type": "function", "function": wanted},
        wanted | {"description": None, "parameters": wanted["parameters"] | {"required": None}},
        {
            "name": "f",
            "type": None,
            "function": None,
            "parameters": {"type": "object", "properties": floats},
            "strict": True,
        },
        json.dumps({"type": "function", "function": wanted}),
    ):
        assert repr(tool_schema(dressed)) == repr(wanted)
    for empty in (
        {"name": "f"},
        {"name": "f", "description": None, "parameters": None},
        {"name": "f", "parameters": {}},
    ):
        assert tool_schema(empty)["parameters"].get("properties", {}) == {}
    nested = {
        "type": "object",
        "properties": {"o": {"type": "object", "properties": {"i": {"type": "integer", "minimum": 1.0}, "gone": None}}},
    }
    assert repr(
        tool_schema({"name": "f", "parameters": nested})["parameters"]["properties"]["o"]["properties"]
    ) == repr({"i": {"type": "integer", "minimum": 1}})


def test_parameters_under_another_name_are_read_or_refused() -> None:
    wanted = {"type": "object", "properties": {"x": {"type": "integer"}}}
    for key in ("parameters", "input_schema", "inputSchema"):
        assert tool_schema({"name": "f", key: wanted})["parameters"] == wanted
    for odd in (
        {"arguments": wanted},
        {"parameters": {"x": {"type": "integer"}}},
        {"parameters": {"type": "string"}},
        {"parameters": wanted, "input_schema": {"type": "object", "properties": {"y": {}}}},
    ):
        with pytest.raises(ValueError, match="'f'"):
            tool_schema({"name": "f", **odd})


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ({"parameters": {"a": "string"}}, "have 'a' and no properties"),
        ({"parameters": {"oneOf": [WITH_X]}}, "have 'oneOf' and no properties"),
        ({"parameters": {"type": "object", "properties": {}, "allOf": [WITH_X]}}, "have 'allOf' and no properties"),
        ({"parameters": {"$ref": "#/$defs/A", "$defs": {"A": WITH_X}}}, r"have '\$ref' and no properties"),
        ({"parametersJsonSchema": WITH_X}, "unknown key 'parametersJsonSchema' in its description"),
        ({"parameters": WITH_X, "arguments": WITH_X}, "has 'arguments'"),
        ({"type": "custom", "format": {"type": "grammar"}}, "is of type 'custom'"),
        ({"parameters": {**WITH_X, "required": ["x", "b"]}}, "required names 'b', which is none"),
    ],
)
def test_a_tool_whose_arguments_would_not_be_shown_is_refused(tool: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"'f'.*{message}"):
        tool_schema({"name": "f", **tool})
    with pytest.raises(ValueError, match="the tool 'f' has the unknown key 'parameters' beside its 'function'"):
        tool_schema({"type": "function", "function": {"name": "f"}, "parameters": WITH_X})


def test_types_are_known_by_their_published_names_and_others_are_refused() -> None:
    given = {"a": {"type": "float"}, "b": {"type": ["STRING", "null"]}, "c": {"type": "list", "items": {"type": "any"}}}
    found = tool_schema({"name": "f", "parameters": {"type": "dict", "properties": given}})["parameters"]
    assert found == {
        "type": "object",
        "properties": {
            "a": {"type": "number"},
            "b": {"type": ["string", "null"]},
            "c": {"type": "array", "items": {"type": "string"}},
        },
    }
    for odd in ({"type": "money"}, {"anyOf": [{"type": "money"}]}, {"type": "array", "items": {"type": "money"}}):
        with pytest.raises(ValueError, match="tool 'f': the argument 'a' has the type 'money'; JSON schema has array"):
            tool_schema({"name": "f", "parameters": {"type": "object", "properties": {"a": odd}}})


def test_what_published_descriptions_say_beside_the_arguments_is_taken() -> None:
    for more in (
        {"strict": True, "returns": {"type": "string"}},
        {"type": "function", "response": {"type": "object"}},
        {"annotations": {"readOnlyHint": True}, "title": "F", "outputSchema": {"x": 1}},
    ):
        assert tool_schema({"name": "f", "parameters": WITH_X, **more})["parameters"] == WITH_X
    assert tool_schema({"type": "custom", "name": "f", "input_schema": WITH_X})["parameters"] == WITH_X
    assert tool_schema({"name": "f", "parameters": {"$schema": "s", "additionalProperties": False}})


def test_every_name_that_json_can_carry_is_a_name_and_what_looks_like_source_is_none() -> None:
    for name in ("flights.search-v2", "from", "größe", "mcp__x/y", "2d"):
        check_schema(
            {
                "name": name,
                "parameters": {"properties": {name: {}, "content-type": {}, "$filter": {}, "filter[name]": {}}},
            }
        )
    for name in ("f()", "__import__('os')", "a b", "", "a\nb", "x=1", "<tool_call>", "a\\", "x" * 201, 'q"'):
        with pytest.raises(ValueError, match="name"):
            check_schema({"name": name, "parameters": {}})
