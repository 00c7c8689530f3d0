"""Tools of MCP servers: real server processes, written with the official package."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from pact_nemo.environments.own.mcp_tools import MCPHost
from pact_nemo.environments.own.settings import ONE_OF_THEM, MCPConfig
from pact_nemo.errors import ConfigError, EnvironmentFailure

ROOT = Path(__file__).resolve().parents[1]
BENCH = str(Path(__file__).with_name("fixtures") / "mcp_bench.py")


def config(*arguments: str, **settings: Any) -> MCPConfig:
    return MCPConfig(**{"command": ["python", BENCH, *arguments], "timeout": 60.0, **settings})


def eventually(true: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (done := true()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return done


def guarded(words: str) -> list[int]:
    """The servers with these words in their command, or their guard's."""
    found = []
    for each in psutil.Process().children(True):
        with contextlib.suppress(psutil.Error):
            if words in " ".join(each.cmdline()):
                found.append(each.pid)
    return found


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid)


@pytest.fixture(scope="module")
def host() -> Iterator[MCPHost]:
    made = MCPHost(config(), workers=4)
    yield made
    made.close()


@pytest.fixture
def opened(host: MCPHost) -> Iterator[Any]:
    tools = host.open({"id": "t1"})
    yield tools
    tools.close()


@pytest.mark.parametrize("place", ["docs/start/your-own-agent.md", "recipes/pact_own.py", "the message"])
def test_the_server_that_is_given_as_an_example_starts(place: str) -> None:
    text = ONE_OF_THEM if place == "the message" else (ROOT / place).read_text()
    example = re.search(r"agent\.mcp\.command=\[([^\]]*)\]", text)
    assert example
    made = MCPHost(MCPConfig(command=example[1].split(","), timeout=60.0), workers=1)
    try:
        assert "convert_time" in [each["name"] for each in made.schemas]
    finally:
        made.close()


def test_the_tools_are_shown_with_the_schemas_of_the_server_in_its_order(host: MCPHost) -> None:
    assert [each["name"] for each in host.schemas][:3] == ["add", "files.read-all", "write"]
    add = host.schemas[0]
    assert add["description"] == "Add to the counter of this process."
    assert add["parameters"]["properties"]["number"]["type"] == "integer"
    assert add["parameters"]["required"] == ["number"]
    assert host.offers == frozenset()


def test_each_rollout_has_a_server_and_a_folder_of_its_own(host: MCPHost) -> None:
    first, second = host.open({"id": "a"}), host.open({"id": "b"})
    try:
        assert [first.call("add", {"number": 3}), first.call("add", {"number": 4})] == ["3", "7"]
        assert second.call("add", {"number": 1}) == "1"
        folder = first.call("write", {"name": "note"})
        assert second.call("write", {"name": "other"}) != folder
        assert first.call("files.read-all", {}) == "note"
    finally:
        first.close()
        second.close()
    assert eventually(lambda: not os.path.exists(folder))
    with pytest.raises(EnvironmentFailure, match="its tools are closed"):
        first.call("add", {"number": 1})


def test_what_the_policy_does_wrong_is_an_observation(opened: Any) -> None:
    assert opened.call("add", {"number": "x"}) == "Error: ValidationError: number: 'x' is not of type 'integer'"
    assert opened.call("add", {}) == "Error: ValidationError: 'number' is a required property"
    assert opened.call("gone", {}).startswith('Error: UnknownTool: there is no tool "gone"; tools: add, files.read')
    assert opened.call("fail", {"why": "\ud800"}).startswith("Error: ValidationError: a text holds half a surrogate")
    assert opened.call("slow", {"seconds": float("nan")}) == "Error: ValidationError: a number is not finite"
    assert opened.call("fail", {"why": "boom"}).startswith("Error: Error executing tool fail")
    assert opened.call("refuse", {}) == "Error: the door is shut"
    assert opened.call("add", {"number": 1}) == "1"  # and it lives


def test_a_long_result_comes_whole_and_what_is_no_text_is_named(opened: Any) -> None:
    assert opened.call("long", {"characters": 5_000_000}) == "x" * 5_000_000
    assert opened.call("picture", {}) == "before\n[image, image/png, 12 bytes: not shown]\nafter"


