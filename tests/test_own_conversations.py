"""A file that should give an own agent its tasks, and holds no conversations: refused by what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fixtures.conversations import ROW

from pact_nemo.checkout import ROOT
from pact_nemo.config.load import load_config
from pact_nemo.data.tasks import build_environment
from pact_nemo.errors import DataError

PRESET = ROOT / "conf" / "pact_own-smollm2_135m-cpu.yaml"
TOOLS = f"{ROOT / 'examples' / 'shop' / 'shop.py'}:Shop"
PRETTY = json.dumps(ROW, indent=1)
SHAREGPT = json.dumps({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]})
RESPONSES = json.dumps({"input": [{"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}]})
BLOCKS = json.dumps({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "look"}]}]})
TRACE = json.dumps({"version": 1, "task_id": "a", "source": "x", "verified": True, "turns": []})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (SHAREGPT.encode(), "c.jsonl:1: this is a chat in ShareGPT format"),
        (RESPONSES.encode(), "c.jsonl:1: this is a chat in the format of OpenAI's responses"),
        (BLOCKS.encode(), "c.jsonl:1: this is a chat in Anthropic format"),
        (b'{"contents": [{"role": "user", "parts": [{"text": "x"}]}]}', "c.jsonl:1: this is a chat in Gemini format"),
        (json.dumps(ROW).encode("utf-16"), "c.jsonl: not UTF-8 but UTF-16: write the file as UTF-8"),
        (b'{"messages": "\xe9"}\n', "c.jsonl:1: not UTF-8: .*write the file as UTF-8"),
        (f"{PRETTY}\n{PRETTY}\n".encode(), "c.jsonl: not one object a line: an object goes over several lines"),
        (b"- a list\n", "c.jsonl:1: not one object a line: .*repair the line"),
        (json.dumps({"rows": [ROW]}).encode(), "c.jsonl: .* holds its rows under 'rows': write the rows"),
        (b'{"dialogue": "x"}', "c.jsonl:1: a row with dialogue is neither a chat in OpenAI format nor a trace"),
        (TRACE.encode(), "c.jsonl: these are traces, and their tasks are missing: give tasks.path"),
        (None, "c.jsonl: no such file; give the path of conversations"),
    ],
)
def test_without_tasks_a_file_that_is_no_conversations_is_refused_by_what_it_is(
    tmp_path: Path, data: bytes | None, message: str
) -> None:
    path = tmp_path / "c.jsonl"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        build_environment(load_config(PRESET, [f"agent.tools={TOOLS}", f"traces.path={path}"]))
