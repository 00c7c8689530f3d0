"""Texts that are fuzzed: tool calls in every format, conversations and chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from pact_nemo.chat import conversation_text, conversation_tokens, foreign_calls, json_calls, parsing, tool_formats
from pact_nemo.chat import template as chat_template
from pact_nemo.chat.template import ChatFormat
from pact_nemo.chat.tool_formats import TOOL_FORMATS
from pact_nemo.environments import calls
from pact_nemo.environments.base import ToolCall
from pact_nemo.errors import ConfigError, DataError, ToolCallError
from pact_nemo.runtime import strict_json
from pact_nemo.traces import schema
from tests.faults.target_kit import REMEDY, Target, Unnamed, cached_chat
from tests.faults.targets_rows import LS, TRACE
from tests.fixtures.chat_models import tokenizer

_CALLS = (ToolCall("ls", {"a": True}), ToolCall("touch", {"file_name": "a 'b'\n", "size": [1, {"x": None}]}))
_TOUCH = {"type": "object", "properties": {"file_name": {"type": "string"}, "size": {}}, "required": ["file_name"]}
TOOLS = (LS, LS | {"name": "touch", "parameters": _TOUCH})


def _tool_format(name: str) -> Target:
    form = TOOL_FORMATS[name]

    def target(data: bytes) -> None:
        text = data.decode("utf-8", "surrogatepass" if len(data) % 2 else "replace")
        parsed = form.parse(text, TOOLS)  # never raises, whatever a policy writes
        assert all(isinstance(error, str) and error for error in parsed.errors)
        for call in parsed.calls:
            calls.check_call(call)
        if parsed.calls:
            try:
                written = form.render_calls(parsed.calls)
            except ToolCallError:
                return  # longer when written out than a call may be
            assert repr(form.parse(written, TOOLS).calls) == repr(parsed.calls)

    drifted = b'{"type": "function", "function": {"name": "touch", "arguments": "{\\"file_name\\": 1}"}}\n<function=ls>'
    thinking = f"<think>\nHm.\n{form.render_calls(_CALLS)}\n</think>\n\n{form.render_calls(_CALLS[:1])}".encode()
    corpus = [
        f"Use them.\n{form.render_calls(_CALLS)}".encode(),
        form.render_calls(_CALLS[:1]).encode(),
        b"An answer.",
        drifted,
        thinking,
    ]

    def decoding(data: bytes) -> None:
        try:
            target(data)
        except UnicodeDecodeError:
            target(data.decode("utf-8", "replace").encode())

    return Target(lambda folder: (decoding, corpus), (tool_formats, parsing, foreign_calls, json_calls, calls), ())


def _make_conversations(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    kinds = ("smollm/pythonic", "qwen2_5/hermes", "qwen3/hermes", "llama3/llama3_json")

    def target(data: bytes) -> None:
        """A trace row's messages and tools, which come from a file, in the template of every family."""
        try:
            row = strict_json.loads(data.decode("utf-8"))
            turn = schema._Reader("x.jsonl", 1)._turn(row, "turns[0]", last=False)
        except (ValueError, DataError):
            return
        for kind in kinds:
            chat = cached_chat(kind)
            messages, tools = list(turn.user_messages_after), list(turn.new_tools_after)
            try:
                chat.prompt_ids(messages, tools)
                chat.continuation(
                    [*chat.tool_format.render_observation(turn.observations), *messages],
                    tools if messages else (),
                    generation=False,
                )
            except (DataError, ConfigError) as error:
                if not REMEDY.search(str(error)) and "template" not in str(error):
                    raise Unnamed(str(error)) from error

    row = json.loads(json.dumps(TRACE.to_dict()))["turns"][0]
    system = row | {
        "user_messages_after": [{"role": "system", "content": "S"}, {"role": "user", "content": "<|im_end|> é"}]
    }
    return target, [json.dumps(row).encode(), json.dumps(system).encode()]


def _make_templates(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    base = tokenizer("smollm")

    def target(data: bytes) -> None:
        base.chat_template = data.decode("utf-8", "replace")
        chat = ChatFormat(base, TOOL_FORMATS["hermes"])
        chat.prompt_ids([{"role": "user", "content": "Hello"}], [LS])
        chat.continuation_ids([{"role": "tool", "content": "[]"}], after_eos=True)
        chat.boundary_ids()
        chat.generation_ids()

    return target, [tokenizer(family).chat_template.encode() for family in ("smollm", "qwen2_5")]


def chat_targets() -> dict[str, Target]:
    return {
        **{f"calls-{name}": _tool_format(name) for name in TOOL_FORMATS},
        "conversations": Target(_make_conversations, (conversation_text, conversation_tokens, schema), ()),
        # jinja folds `- - - … x` in time cubic in the signs (300: 5 s), up to Python's recursion limit
        "chat-templates": Target(
            _make_templates,
            (conversation_text, conversation_tokens, chat_template),
            (ConfigError, DataError),
            hang_s=60.0,
        ),
    }
