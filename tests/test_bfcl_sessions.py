"""BFCL's sessions: they don't touch one another, and call text holds literals only."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pact_nemo.environments.base import Outcome, ToolCall
from pact_nemo.environments.bfcl.backend import protect_strings
from pact_nemo.environments.bfcl.data import function_documents
from pact_nemo.errors import EnvironmentFailure
from tests.workers.bfcl_play import environment, left_behind, play, reference
from tests.workers.bfcl_tasks import bfcl_environment


def test_unknown_tools_are_answered_and_not_executed() -> None:
    env = environment("turn", "multi_turn_base", max_tools=3)
    task = env.tasks()[0]
    session = env.start(task)
    before = [list(turn) for turn in session.steps]
    [text] = session.execute([ToolCall("rm_everything", {"x": 1})])
    assert text.startswith("Error: unknown function 'rm_everything'. Available: ")
    assert all(tool["name"] in text for tool in task.tools)
    hidden = next(
        tool["name"]
        for tool in function_documents()["GorillaFileSystem"]
        if tool["name"] not in {t["name"] for t in task.tools}
    )
    assert "unknown function" in session.execute([ToolCall(hidden, {})])[0]
    assert session.steps == before
    session.close()


def test_wrong_arguments_get_the_benchmark_error_text() -> None:
    env = environment("full", "multi_turn_base")
    session = env.start(env.tasks()[0])
    texts = session.execute(
        [ToolCall("ls", {"colour": "red"}), ToolCall("cd", {}), ToolCall("cd", {"folder": "nowhere"})]
    )
    assert "unexpected keyword argument 'colour'" in texts[0]
    assert "missing 1 required positional argument: 'folder'" in texts[1]
    assert "nowhere" in texts[2]
    session.close()


@pytest.mark.parametrize(
    "call",
    [
        ToolCall("ls", {"a=__import__('os').system('true'), b": 1}),
        ToolCall("ls", {"a": float("nan")}),
        ToolCall("ls", {"a": object()}),
        ToolCall("echo", {"content": "x" * 50_000}),
    ],
)
def test_calls_that_are_no_literals_never_reach_the_backend(call: ToolCall, monkeypatch: pytest.MonkeyPatch) -> None:
    env = environment("full", "multi_turn_base")
    session = env.start(env.tasks()[0])
    monkeypatch.setattr(session._backend, "execute", lambda calls: pytest.fail(f"executed {calls}"))
    assert session.execute([call])[0].startswith("Error: ")
    assert session.steps == [[]]
    session.close()


def test_call_like_text_inside_an_argument_is_kept_as_written() -> None:
    env = environment("full", "multi_turn_base")
    session = env.start(env.tasks()[0])
    content = "run ls() then 'cat (x)' and \"pwd\\\\()\"\n"
    session.execute([ToolCall("touch", {"file_name": "t"}), ToolCall("echo", {"content": content, "file_name": "t"})])
    [text] = session.execute([ToolCall("cat", {"file_name": "t"})])
    import json

    assert json.loads(text) == {"file_content": content}
    session.close()


def test_protect_strings_changes_no_value() -> None:
    rng = random.Random(0)
    for _ in range(300):
        value = "".join(rng.choice("ab ()'\"\\\n1_é") for _ in range(rng.randrange(12)))
        text = protect_strings(f"f(x={value!r})")
        assert eval(text, {"f": lambda x: x}) == value  # noqa: S307 - the literal was made two lines above
        assert text.count("(") == 1 or "(" in value


@pytest.mark.parametrize(
    "call",
    [
        ToolCall("power", {"base": 10, "exponent": 10**9}),
        ToolCall("power", {"base": 10**6, "exponent": 10**7}),
        ToolCall("logarithm", {"value": 3.0, "base": 2.0, "precision": 10**9}),
        ToolCall("square_root", {"number": 2, "precision": 10**9}),
    ],
)
def test_endless_arithmetic_is_refused(call: ToolCall) -> None:
    env = environment("full", "multi_turn_base")
    task = next(task for task in env.tasks() if any(tool["name"] == "power" for tool in task.tools))
    session = env.start(task)
    started = time.monotonic()
    assert session.execute([call])[0].startswith("Error: ")
    assert time.monotonic() - started < 20
    assert session.execute([ToolCall("power", {"base": 2, "exponent": 10})]) == ['{"result": 1024}']
    session.close()


def test_a_call_after_the_end_is_an_environment_failure() -> None:
    env = environment("turn", "multi_turn_base")
    session = env.start(env.tasks()[0])
    assert session.next_user_turn() is None
    with pytest.raises(EnvironmentFailure):
        session.execute([ToolCall("ls", {})])
    session.close()
    session.close()


def test_long_observations_are_cut_for_the_policy_only() -> None:
    env = bfcl_environment(("multi_turn_long_context",), window="full", max_observation_chars=50)
    task = env.tasks()[0]
    outcome, observations = play(env, task, reference(task))
    assert outcome.success
    assert max(map(len, observations)) == 50 + len(" [cut]")


def test_concurrent_sessions_give_what_serial_ones_give() -> None:
    env = environment("full")
    rng = random.Random(1)
    tasks = [rng.choice(env.tasks()) for _ in range(40)]
    tasks += [tasks[0]] * 12  # the same task many times at once
    plans = []
    for index, task in enumerate(tasks):
        calls = reference(task)
        if index % 3 == 1:  # some episodes go wrong, each in its own way
            calls[index % len(calls)] = [ToolCall(task.tools[index % len(task.tools)]["name"], {})]
        plans.append((task, calls))
    serial = [play(env, task, calls) for task, calls in plans]
    barrier = threading.Barrier(8)

    def worker(lane: int) -> list[tuple[int, tuple[Outcome, list[str]]]]:
        barrier.wait(timeout=30)
        return [(index, play(env, *plans[index])) for index in range(lane, len(plans), 8)]

    with ThreadPoolExecutor(8) as pool:
        parallel = dict(pair for lane in pool.map(worker, range(8)) for pair in lane)
    assert [parallel[index] for index in range(len(plans))] == serial
    assert any(outcome.success for outcome, _ in serial) and any(not outcome.success for outcome, _ in serial)
    assert left_behind() == []


def test_interleaved_sessions_of_one_task_do_not_see_each_other() -> None:
    env = environment("full", "multi_turn_base")
    task = env.tasks()[0]
    one, two = env.start(task), env.start(task)
    one.execute([ToolCall("mkdir", {"dir_name": "only_one"})])
    assert "only_one" in one.execute([ToolCall("ls", {})])[0]
    assert "only_one" not in two.execute([ToolCall("ls", {})])[0]
    one.close()
    assert "only_one" not in two.execute([ToolCall("ls", {})])[0]
    two.close()
    assert left_behind() == []
