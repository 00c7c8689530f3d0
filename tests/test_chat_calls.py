"""Calls as models drift to them: read with what was written, an error that the policy sees, or data; nothing else."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from pact_nemo.chat.tool_formats import TOOL_FORMATS
from pact_nemo.environments.base import ToolCall
from pact_nemo.errors import ToolCallError
from tests.workers.call_texts import NAMES, TOOLS, F, G, tool, written

ODD = {
    "name": "flights.search-v2",
    "description": "Find flights.",
    "parameters": {
        "type": "object",
        "properties": {"from": {"type": "string"}, "content-type": {"type": "string"}},
        "required": ["from"],
    },
}
ODD_CALL = ToolCall(
    "flights.search-v2",
    {"from": "Paris", "content-type": "x", "filter[name]": "größe", "$filter": [1, 1.0, True, None]},
)


def dress(name: str, text: str) -> str:
    """A JSON call in the format's dress."""
    return f"<tool_call>\n{text}\n</tool_call>" if name == "hermes" else text


# -- keys that aren't the format's
# ---------------------------------------------------------------------------------------------------------

READ = [
    ('{"name": "f", "arguments": {"a": 1}}', [F]),
    ('{"name": "f", "parameters": {"a": 1}}', [F]),
    ('{"name": "f", "args": {"a": 1}}', [F]),
    ('{"name": "f", "input": {"a": 1}, "type": "tool_use", "id": "toolu_1"}', [F]),
    ('{"parameters": {"a": 1}, "name": "f"}', [F]),
    ('{"type": "function", "name": "f", "parameters": {"a": 1}}', [F]),
    ('{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', [F]),
    ('{"function": {"name": "f", "arguments": {"a": 1}}}', [F]),
    ('{"name": "f", "arguments": "{\\"a\\": 1}"}', [F]),
    ('{"name": "f", "arguments": {"a": 1}, "parameters": {"a": 1}}', [F]),
    ('{"name": "f", "arguments": {"a": 1}, "parameters": null}', [F]),
    ('{"tool_calls": [{"name": "f", "arguments": {"a": 1}}]}', [F]),
    ('[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', [F, G]),
    ('```json\n{"name": "f", "arguments": {"a": 1}}\n```', [F]),
    ('{"name": "g"}', [G]),
    ('{"name": "g", "arguments": null}', [G]),
    ('{"name": "g", "arguments": ""}', [G]),
    ('{"name": "f", "arguments": {}}', [ToolCall("f", {})]),  # written so: the tool answers
    ('{"name": "f", "arguments": {"a": 1.0}}', [ToolCall("f", {"a": 1.0})]),
    ('{"name": "f", "arguments": {"a": true}}', [ToolCall("f", {"a": True})]),
    (
        '{"name": "nothing", "arguments": {"a": 1}}',
        [ToolCall("nothing", {"a": 1})],
    ),  # the environment says that it has no such tool
]
REFUSED = [
    ('{"name": "f"}', "needs arguments: a"),
    ('{"name": "f", "arguments": null}', "needs arguments: a"),
    ('{"name": "f", "a": 1}', "'a'"),
    ('{"name": "f", "arguments": {"a": 1}, "b": 2}', "'b'"),
    ('{"name": "f", "arguments": {"a": 1}, "parameters": {"a": 2}}', "differ"),
    ('{"name": "f", "arguments": {"a": 1}, "parameters": {"a": 1.0}}', "differ"),
    ('{"name": "f", "arguments": {"a": 1, "a": 2}}', "twice"),
    ('{"name": "f", "name": "g", "arguments": {}}', "twice"),
    ('{"name": "f", "arguments": {"a": {"b": 1, "b": 1}}}', "twice"),
    ('{"name": "f", "arguments": "{\\"a\\": 1, \\"a\\": 2}"}', "twice"),
    ('{"name": "f", "arguments": "{\\"a\\": 1} {}"}', "more than one"),
    ('{"name": "f", "arguments": "a=1"}', "not valid JSON"),
    ('{"name": "f", "arguments": [1]}', "must be a JSON object"),
    ('{"name": "f", "arguments": {"a": NaN}}', "not JSON"),
    ('{"name": "f", "arguments": {"a": 1e999}}', "too large"),
    ('{"name": "f", "arguments": {"a": ' + "9" * 400 + "}}", "longer than any float"),
    ('{"name": "f", "arguments": {"a": ' + "9" * 9000 + "}}", ""),
    ('{"name": "f", "arguments": {"a": ' + "[" * 40 + "]" * 40 + "}}", "nested"),
    ('{"name": "f", "arguments": {"a": ' + "[" * 5000 + "]" * 5000 + "}}", "nested"),
    ('{"name": "f", "arguments": {"a": 1}', ""),
    ('{"name": "f", "arguments": {\'a\': 1}}', "not valid JSON"),
    ('{"function": "f", "arguments": {"a": 1}}', 'needs a "name"'),
    ('{"tool": "f", "tool_input": {"a": 1}}', 'needs a "name"'),
    ('[{"name": "f", "arguments": {"a": 1}}, {"name": "f"}]', "needs arguments"),
    ('{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}, "arguments": {}}', "'arguments'"),
]


