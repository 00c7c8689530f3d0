"""The user's class in processes of its own: what it does wrong is one observation or one failed rollout, never more."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pact_nemo.environments.own import importer, workers
from pact_nemo.environments.own.settings import OwnConfig
from pact_nemo.environments.own.workers import ClassHost, OpenClass
from pact_nemo.errors import ConfigError, EnvironmentFailure

FILE = Path(__file__).parent / "fixtures" / "own_tools.py"
TASK = {"id": "t1", "answer": "59.80", "info": {"stock": {"cup": 2}}}
EPISODE = {"task": TASK, "messages": [], "calls": [], "answer": "It costs 59.80."}


def host(reference: str = f"{FILE}:Hostile", **settings: Any) -> ClassHost:
    return ClassHost(reference, OwnConfig(tools=reference, **{"timeout": 20.0, **settings}))


@pytest.fixture(scope="module", params=["process", "thread", "sandbox"])
def shop(request: pytest.FixtureRequest) -> Iterator[ClassHost]:
    found = host(f"{FILE}:Shop", isolation=request.param)
    yield found
    found.close()


@pytest.fixture(scope="module")
def hostile() -> Iterator[ClassHost]:
    found = host(timeout=3.0, memory_mb=400)
    yield found
    found.close()


def test_the_class_of_the_manual(shop: ClassHost) -> None:
    assert [tool["name"] for tool in shop.schemas] == ["inherited", "lookup", "take", "later", "static", "of_class"]
    assert shop.offers == {"state", "score", "opening"}
    assert shop.schemas[1] == {
        "name": "lookup",
        "description": "Number in stock.",
        "parameters": {"type": "object", "properties": {"sku": {"type": "string"}}, "required": ["sku"]},
    }
    assert len(shop.warnings) == 4 and "Shop.static has no docstring" in " ".join(shop.warnings)
    tools = shop.open(TASK)
    assert tools.opening == "1 kinds"
    assert tools.call("lookup", {"sku": "cup"}) == "2"
    assert tools.call("take", {"sku": "cup"}) == '{"cup": 1}' and tools.state() == {"cup": 1}
    assert tools.call("lookup", {"sku": "pot"}) == "Error: KeyError: 'pot'"
    assert tools.call("lookup", {"sku": 3}) == 'Error: ValidationError: argument "sku": Input should be a valid string'
    assert tools.call("later", {}) == tools.call("later", {}) == "one loop"
    assert (tools.call("static", {}), tools.call("of_class", {}), tools.call("inherited", {})) == ("s", "Shop", "i")
    assert tools.call("reset", {}).startswith('Error: UnknownTool: there is no tool "reset"; tools: inherited, lookup')
    assert tools.score(EPISODE) == 1.0 and tools.score({**EPISODE, "answer": ""}) == 0.0
    tools.close()
    tools.close()
    with pytest.raises(EnvironmentFailure, match="task 't1': its tools are closed"):
        tools.call("lookup", {"sku": "cup"})
    assert TASK["info"] == {"stock": {"cup": 2}}  # rollouts get copies


def test_trl_classes_work_as_they_are() -> None:
    game = host(f"{FILE}:Game")
    assert [tool["name"] for tool in game.schemas] == ["guess"] and game.offers == {"score", "opening"}
    tools = game.open({"id": "t", "word": "cat", "prompt": []})
    assert tools.opening == "a word of 3 letters"
    assert tools.call("guess", {"word": "cat"}) == "right" and tools.score(EPISODE) == 1.0
    tools.close()
    with pytest.raises(
        EnvironmentFailure, match="Game.reset needs 'word', which the task's row does not have; it has id"
    ):
        game.open({"id": "t"})
    game.close()


def test_a_module_of_functions_and_its_siblings() -> None:
    found = host(str(FILE.with_name("own_functions.py")), include=["add"])
    assert [tool["name"] for tool in found.schemas] == ["add"] and not found.offers
    tools = found.open({})
    assert tools.call("add", {"left": 1, "right": 2}) == "3"
    found.close()
    with pytest.raises(ConfigError, match="agent.include names 'sub'; own_functions.py has add, count"):
        host(str(FILE.with_name("own_functions.py")), include=["sub"])


def test_globals_do_not_leak_between_interleaved_rollouts(hostile: ClassHost) -> None:
    one, two = hostile.open(TASK), hostile.open(TASK)
    assert [tools.call("count", {}) for tools in (one, two, one, two)] == ["1", "1", "2", "2"]
    for tools in (one, two):
        tools.close()


OBSERVED = [
    ("exits", "Error: SystemExit: 3"),
    ("interrupts", "Error: KeyboardInterrupt"),
    ("recurses", "Error: RecursionError: maximum recursion depth exceeded"),
    ("raises_odd", "Error: Odd"),
    ("floods", "done"),
    ("leaves_thread", "started"),
    ("forks", "parent"),
    ("surrogate", "a?b"),
    ("allocates", "Error: MemoryError"),
]


@pytest.mark.parametrize(("tool", "text"), OBSERVED)
def test_what_a_tool_does_is_an_observation(hostile: ClassHost, tool: str, text: str) -> None:
    tools = hostile.open(TASK)
    assert tools.call(tool, {}).startswith(text)
    assert tools.call("count", {}) == "1"  # it goes on
    tools.close()


def test_a_result_is_cut_before_it_is_sent(hostile: ClassHost) -> None:
    tools = hostile.open(TASK)
    assert tools.call("returns", {"size": 100_000_000}) == "x" * 10_000_000
    assert tools.call("returns", {"size": 2_000_000_000}) == "Error: MemoryError"
    tools.close()


LOST = [
    ("leaves", r"tool 'leaves': its process ended \(exit code 3\)"),
    ("crashes", r"tool 'crashes': its process ended \(signal 11, SIGSEGV\)"),
    ("kills_itself", r"tool 'kills_itself': its process ended \(signal 9, SIGKILL\)"),
    ("leaves_with_child", r"tool 'leaves_with_child': its process ended \(exit code 0\)"),
    ("hangs", r"tool 'hangs': took longer than 3 s"),
    ("closes_everything", r"tool 'closes_everything': its process (closed the connection|ended \(exit code 1\))"),
    ("lies", r"tool 'lies': its message is too long \(4294967295 bytes"),
    ("babbles", r"tool 'babbles': its process sent no message"),
]


@pytest.mark.parametrize(("tool", "words"), LOST)
def test_a_lost_process_is_a_failed_rollout_of_its_own(hostile: ClassHost, tool: str, words: str) -> None:
    tools, other = hostile.open(TASK), hostile.open(TASK)
    for _ in range(2):  # every further use raises it, too
        with pytest.raises(EnvironmentFailure, match=f"^task 't1': {words}"):
            tools.call(tool, {})
    tools.close()
    assert other.call("count", {}) == "1"
    other.close()


JUDGED = [
    ("score", "2", r"Judge.score gave 2; it gives a number in \[0, 1\]"),
    ("score", "float('nan')", "Judge.score gave nan"),
    ("score", "'1'", "Judge.score gave '1'"),
    ("score", "1 / 0", r"score\(\) raised ZeroDivisionError: division by zero \(.*judge.py:5\)"),
    ("score", "exit()", r"score\(\) raised SystemExit"),
    ("state", "object()", "Judge.state gave no JSON value: object has no JSON form"),
    ("state", "'x' * 70_000_000", "its result can't be sent: TooLong"),
    ("__init__", "1 / 0", r"Judge\(\) raised ZeroDivisionError.*judge.py:5"),
    ("reset", "3", "Judge.reset returned int; it returns None, or a text for the model"),
]


@pytest.mark.parametrize(("method", "value", "words"), JUDGED)
def test_what_is_no_tool_fails_the_rollout(tmp_path: Path, method: str, value: str, words: str) -> None:
    file = tmp_path / "judge.py"
    argument = ", episode" if method == "score" else ""
    body = f"    def {method}(self{argument}):\n        return {value}\n"
    file.write_text(f"class Judge:\n    def tool(self):\n        'Tool.'\n{body}")
    found = host(f"{file}:Judge")
    for _ in range(2):
        with pytest.raises(EnvironmentFailure, match=f"^task 't1': .*{words}"):
            tools = found.open(TASK)
            tools.score(EPISODE) if method == "score" else tools.state()
    until = time.monotonic() + 60
    zygote = psutil.Process(found._importer._process.pid)  # type: ignore[union-attr]
    statuses: list[str] = ["unknown"] * 2
    while len(statuses) != 1 and time.monotonic() < until:  # one waits for the next rollout
        time.sleep(0.1)
        with contextlib.suppress(psutil.NoSuchProcess):
            statuses = [child.status() for child in zygote.children()]
    assert len(statuses) == 1 and psutil.STATUS_ZOMBIE not in statuses
    found.close()


IMPORTED = [
    ("import os; os._exit(3)", r"the process that imports it ended \(exit code 3\)"),
    ("x = 1\nraise OSError('no disk')", r"can't be imported: OSError: no disk \(.*odd.py:2\)$"),
    ("import no_such_package", r"No module named 'no_such_package' \(.*odd.py:1\); is its folder in PYTHONPATH\?"),
    ("class Odd\n  pass", r"SyntaxError: expected ':' \(odd.py, line 1\)"),
    ("import time; time.sleep(60)", "its import took longer than 2 s"),
    ("class Other: pass", "has no Odd; it has Other"),
    ("def Odd(): pass", r"Odd is no class; say agent.tools=.*odd.py agent.include=\[Odd\]"),
    ("class Odd: pass", "offers no tool; Odd has no public function"),
    ("class Odd:\n  def close(self, door: str): ...", "Odd.close: close is no tool but a part of the agent"),
    (
        "class Odd:\n  def __init__(self, a, b): ...\n  def f(self): ...",
        "Odd.__init__: it needs a, b, and is called with",
    ),
    (
        "class Odd:\n  def f(self): ...\n  def score(self, e): ...\n  def get_reward(self): ...",
        "there is get_reward, too",
    ),
]


@pytest.mark.parametrize(("text", "words"), IMPORTED)
def test_a_file_that_is_none_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.setattr(importer, "IMPORT_S", 2.0 if "sleep" in text else 60.0)
    (tmp_path / "odd.py").write_text(text)
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=words):
        host(f"{tmp_path / 'odd.py'}:Odd", timeout=1.0)
    assert not any(name.startswith("odd") for name in set(sys.modules) - before)  # not even in part


def test_no_more_rollouts_at_once_than_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = host(workers=1)
    first = found.open(TASK)
    monkeypatch.setattr(workers, "SLOT_S", 0.2)
    with pytest.raises(EnvironmentFailure, match="no rollout ended within 0.2 s, and agent.workers=1 are open"):
        found.open(TASK)
    monkeypatch.setattr(workers, "SLOT_S", 30.0)
    opened: list[OpenClass] = []
    waiting = threading.Thread(target=lambda: opened.append(found.open(TASK)))
    waiting.start()
    first.close()
    waiting.join(20)
    assert opened[0].call("count", {}) == "1"
    found.close()


def test_what_is_imported_is_little(hostile: ClassHost) -> None:
    tools = hostile.open(TASK)
    assert tools.call("modules", {}) == "[]"
    tools.close()


def test_tracebacks_are_logged_and_not_without_end(
    hostile: ClassHost, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(hostile, "_traces", 0)
    tools = hostile.open(TASK)
    for _ in range(30):
        tools.call("raises_odd", {})
    tools.close()
    said = [record.getMessage() for record in caplog.records]
    assert (
        len(said) == 21 and "task 't1': tool 'raises_odd' raised:\nTraceback" in said[0] and "own_tools.py" in said[0]
    )


def test_a_late_thread_fails_its_rollout() -> None:
    found = host(isolation="thread", timeout=0.3, include=["hangs", "count", "exits"])
    late, other = found.open(TASK), found.open(TASK)
    for tool in ("hangs", "count"):
        with pytest.raises(EnvironmentFailure, match="tool 'hangs': took longer than 0.3 s; its thread goes on"):
            late.call(tool, {})
    assert other.call("exits", {}) == "Error: SystemExit: 3"
    found.close()
