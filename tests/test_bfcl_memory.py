"""BFCL's memory categories: the published tasks, prompts and verdicts are bfcl-eval's own; memories don't leak; the
training kinds reward what they say.
"""

from __future__ import annotations

import ast
import copy
import json
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.environments.base import Task, ToolCall
from pact_nemo.environments.bfcl.agentic_data import MEMORY_CATEGORIES, load_agentic
from pact_nemo.environments.bfcl.agentic_session import contains_answer
from pact_nemo.environments.bfcl.data import data_dir
from pact_nemo.environments.bfcl.environment import BFCLEnvironment
from pact_nemo.environments.bfcl.memory import Snapshots
from pact_nemo.environments.bfcl.settings import BFCLConfig
from pact_nemo.environments.order import order_fault
from pact_nemo.environments.splits import split
from pact_nemo.errors import ConfigError, EnvironmentFailure
from tests.workers.bfcl_play import left_behind
from tests.workers.bfcl_tasks import bfcl_environment, make_traces

CHAINS = {"student": (10, 50), "customer": (10, 30), "finance": (7, 25), "healthcare": (5, 25), "notetaker": (5, 25)}
PLAYED = ("memory_kv", "memory_rec_sum")


def add(category: str, name: str, value: str) -> ToolCall:
    if category == "memory_kv":
        return ToolCall("core_memory_add", {"key": name, "value": value})
    return ToolCall("memory_append", {"text": f"{name}: {value}\n"})


def published(category: str, folder: Path | None = None) -> BFCLEnvironment:
    return BFCLEnvironment(BFCLConfig(categories=[category]), folder=folder)


def one_chain(env: BFCLEnvironment, chain: str) -> tuple[list[Task], list[Task]]:
    tasks = [task for task in env.tasks() if task.group == chain]
    return [task for task in tasks if task.prepares], [task for task in tasks if not task.prepares]


def hold(env: BFCLEnvironment, task: Task, calls: list[ToolCall]) -> str:
    """Play a conversation with calls in its first turn; what its first message was."""
    session: Any = env.start(task)
    try:
        opening = session.opening()[0]["content"]
        assert all("error" not in text for text in session.execute(calls))
        while session.next_user_turn("I see.") is not None:
            pass
        session.outcome()
        return str(opening)
    finally:
        session.close()


def answered(env: BFCLEnvironment, task: Task, message: str) -> Any:
    session = env.start(task)
    try:
        session.next_user_turn(message)
        return session.outcome()
    finally:
        session.close()


@pytest.mark.parametrize("category", MEMORY_CATEGORIES)
def test_entries_are_the_packages_own(category: str) -> None:
    from bfcl_eval.utils import load_dataset_entry, load_ground_truth_entry

    ours = load_agentic(category)
    official = load_dataset_entry(category, include_language_specific_hint=False)
    answers = [tuple(row["ground_truth"]) for row in load_ground_truth_entry(category)]
    assert len(ours) == 37 + 155
    by_id = {entry.id: entry for entry in ours}
    assert by_id.keys() == {row["id"] for row in official}
    for row in official:
        entry = by_id[row["id"]]
        assert [list(turn) for turn in entry.user_turns] == row["question"]
        assert list(entry.after) == row["depends_on"] and entry.chain == row["scenario"]
        assert [entry.backend] == row["involved_classes"]
        assert [tool["name"] for tool in entry.tools] == [tool["name"] for tool in row["function"]]
    assert [entry.answers for entry in ours if not entry.is_conversation] == answers


@pytest.mark.parametrize("category", PLAYED)
def test_chains_come_in_order_and_are_the_split_groups(category: str) -> None:
    env = published(category)
    try:
        tasks = env.tasks()
        assert order_fault(tasks) is None
        for chain, (conversations, questions) in CHAINS.items():
            held, asked = one_chain(env, chain)
            assert (len(held), len(asked)) == (conversations, questions)
            assert [len(task.after) for task in held] == list(range(conversations))
            assert all(task.after == tuple(each.id for each in held) for task in asked)
        depths = [len(task.after) for task in tasks if task.prepares]
        assert depths == sorted(depths), "so that a part of the tasks keeps all chains busy"
    finally:
        env.close()
    kinds = [bfcl_environment([category], memory=kind).tasks() for kind in ("write", "read")]
    held_out = [{task.group for task in split(some, 2, seed=4)[1]} for some in (tasks, *kinds)]
    assert held_out[0] == held_out[1] == held_out[2] and len(held_out[0]) == 2


def official_instruction() -> Any:
    """BFCL's own function; its module needs parsers that are not installed, so it is taken out of the source."""
    from bfcl_eval.constants import default_prompts

    source = (data_dir().parent / "model_handler" / "utils.py").read_text(encoding="utf-8")
    body = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "add_memory_instruction_system_prompt"
    ]
    for argument in body[0].args.args:
        argument.annotation = None
    body[0].returns = None
    names: dict[str, Any] = dict(vars(default_prompts))
    exec(compile(ast.Module(body, []), "utils.py", "exec"), names)
    return names["add_memory_instruction_system_prompt"]