@pytest.mark.parametrize("name", ["hermes", "llama3_json"])
@pytest.mark.parametrize(("text", "calls"), READ)
def test_a_call_is_read_with_the_arguments_that_were_written(name: str, text: str, calls: list[ToolCall]) -> None:
    parsed = TOOL_FORMATS[name].parse(f"Use it.\n{dress(name, text)}", TOOLS)
    assert repr(parsed.calls) == repr(calls) and parsed.errors == []
    assert parsed.reasoning == "Use it."


@pytest.mark.parametrize("name", ["hermes", "llama3_json"])
@pytest.mark.parametrize(("text", "part"), REFUSED)
def test_an_ambiguous_call_is_an_error_and_no_answer(name: str, text: str, part: str) -> None:
    parsed = TOOL_FORMATS[name].parse(dress(name, text), TOOLS)
    assert len(parsed.errors) == 1 and part in parsed.errors[0]
    assert all(call == F for call in parsed.calls) and len(parsed.calls) <= 1


DATA = [
    'The person is:\n{"name": "Bob", "age": 5}',
    'Here they are:\n[{"name": "Bob"}, {"name": "Ann", "age": 5}]',
    '{"capital": "Paris"}',
    '{"name": "Bob", "input": 5}',
    '{"name": "Bob", "age": NaN}',
    '{"name": "Bob", "age": 5, "age": 6}',
    '{"people": [\n{"name": "Bob", "age": 5},\n{"name": "Ann"}\n]}',
    'You would write {"name": "f", "arguments": {"a": 1}} for it.',
    "[ ] buy milk\n[x] call f(a=1) later",
    "f is a tool. It takes (a).",
    "Action: none\nThe function tag is <function=name>.",
    "```python\nprint(1)\n```",
    '{"tag": "<think>"}',
    "It is said in [f(x)](https://example.org/f).",
    "The tool (f(a=1)) found it, as [f(a=1)] says above.",
    "I looked it up (f(a=1)).",
    "(f(a=1) found it.)",
    "(f(a=1))",
    "Take [other(a=1)]",
    "Values: [1, 2], (3, 4) and [f, g]",
    'They write {"function_call": {"name": "f", "arguments": "{}"}} for it.',
    '{"function_call": "none", "function": 3}',
    '{"tool_uses": [1, 2]}',
    "<tool_code> is a tag, to=functions.h is none.",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", DATA)
def test_data_that_merely_has_a_name_is_an_answer(name: str, text: str) -> None:
    parsed = TOOL_FORMATS[name].parse(text, TOOLS)
    assert (parsed.calls, parsed.errors, parsed.reasoning) == ([], [], text)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("pythonic", "hermes"), 'I call it.\n{"name": "f", "arguments": {"a": 1}}'),
        (("pythonic", "hermes"), '```json\n{"name": "f", "arguments": {"a": 1}}\n```'),
        (("pythonic", "hermes"), '[{"type": "function", "function": {"name": "f", "arguments": "{}"}}]'),
        (("pythonic", "hermes"), '{"name": "f", "arguments": {"a": 1}'),
        (("pythonic", "llama3_json"), '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'),
        (("hermes", "llama3_json"), "I call it.\n[f(a=1)]"),
        (NAMES, "I call it.\nf(a=1)"),
        (NAMES, "result = f(a=1)"),
        (NAMES, "<function=f>{}</function>"),
        (NAMES, "<|python_tag|>f.call(a=1)"),
        (NAMES, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]'),
        (NAMES, '<function_call>{"name": "f", "arguments": {"a": 1}}</function_call>'),
        (NAMES, "Thought: I call it.\nAction: f\nAction Input: {}"),
        (("pythonic",), "[flights.search(a=1)]"),
        (NAMES, 'I call it: {"name": "f", "arguments": {"a": 1}}'),
        (NAMES, '<tool_calls>[{"function": {"name": "f", "arguments": "{}"}}]</tool_calls>'),
        (NAMES, 'functools[{"name": "f", "input": {"a": 1}}]'),
        (NAMES, '<tool_use>{"tool": "f", "args": {}}</tool_use>.'),
        (NAMES, '{"action": "f", "action_input": {"a": 1}}'),
        (NAMES, '{"f": {"a": 1}}'),
        (NAMES, "{'name': 'f', 'arguments': {'a': 1}}"),
        (NAMES, "{name: f, arguments: {a: 1}}"),
        (NAMES, '<invoke name="f"><parameter name="a">1</parameter></invoke>'),
        (NAMES, "```python\nf(a=1)\n```"),
        (NAMES, "So `f(a=1)`".replace("So ", "So\n")),
        (NAMES, "print(f(a=1))"),
        (NAMES, '<|tool_call|>{"name": "f", "arguments": {"a": 1}}<|/tool_call|>'),
        (NAMES, "<tool_code>\nf(a=1)\n</tool_code>"),
        (NAMES, "<tool_code>\nprint(f(a=1))\n</tool_code>\nNow I wait."),
        (NAMES, 'to=functions.f json{"a": 1}'),
        (NAMES, '<|channel|>commentary to=functions.f<|message|>{"a": 1}'),
        (NAMES, '<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}'),
        (NAMES, '{"recipient_name": "functions.f", "parameters": {"a": 1}}'),
        (NAMES, 'I use {"recipient_name": "functions.f", "parameters": {"a": 1}}'),
        (NAMES, '{"tool_uses": [{"recipient_name": "functions.f", "parameters": {"a": 1}}]}'),
        (NAMES, '{"recipient_name": "functions.f", "parameters": {"a": 1}'),
        (NAMES, "<start_function_call>call:f{a:1}<end_function_call>"),
        (NAMES, '{"function_call": {"name": "f", "arguments": {"a": 1}}}'),
        (NAMES, 'So: {"function_call": {"name": "f", "arguments": "{}"}}'),
        (NAMES, "I call it: [f(a=1)]"),
        (NAMES, "I call both: `[f(a=1), g()]`."),
        (NAMES, "<think>Hm.</think>I call it: [f(a=1,\n)]"),
        (NAMES, "[[f(a=1)]]"),
        (NAMES, "Now:\n(f(a=1), g())"),
    ],
)
def test_a_call_in_another_formats_dress_is_an_error(names: tuple[str, ...], text: str) -> None:
    for name in names:
        parsed = TOOL_FORMATS[name].parse(text, TOOLS)
        assert parsed.calls == [] and len(parsed.errors) == 1, (name, parsed)


