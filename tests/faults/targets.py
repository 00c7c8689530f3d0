"""What is fuzzed: every loader and parser, with valid inputs, the modules that guide the search, and the errors that
may refuse an input.

A target goes on with what it accepted as a run would: renders prompts, encodes traces, writes rows back. So a row that
is half right and breaks something later counts as a crash too. A refusal has to be typed and to name file, place and
remedy.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pact_nemo.chat import conversation_text, conversation_tokens, json_calls, parsing, tool_formats
from pact_nemo.chat import template as chat_template
from pact_nemo.chat.template import ChatFormat
from pact_nemo.chat.tool_formats import TOOL_FORMATS
from pact_nemo.checkpoints import manifest, resume_folders, resume_manifest
from pact_nemo.config import load as config_module
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import to_yaml
from pact_nemo.environments import calls, ftrl, python_tools, rows, toolhop
from pact_nemo.environments.base import Task, ToolCall
from pact_nemo.environments.bfcl import data as bfcl_data
from pact_nemo.environments.bfcl import environment as bfcl
from pact_nemo.errors import CheckpointError, ConfigError, DataError, PactError, ToolCallError
from pact_nemo.report import data as report_data
from pact_nemo.report import page as report_page
from pact_nemo.rollouts import store
from pact_nemo.runtime import strict_json, tensor_files
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.sandbox import Limits, Sandbox
from pact_nemo.traces import annotate, filters, recorded, schema, spans
from pact_nemo.tracking import jsonl as metrics_module
from pact_nemo.tracking.episodes import task_view
from tests.fixtures.chat_models import chat_format, tokenizer
from tests.fixtures.run_folders import make_run
from tests.workers.bfcl_tasks import bfcl_environment

ROOT = Path(__file__).resolve().parents[2]
REMEDY = re.compile(
    r"\b(?:repair|make|fetch|save|set|dump|reinstall|export|resume|delete|remove|choose|one of|take|give|can be"
    r" read|change|known|must|need)",
    re.I,
)


@dataclass(frozen=True)
class Target:
    """Something to fuzz.

    Attributes:
        make: from an empty folder: the function to call, and its valid inputs.
        modules: whose lines guide the search.
        refusals: errors that may refuse an input.
        long: inputs of the long run.
        hang_s: an input that takes longer counts as one that hangs.
    """

    make: Callable[[Path], tuple[Callable[[bytes], None], list[bytes]]]
    modules: Sequence[ModuleType]
    refusals: tuple[type[Exception], ...]
    long: int = 10_000
    hang_s: float = 10.0


class Unnamed(AssertionError):
    """A refusal that doesn't say where or what to do."""


def named(error: PactError, path: Path | str, *, line: bool = False) -> None:
    """Raises Unnamed where an error names no file, no row (if it has one) or no remedy."""
    text = str(error)
    if Path(path).name not in text or not REMEDY.search(text.partition(Path(path).name)[2]):
        raise Unnamed(f"names no file or no remedy: {text!r}") from error
    if isinstance(error, DataError) and (error.file is None or line and error.line is None):
        raise Unnamed(f"names no row: {text!r}") from error


def _lines(*values: Any) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


@cache
def _sandbox() -> Sandbox:
    return Sandbox(1, Limits())  # never called: a fuzzed row is loaded and shown, not played


@cache
def _chat(kind: str = "smollm/pythonic") -> ChatFormat:
    return chat_format(kind)


def show(task: Task) -> None:
    """What a run does with a task before its first episode: prompts in every tool format, and its rows of the run
    folder.
    """
    for form in TOOL_FORMATS.values():
        form.render_tools(task.tools)
        form.parse("[f(1)]", task.tools)
    _chat().prompt_ids(list(task.user_turns[0]), list(task.tools))
    json.dumps(task_view(task), ensure_ascii=False, allow_nan=False).encode("utf-8")


# -- rows
# ----------------------------------------------------------------------------------------------------------------------


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
        (".jsonl", _lines(FTRL_ROW, FTRL_PLAIN)),
        (".json", json.dumps([FTRL_PLAIN]).encode()),
        (".jsonl", _lines(FTRL_PLAIN)),
    )
    return Target(
        _questions(lambda path: ftrl.FTRLEnvironment(path, _sandbox()), *contents),
        (ftrl, rows, python_tools, strict_json),
        (DataError,),
    )