@pytest.mark.parametrize("category", PLAYED)
def test_prompts_show_the_memory_as_bfcls_own_runner_does(category: str) -> None:
    from bfcl_eval.utils import load_dataset_entry

    official = {row["id"]: row for row in load_dataset_entry(category)}
    instruct, env = official_instruction(), published(category)
    held, asked = one_chain(env, "notetaker")
    kept: list[str] = []
    try:
        for number, task in enumerate([*held, asked[3]]):
            session: Any = env.start(task)
            shown = session._memory.backend.instance(session._memory.entry.backend)
            wanted = instruct(copy.deepcopy(official[task.id]["question"]), category, "notetaker", shown)
            assert session.opening() == wanted[0]
            assert all(text in wanted[0][0]["content"] for text in kept)
            kept.append(f"fact {number}")
            if task.prepares:
                session.execute([add(category, f"note_{'abcdef'[number]}", kept[-1])])
                session.outcome()
            session.close()
    finally:
        env.close()
    assert left_behind() == []


@pytest.mark.parametrize("category", PLAYED)
def test_published_answers_pass_and_wrong_ones_fail_on_every_question(category: str, tmp_path: Path) -> None:
    env = published(category, tmp_path)
    empty = json.dumps({"memory": ""} if category == "memory_rec_sum" else {"core_memory": {}, "archival_memory": {}})
    asked = [task for task in env.tasks() if not task.prepares]
    try:
        for name in {task.after[-1] for task in asked}:
            (tmp_path / "memory" / f"{name}.json").write_text(empty)
        assert len(asked) == 155
        for task in asked:
            for answer in task.data["entry"].answers:
                good = answered(env, task, f"{{'answer': '{answer}', 'context': 'You said so.'}}")
                assert (good.success, good.score, good.reason) == (True, 1.0, "ok"), task.id
            bad = answered(env, task, "{'answer': 'I do not know', 'context': 'I do not know'}")
            assert (bad.success, bad.score, bad.reason) == (False, 0.0, "agentic:answer_not_found"), task.id
            assert answered(env, task, " ").reason == "agentic:no_last_message"
        session = env.start(asked[0])
        assert session.outcome().reason == "agentic:no_last_message", "a limit cut it before the last message"
        session.close()
    finally:
        env.close()


@pytest.mark.parametrize("category", PLAYED)
def test_chains_at_once_give_what_they_give_one_by_one(category: str, tmp_path: Path) -> None:
    def play(env: BFCLEnvironment, chain: str) -> list[str]:
        shown = []
        for number, task in enumerate(one_chain(env, chain)[0][:4]):
            shown.append(hold(env, task, [add(category, f"note_{'abcd'[number]}", f"{chain} {number}")]))
        return shown

    one_by_one, at_once = published(category, tmp_path / "one"), published(category, tmp_path / "many")
    try:
        wanted = [play(one_by_one, chain) for chain in CHAINS]
        barrier = threading.Barrier(len(CHAINS))

        def worker(chain: str) -> list[str]:
            barrier.wait(timeout=30)
            return play(at_once, chain)

        with ThreadPoolExecutor(len(CHAINS)) as threads:
            assert list(threads.map(worker, CHAINS)) == wanted
    finally:
        one_by_one.close()
        at_once.close()
    files = {path.name: path.read_text() for path in (tmp_path / "one" / "memory").glob("*.json")}
    assert files == {path.name: path.read_text() for path in (tmp_path / "many" / "memory").glob("*.json")}
    assert len(files) == 4 * len(CHAINS) and left_behind() == []


def test_a_conversation_that_is_played_again_starts_from_its_predecessor(tmp_path: Path) -> None:
    env = published("memory_kv", tmp_path)
    first, second, third = one_chain(env, "finance")[0][:3]
    try:
        hold(env, first, [add("memory_kv", "a", "1")])
        hold(env, second, [add("memory_kv", "b", "2")])
        again = hold(env, second, [add("memory_kv", "b", "two")])
        assert '"a": "1"' in again and '"b"' not in again
        assert '"b": "two"' in hold(env, third, [])
        session = env.start(second)  # it fails this time: nothing asks for its outcome
        session.execute([add("memory_kv", "b", "2")])
        session.close()
        with pytest.raises(EnvironmentFailure, match=rf"{third.id}: the conversation {second.id} before it"):
            env.start(third)
    finally:
        env.close()


def _take(folder: Path, answer: Any) -> None:
    try:
        Snapshots(folder).open()
    except ConfigError as error:
        answer.put(str(error))