def test_markers_within_data_of_an_answer_break_nothing() -> None:
    for name in NAMES:
        for text in (
            '{"tag": "</think>"}',
            '{"tag": "</think>"}\n</think>\n{"tag": "<think>"}',
            '["</think>",\n{"a": "</think>"}]',
        ):
            parsed = TOOL_FORMATS[name].parse(text, TOOLS)
            assert (parsed.calls, parsed.errors) == ([], []), (name, text)


def test_data_before_a_llama_call_are_passed_over_and_what_follows_it_is_not() -> None:
    form = TOOL_FORMATS["llama3_json"]
    call = '{"name": "f", "parameters": {"a": 1}}'
    assert form.parse(f'Known:\n{{"name": "Bob", "age": 5}}\n{call}', TOOLS).calls == [F]
    assert form.parse(f"{call}; {call}\n```json\n{call}\n```", TOOLS).calls == [F, F, F]
    after = form.parse(f'{call}\n{{"name": "Bob", "age": 5}}', TOOLS)
    assert after.calls == [F] and len(after.errors) == 1
    assert form.parse(f"<|python_tag|>{call}", TOOLS).calls == [F]


def test_a_broken_hermes_block_hides_neither_the_next_one_nor_executes_its_text() -> None:
    form, good = TOOL_FORMATS["hermes"], written("hermes", F)
    for text in (
        f"<tool_call>\n{{bad\n</tool_call>\n{good}",
        f"<tool_call>\n{{bad\n{good}",
        f"<tool_call> is the tag. {good}",
    ):
        parsed = form.parse(text, TOOLS)
        assert parsed.calls == [F] and len(parsed.errors) == 1, text
    quoted = json.dumps(f"x {good}")[:-1]  # the text is never closed
    parsed = form.parse(f'<tool_call>\n{{"name": "write", "arguments": {{"text": {quoted}\n</tool_call>', TOOLS)
    assert parsed.calls == [] and parsed.errors


