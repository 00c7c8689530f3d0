"""Names that a tool format can't carry: one two-way table for prompts, tasks, traces, calls and messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mcp.types import Tool

from pact_nemo.chat.tool_formats import TOOL_FORMATS, Pythonic
from pact_nemo.checking.data_checks import name_findings
from pact_nemo.config.load import load_config
from pact_nemo.data.conversations import conversations_of, import_traces
from pact_nemo.data.tasks import build_environment
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.calls import check_call
from pact_nemo.environments.own.mcp_shapes import offered_tools
from pact_nemo.environments.own.names import Aliases
from pact_nemo.environments.own.settings import MCPConfig
from pact_nemo.errors import ConfigError
from pact_nemo.runtime.quarantine import Quarantine

ROOT = Path(__file__).resolve().parents[1]
CASE = {
    "name": "flights.search-v2",
    "description": "Find flights.",
    "parameters": {
        "type": "object",
        "properties": {"from": {"type": "string"}, "content-type": {"type": "string"}, "date of travel": {}},
        "required": ["from"],
    },
}


@pytest.mark.parametrize("format_name", sorted(TOOL_FORMATS))
def test_every_format_carries_what_it_shows(format_name: str) -> None:
    """A call by own names, as the model writes it in this format, comes back as the call by own names."""
    chosen = TOOL_FORMATS[format_name]
    aliases = Aliases([CASE], python_names=isinstance(chosen, Pythonic))
    chosen.check_tools(aliases.schemas)
    call = ToolCall("flights.search-v2", {"from": "FRA", "content-type": "x", "date of travel": "May"})
    shown = aliases.shown(call)
    check_call(shown)
    parsed = chosen.parse(chosen.render_calls([shown]), aliases.schemas)
    assert not parsed.errors and [aliases.own(each) for each in parsed.calls] == [call]
    assert aliases.shown(shown) == shown and aliases.own(call) == call  # whichever name is there already


def test_an_mcp_server_may_have_names_with_blanks() -> None:
    schema = {"type": "object", "properties": {"the city": {"type": "string"}}, "required": ["the city"]}
    tools = offered_tools(MCPConfig(command=["x"]), [Tool(name="get weather", input_schema=schema)])
    aliases = Aliases([tool.schema for tool in tools.values()], python_names=False)
    assert aliases.schemas[0]["name"] == "get_weather"
    assert list(aliases.schemas[0]["parameters"]["properties"]) == ["the_city"]
    assert aliases.own(ToolCall("get_weather", {"the_city": "Ulm"})) == ToolCall("get weather", {"the city": "Ulm"})
    assert aliases.table() == {
        "tools": {"get weather": "get_weather"},
        "arguments": {"get weather": {"the city": "the_city"}},
    }
    fault = tools["get weather"].fault({})
    assert fault is not None and "'the_city'" in aliases.shown_text("get weather", fault)


@pytest.mark.parametrize(
    ("names", "python", "both"),
    [
        (["user-id", "user_id"], True, "'user-id' and 'user_id'"),
        (["user id", "user\tid"], False, "'user id' and 'user\\\\tid'"),
    ],
)
def test_two_arguments_that_would_be_one_are_refused_with_both_names(names: list[str], python: bool, both: str) -> None:
    tool = {"name": "look", "parameters": {"type": "object", "properties": {name: {} for name in names}}}
    with pytest.raises(ConfigError, match=f"the arguments of 'look', {both} would both be shown"):
        Aliases([tool], python)


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def conversation(task: str, tool: str) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": tool, "arguments": '{"pattern": "*.no"}'}}
    return {
        "task_id": task,
        "messages": [
            {"role": "user", "content": f"Which files, {task}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": ""},
            {"role": "assistant", "content": "none"},
        ],
    }


def test_tasks_and_traces_may_have_either_name(tmp_path: Path) -> None:
    """An endpoint may have refused the server's name, so that conversations have the other one."""
    server = ROOT / "tests" / "fixtures" / "mcp_bench.py"
    names = ("files.read-all", "files_read_all")
    rows = [
        {"id": f"t{index}", "question": f"Which files, t{index}?", "answer": "none", "tools": [name, "add"],
         "expected_calls": [{"name": name, "arguments": {}}]}
        for index, name in enumerate(names)
    ]  # fmt: skip
    traces = [conversation(f"t{index}", name) for index, name in enumerate(names)]
    words = [
        f"agent.mcp.command=[python,{server}]",
        f"tasks.path={written(tmp_path / 'tasks.jsonl', rows)}",
        f"traces.path={written(tmp_path / 'traces.jsonl', traces)}",
    ]
    config = load_config(ROOT / "conf" / "pact_own-smollm2_135m-cpu.yaml", words)
    environment = build_environment(config)
    try:
        tasks = environment.tasks()
        assert [task.tools[0]["name"] for task in tasks] == ["files_read_all"] * 2
        assert [task.reference_calls for task in tasks] == [((ToolCall("files_read_all", {}),),)] * 2
        told = conversations_of(config, Quarantine())
        found, rejected = import_traces(config, environment, told or [], tasks)
        assert not rejected and [found[task.id][0].turns[0].calls[0].name for task in tasks] == ["files_read_all"] * 2
        session = environment.start(tasks[0])
        try:
            assert session.execute([ToolCall("files_read_all", {"pattern": "*.no"})]) == [""]
        finally:
            session.close()
        (told_names,) = name_findings(environment)
        assert "files.read-all as files_read_all" in told_names.text
    finally:
        environment.close()