def test_a_call_is_fast_and_an_open_server_is_ready(host: MCPHost, opened: Any) -> None:
    def timed() -> float:
        began = time.perf_counter()
        opened.call("add", {"number": 1})
        return time.perf_counter() - began

    assert statistics.median(timed() for _ in range(20)) < 0.25  # 6 to 9 ms on two busy cores


def test_a_server_sees_no_secret_of_the_trainer(opened: Any) -> None:
    harmless = "PATH HOME LANG LC_ALL LC_CTYPE LOGNAME SHELL TERM USER TMPDIR TZ"
    assert {"PATH", "HOME"} <= set(opened.call("environment", {}).split()) <= set(harmless.split())


def test_a_dead_server_is_a_failure_that_says_how_it_ended(host: MCPHost) -> None:
    tools = host.open({"id": "t7"})
    with pytest.raises(EnvironmentFailure, match=r"task 't7': tool 'leave': .*ended \(exit 5\): leaving on purpose"):
        tools.call("leave", {"code": 5})
    with pytest.raises(EnvironmentFailure, match="exit 5"):
        tools.call("add", {"number": 1})
    tools.close()


@pytest.mark.parametrize("apart", [False, True])
def test_a_server_leaves_no_process_behind(host: MCPHost, apart: bool) -> None:
    tools = host.open({"id": "t"})
    helper = int(tools.call("helper", {"apart": apart}))
    assert not is_gone(helper)
    tools.close()
    assert eventually(lambda: is_gone(helper))


def test_more_rollouts_than_workers_wait_for_one_to_end(host: MCPHost) -> None:
    with ThreadPoolExecutor(5) as threads:
        opened = list(threads.map(lambda number: host.open({"id": str(number)}), range(4)))
        fifth = threads.submit(host.open, {"id": "5"})
        assert list(threads.map(lambda tools: tools.call("add", {"number": 1}), opened)) == ["1"] * 4
        assert not fifth.done()
        opened[0].close()
        assert fifth.result(timeout=60).call("add", {"number": 2}) == "2"
        for tools in (*opened, fifth.result()):
            tools.close()


def test_after_close_nothing_is_left() -> None:
    made = MCPHost(config(), workers=3)
    tools = made.open({"id": "a"})
    base = Path(tools.call("write", {"name": "x"})).parent
    servers = [
        pid
        for guard in guarded(str(base))
        for pid in (guard, *(each.pid for each in psutil.Process(guard).children(True)))
    ]
    assert len(servers) >= 2
    made.close()
    made.close()
    assert not base.exists() and all(is_gone(pid) for pid in servers)
    for use in (lambda: made.open({"id": "b"}), lambda: tools.call("add", {"number": 1})):
        with pytest.raises(EnvironmentFailure, match="closed"):
            use()
    tools.close()


def test_a_late_call_is_a_failure_and_its_server_is_killed() -> None:
    made = MCPHost(config(timeout=8.0), workers=1)
    try:
        tools = made.open({"id": "a"})
        helper = int(tools.call("helper", {"apart": False}))
        with pytest.raises(EnvironmentFailure, match=r"tool 'slow': took longer than agent.mcp.timeout=8 s"):
            tools.call("slow", {"seconds": 300})
        assert eventually(lambda: is_gone(helper))
        with pytest.raises(EnvironmentFailure, match="took longer"):
            tools.call("add", {"number": 1})
        again = made.open({"id": "b"})  # the place is free, though the first one wasn't closed
        assert again.call("add", {"number": 2}) == "2"
    finally:
        made.close()


def test_a_shared_server_serves_all_and_is_started_again() -> None:
    made = MCPHost(config(shared=True, hidden={"root": "{workdir}"}), workers=2)
    try:
        tools = [made.open({"id": str(number)}) for number in range(3)]  # more than there are workers
        assert [each.call("add", {"number": 1}) for each in tools] == ["1", "2", "3"]
        with ThreadPoolExecutor(3) as threads:
            assert list(threads.map(lambda each: each.call("files.read-all", {}), tools)) == ["", "", ""]
        with pytest.raises(EnvironmentFailure, match="exit 1"):
            tools[0].call("leave", {"code": 1})
        with pytest.raises(EnvironmentFailure):
            tools[1].call("add", {"number": 1})
        assert made.open({"id": "new"}).call("add", {"number": 5}) == "5"
    finally:
        made.close()