@pytest.mark.parametrize("name", NAMES)
def test_reading_takes_time_linear_in_the_length(name: str) -> None:
    units = [
        "<tool_call>",
        '<tool_call>{"',
        "<think>",
        "</think>",
        "\n",
        " ",
        '{"a":\n',
        '{"\n',
        "[\n",
        "[f('",
        "`",
        "```\n",
        "<|python_tag|>",
        '{"a":1,"a":1}\n',
        '{"name": "f"\n',
        "[f(x='''",
        " [f(a=1),",
        "[[[[",
        "<tool_code>",
        "\\'",
        written(name, G) + "</think>\n",
    ]
    for unit in units:
        text = unit * (60_000 // len(unit))
        started = time.perf_counter()
        TOOL_FORMATS[name].parse(text, TOOLS)
        assert time.perf_counter() - started < 5, unit  # what is quadratic takes minutes


# -- names
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hermes", "llama3_json"])
def test_json_formats_carry_names_that_python_cannot_write(name: str) -> None:
    form = TOOL_FORMATS[name]
    form.check_tools([ODD])
    parsed = form.parse(form.render_calls([ODD_CALL]), [ODD])
    assert repr(parsed.calls) == repr([ODD_CALL]) and parsed.errors == []


@pytest.mark.parametrize("name", ["pythonic", "pythonic_schema"])
@pytest.mark.parametrize(
    "odd", [ODD, tool("from"), tool("f", "class"), tool("f", "content-type"), tool("größe"), tool("2d")]
)
def test_python_text_refuses_the_tools_that_it_cannot_call_and_names_the_remedy(name: str, odd: dict[str, Any]) -> None:
    TOOL_FORMATS[name].check_tools(TOOLS)
    with pytest.raises(ToolCallError, match=f"{odd['name']}.*plain identifier.*model.tool_format=hermes"):
        TOOL_FORMATS[name].check_tools([*TOOLS, odd])
    with pytest.raises(ToolCallError, match="plain identifier"):
        TOOL_FORMATS[name].render_calls([ODD_CALL])