def _toolhop() -> Target:
    contents = ((".jsonl", _lines(TOOLHOP_ROW, TOOLHOP_ROW | {"id": 8})), (".json", json.dumps([TOOLHOP_ROW]).encode()))
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
                    spans.fit_trace(trace, _chat(), 40, "segment")
                except DataError as error:
                    if "no exact mask" not in str(error):
                        raise
            filters.leaks_answer(trace, "q", "x y")
        schema.write_traces(folder / "again.jsonl", traces)
        assert schema.read_traces(folder / "again.jsonl") == traces

    return target, [_lines(TRACE.to_dict()), _lines(TRACE.to_dict(), replace(TRACE, task_id="t#1").to_dict())]


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
        _lines(
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

    return target, [_lines(*questions) + b"\n" + _lines(*answers), _lines(questions[0]) + b"\n" + _lines(answers[0])]


# -- tool calls and chat
# -------------------------------------------------------------------------------------------------------------------

_CALLS = (ToolCall("ls", {"a": True}), ToolCall("touch", {"file_name": "a 'b'\n", "size": [1, {"x": None}]}))
_TOUCH = {"type": "object", "properties": {"file_name": {"type": "string"}, "size": {}}, "required": ["file_name"]}
TOOLS = (LS, LS | {"name": "touch", "parameters": _TOUCH})


def _tool_format(name: str) -> Target:
    form = TOOL_FORMATS[name]

    def target(data: bytes) -> None:
        text = data.decode("utf-8", "surrogatepass" if len(data) % 2 else "replace")
        parsed = form.parse(text, TOOLS)  # never raises, whatever a policy writes
        assert all(isinstance(error, str) and error for error in parsed.errors)
        for call in parsed.calls:
            calls.check_call(call)
        if parsed.calls:
            try:
                written = form.render_calls(parsed.calls)
            except ToolCallError:
                return  # longer when written out than a call may be
            assert repr(form.parse(written, TOOLS).calls) == repr(parsed.calls)

    drifted = b'{"type": "function", "function": {"name": "touch", "arguments": "{\\"file_name\\": 1}"}}\n<function=ls>'
    thinking = f"<think>\nHm.\n{form.render_calls(_CALLS)}\n</think>\n\n{form.render_calls(_CALLS[:1])}".encode()
    corpus = [
        f"Use them.\n{form.render_calls(_CALLS)}".encode(),
        form.render_calls(_CALLS[:1]).encode(),
        b"An answer.",
        drifted,
        thinking,
    ]

    def decoding(data: bytes) -> None:
        try:
            target(data)
        except UnicodeDecodeError:
            target(data.decode("utf-8", "replace").encode())

    return Target(lambda folder: (decoding, corpus), (tool_formats, parsing, json_calls, calls), ())


def _make_conversations(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    kinds = ("smollm/pythonic", "qwen2_5/hermes", "qwen3/hermes", "llama3/llama3_json")

    def target(data: bytes) -> None:
        """A trace row's messages and tools, which come from a file, in the template of every family."""
        try:
            row = strict_json.loads(data.decode("utf-8"))
            turn = schema._Reader("x.jsonl", 1)._turn(row, "turns[0]", last=False)
        except (ValueError, DataError):
            return
        for kind in kinds:
            chat = _chat(kind)
            messages, tools = list(turn.user_messages_after), list(turn.new_tools_after)
            try:
                chat.prompt_ids(messages, tools)
                chat.continuation(
                    [*chat.tool_format.render_observation(turn.observations), *messages],
                    tools if messages else (),
                    generation=False,
                )
            except (DataError, ConfigError) as error:
                if not REMEDY.search(str(error)) and "template" not in str(error):
                    raise Unnamed(str(error)) from error

    row = json.loads(json.dumps(TRACE.to_dict()))["turns"][0]
    system = row | {
        "user_messages_after": [{"role": "system", "content": "S"}, {"role": "user", "content": "<|im_end|> é"}]
    }
    return target, [json.dumps(row).encode(), json.dumps(system).encode()]


def _make_templates(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    base = tokenizer("smollm")

    def target(data: bytes) -> None:
        base.chat_template = data.decode("utf-8", "replace")
        chat = ChatFormat(base, TOOL_FORMATS["hermes"])
        chat.prompt_ids([{"role": "user", "content": "Hello"}], [LS])
        chat.continuation_ids([{"role": "tool", "content": "[]"}], after_eos=True)
        chat.boundary_ids()
        chat.generation_ids()

    return target, [tokenizer(family).chat_template.encode() for family in ("smollm", "qwen2_5")]


# -- configuration and manifests
# --------------------------------------------------------------------------------------------------------------


def _make_config(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    path = folder / "c.yaml"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        try:
            config = load_config(path)
        except ConfigError as error:
            if not re.search(r"c\.yaml|[a-z]+\.[a-z_]+", str(error)):
                raise Unnamed(str(error)) from error
            raise
        config.policy.resolved_precision(cuda=False)
        for part in (config.rollout.server, config.optimizer):
            try:
                part.validate()
            except ConfigError:
                pass
        (folder / "again.yaml").write_text(to_yaml(config))
        assert to_yaml(load_config(folder / "again.yaml")) == to_yaml(config)

    small = (ROOT / "conf/pact_bfcl-smollm2_135m-cpu.yaml").read_bytes()
    small = b"".join(
        line for line in small.splitlines(keepends=True) if not line.startswith((b"#", b"defaults", b"  - "))
    )
    plain = (
        b"run:\n  seed: 3\ntrainer:\n  steps: 4\n  batch_size: 8\n  mini_batch_size: 4\noptimizer:\n  betas: [0.9,"
        b" 0.95]\n  lr: 1.0e-6\n"
    )
    flow = (
        b"{rollout: {server: {device: cpu, extra_args: [a]}, importance: off}, policy: {fp8: null}, traces:"
        b" {components: [calls]}}\n"
    )
    return target, [small, plain, flow]


def _make_overrides(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    def target(data: bytes) -> None:
        words = [word for word in data.decode("utf-8", "replace").split("\n") if word]
        config = load_config(None, ["tasks.held_out=2", *words])
        to_yaml(config)

    return target, [
        b"trainer.steps=3\nrun.label=a b",
        b"optimizer.betas=[0.9,0.95]\npolicy.fp8=null",
        b'rollout.server.extra_args=[--x,"y"]\nrollout.server.url=http://127.0.0.1:8000',
        b"objective.schedule.kind=adaptive\nobjective.schedule.anchor_end=0.2",
    ]


def _make_export_manifest(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    base = folder / "v000000"
    base.mkdir()
    (base / "model.safetensors").write_bytes(tensor_files.make_header([("a", "F32", (2,), 8)]) + bytes(8))
    (base / "config.json").write_text("{}")
    manifest.write_manifest(base, 0, {"step": 1})
    path = base / manifest.MANIFEST_NAME

    def target(data: bytes) -> None:
        path.write_bytes(data)
        try:
            manifest.verify_manifest(base)
        except CheckpointError as error:
            if str(base) not in str(error) or not REMEDY.search(str(error)):
                raise Unnamed(str(error)) from error
            raise

    old = {"schema": 1, "version": 0, "extra": {}, "files": {}}
    from pact_nemo.runtime.files import sha256_file

    old["files"] = {
        name: {"size": (base / name).stat().st_size, "sha256": sha256_file(base / name)}
        for name in ("config.json", "model.safetensors")
    }
    return target, [path.read_bytes(), json.dumps(old).encode()]


def _make_checkpoint_manifest(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    base = folder / "step_000001"
    (base / "weights").mkdir(parents=True)
    (base / "state.json").write_text("{}")
    (base / "weights" / "x.distcp").write_bytes(bytes(100))
    resume_manifest.write_manifest(base)
    path = base / resume_manifest.MANIFEST_NAME

    def target(data: bytes) -> None:
        path.write_bytes(data)
        try:
            resume_manifest.verify(base)
        except CheckpointError as error:
            if str(base) not in str(error) or not REMEDY.search(str(error)):
                raise Unnamed(str(error)) from error
            raise
        assert resume_folders.latest_complete(folder) == base

    return target, [path.read_bytes()]


def _make_tensor_files(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    single, index = folder / "model.safetensors", folder / tensor_files.INDEX_NAME

    def target(data: bytes) -> None:
        """The first byte says whether the input is a weight file or an index over one."""
        index.unlink(missing_ok=True)
        (single if data[:1] == b"w" else index).write_bytes(data[1:])
        try:
            tensor_files.read_tensors(folder)
        except CheckpointError as error:
            if str(folder) not in str(error) or not REMEDY.search(str(error)):
                raise Unnamed(str(error)) from error
            raise

    header = tensor_files.make_header([("a.weight", "F32", (2, 3), 24), ("b", "BF16", (4,), 8)])
    return target, [
        b"w" + header + bytes(32),
        b"i" + json.dumps({"weight_map": dict.fromkeys(("a.weight", "b"), "model.safetensors")}).encode(),
    ]


# -- run folders
# ----------------------------------------------------------------------------------------------------------------------


def _make_metrics(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    path = folder / metrics_module.FILE

    def target(data: bytes) -> None:
        path.write_bytes(data)
        try:
            metrics_module.read_metrics(folder)
        except DataError as error:
            named(error, path, line=True)
            raise

    return target, [_lines({"step": 1, "stage": "rl", "loss/total": 0.5, "x": None}, {"step": 2, "stage": "rl"})]


def _make_report(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    """The first byte chooses the file of a run folder that the input replaces; the page is made from what is left."""
    run = make_run(folder, steps=2, warmup=1, tasks=2, passed=(0, 1, 2))
    names = [path for path in sorted(run.rglob("*")) if path.suffix in (".json", ".jsonl", ".yaml")]
    whole = {path: path.read_bytes() for path in names}

    def target(data: bytes) -> None:
        path = names[data[0] % len(names)] if data else names[0]
        path.write_bytes(data[1:])
        try:
            report_page.render(report_data.load_run(run)).encode("utf-8")
        except DataError:
            raise
        finally:
            path.write_bytes(whole[path])

    return target, [bytes([index]) + data for index, data in enumerate(whole.values())]


def targets() -> dict[str, Target]:
    """All of them by name."""
    refused = (DataError,)
    return {
        "ftrl": _ftrl(),
        "ftrl-parquet": _ftrl_parquet(),
        "toolhop": _toolhop(),
        "bfcl": Target(_make_bfcl, (bfcl_data, bfcl, strict_json, calls), refused),
        "traces": Target(_make_traces, (schema, filters, spans, annotate, strict_json), refused),
        "rollouts": Target(_make_rollouts, (store, strict_json), refused),
        **{f"calls-{name}": _tool_format(name) for name in TOOL_FORMATS},
        "conversations": Target(_make_conversations, (conversation_text, conversation_tokens, schema), ()),
        # jinja folds `- - - … x` in time cubic in the signs (300: 5 s), up to Python's recursion limit
        "chat-templates": Target(
            _make_templates,
            (conversation_text, conversation_tokens, chat_template),
            (ConfigError, DataError),
            hang_s=60.0,
        ),
        "config": Target(_make_config, (config_module,), (ConfigError,)),
        "overrides": Target(_make_overrides, (config_module,), (ConfigError,)),
        "export-manifest": Target(_make_export_manifest, (manifest,), (CheckpointError,)),
        "checkpoint-manifest": Target(_make_checkpoint_manifest, (resume_manifest, resume_folders), (CheckpointError,)),
        "safetensors": Target(_make_tensor_files, (tensor_files,), (CheckpointError,)),
        "metrics": Target(_make_metrics, (metrics_module,), refused),
        "run-folder": Target(_make_report, (report_data, report_page), refused),
    }


def scratch(tmp: Path) -> Path:
    """A folder in memory where there is one: a target writes a file an input."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK):
        folder = memory / f"pact-fuzz-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder
    return tmp
