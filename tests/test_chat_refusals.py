"""Chat templates and tokenizers as users have them: every piece of a conversation comes out exactly, or the template is
refused by name.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from pact_nemo.chat.template import ChatFormat
from pact_nemo.chat.tool_formats import TOOL_FORMATS
from pact_nemo.environments.base import ToolCall
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.objective.components import CALL, REASONING
from pact_nemo.traces.schema import ReasoningSegment, Trace, TraceTurn
from pact_nemo.traces.spans import encode_trace
from tests.fixtures.chat_models import tokenizer

MESSAGE = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
OPEN = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
CHATML = "{%- for m in messages %}" + MESSAGE + "{%- endfor %}" + OPEN
TOOLS = [{"name": "ls", "description": "MARKTOOL.", "parameters": {"type": "object", "properties": {}}}]
USER = {"role": "user", "content": "Hello"}


@cache
def _small() -> Any:
    return tokenizer("smollm")


def chat_of(template: Any, form: str = "hermes", **kwargs: Any) -> ChatFormat:
    made = _small()
    made.chat_template = template
    return ChatFormat(made, TOOL_FORMATS[form], kwargs)


def only(condition: str) -> str:
    return "{%- for m in messages %}{%- if " + condition + " %}" + MESSAGE + "{%- endif %}{%- endfor %}" + OPEN


@pytest.mark.parametrize("form", ["pythonic", "hermes", "llama3_json"])
@pytest.mark.parametrize(
    ("template", "message"),
    [
        (only("m.role in ['system', 'user', 'assistant']"), "drops the results of tools"),
        (only("m.role != 'tool' or loop.index0 < 5"), "drops the results of tools"),
        (only("m.role != 'tool' or not loop.last"), "drops the results of tools|otherwise than its pieces"),
        (only("m.role != 'system'"), "drops the (system message|tools)"),
        (only("m.role != 'user' or loop.index0 < 3"), "drops what a user says"),
        (CHATML.replace("m['content']", "m['content'] | upper"), "alters|drops"),
        (
            CHATML.replace("m['content']", "(m['content'] | e if m.role == 'tool' else m['content'])"),
            "alters the results of tools",
        ),
        (
            CHATML.replace("m['content']", "(m['content'] | e if m.role == 'user' else m['content'])"),
            "alters what a user says",
        ),
        (
            CHATML.replace("m['content']", "(m['content'][:20] if m.role == 'tool' else m['content'])"),
            "alters the results of tools",
        ),
        (CHATML.replace("m['content']", "m['content'] | replace('\\n\\n', '\\n')"), "alters"),
        (
            CHATML.replace("m['content']", "m['content'] + (m['content'] if m.role == 'tool' else '')"),
            "repeats the results of tools",
        ),
        (CHATML.replace("m['content']", "m['content'][0]['text']"), "drops|can't be used|alters or repeats"),
        ("{{ messages[-1].content }}" + CHATML, "repeats|otherwise than its pieces"),
        ("{{ messages | length }}" + CHATML, "otherwise than its pieces|not a suffix|opens"),
        (
            "{%- if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{%- endif %}" + CHATML,
            "no system role",
        ),
        (
            only("loop.index0 == 0 or m.role != messages[loop.index0 - 1].role or raise_exception('must alternate')"),
            "must alternate|drops",
        ),
        (
            CHATML.replace("m['content'] +", "m['content'] + (range(1000) | random | string) +"),
            "otherwise than|each time|not a suffix|doesn't end an assistant message",  # by what it draws
        ),
        ("{{ strftime_now('%d %b %Y') }}" + CHATML, "today's date"),
        (CHATML.replace("'<|im_end|>", "'"), "special token"),
        (
            CHATML.replace("m['content']", "(m['content'][:2000] if m.role == 'tool' else m['content'])"),
            "long.*alters the results of tools",
        ),
        (CHATML.replace("m['content']", "m['content'] | truncate(50000)"), "long.*alters the system message"),
        (
            CHATML.replace("in messages", "in (messages if messages | length < 30 else messages[-30:])"),
            "in a long conversation, drops",
        ),
        (
            CHATML.replace("m['content'] +", "m['content'] + ('' if m.role != 'tool' else m.name | string) +"),
            "writes the 'name' of a message",
        ),
        (
            CHATML.replace(
                "m['content'] +", "('tool ' ~ m.get('name') ~ ': ' if m.role == 'tool' else '') + m['content'] +"
            ),
            "writes the 'name' of a message",
        ),
        (
            CHATML.replace("m['content'] +", "m['content'] + m.get('tool_call_id', '') +"),
            "writes the 'tool_call_id' of a message",
        ),
        (
            "{%- for m in messages if m.role == 'tool' %}" + MESSAGE + "{%- endfor %}" + only("m.role != 'tool'"),
            "before what came|than its pieces",
        ),
    ],
)
def test_what_a_template_drops_alters_or_repeats_is_refused_by_name(template: str, message: str, form: str) -> None:
    if form == "pythonic" and "alternate" in message:
        pytest.skip("one message holds all results of a turn, so roles do alternate")
    with pytest.raises(ConfigError, match=message) as refusal:
        chat_of(template, form)
    assert "template" in str(refusal.value)


def test_the_word_tools_in_a_comment_is_no_support_for_tools() -> None:
    for form in ("hermes", "llama3_json"):
        chat = chat_of("{#- plain ChatML, no tools #}" + CHATML, form)
        assert not chat.shows_tools and "MARKTOOL" in chat.render([USER], TOOLS)
    tools, whole = (
        "{%- if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}" + CHATML,
        "(tools | tojson)",
    )
    assert chat_of(tools).shows_tools
    for half in (
        "{%- for t in tools or [] %}{{ t.function.name }}{%- endfor %}"
        + CHATML,  # names only: the project's text says it all
        tools.replace(whole, "(tools[0] | tojson)"),
        tools.replace(whole, "(tools[:5] | tojson)"),
        tools.replace(whole, "(tools | tojson | replace('\"default\"', '') | replace('MARK-DEFAULT', ''))"),
        tools.replace(whole, '(tools | tojson | replace(\'"required": ["mark_argument"]\', \'"required": []\'))'),
        tools.replace(whole, "(tools | tojson | replace('MARK-EITHER', ''))"),
        tools.replace(whole, "(tools | tojson | replace('mark_item', ''))"),
        tools.replace(whole, "(tools | tojson)[:3000]"),
        tools.replace("if tools", "if tools and messages[0].role != 'system'"),
    ):
        assert not chat_of(half).shows_tools and "MARKTOOL" in chat_of(half).render(
            [{"role": "system", "content": "Be."}, USER], TOOLS
        )


def test_results_of_one_turn_keep_their_order() -> None:
    behind = "{%- if m.role != 'tool' %}{{ ns.held }}{%- set ns.held = '' %}" + MESSAGE
    held = "{%- else %}{%- set ns.held = '<|im_start|>tool\\n' + m.content + '<|im_end|>\\n' + ns.held %}{%- endif %}"
    template = (
        "{%- set ns = namespace(held='') %}{%- for m in messages %}"
        + behind
        + held
        + "{%- endfor %}{{ ns.held }}"
        + OPEN
    )
    with pytest.raises(ConfigError, match="writes the results of tools .*before what came earlier"):
        chat_of(template)


@pytest.mark.parametrize(
    ("condition", "what"),
    [
        ("m.role != 'tool' or m.content | trim != ''", "an empty result"),
        ("loop.first or m != messages[loop.index0 - 1]", "a result that is like the one before it"),
    ],
)
def test_results_that_are_empty_or_alike_are_results(condition: str, what: str) -> None:
    with pytest.raises(ConfigError, match=f"drops {what} of several calls"):
        chat_of(only(condition), "llama3_json")


def test_a_message_whose_words_stand_in_another_one_is_missed_all_the_same() -> None:
    chat = chat_of(only("m.role != 'system' or loop.first"))
    system = {"role": "system", "content": "Be brief."}
    for messages in ([system, system, USER], [{"role": "user", "content": "please Be brief."}, system]):
        with pytest.raises(DataError, match="leaves out or alters a message of role 'system': 'Be brief"):
            chat.prompt_ids(messages, TOOLS)


def test_a_message_that_only_some_conversations_lose_is_refused_with_its_prompt() -> None:
    chat = chat_of(only("m.role != 'system' or loop.first"))
    assert chat.prompt_ids([{"role": "system", "content": " First. "}, USER], TOOLS)
    first, second = {"role": "system", "content": "First."}, {"role": "system", "content": "Second."}
    for messages in ([first, second, USER], [USER, {"role": "system", "content": "Late."}]):
        with pytest.raises(DataError, match="leaves out or alters a message of role 'system': '(Second|Late)"):
            chat.prompt_ids(messages, TOOLS)


@pytest.mark.parametrize("value", ["false", "True", "no", "0", "1.5", "null"])
def test_a_switch_given_as_a_text_is_refused(value: str) -> None:
    switch = (
        CHATML
        + "{%- if add_generation_prompt and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    )
    with pytest.raises(ConfigError, match=f"model.template_kwargs.enable_thinking='{value}' is a text.*without quotes"):
        chat_of(switch, enable_thinking=value)
    assert chat_of(switch, enable_thinking=False).generation_thought
    assert chat_of("{{ date_string }}" + CHATML, date_string="26 Jul 2024")  # a text that is one


def test_one_named_template_serves_every_piece() -> None:
    tool_use = (
        "{{- '<|im_start|>system\\n<tools>' }}{%- for t in tools %}{{ t | tojson }}{%- endfor %}"
        "{{ '</tools><|im_end|>\\n' }}"
        + CHATML.replace(
            "m['content']",
            "('<tool_response>' + m['content'] + '</tool_response>' if m.role == 'tool' else m['content'])",
        )
    )
    tool_use = tool_use.replace("{%- for m in", "{%- set messages = messages %}{%- for m in")
    chat = chat_of({"default": CHATML, "tool_use": tool_use})
    observation = [{"role": "tool", "content": "MARKOBS"}]
    pieces = (
        chat.prompt_ids([USER], TOOLS)
        + chat.encode_assistant("Use ls.")[0]
        + [chat.end_of_turn_id]
        + chat.continuation_ids(observation, True)
    )
    assert pieces == chat.prompt_ids([USER, {"role": "assistant", "content": "Use ls."}, *observation], TOOLS)
    assert "<tool_response>MARKOBS" in chat.tokenizer.decode(pieces)
    assert "tool_use" in chat.source
    assert chat_of({"default": CHATML, "tool_use": tool_use}, "pythonic").source.endswith(
        "'default'"
    )  # its tools stand in the system message
    with pytest.raises(ConfigError, match="named rag, none of them 'default'"):
        chat_of({"rag": CHATML})


def _trace() -> Trace:
    turn = TraceTurn((ReasoningSegment("other", "Think."),), (ToolCall("ls", {}),), ("MARKOBS",))
    return Trace("a", "x", (turn, turn), True)


def test_a_generation_prompt_that_opens_a_thought_is_closed_before_the_call() -> None:
    chat = chat_of(CHATML.replace("assistant\\n", "assistant\\n<think>\\n"))
    assert chat.opens_thought and chat.generation_thought == "<think>\n"
    tokens = encode_trace(_trace(), chat)
    call = '<tool_call>\n{"name": "ls", "arguments": {}}\n</tool_call>'
    turn = f"Think.\n</think>\n\n{call}<|im_end|>\n<|im_start|>tool\nMARKOBS<|im_end|>\n"
    assert chat.tokenizer.decode(tokens.token_ids) == f"{turn}<|im_start|>assistant\n<think>\n{turn}"
    taught = [i for i, c in zip(tokens.token_ids, tokens.component, strict=True) if c in (CALL, REASONING)]
    assert (
        chat.tokenizer.decode(taught) == f"Think.\n</think>\n\n{call}" * 2
    )  # the opening marker belongs to the prompt


@pytest.mark.parametrize("closing", ["</thinking>", "[/THINK]", "</reasoning>"])
def test_a_template_that_cuts_thoughts_between_unknown_markers_is_refused(closing: str) -> None:
    cut = f"(m['content'] if m is sameas messages[-1] else m['content'].split('{closing}')[-1])"
    with pytest.raises(ConfigError, match="has thoughts between .* only <think> and </think> are known"):
        chat_of(CHATML.replace("m['content']", cut))


def test_a_word_about_thoughts_makes_no_thinking_model() -> None:
    assert chat_of("{#- <think> and </think> are for others #}" + CHATML).thought is None


def test_a_template_that_closes_an_empty_thought_leaves_none_to_the_policy() -> None:
    chat = chat_of(CHATML.replace("assistant\\n", "assistant\\n<think>\\n\\n</think>\\n\\n"))
    assert chat.thought is None and not chat.opens_thought and chat.earlier_thoughts == "dropped"
    text = chat.tokenizer.decode(encode_trace(_trace(), chat).token_ids)
    assert text.startswith("Think.\n<tool_call>") and text.count("<think>\n\n</think>\n\nThink.\n<tool_call>") == 1


# --- tokenizers
# ----------------------------------------------------------------------------------------------------------------------
