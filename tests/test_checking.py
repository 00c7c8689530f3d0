"""``tools/check.py``: every planted fault is found by name, and sound data raises no alarm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checking.check import Checked, check
from pact_nemo.checking.findings import Finding, grouped, listed
from pact_nemo.checking.plays import Script
from pact_nemo.checking.reward_checks import _holds
from pact_nemo.checkout import ROOT
from pact_nemo.config.load import load_config
from pact_nemo.environments.base import ToolCall
from pact_nemo.traces.schema import Trace, TraceTurn

CLASS = '''
import itertools, os, random, time
from pathlib import Path
BOOK = Path(__file__).with_name("book.txt")

class Shop:
    def __init__(self, task):
        self.stock = {sku: dict(article) for sku, article in task["info"]["stock"].items()}

    def lookup(self, sku: str) -> dict:
        """Price and number in stock of an article."""
        return self.stock[sku]

    def order(self, sku: str, count: int) -> str:
        """Order some pieces of an article."""
        if count > self.stock[sku]["count"]:
            raise ValueError("too many")
        self.stock[sku]["count"] -= count
        return f"ordered {count} of {sku}"
'''
SKUS = ("A1", "B2", "C3", "D4")
Row = dict[str, Any]


def task(index: int) -> Row:
    stock = {sku: {"price": 10 + 7 * index + place, "count": 5} for place, sku in enumerate(SKUS)}
    question = f"What does article {SKUS[index]} cost, in shop {index}?"
    return {"id": f"t{index}", "question": question, "answer": str(10 + 8 * index), "info": {"stock": stock}}


def call(name: str, **arguments: Any) -> Row:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def trace(index: int) -> Row:
    article = task(index)["info"]["stock"][SKUS[index]]
    return {
        "task_id": f"t{index}",
        "messages": [
            {"role": "user", "content": task(index)["question"]},
            {"role": "assistant", "content": "I look it up.", "tool_calls": [call("lookup", sku=SKUS[index])]},
            {"role": "tool", "tool_call_id": "c1", "content": json.dumps(article)},
            {"role": "assistant", "content": f"It costs {article['price']}."},
        ],
    }


@dataclass
class Data:
    """What a user has; a fault changes it."""

    source: str = CLASS
    tasks: list[Row] = field(default_factory=lambda: [task(index) for index in range(4)])
    traces: list[Row] = field(default_factory=lambda: [trace(index) for index in range(4)])
    words: list[str] = field(default_factory=list)
    lines: dict[str, str] = field(default_factory=dict)  #: text that is put before a file's rows

    def written(self, folder: Path) -> list[str]:
        (folder / "shop.py").write_text(self.source)
        for name, rows in (("tasks", self.tasks), ("traces", self.traces)):
            text = self.lines.get(name, "") + "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text)
        words = [f"agent.tools={folder}/shop.py:Shop", f"tasks.path={folder}/tasks.jsonl"]
        return [*words, f"traces.path={folder}/traces.jsonl", *self.words]


def run(data: Data, folder: Path, chat: ChatFormat) -> Checked:
    config = load_config(ROOT / "conf" / "pact_own-smollm2_135m-cpu.yaml", data.written(folder))
    return check(config, chat)


def method(source: str) -> Callable[[Data], None]:
    """A fault: one more method of the class."""

    def change(data: Data) -> None:
        data.source += "\n" + source

    return change


def instead(old: str, new: str) -> Callable[[Data], None]:
    """A fault: other text in the class."""

    def change(data: Data) -> None:
        assert old in data.source
        data.source = data.source.replace(old, new)

    return change


def words(*given: str) -> Callable[[Data], None]:
    return lambda data: data.words.extend(given)


def in_task(**values: Any) -> Callable[[Data], None]:
    """A fault: other values of the first task's row; None takes a key out."""

    def change(data: Data) -> None:
        data.tasks[0] = {key: value for key, value in (data.tasks[0] | values).items() if value is not None}

    return change


def in_trace(**values: Any) -> Callable[[Data], None]:
    def change(data: Data) -> None:
        data.traces[0] = {key: value for key, value in (data.traces[0] | values).items() if value is not None}

    return change


def in_message(place: int, **values: Any) -> Callable[[Data], None]:
    """A fault: other values of a message of the first conversation."""
    return lambda data: data.traces[0]["messages"][place].update(values)


def row_before(name: str, text: str) -> Callable[[Data], None]:
    return lambda data: data.lines.update({name: text + "\n"})


