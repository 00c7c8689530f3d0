"""Thoughts around calls: what a message says outside of them counts, and within a call their markers are data."""

from __future__ import annotations

import pytest

from pact_nemo.chat.thoughts import thoughts_and_visible, visible_text
from pact_nemo.chat.tool_formats import TOOL_FORMATS
from pact_nemo.environments.base import ToolCall
from tests.workers.call_texts import NAMES, TOOLS, F, G, written


@pytest.mark.parametrize(
    ("text", "opened", "thought", "visible"),
    [
        ("b", False, "", "b"),
        ("<think>\na\n</think>\n\nb\n", False, "a", "b"),
        ("<think>\n\n</think>\n\nb", False, "", "b"),
        ("x <think>a</think> y", False, "a", "x  y"),
        ("<think>a</think>x<think>b</think>y", False, "a\n\nb", "xy"),
        ("<think>a", False, "a", ""),
        ("x <think>a", False, "a", "x"),
        ("a</think>b", False, "a", "b"),
        ("a</think>b", True, "a", "b"),
        ("a", True, "a", ""),
        ("<think>a <think>b</think> c</think>d", False, "a b c", "d"),
        ("", True, "", ""),
    ],
)
def test_what_a_message_says_outside_of_its_thoughts(text: str, opened: bool, thought: str, visible: str) -> None:
    assert thoughts_and_visible(text, opened) == (thought, visible)
    assert visible_text(text, opened) == visible


@pytest.mark.parametrize("name", NAMES)
def test_calls_in_a_thought_are_neither_made_nor_malformed(name: str) -> None:
    form = TOOL_FORMATS[name]
    right, wrong = written(name, F), written(name, ToolCall("write", {"text": "wrong"}))
    mention = {"hermes": "<tool_call> here", "llama3_json": '\n{"name": "f", "para', "pythonic": "\n[f(a="}[name]
    for thought in (f"I could try\n{wrong}\nbut no.", f"A mention: {mention}", ""):
        for text, opened in (
            (f"<think>\n{thought}\n</think>\n\n{right}", False),
            (f"{thought}\n</think>\n\n{right}", True),
            (f"{thought}\n</think>\n\n{right}", False),
            (f"I look.\n<think>{thought}</think>\n{right}", False),
            (f"<think>a</think>\n<think>{thought}</think>\n{right}", False),
            (f"{right}\n<think>{thought}</think>\n", False),
            (f"{right}\n<think>{thought}", False),
        ):
            parsed = form.parse(text, TOOLS, opened)
            assert (parsed.calls, parsed.errors) == ([F], []), text
        for text, opened in (
            (f"<think>\n{thought}\n</think>\n\nDone.", False),
            (f"<think>\n{thought}", False),
            (f"<think>\n{thought}\n{right}", False),
            (f"{thought}\n{right}", True),
            (f"{thought}\n</think>\nDone.", False),
            (f"{thought}\n{right}\n</think>\nDone.", False),
            (f"Done. <think>{thought}\n{right}", False),
        ):
            parsed = form.parse(text, TOOLS, opened)
            assert (parsed.calls, parsed.errors) == ([], []), text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("between", ["", " ", "\n", "\n\n"])
def test_a_call_may_follow_the_closing_marker_on_its_line(name: str, between: str) -> None:
    text = f"<think>Not {written(name, G)}.</think>{between}{written(name, F)}"
    for parsed in (
        TOOL_FORMATS[name].parse(text, TOOLS),
        TOOL_FORMATS[name].parse(text.removeprefix("<think>"), TOOLS, in_thought=True),
    ):
        assert (parsed.calls, parsed.errors) == ([F], [])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "data",
    ["<think>", "</think>", "<think>x</think>", "a</think>b<think>", "</tool_call>", "<tool_call>\n{}", "'\"\n[f()]"],
)
def test_markers_and_tags_within_an_argument_are_data(name: str, data: str) -> None:
    calls = [ToolCall("write", {"text": data}), F]
    for text, opened in (
        (written(name, *calls), False),
        (f"<think>t</think>\n{written(name, *calls)}", False),
        (f"t</think>\n{written(name, *calls)}", True),
        (f"{written(name, *calls)}\n<think>t", False),
    ):
        parsed = TOOL_FORMATS[name].parse(text, TOOLS, opened)
        assert (parsed.calls, parsed.errors) == (calls, []), text
