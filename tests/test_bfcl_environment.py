"""BFCL's tasks: ground truth passes, nothing else does by accident; windows, tools and groups are those asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pact_nemo.checkout import ROOT
from pact_nemo.config.load import load_config
from pact_nemo.environments.base import Outcome, ToolCall
from pact_nemo.environments.bfcl import data
from pact_nemo.environments.bfcl.data import CATEGORIES, data_dir, function_documents, load_category
from pact_nemo.environments.grounding import is_grounded
from pact_nemo.errors import ConfigError, DataError
from tests.workers.bfcl_play import environment, left_behind, play, reference
from tests.workers.bfcl_tasks import bfcl_environment


@pytest.mark.parametrize(("window", "count"), [("full", 800), ("turn", 912)])
def test_ground_truth_of_every_task_passes_the_official_checker(window: str, count: int) -> None:
    env = environment(window)
    tasks = env.tasks()
    assert len(tasks) == count and len({task.id for task in tasks}) == count
    failed = {task.id: outcome.reason for task in tasks if not (outcome := play(env, task, reference(task))[0]).success}
    assert failed == {}
    assert left_behind() == []


@pytest.mark.parametrize("window", ["full", "turn"])
def test_doing_nothing_or_nonsense_passes_no_task(window: str) -> None:
    env = environment(window)
    for task in env.tasks():
        empty: list[list[ToolCall]] = [[] for _ in task.reference_calls]
        assert not play(env, task, empty)[0].success, task.id
        unknown = [[ToolCall("no_such_function", {})] for _ in task.reference_calls]
        assert not play(env, task, unknown)[0].success, task.id


def test_turn_window_fails_with_an_altered_argument() -> None:
    env = environment("turn", "multi_turn_base")
    insensitive: list[str] = []
    checked = 0
    for task in env.tasks():
        call = task.reference_calls[0][-1]
        texts = [key for key, value in call.arguments.items() if isinstance(value, str)]
        if not texts:
            continue
        checked += 1
        wrong = ToolCall(call.name, {**call.arguments, texts[0]: "zz_other"})
        outcome, _ = play(env, task, [[*task.reference_calls[0][:-1], wrong]])
        if outcome.success:
            insensitive.append(f"{call.name}({texts[0]})")
        else:
            assert outcome.score == 0.0 and outcome.reason.startswith("multi_turn:")
    assert checked > 150
    # BFCL's own backends ignore or can't tell these; nothing else passes
    assert sorted(insensitive) == ["add_to_watchlist(stock)"] * 6 + ["authenticate_travel(client_id)"] * 2


def test_turn_window_continues_from_the_replayed_state() -> None:
    env = environment("turn", "multi_turn_base")
    task = next(task for task in env.tasks() if task.id == "multi_turn_base_0#2")
    session = env.start(task)
    # only after the ground truth of turns 0 and 1 is the file there
    assert "sorted_content" in session.execute([ToolCall("sort", {"file_name": "final_report.pdf"})])[0]
    session.close()
    fresh = environment("full", "multi_turn_base").tasks()[0]
    session = environment("full", "multi_turn_base").start(fresh)
    assert "error" in session.execute([ToolCall("sort", {"file_name": "final_report.pdf"})])[0].lower()
    session.close()


def test_turn_window_filters() -> None:
    env = environment("turn", "multi_turn_base")
    for task in env.tasks():
        assert 1 <= len(task.reference_calls[0]) <= 2 and len(task.user_turns) == 1
        if len(task.reference_calls[0]) == 1:
            schema = {tool["name"]: tool["parameters"]["properties"] for tool in task.tools}[
                task.reference_calls[0][0].name
            ]
            for key, value in task.reference_calls[0][0].arguments.items():
                assert value == schema[key].get("default") or is_grounded(value, task.user_turns[0][0]["content"]), (
                    task.id,
                    key,
                )
    loose = bfcl_environment(("multi_turn_base",), window="turn", grounded_only=False, max_calls=None).tasks()
    assert len(loose) > len(env.tasks()) and max(len(task.reference_calls[0]) for task in loose) > 2
    short = bfcl_environment(("multi_turn_base",), window="turn", max_user_chars=80).tasks()
    assert short and all(len(task.user_turns[0][0]["content"]) <= 80 for task in short)


def test_groups_are_scenarios_shared_by_the_categories() -> None:
    groups = {
        category: {task.group for task in environment("full").tasks() if task.category == category}
        for category in CATEGORIES
    }
    assert all(group == {str(number) for number in range(200)} for group in groups.values())
    task = environment("turn", "multi_turn_base").tasks()[0]
    assert task.id.startswith(f"multi_turn_base_{task.group}#")


def test_an_episode_that_stops_early_fails_as_in_the_official_runner() -> None:
    env = environment("full", "multi_turn_base")
    task = env.tasks()[1]
    session = env.start(task)
    for call in task.reference_calls[0]:
        session.execute([call])
    assert session.outcome() == Outcome(False, 0.0, "multi_turn:force_terminated")
    session.close()
    lenient = bfcl_environment(("multi_turn_base",), window="turn", judge_unfinished=True)
    task = lenient.tasks()[0]
    session = lenient.start(task)
    for call in task.reference_calls[0]:
        session.execute([call])
    assert session.outcome().success
    assert session.outcome().success  # may be asked twice
    session.close()


def test_miss_func_reveals_its_tools_at_the_right_turn() -> None:
    env = environment("full", "multi_turn_miss_func")
    seen = 0
    for task, entry in zip(env.tasks(), load_category("multi_turn_miss_func"), strict=True):
        offered = {tool["name"] for tool in task.tools}
        session = env.start(task)
        for turn in range(1, len(task.user_turns)):
            upcoming = session.next_user_turn()
            assert upcoming is not None
            messages, revealed = upcoming
            names = [tool["name"] for tool in revealed]
            expected = entry.record["missed_function"].get(str(turn), [])
            assert sorted(names) == sorted(expected)
            assert not offered & set(names)
            if names:
                assert messages == [
                    {
                        "role": "user",
                        "content": "I have updated some more functions you can choose from. What about now?",
                    }
                ]
                seen += 1
        session.close()
    assert seen == 200


@pytest.mark.parametrize(
    ("missed", "says"),
    [
        ({"1": ["no_such_tool"]}, r"holds back no_such_tool, not offered before.*missed_function\.1"),
        ({"1": ["cd"], "01": ["ls"]}, r"lists of tool names by turn number.*missed_function"),
        ({"1": ["cd"], "2": ["cd"]}, r"holds back cd, not offered before.*missed_function\.2"),
        ({"40": ["cd"]}, r"tools can't come in that turn.*missed_function\.40"),
        ({"0": ["cd"]}, r"tools can't come in that turn.*missed_function\.0"),
    ],
)
def test_tools_that_are_held_back_come_in_a_later_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missed: dict[str, list[str]], says: str
) -> None:
    """Otherwise the policy would miss them for good, or have them from the start, without a word."""
    name = "BFCL_v4_multi_turn_miss_func.json"
    row = json.loads((data_dir() / name).read_text(encoding="utf-8").splitlines()[0]) | {"missed_function": missed}
    (tmp_path / "possible_answer").mkdir()
    (tmp_path / name).write_text(json.dumps(row))
    (tmp_path / "possible_answer" / name).write_bytes((data_dir() / "possible_answer" / name).read_bytes())
    monkeypatch.setattr(data, "data_dir", lambda: tmp_path)
    with pytest.raises(DataError, match=says):
        load_category("multi_turn_miss_func")


def test_irrelevance_check_is_a_setting() -> None:
    strict = bfcl_environment(("multi_turn_miss_func",), irrelevance_check=True)
    task = next(
        task
        for task in strict.tasks()
        if task.category == "multi_turn_miss_func" and any(t["name"] == "pwd" for t in task.tools)
    )
    empty = next(turn for turn, calls in enumerate(task.reference_calls) if not calls)
    calls = reference(task)
    calls[empty] = [ToolCall("pwd", {})]
    assert play(strict, task, calls)[0].reason == "multi_turn:irrelevance_error:decoder_success"
    assert play(environment("full", "multi_turn_miss_func"), task, calls)[0].success


def test_max_tools_keeps_the_needed_ones_and_is_seeded() -> None:
    tasks = environment("turn", "multi_turn_base", max_tools=5).tasks()
    again = bfcl_environment(("multi_turn_base",), window="turn", max_tools=5).tasks()
    other = bfcl_environment(("multi_turn_base",), window="turn", max_tools=5, seed=1).tasks()
    documents = function_documents()
    firsts = 0
    for task, same in zip(tasks, again, strict=True):
        names = [tool["name"] for tool in task.tools]
        assert names == [tool["name"] for tool in same.tools]
        assert len(names) == len(set(names)) == 5
        needed = {call.name for call in task.reference_calls[0]}
        assert needed <= set(names)
        classes = task.data["entry"].classes
        assert set(names) <= {tool["name"] for name in classes for tool in documents[name]}
        firsts += names[0] in needed
    assert any(a.tools != b.tools for a, b in zip(tasks, other, strict=True))
    assert 0 < firsts < len(tasks) / 2  # the needed tool has no fixed place


def test_schemas_use_json_schema_types() -> None:
    def types(schema: dict) -> set[str]:
        inner = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
        return {schema["type"]}.union(*(types(item) for item in inner))

    found = set().union(*(types(tool["parameters"]) for tools in function_documents().values() for tool in tools))
    assert found <= {"object", "array", "string", "integer", "number", "boolean"}


def test_settings_are_checked() -> None:
    for settings in (
        {"categories": ("nope",)},
        {"categories": "multi_turn_base"},
        {"window": "half"},
    ):
        with pytest.raises(ConfigError):
            bfcl_environment(**settings)
    with pytest.raises(ConfigError, match="environment_config.max_tools=0"):
        load_config([ROOT / "conf" / "pact_bfcl.yaml"], ["environment_config.max_tools=0"])


def test_importing_is_quiet_and_drags_in_no_vendor_sdk() -> None:
    code = (
        "import sys\nfrom pact_nemo.environments.bfcl.environment import BFCLConfig, BFCLEnvironment\n"
        "env = BFCLEnvironment(BFCLConfig(['multi_turn_base']))\nsession = env.start(env.tasks()[0])\n"
        "session.next_user_turn(); session.outcome(); session.close()\n"
        "bad = {'openai', 'anthropic', 'cohere', 'mistralai', 'boto3', 'google.genai', 'torch', 'transformers'}\n"
        "bad &= set(sys.modules)\nassert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("value", "text", "expected"),
    [
        ("notes.txt", "Open NOTES.TXT now", True),
        ("notes.txt", "Open the notes", False),
        (5, "give me 5 lines", True),
        (5, "give me 15 lines", False),
        (5, "give me 5.5 lines", False),
        (5.0, "pay 5 dollars.", True),
        (1500, "pay 1,500 dollars", True),
        ("ab", "a cab", False),
        (".", "the end.", False),
        (True, "", True),
        (["x1y", 3], "x1y and 3", True),
        (["x1y", 4], "x1y and 3", False),
        ({"k": "abc"}, "abc", True),
    ],
)
def test_grounding(value: object, text: str, expected: bool) -> None:
    assert is_grounded(value, text) is expected