def test_two_evaluations_never_share_a_folder(tmp_path: Path) -> None:
    env = published("memory_kv", tmp_path)
    env.tasks()
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    other = context.Process(target=_take, args=(tmp_path, answer))
    other.start()
    assert "in use by another evaluation" in answer.get(timeout=30)
    other.join(30)
    with pytest.raises(ConfigError, match="in use by another evaluation"):
        published("memory_rec_sum", tmp_path).tasks()
    env.close()
    again = published("memory_kv", tmp_path)
    again.tasks()
    again.close()
    one, two = published("memory_kv"), published("memory_kv")
    hold(one, one_chain(one, "finance")[0][0], [add("memory_kv", "a", "1")])
    with pytest.raises(EnvironmentFailure):
        two.start(one_chain(two, "finance")[0][1])
    folder = one._agentic._snapshots.folder  # type: ignore[union-attr]
    one.close()
    two.close()
    assert not folder.exists(), "a temporary folder goes with its environment"


@pytest.mark.parametrize("category", PLAYED)
def test_writing_is_paid_by_the_share_of_answers_that_the_memory_holds(category: str) -> None:
    env = bfcl_environment([category], memory="write")
    tasks = env.tasks()
    assert len(tasks) == 37 and {task.category for task in tasks} == {f"{category}_write"}
    assert sum(len(task.data["targets"]) for task in tasks) == 130
    traces, rejected = make_traces(env, tasks)
    assert len(traces) == 37 and not rejected and all(trace.verified for trace in traces)
    task = max(tasks, key=lambda task: len(task.data["targets"]))
    targets = task.data["targets"]

    def score(*texts: str) -> Any:
        session: Any = env.start(task)
        session.execute([add(category, f"note_{'abcdefg'[i]}", text) for i, text in enumerate(texts)])
        outcome = session.outcome()
        session.close()
        return outcome

    assert score().score == 0.0 and score("nothing to see").score == 0.0
    one = score(targets[0].answers[0])
    held = sum(any(answer in targets[0].answers for answer in each.answers) for each in targets)
    assert one.score == held / len(targets) and one.metrics == {"answers_held": held} and not one.success
    assert one.reason == f"memory:{len(targets) - held}_of_{len(targets)}_answers_missing"
    assert task.user_turns[0][0]["role"] == "system" and "There is no content" in task.user_turns[0][0]["content"]
    assert task.after == () and not task.prepares
    env.close()


def test_reading_is_one_question_to_a_memory_that_is_always_the_same() -> None:
    env = bfcl_environment(["memory_kv"], memory="read")
    tasks = env.tasks()
    assert len(tasks) == 130 and {task.category for task in tasks} == {"memory_kv_read"}
    traces, rejected = make_traces(env, tasks)
    assert len(traces) == 130 and not rejected
    for trace, task in zip(traces, tasks, strict=True):
        seen = json.loads(trace.turns[-1].observations[-1])["value"]
        assert contains_answer(seen, task.data["entry"].answers)[0], task.id
    task = tasks[0]
    one: Any = env.start(task)
    one.execute([ToolCall("archival_memory_clear", {})])
    assert answered(env, task, task.data["entry"].answers[0]).success
    two: Any = env.start(task)
    assert two.opening() == [dict(row) for row in task.user_turns[0]]
    assert json.loads(two.execute([ToolCall("archival_memory_list_keys", {})])[0])["keys"]
    one.close()
    two.close()
    summed = bfcl_environment(["memory_rec_sum"], memory="read")
    for task in summed.tasks():
        assert task.reference_calls == ((),)
        assert contains_answer(task.user_turns[0][0]["content"], task.data["entry"].answers)[0]


def test_reading_the_memories_of_an_evaluation(tmp_path: Path) -> None:
    env = published("memory_kv", tmp_path)
    for chain in CHAINS:
        last = one_chain(env, chain)[0][-1]
        saved = {"core_memory": {"name": "Michael"}, "archival_memory": {"where": "Seattle"}}
        env._agentic._snapshots.write(last.id, json.dumps(saved))  # type: ignore[union-attr]
    env.close()
    reader = bfcl_environment(["memory_kv"], memory="read", memory_snapshots=str(tmp_path / "memory"))
    assert [task.id for task in reader.tasks()] == ["memory_kv_0-customer-0", "memory_kv_2-customer-2"]
    assert '"name": "Michael"' in reader.tasks()[0].user_turns[0][0]["content"]
    (tmp_path / "memory" / "memory_kv_prereq_36-notetaker-4.json").write_text('{"memory": "of the other kind"}')
    with pytest.raises(
        ConfigError, match=r"memory_kv_prereq_36-notetaker-4\.json is not a memory that memory_kv saved"
    ):
        bfcl_environment(["memory_kv"], memory="read", memory_snapshots=str(tmp_path / "memory")).tasks()


def test_max_tools_keeps_what_the_reference_calls_need() -> None:
    env = bfcl_environment(["memory_kv"], memory="read", max_tools=4)
    for task in env.tasks():
        names = {tool["name"] for tool in task.tools}
        assert len(task.tools) == 4 and {"archival_memory_list_keys", "archival_memory_retrieve"} <= names
