"""Settings of an MCP server that can not work are refused by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.environments.own.mcp_templates import LaunchPlan, Rollout, Template
from pact_nemo.environments.own.mcp_tools import MCPHost
from pact_nemo.errors import ConfigError
from tests.test_own_mcp import config, guarded


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("crash", r"ended at start \(exit 3\): no database at 10.0.0.1"),
        (
            "sdk1",
            "No module named 'mcp.server.fastmcp'(.|\n)*seems to be written for version 1 of the Python package mcp",
        ),
        ("empty", "the server has no tools"),
        ("hang", "did not answer within agent.mcp.timeout=3 s"),
    ],
)
def test_a_failed_start_is_an_error_of_the_configuration(start: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MCPHost(config("--start", start, timeout=3.0 if start == "hang" else 60.0), workers=1)
    assert not guarded(f"--start {start}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"command": ["no-such-server"]}, "the program 'no-such-server' isn't found in .*agent.mcp.env.PATH"),
        (
            {"command": ["python", "{folder}"]},
            r"agent.mcp.command\[1\]: {folder} is no placeholder; there are {workdir}",
        ),
        ({"env": {"A": "{task}"}}, "agent.mcp.env.A: {task} is no placeholder"),
        ({"cwd": "/nowhere/{rollouts}"}, "agent.mcp.cwd: {rollouts} is no placeholder"),
        ({"cwd": "/nowhere"}, "agent.mcp.cwd='/nowhere': there is no such folder"),
        ({"command": ["python", "tests/conftest.py"]}, "is a file of the trainer's folder, .*give its whole path"),
        ({"shared": True, "env": {"A": "{rollout}"}}, "one server for all rollouts can't have {rollout}"),
        ({"env": {"A": "{task[a]}"}}, "there is no task to read the tools with"),
    ],
)
def test_settings_that_can_not_work_are_refused(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(ConfigError, match=message):
        MCPHost(config(**settings), workers=1)


def test_templates() -> None:
    rollout = Rollout(7, "/tmp/w", {"info": {"list": ["a", {"b": 2}], "on": True}})
    text = '{"x": {workdir}} {{workdir}} {rollout} {task[info][list][1]} {task[info][on]} {} { a }'
    assert Template(text, "here").fill(rollout) == '{"x": /tmp/w} {workdir} 7 {"b": 2} true {} { a }'
    plan = LaunchPlan(config("--root", "{task[info][list][0]}", env={"N": "{rollout}"}))
    launch = plan.launch(rollout)
    assert plan.needs_task and launch.command[-1] == "a" and launch.env["N"] == "7" and launch.cwd == "/tmp/w"
    assert launch.env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
