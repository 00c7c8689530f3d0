"""Tool formats: what is written reads back the same, and no policy text can run code, crash the parser or smuggle in a
name.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pact_nemo.chat.tool_formats import TOOL_FORMATS, first_sentence, signature_line, tool_format
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.bfcl.data import function_documents
from pact_nemo.errors import ConfigError, ToolCallError

NAMES = ["pythonic", "hermes", "llama3_json"]
PYTHONIC = TOOL_FORMATS["pythonic"]
LS = {
    "name": "ls",
    "description": (
        "This tool belongs to the file system. Simple. Tool description: List the contents of the current directory."
        " And more."
    ),
    "parameters": {"type": "object", "properties": {"a": {"type": "boolean", "default": False}}, "required": []},
}
TOUCH = {
    "name": "touch",
    "description": "Create a file.",
    "parameters": {
        "type": "object",
        "properties": {"file_name": {"type": "string"}, "size": {"type": "integer", "default": 3}},
        "required": ["file_name"],
    },
}
TOOLS = [LS, TOUCH]

identifiers = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,8}", fullmatch=True).filter(lambda name: _is_plain(name))
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
calls = st.builds(ToolCall, identifiers, st.dictionaries(identifiers, values, max_size=3))


def _is_plain(name: str) -> bool:
    import keyword

    return not keyword.iskeyword(name)


def _same(left: object, right: object) -> bool:
    """Equality that tells True from 1 and 1 from 1.0."""
    return repr(left) == repr(right)


@pytest.mark.parametrize("name", NAMES)
@given(
    turn=st.lists(calls, min_size=1, max_size=3), reasoning=st.sampled_from(["", "Use it.", "Two lines\nhere: a=1."])
)
def test_calls_read_back_as_written(name: str, turn: list[ToolCall], reasoning: str) -> None:
    form = TOOL_FORMATS[name]
    text = f"{reasoning}\n{form.render_calls(turn)}" if reasoning else form.render_calls(turn)
    parsed = form.parse(text)
    assert parsed.errors == []
    assert parsed.reasoning == reasoning
    assert _same(parsed.calls, turn)


@pytest.mark.parametrize("name", NAMES)
@given(
    text=st.text(max_size=60)
    | st.lists(
        st.sampled_from(
            [
                "[",
                "ls(",
                "a=",
                "1",
                ")",
                "]",
                ",",
                "'",
                '"',
                "\\",
                "\n",
                "{",
                "}",
                '"name"',
                ":",
                "<tool_call>",
                "</tool_call>",
                "\0",
                "eval(",
            ]
        ),
        max_size=20,
    ).map("".join)
)
def test_no_text_makes_the_parser_raise(name: str, text: str) -> None:
    parsed = TOOL_FORMATS[name].parse(text, TOOLS)
    for call in parsed.calls:
        assert call.name.isidentifier()
        json.dumps(call.arguments, allow_nan=False)


def test_positional_arguments_get_the_schema_names() -> None:
    assert PYTHONIC.parse("[touch('a.txt', 5)]", TOOLS).calls == [ToolCall("touch", {"file_name": "a.txt", "size": 5})]
    assert PYTHONIC.parse("[touch('a.txt', size=5)]", TOOLS).calls == [
        ToolCall("touch", {"file_name": "a.txt", "size": 5})
    ]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[touch('a', 1, 2)]", "at most 2"),
        ("[touch('a', file_name='b')]", "twice"),
        ("[foo('a')]", "unknown function 'foo'"),
        ("[touch(file_name=__import__('os').getcwd())]", "not a literal"),
        ("[touch(file_name=f'{1+1}')]", "not a literal"),
        ("[touch(file_name=b'x')]", "not a literal"),
        ("[touch(file_name={1, 2})]", "not a literal"),
        ("[touch(size=1+1)]", "not a literal"),
        ("[touch(size=9**9**9)]", "not a literal"),
        ("[touch(size=1e999)]", "finite"),
        ("[touch(file_name=name)]", "not a literal"),
        ("[touch(**{'file_name': 'a'})]", "**"),
        ("[ls(), os.system('ls')]", "expected calls"),
        ("[ls()]\nDone.", "not valid call syntax"),
        ("[ls()", "not valid call syntax"),
        ("[ls()] + [ls()]", "expected one list"),
        ("[ls(a=" + "[" * 300 + "]" * 300 + ")]", ""),
        ("[touch(file_name='" + "x" * 30_000 + "')]", "limit"),
        ("[touch(size=" + "9" * 6000 + ")]", ""),
        ("[touch(file_name='''a\r\nb''')]", "carriage return"),
        ('[touch(file_name="""a\rb""")]', "carriage return"),
        ("[touch(ｓize=1)]", "the name 'size' is written in other letters"),  # noqa: RUF001 - as a policy may
        ("[ls(),\n touch(file_name='é', ﬁle_name='b')]", "the name 'file_name' is written in other letters"),
        ("[ls(), ｌs()]", "the name 'ls' is written in other letters"),  # noqa: RUF001 - as above
    ],
)
def test_pythonic_refuses_all_but_literal_calls_and_says_why(text: str, part: str) -> None:
    parsed = PYTHONIC.parse(f"Thinking.\n{text}", TOOLS)
    assert parsed.calls == []
    assert len(parsed.errors) == 1 and part in parsed.errors[0]
    assert parsed.reasoning == "Thinking."


def test_pythonic_reads_what_is_written_between_lines_and_letters_of_its_own() -> None:
    text = "[touch(file_name='é ａ',\r\n size=1)]"  # noqa: RUF001 - an argument's text is its own
    assert PYTHONIC.parse(text, TOOLS).calls == [ToolCall("touch", {"file_name": "é ａ", "size": 1})]  # noqa: RUF001


def test_a_message_without_call_syntax_is_an_answer() -> None:
    for name in NAMES:
        parsed = TOOL_FORMATS[name].parse("  The list is [1, 2] and ls(a) was run. {}\n")
        assert (parsed.reasoning, parsed.calls, parsed.errors) == ("The list is [1, 2] and ls(a) was run. {}", [], [])


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "ls", "arguments": {"a=__import__(\'os\').system(\'true\'), b": 1}}\n</tool_call>',
        '<tool_call>\n{"name": "ls()", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "ls", "arguments": {"a": NaN}}\n</tool_call>',
        '<tool_call>\n{"name": "ls", "arguments": {"a": 1e999}}\n</tool_call>',
        '<tool_call>\n{"name": "ls", "arguments": "a=1"}\n</tool_call>',
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        '<tool_call>\n["ls"]\n</tool_call>',
        '<tool_call>\n{"name": "ls", "arguments": {}}',
        "<tool_call>\n" + "[" * 100_000,
        "<tool_call>",
    ],
)
def test_hermes_lists_malformed_calls_as_errors(text: str) -> None:
    parsed = TOOL_FORMATS["hermes"].parse(text)
    assert parsed.calls == [] and len(parsed.errors) == 1


def test_hermes_keeps_good_calls_beside_bad_ones_and_tags_inside_arguments() -> None:
    good = ToolCall("echo", {"content": "</tool_call> <tool_call> {"})
    text = f"Hm.\n{TOOL_FORMATS['hermes'].render_calls([good])}\n<tool_call>\n{{bad\n</tool_call>"
    parsed = TOOL_FORMATS["hermes"].parse(text)
    assert parsed.calls == [good]
    assert len(parsed.errors) == 1


def test_llama_reads_several_calls_and_refuses_trailing_text() -> None:
    form = TOOL_FORMATS["llama3_json"]
    one = '{"name": "ls", "parameters": {"a": true}}'
    assert form.parse(f"<|python_tag|>{one}").calls == [ToolCall("ls", {"a": True})]
    assert len(form.parse(f"{one}\n{one}").calls) == 2
    assert form.parse(f"{one} there").errors == ["there is text after the calls"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "call",
    [
        ToolCall("a b", {}),
        ToolCall("f", {"x)": 1}),
        ToolCall("f", {"x": math.nan}),
        ToolCall("f", {"x": object()}),
        ToolCall("f", {"x": {1: 2}}),
    ],
)
def test_a_call_that_is_no_json_literal_is_not_written(name: str, call: ToolCall) -> None:
    with pytest.raises(ToolCallError):
        TOOL_FORMATS[name].render_calls([call])


def test_compact_tool_lines() -> None:
    assert signature_line(LS) == "ls(a: bool = False): List the contents of the current directory."
    assert signature_line(TOUCH) == "touch(file_name: str, size: int = 3): Create a file."
    assert first_sentence("Convert 1.5 miles. Then stop.") == "Convert 1.5 miles."
    text = PYTHONIC.render_tools(TOOLS)
    assert signature_line(LS) in text and "[name(argument=value)]" in text
    assert "belongs to" not in "".join(
        signature_line(tool) for tools in function_documents().values() for tool in tools
    )


@pytest.mark.parametrize(
    ("schema", "shown"),
    [
        ({"type": "string", "enum": ["x", "y"]}, "str"),
        ({"type": "array", "items": {"type": "integer"}}, "list"),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "int | str"),
        ({"anyOf": [{"type": "null"}, {"type": "integer"}]}, "int | None"),
        ({"type": ["string", "null"]}, "str | None"),
        ({"oneOf": [{"type": "number"}, {"type": "array", "items": {"type": "integer"}}]}, "float | list[int]"),
        ({"enum": ["x", "y"]}, "Literal['x', 'y']"),
        ({"anyOf": [{"const": 1}, {"type": "null"}]}, "Literal[1] | None"),
        ({"$ref": "#/$defs/Day"}, "Literal['mon', 'tue']"),
        ({"allOf": [{"$ref": "#/$defs/Count"}], "default": 1}, "int"),
        ({"anyOf": [{"$ref": "#/$defs/Tree"}, {"$ref": "#/$defs/Count"}]}, "list | int"),
        ({"$ref": "https://example.org/elsewhere"}, "Any"),
        ({"anyOf": [{"type": "integer"}, {}]}, "Any"),
        ({}, "Any"),
    ],
)
def test_a_compact_line_shows_the_type_that_an_argument_has(schema: dict[str, Any], shown: str) -> None:
    definitions = {
        "Day": {"enum": ["mon", "tue"], "type": "string"},
        "Count": {"type": "integer"},
        "Tree": {"type": "array", "items": {"$ref": "#/$defs/Tree"}},
    }
    tool = {"name": "f", "parameters": {"properties": {"a": schema}, "required": ["a"], "$defs": definitions}}
    assert signature_line(tool) == f"f(a: {shown}): "


def test_observations_become_tool_messages() -> None:
    assert PYTHONIC.render_observation(["a", "b"]) == [{"role": "tool", "content": "a\nb"}]
    assert TOOL_FORMATS["hermes"].render_observation(["a", "b"]) == [
        {"role": "tool", "content": "a"},
        {"role": "tool", "content": "b"},
    ]


def test_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="hermes.*pythonic"):
        tool_format("xml")
    assert all(form.name == name for name, form in TOOL_FORMATS.items())