def long_trace(data: Data) -> None:
    messages = data.traces[0]["messages"]
    data.traces[0]["messages"] = [messages[0], *[dict(each) for _ in range(4) for each in messages[1:3]], messages[3]]


def foreign_format(data: Data) -> None:
    data.traces[0] = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}


def wrong_expected_call(data: Data) -> None:
    in_task(answer=None, expected_calls=[{"name": "lookup", "arguments": {"skew": "A1"}}])(data)
    data.traces.pop(0)


def same_request(data: Data) -> None:
    data.tasks.append({**data.tasks[0], "id": "t9", "answer": "99"})


def two_turns(data: Data) -> None:
    """The first conversation goes on: the user asks for another article."""
    more = trace(1)["messages"]
    more[1]["tool_calls"][0]["id"] = more[2]["tool_call_id"] = "c2"
    more[1]["tool_calls"] = [{**call("lookup", sku="B2"), "id": "c2"}]
    data.traces[0]["messages"] += [{"role": "user", "content": "And B2?"}, *more[1:]]


def chat_first(data: Data) -> None:
    """The first user turn of the first conversation is answered without a call."""
    del data.traces[0]["messages"][1:3]


LEAK = "return self.stock[sku]\n"
BOOKED = """
        BOOK.write_text(f"{BOOK.read_text() if BOOK.exists() else 0}1")
        return {**self.stock[sku], "served": len(BOOK.read_text())}
"""
SHARED = """
        seen = set(os.listdir(BOOK.parent)) - {"shop.py", "__pycache__", "tasks.jsonl", "traces.jsonl"}
        (BOOK.parent / f"open_{sku}").touch()
        return {**self.stock[sku], "others": len(seen - {f"open_{sku}"})}

    def close(self):
        for path in BOOK.parent.glob("open_*"):
            path.unlink(missing_ok=True)
"""
ALONE = """
        lock = BOOK.with_name("lock")
        if lock.exists() and lock.read_text() != str(os.getpid()):
            os._exit(3)
        lock.write_text(str(os.getpid()))
        return self.stock[sku]

    def close(self):
        BOOK.with_name("lock").unlink(missing_ok=True)
"""


def own_schema(data: Data) -> None:
    """The conversations as traces of our own schema, of which one names another task."""
    names = ["t8", *(str(row["task_id"]) for row in data.traces[1:])]
    called = [ToolCall("lookup", {"sku": SKUS[index]}) for index in range(4)]
    told = [row["messages"][2]["content"] for row in data.traces]
    data.traces = [
        Trace(name, "teacher", (TraceTurn((), (one,), (text,)),), True).to_dict()
        for name, one, text in zip(names, called, told, strict=True)
    ]


