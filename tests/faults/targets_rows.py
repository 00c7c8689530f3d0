"""Rows that are fuzzed: tasks of FTRL, ToolHop and BFCL, traces and rollouts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pact_nemo.environments import calls, ftrl, python_tools, rows, toolhop
from pact_nemo.environments.base import Task, ToolCall
from pact_nemo.environments.bfcl import data as bfcl_data
from pact_nemo.environments.bfcl import environment as bfcl
from pact_nemo.errors import DataError
from pact_nemo.rollouts import store
from pact_nemo.runtime import strict_json
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.sandbox import Limits, Sandbox
from pact_nemo.traces import annotate, filters, recorded, schema, spans
from tests.faults.target_kit import Target, cached_chat, json_lines, named, show
from tests.workers.bfcl_tasks import bfcl_environment


@cache
def _sandbox() -> Sandbox:
    return Sandbox(1, Limits())  # never called: a fuzzed row is loaded and shown, not played


def function(name: str, **properties: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties)[:1],
    }
    return {"type": "function", "function": {"name": name, "description": f"{name} it", "parameters": parameters}}


FIND = "def find(place):\n    return {'France': 'Paris'}.get(place, 'unknown')\nfind('France')\n"
FTRL_ROW = {
    "messages": [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": "What is the capital of France?"},
    ],
    "tools": json.dumps([function("find", place="string", year="integer")]),
    "codes": json.dumps({"find": FIND}),
    "unsolved_set": json.dumps({"find": ["Paris"]}),
    "solve_rate": 0.0,
    "data_source": "self/multi_hop",
    "split": "test",
    "answer": "Paris",
    "ground_truth": json.dumps([{"name": "find", "parameters": {"place": "France", "year": 2020}}]),
}
FTRL_PLAIN = FTRL_ROW | {
    key: json.loads(str(FTRL_ROW[key])) for key in ("tools", "codes", "unsolved_set", "ground_truth")
}
TOOLHOP_ROW = {
    "id": 7,
    "question": "What is the capital of France?",
    "answer": "Paris",
    "answer_type": "name",
    "sub_task": {"What is the capital of France?": "Paris"},
    "tools": {"What is the capital of France?": function("find", place="string")["function"]},
    "functions": [FIND],
}


def _questions(
    environment_of: Callable[[Path], Any], *contents: tuple[str, bytes]
) -> Callable[[Path], tuple[Callable[[bytes], None], list[bytes]]]:
    """Loader of FTRL or ToolHop; the first byte of an input says which file ending it gets."""

    def make(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
        endings = (".jsonl", ".json", ".parquet")

        def target(data: bytes) -> None:
            path = folder / f"rows{endings[data[0] % 3] if data else '.txt'}"
            path.write_bytes(data[1:])
            try:
                environment = environment_of(path)
                tasks = environment.tasks()
            except DataError as error:
                named(error, path, line=path.suffix == ".jsonl")
                raise
            for task in tasks:
                show(task)
                for goal in environment.goals(task):
                    tool = {tool["name"]: tool for tool in task.tools}.get(goal.tool)
                    if goal.source is not None and tool is not None:
                        candidates = recorded.candidate_arguments(tool, goal.source, goal.question, ())
                        list(itertools.islice(candidates, 5))
            assert len({task.id for task in tasks}) == len(tasks)

        return target, [bytes([endings.index(ending)]) + data for ending, data in contents]

    return make


def _parquet(row: dict[str, Any]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist([row]), sink)
    return bytes(sink.getvalue())


def _ftrl() -> Target:
    contents = (
        (".jsonl", json_lines(FTRL_ROW, FTRL_PLAIN)),
        (".json", json.dumps([FTRL_PLAIN]).encode()),
        (".jsonl", json_lines(FTRL_PLAIN)),
    )
    return Target(
        _questions(lambda path: ftrl.FTRLEnvironment(path, _sandbox()), *contents),
        (ftrl, rows, python_tools, strict_json),
        (DataError,),
    )


def _toolhop() -> Target:
    contents = (
        (".jsonl", json_lines(TOOLHOP_ROW, TOOLHOP_ROW | {"id": 8})),
        (".json", json.dumps([TOOLHOP_ROW]).encode()),
    )
    return Target(
        _questions(lambda path: toolhop.ToolHopEnvironment(path, _sandbox()), *contents),
        (toolhop, rows, python_tools, strict_json),
        (DataError,),
    )


def _ftrl_parquet() -> Target:
    text = {key: value for key, value in FTRL_ROW.items() if isinstance(value, str)} | {
        "messages": json.dumps(FTRL_ROW["messages"])
    }
    contents = ((".parquet", _parquet(FTRL_ROW)), (".parquet", _parquet(text)))
    return Target(
        _questions(lambda path: ftrl.FTRLEnvironment(path, _sandbox()), *contents), (ftrl, rows), (DataError,)
    )


LS = {
    "name": "ls",
    "description": "List it. More.",
    "parameters": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": []},
}
TRACE = schema.Trace(
    "t#0",
    "ground_truth",
    (
        schema.TraceTurn(
            (schema.ReasoningSegment("tool_selection", "Use ls."), schema.ReasoningSegment("other", " Now. \u2028é")),
            (ToolCall("ls", {"a": True, "b": [1, {"c": None}]}),),
            ("[]",),
            0,
            ({"role": "user", "content": "More."},),
            (LS | {"name": "cat"},),
        ),
        schema.TraceTurn((schema.ReasoningSegment("task_restate", "Again."),), (ToolCall("ls", {}),), ("['x']",), 1),
    ),
    True,
)
TASK = Task("t#0", "t", "fuzz", (({"role": "user", "content": "List."},),), (LS,), ((),), "x")


def _make_traces(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    path = folder / "traces.jsonl"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        try:
            traces = schema.read_traces(path)
        except DataError as error:
            named(error, path, line=True)
            raise
        for trace in traces:
            if filters.why_not(trace, replace(TASK, id=trace.task_id)) is None:  # what a run checks before it uses one
                try:
                    spans.fit_trace(trace, cached_chat(), 40, "segment")
                except DataError as error:
                    if "no exact mask" not in str(error):
                        raise
            filters.leaks_answer(trace, "q", "x y")
        schema.write_traces(folder / "again.jsonl", traces)
        assert schema.read_traces(folder / "again.jsonl") == traces

    return target, [json_lines(TRACE.to_dict()), json_lines(TRACE.to_dict(), replace(TRACE, task_id="t#1").to_dict())]


def _make_rollouts(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    path = folder / "step_000000.jsonl"
    row = {
        "task_id": "t#0",
        "sample": 0,
        "prompt_ids": [1, 2],
        "token_ids": [3, 4, 5],
        "loss_mask": [1, 1, 0],
        "sampler_logprobs": [-0.5, -1, 0.0],
        "turns": [
            {
                "start": 0,
                "end": 2,
                "text": "Use it.\n[ls(a=True)]",
                "calls": [{"name": "ls", "arguments": {"a": True}}],
                "call_errors": [],
                "observations": ["[]"],
                "user_turn": 0,
                "finish_reason": "stop",
            }
        ],
        "outcome": {"success": True, "score": 1.0, "reason": "ok", "metrics": {"solve_p": 1.0}, "solved": [True]},
        "weight_version": 3,
        "status": "ok",
        "error": None,
        "seconds": 0.5,
    }

    def target(data: bytes) -> None:
        path.write_bytes(data)
        try:
            rollouts = store.read_rollouts(path)
        except DataError as error:
            named(error, path)
            raise
        store.write_rollouts(folder / "again.jsonl", rollouts)
        assert store.read_rollouts(folder / "again.jsonl") == rollouts

    return target, [
        json_lines(
            row,
            row | {"sample": 1, "outcome": None, "status": "failed", "turns": []},
            row | {"sample": 2, "rewinds": [[2, 1]]},
        )
    ]


def _make_bfcl(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    category = "multi_turn_miss_func"
    name = f"BFCL_v4_{category}.json"
    source = bfcl_data.data_dir()
    (folder / "possible_answer").mkdir()
    bfcl_data.function_documents()

    def picked(path: Path) -> list[dict[str, Any]]:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in itertools.islice(file, 2)]

    questions, answers = picked(source / name), picked(source / "possible_answer" / name)

    def target(data: bytes) -> None:
        first, _, second = data.partition(b"\n\n")
        (folder / name).write_bytes(first)
        (folder / "possible_answer" / name).write_bytes(second)
        entries, bad = bfcl_data._load.__wrapped__(folder, category)
        for row in bad:
            named(row.error, name, line=True)
            row.to_dict()
        for window in ("full", "turn"):
            environment = bfcl_environment((category,), window, max_tools=4, quarantine=Quarantine("strict"))
            for entry in entries:
                for task in environment._tasks_of(entry):
                    show(task)
        if bad:
            raise bad[0].error

    return target, [
        json_lines(*questions) + b"\n" + json_lines(*answers),
        json_lines(questions[0]) + b"\n" + json_lines(answers[0]),
    ]


def row_targets() -> dict[str, Target]:
    refused = (DataError,)
    return {
        "ftrl": _ftrl(),
        "ftrl-parquet": _ftrl_parquet(),
        "toolhop": _toolhop(),
        "bfcl": Target(_make_bfcl, (bfcl_data, bfcl, strict_json, calls), refused),
        "traces": Target(_make_traces, (schema, filters, spans, annotate, strict_json), refused),
        "rollouts": Target(_make_rollouts, (store, strict_json), refused),
    }