def test_include_rename_and_hidden_arguments() -> None:
    settings = config(
        include=["who", "files.read-all"],
        rename={"files.read-all": "files"},
        hidden={"repository": "{task[info][repository]}#{rollout}", "limit": "{task[limit]}"},
    )
    made = MCPHost(settings, workers=1)
    try:
        assert [each["name"] for each in made.schemas] == ["files", "who"]
        shown = made.schemas[1]["parameters"]
        assert list(shown["properties"]) == ["text"] and shown["required"] == ["text"]
        tools = made.open({"id": "t", "info": {"repository": "a/b"}, "limit": 3})
        assert tools.call("who", {"text": "x", "repository": "stolen"}) == "'a/b#1' 3 'x'"
        assert tools.call("files.read-all", {}).startswith("Error: UnknownTool")
        tools.close()
        tools = made.open({"id": "t"})
        with pytest.raises(
            EnvironmentFailure, match=r"hidden.repository: the task has no .*; at \[info\] there is: id"
        ):
            tools.call("who", {"text": "x"})
    finally:
        made.close()


def test_a_server_that_needs_the_task_is_started_for_it() -> None:
    made = MCPHost(config(env={"TASK_NAME": "{task[id]}"}), workers=2, example={"id": "first"})
    try:
        assert "TASK_NAME" in made.open({"id": "a"}).call("environment", {})
        with pytest.raises(EnvironmentFailure, match="task '[?]': agent.mcp.env.TASK_NAME: the task has no"):
            made.open({})
    finally:
        made.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include": ["adds"]}, "agent.mcp.include: 'adds' is no tool of the server; there are: add, files.read-all"),
        ({"rename": {"adds": "x"}}, "agent.mcp.rename: 'adds' is no tool"),
        ({"rename": {"add": "write"}}, "'add' and 'write' would both be shown as 'write'"),
        ({"hidden": {"repo": "x"}}, "agent.mcp.hidden: 'repo' is no argument of its tools; there are: number, pattern"),
        ({"hidden": {"limit": "ten"}}, "agent.mcp.hidden.limit='ten': has to be integer, as JSON"),
    ],
)
def test_names_that_the_server_does_not_have_are_refused(settings: dict[str, Any], message: str, host: MCPHost) -> None:
    from pact_nemo.environments.own.mcp_shapes import offered_tools

    tools = next(iter(host._servers._all)).tools  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=message):
        offered_tools(config(**settings), tools)


def test_nothing_outlives_a_trainer_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from pact_nemo.environments.own.mcp_tools import MCPHost\n"
        "from pact_nemo.environments.own.settings import MCPConfig\n"
        f"host = MCPHost(MCPConfig(command=['python', {BENCH!r}], timeout=60.0), 2)\n"
        "tools = host.open({'id': 'a'})\n"
        "print(tools.call('helper', {'apart': True}), tools.call('write', {'name': 'x'}), flush=True)\n"
        "time.sleep(300)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout is not None
        helper, folder = trainer.stdout.readline().split()
        everyone = [each.pid for each in psutil.Process(trainer.pid).children(True)]
        assert int(helper) in everyone and len(everyone) >= 3
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    assert eventually(lambda: all(is_gone(pid) for pid in everyone))
    assert eventually(lambda: not Path(folder).parent.exists())


@pytest.mark.parametrize("name", ["time", "git"])
def test_the_published_servers(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(f"mcp_server_{name}") is None:
        pytest.skip(f"mcp-server-{name} isn't installed")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    options = {"time": ["--local-timezone", "UTC"], "git": ["--repository", str(tmp_path)]}[name]
    hidden = {"repo_path": str(tmp_path)} if name == "git" else {}
    where = {key: os.environ[key] for key in ("PYTHONPATH",) if key in os.environ}
    command = ["python", "-m", f"mcp_server_{name}", *options]
    made = MCPHost(MCPConfig(command=command, env=where, hidden=hidden, timeout=60.0), workers=1)
    try:
        tool, arguments, words = {
            "time": ("get_current_time", {"timezone": "UTC"}, "day_of_week"),
            "git": ("git_status", {}, "On branch"),
        }[name]
        assert words in made.open({}).call(tool, arguments)
    finally:
        made.close()