#: name of a fault -> (what it changes, level, kind, words of the finding)
FAULTS: dict[str, tuple[Callable[[Data], None], str, str, list[str]]] = {
    # tools
    "no such class": (instead("class Shop", "class Store"), "error", "settings", ["Shop"]),
    "the file can't be imported": (
        instead("import itertools", "import no_such_module_x"),
        "error",
        "settings",
        ["no_such_module_x"],
    ),
    "the file is no Python": (method("    def broken(:"), "error", "settings", ["shop.py"]),
    "no method is public": (
        lambda data: setattr(
            data, "source", data.source.replace("def lookup", "def _lookup").replace("def order", "def _order")
        ),
        "error",
        "settings",
        ["tool"],
    ),
    "a tool without a docstring": (
        method("    def ping(self) -> str:\n        return 'pong'\n"),
        "warning",
        "tool",
        ["ping", "description"],
    ),
    "an argument without a type": (
        method('    def ping(self, host) -> str:\n        """Ping."""\n        return host\n'),
        "error",
        "settings",
        ["Shop.ping", "no type hint", "host: str"],
    ),
    "the constructor raises": (
        instead('task["info"]["stock"]', 'task["stocks"]'),
        "error",
        "episode",
        ["KeyError", "stocks"],
    ),
    "one task's constructor raises": (in_task(info={"other": 1}), "error", "episode", ["KeyError", "stock"]),
    "an expected call with a wrong argument": (
        wrong_expected_call,
        "error",
        "expert",
        ["t0", "lookup", "Error"],
    ),
    "an expected call that is not offered": (
        in_task(tools=["lookup"], expected_calls=[{"name": "order", "arguments": {"sku": "A1", "count": 1}}]),
        "error",
        "row",
        ["'order' is expected and not offered"],
    ),
    "a tool ends the process": (instead(LEAK, "os._exit(3)\n"), "error", "episode", ["t"]),
    "score() raises": (
        method("    def score(self, episode):\n        return episode.calls[99]\n"),
        "error",
        "episode",
        ["IndexError"],
    ),
    "score() gives no number": (
        method("    def score(self, episode):\n        return 'good'\n"),
        "error",
        "episode",
        ["score"],
    ),
    "score() is nan": (
        method("    def score(self, episode):\n        return float('nan')\n"),
        "error",
        "episode",
        ["nan"],
    ),
    "score() is ten": (method("    def score(self, episode):\n        return 10.0\n"), "error", "episode", ["10.0"]),
    "score() is always one": (
        method("    def score(self, episode):\n        return 1.0\n"),
        "error",
        "reward",
        ["doing nothing solves 4 of 4"],
    ),
    "score() is always zero": (
        method("    def score(self, episode):\n        return 0.0\n"),
        "error",
        "trace",
        ["none of 4 conversations"],
    ),
    "score() only counts calls": (
        method("    def score(self, episode):\n        return float(len(episode.calls) > 0)\n"),
        "error",
        "reward",
        ["another task's expert solves 4 of 4"],
    ),
    "a tool draws by chance": (
        instead(LEAK, 'return {**self.stock[sku], "luck": random.SystemRandom().random()}\n'),
        "warning",
        "repeat",
        ["lookup"],
    ),
    "a tool tells the time": (
        instead(LEAK, 'return {**self.stock[sku], "now": time.time_ns()}\n'),
        "warning",
        "repeat",
        ["lookup"],
    ),
    "episodes count in one file": (instead(LEAK, BOOKED.strip() + "\n"), "warning", "repeat", ["lookup"]),
    "episodes see each other's files": (
        instead(LEAK, SHARED.strip() + "\n"),
        "error",
        "isolation",
        ["lookup", "others"],
    ),
    # settings
    "no such tasks file": (words("tasks.path=/nowhere/tasks.jsonl"), "error", "file", ["/nowhere/tasks.jsonl"]),
    "no such traces file": (words("traces.path=/nowhere/traces.jsonl"), "error", "settings", ["/nowhere/traces.jsonl"]),
    "prompts are too long": (
        words("tasks.max_prompt_tokens=20"),
        "warning",
        "length",
        ["prompts", "4 of 4 are left out"],
    ),
    "traces are too long": (words("traces.max_tokens=10"), "warning", "length", ["traces", "4 of 4 are cut"]),
    "responses are too short": (
        words("rollout.sampling.max_response_tokens=8", "rollout.sampling.max_turn_tokens=8"),
        "error",
        "length",
        ["can't be finished"],
    ),
    "too few turns": (long_trace, "error", "length", ["assistant turns", "1 of 4 can't be finished"]),
    # tasks
    "a task row is no JSON": (row_before("tasks", "{oops"), "error", "row", ["tasks.jsonl", "1"]),
    "a task without a request": (in_task(question=None), "error", "row", ["question"]),
    "a request with an assistant in it": (
        in_task(question=None, messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        "error",
        "row",
        ["assistant", "messages[1]"],
    ),
    "an id twice": (in_task(id="t1"), "error", "row", ["t1"]),
    "nothing tells right from wrong": (
        lambda data: (in_task(answer=None)(data), data.traces.pop(0)),
        "error",
        "row",
        ["nothing tells right from wrong"],
    ),
    "an answer that is no number": (
        lambda data: (words("agent.answer=number")(data), in_task(answer="cheap")(data)),
        "error",
        "row",
        ["cheap"],
    ),
    "a tool that does not exist": (in_task(tools=["lookup", "refund"]), "error", "row", ["refund", "tools[1]"]),
    "an expected call of no tool": (
        in_task(expected_calls=[{"name": "refund", "arguments": {}}]),
        "error",
        "row",
        ["refund"],
    ),
    "an expected call with broken arguments": (
        in_task(expected_calls=[{"name": "lookup", "arguments": "{sku: A1"}]),
        "error",
        "row",
        ["expected_calls[0]", "no JSON"],
    ),
    "a misspelt key of a task": (
        in_task(answer=None, anwser="10"),
        "warning",
        "key",
        ["tasks.jsonl:1", "'anwser' goes to the class only", "near: 'answer'"],
    ),
    "a misspelt request": (
        in_task(question=None, quesiton="What?"),
        "warning",
        "key",
        ["'quesiton'", "near: 'question'"],
    ),
    "a misspelt key of a conversation": (
        in_trace(rewrad=1.0),
        "warning",
        "key",
        ["traces.jsonl:1", "'rewrad' is read by nobody", "near: 'reward'"],
    ),
    "only calls that read are expected": (
        lambda data: (
            words("agent.read_only=[lookup]")(data),
            in_task(answer=None, expected_calls=[{"name": "lookup", "arguments": {"sku": "A1"}}])(data),
        ),
        "error",
        "row",
        ["tasks.jsonl:1", "agent.read_only"],
    ),
    "a conversation of more user turns than the task": (
        two_turns,
        "warning",
        "trace:longer_than_task",
        ["traces.jsonl:1", "user_turns", "agent.user_turns=first"],
    ),
    "a first user turn without a call": (
        lambda data: (words("agent.user_turns=first")(data), two_turns(data), chat_first(data)),
        "warning",
        "trace:no_call_in_first_turn",
        ["traces.jsonl:1", "agent.user_turns=recorded"],
    ),
    "one request, two answers": (same_request, "error", "task", ["2 different answers"]),
    # conversations
    "a conversation row is no JSON": (row_before("traces", "{oops"), "error", "row", ["traces.jsonl"]),
    "a conversation without messages": (in_trace(messages=None), "error", "row", ["messages"]),
    "another chat format": (foreign_format, "error", "file", ["ShareGPT"]),
    "a reward that is a text": (in_trace(reward="good"), "error", "row", ["reward"]),
    "a task_id with a typing error": (in_trace(task_id="tt0"), "warning", "trace:of_no_task", ["tt0", "near", "t0"]),
    "a call of a tool that isn't there": (
        in_message(1, tool_calls=[call("find", sku="A1")]),
        "warning",
        "trace:unknown_tool",
        ["traces.jsonl:1", "'find'"],
    ),
    "arguments that are no JSON": (
        in_message(
            1, tool_calls=[{"id": "c1", "type": "function", "function": {"name": "lookup", "arguments": "{sku: A1"}}]
        ),
        "error",
        "row",
        ["messages[1].tool_calls[0]"],
    ),
    "a tool message for another call": (in_message(2, tool_call_id="c7"), "error", "row", ["c7"]),
    "arguments that the tool refuses now": (
        in_message(1, tool_calls=[call("lookup", sku="Z9")]),
        "warning",
        "trace:replay_error",
        ["lookup(sku='Z9')"],
    ),
    "an answer that is wrong": (
        in_message(3, content="It costs 99."),
        "warning",
        "trace:replay_low_score",
        ["wrong answer"],
    ),
    "an observation that looks like a role": (
        in_message(2, content="<|im_start|>user"),
        "warning",
        "trace:role_text_in_observation",
        ["traces.jsonl:1"],
    ),
    "an observation of another day": (
        in_message(2, content='{"price": 10, "count": 4}'),
        "note",
        "trace",
        ["something else", "t0"],
    ),
    "a reward below the limit": (
        lambda data: (
            words("traces.verify=reward", "traces.min_score=0.5")(data),
            [row.update(reward=float(i > 0)) for i, row in enumerate(data.traces)],
        ),
        "warning",
        "trace:low_reward",
        ["traces.jsonl:1"],
    ),
    "a greeting before the user's words": (
        lambda data: data.traces[0]["messages"].insert(0, {"role": "assistant", "content": "Hello!"}),
        "warning",
        "trace:nothing_before_assistant",
        ["1 conversations", "greeting"],
    ),
    "evaluations with too few turns": (
        words("evaluation.max_turns_per_user_turn=1"),
        "warning",
        "length",
        ["in evaluations", "evaluation.max_turns_per_user_turn=1"],
    ),
    "traces of our own schema that belong to no task": (
        own_schema,
        "warning",
        "trace:of_no_task",
        ["1 of 4 traces", "'t8'", "traces.jsonl"],
    ),
    "an episode that fails beside another": (
        instead(LEAK, ALONE.strip() + "\n"),
        "error",
        "isolation",
        ["while another one is open", "agent.workers=1"],
    ),
    "episodes with too few turns": (
        words("rollout.sampling.max_turns=1"),
        "error",
        "length",
        ["assistant turns, the closing one included", "rollout.sampling.max_turns=1"],
    ),
    "messages too short for a call": (
        words("rollout.sampling.max_turn_tokens=4"),
        "error",
        "length",
        ["calls of a message", "rollout.sampling.max_turn_tokens=4"],
    ),
    "a task without a trace": (lambda data: data.traces.pop(), "note", "trace", ["1 of 4 tasks have no trace"]),
}


def test_there_are_enough_faults() -> None:
    assert len(FAULTS) >= 45


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_name(name: str, tmp_path: Path, chat: ChatFormat) -> None:
    change, level, kind, said = FAULTS[name]
    data = Data()
    change(data)
    found = run(data, tmp_path, chat)
    matching = [one for one in found.findings if (one.level, one.kind) == (level, kind)]
    assert any(all(part in str(one) for part in said) for one in matching), "\n".join(listed(found.findings))
    if level != "note":
        assert any(one.remedy or ";" in one.text or ":" in one.text for one in matching)


def test_sound_data_raises_no_alarm(tmp_path: Path, chat: ChatFormat) -> None:
    found = run(Data(), tmp_path, chat)
    assert (found.count("error"), found.count("warning")) == (0, 0), "\n".join(listed(found.findings))
    assert (found.tasks, found.traces, found.played) == (4, 4, 4)
    texts = "\n".join(listed(found.findings))
    assert "doing nothing solves 0 of 4 tasks" in texts and "another task's expert solves 0 of 4" in texts
    assert "no trace calls order" in texts


def test_one_cause_is_told_once(tmp_path: Path, chat: ChatFormat) -> None:
    data = Data()
    instead('task["info"]["stock"]', 'task["stocks"]')(data)
    found = run(data, tmp_path, chat)
    failed = [one for one in found.findings if one.kind == "episode" and "KeyError" in one.text]
    places = [sorted(one.where.split(", ")) for one in failed if one.where]
    assert places == [["t0", "t1", "t2", "t3"]], "\n".join(listed(found.findings))
    many = grouped([Finding("error", "row", f"t{n}", f"t{n}: bad") for n in range(9)])
    assert many == [Finding("error", "row", "t0, t1, t2, t3 and 5 more", "bad")]


def test_questions_with_the_same_answer_are_no_other_tasks(tmp_path: Path, chat: ChatFormat) -> None:
    """Yes is right in half of all tasks whose answers are yes and no."""
    data = Data()
    for index, (row, talk) in enumerate(zip(data.tasks, data.traces, strict=True)):
        row["answer"] = talk["messages"][3]["content"] = "yes" if index < 3 else "no"
    found = run(data, tmp_path, chat)
    assert (found.count("error"), found.count("warning")) == (0, 0), "\n".join(listed(found.findings))
    assert "another task's expert solves 0 of 4 tasks" in "\n".join(listed(found.findings))


def test_many_of_a_kind_are_counted() -> None:
    found = [Finding("error", "row", f"f:{n}", "bad") for n in range(9)] + [Finding("note", "length", "", "long")]
    lines = listed(found)
    assert len(lines) == 7 and lines[5] == "error [row] … and 4 more" and lines[6] == "note [length] long"


@pytest.mark.parametrize(("fault", "code"), [(None, 0), ("score() is always one", 1)])
def test_the_command(fault: str | None, code: int, tmp_path: Path) -> None:
    data = Data()
    if fault is not None:
        FAULTS[fault][0](data)
    command = [sys.executable, str(ROOT / "tools" / "check.py"), "--json", *data.written(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    found = json.loads(done.stdout)
    assert (found["errors"] > 0) == bool(code) and [tool["name"] for tool in found["tools"]] == ["lookup", "order"]


def test_observations_that_are_cut_for_the_policy_alone_are_no_other_ones(tmp_path: Path, chat: ChatFormat) -> None:
    found = run(Data(words=["tasks.max_observation_chars=5"]), tmp_path, chat)
    texts = "\n".join(listed(found.findings))
    assert "tasks.max_observation_chars=5" in texts and "something else" not in texts


def test_an_expert_who_does_more_may_solve_another_ones_task() -> None:
    """What a longer solution holds, it solves; that says nothing against the verdict."""
    first, second = ToolCall("look", {"sku": "A"}), ToolCall("look", {"sku": "B"})
    short = Script((((first,),),))
    assert _holds(Script((((second,), (first,)),)), short) and not _holds(short, Script((((first,), (first,)),)))
    assert not _holds(Script((((first,),),), closing="It costs 4."), short)
