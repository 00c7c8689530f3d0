"""One small input for every crash that fuzzing found, and the typed error that answers it now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.chat.template import ChatFormat
from pact_nemo.chat.tool_formats import TOOL_FORMATS
from pact_nemo.checkpoints import manifest, resume_manifest
from pact_nemo.config.load import load_config
from pact_nemo.environments.ftrl import FTRLEnvironment
from pact_nemo.environments.toolhop import ToolHopEnvironment
from pact_nemo.errors import CheckpointError, ConfigError, DataError
from pact_nemo.report import write_report
from pact_nemo.rollouts.store import read_rollouts
from pact_nemo.runtime import tensor_files
from pact_nemo.traces.schema import read_traces
from pact_nemo.tracking.jsonl import read_metrics
from tests.faults.targets_rows import FTRL_PLAIN, TOOLHOP_ROW, TRACE, function
from tests.fixtures.chat_models import chat_format, tokenizer
from tests.fixtures.run_folders import make_run


def changed(value: Any, path: str, new: Any) -> Any:
    """A copy of a JSON value with another one at a dotted path; ``...`` takes the key away."""
    copy = json.loads(json.dumps(value))
    place = copy
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in parents:
        place = place[part]
    if new is ...:
        del place[last]
    else:
        place[last] = new
    return copy


BAD_TOOLS = [
    ({"name": None}, "name"),
    ({"parameters": {"properties": []}}, "properties"),
    ({"parameters": {"properties": {"a": "string"}}}, "properties"),
    ({"parameters": {"required": [{}]}}, "required"),
    ({"parameters": {"properties": {"a": {"enum": 3}}}}, "enum"),
]


@pytest.mark.parametrize(("change", "words"), BAD_TOOLS)
def test_tools_that_no_template_could_show(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    tool = function("find", place="string")["function"] | change
    (tmp_path / "f.jsonl").write_text(json.dumps(FTRL_PLAIN | {"tools": [tool], "codes": {"find": "", "None": ""}}))
    with pytest.raises(DataError, match=rf"f.jsonl:1: not a function description: .*{words}.*repair the row"):
        FTRLEnvironment(tmp_path / "f.jsonl", None).tasks()  # type: ignore[arg-type]
    (tmp_path / "t.jsonl").write_text(json.dumps(TOOLHOP_ROW | {"tools": {"q": tool}}))
    with pytest.raises(DataError, match=rf"t.jsonl:1: .*{words}"):
        ToolHopEnvironment(tmp_path / "t.jsonl", None).tasks()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "new"),
    [
        ("turns", {}),
        ("turns/0/segments", 3),
        ("turns/0/new_tools_after/0", 3),
        ("turns/0/new_tools_after/0/parameters", []),
        ("turns/0/user_messages_after/0/tool_calls", [1]),
        ("turns/0/calls/0/arguments", [[]]),
        ("turns/1/segments/0/text", "\ud800"),
    ],
)
def test_trace_rows(path: str, new: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(changed(TRACE.to_dict(), path, new)))
    with pytest.raises(DataError, match=r"t.jsonl:1: .*take the line out"):
        read_traces(tmp_path / "t.jsonl")


BAD_ROWS = [
    b"\xff",
    b"[" * 5000,
    b'{"sampler_logprobs": [1' + b"0" * 400 + b"]}",
    b'{"step": 1, "stage": "rl", "x": [1]}',
    b'{"step": 1, "stage": "rl", "x": 1' + b"0" * 400 + b"}",
]


@pytest.mark.parametrize("row", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_metrics_and_rollouts(row: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(row + b"\n")
    with pytest.raises(DataError, match=r"metrics.jsonl:1: .*remove the line"):
        read_metrics(tmp_path)
    (tmp_path / "r.jsonl").write_bytes(row + b"\n")
    with pytest.raises(DataError, match=r"r.jsonl.*(dump it again|dump them again|take the row out)"):
        read_rollouts(tmp_path / "r.jsonl")


def test_a_safetensors_header_is_not_allocated_before_it_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for length in (2**62, 40 << 30, 100):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError, match=r"model.safetensors.*header would have"):
            tensor_files.read_tensors(tmp_path)
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="outside the file"):
        tensor_files.read_tensors(tmp_path)


def test_manifests(tmp_path: Path) -> None:
    base = tmp_path / "v000000"
    base.mkdir()
    for text in (
        '{"schema": 1, "version": Infinity, "extra": {}, "files": {}}',
        "[" * 100_000,
        "\ufeff[]",
        '{"schema": 2, "version": 1e400}',
    ):
        (base / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"manifest.json can't be read"):
            manifest.verify_manifest(base)
    for entry in ({}, {"size": 2}, {"size": None, "sha256": "x"}, 3, {"sha256": "x"}):
        (base / "manifest.json").write_text(json.dumps({"schema": 1, "files": {"state.json": entry}}))
        with pytest.raises(CheckpointError, match=r"manifest.json is missing or unreadable"):
            resume_manifest.verify(base)


@pytest.mark.parametrize(
    "text",
    [
        "run: {seed: ${run.seed}}",
        "run: {label: '${nowhere.x}'}",
        "defaults: 3",
        'defaults: ["\\0"]',
        "optimizer: {betas: [0.9, {0<<: .95}]}",
        "traces: {components: [ca: lls]}",
        "optimizer: {lr: .nan}",
        "? {a: 1}\n: 2",
        "run: [1]",
        "- 1",
        "\x00",
    ],
)
def test_configurations(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "word", ["trainer.steps=[", "run.label=\x07", "a..b=1", "=1", ".=1", "run=${", "trainer.steps=%YAML"]
)
def test_overrides(word: str) -> None:
    with pytest.raises(ConfigError):
        load_config(None, [word])


@pytest.mark.parametrize("text", ["[", "%YAML"])
def test_an_override_of_a_text_is_what_is_typed(text: str) -> None:
    assert load_config(None, [f"run.label={text}"]).run.label == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ '\ud800' }}",
        "{{ 1/0 }}",
        "{{ messages[9].x.y }}",
        "{% for m in messages %}",
        "{{ raise_exception('no') }}",
        "{{ " + "-" * 400 + "1 }}",
    ],
)
def test_chat_templates(template: str) -> None:
    base = tokenizer("smollm")
    base.chat_template = template
    with pytest.raises(ConfigError):
        ChatFormat(base, TOOL_FORMATS["hermes"])
    with pytest.raises(DataError, match="tokens"):
        chat_format("smollm/pythonic").encode_assistant("\ud800")


@pytest.mark.parametrize(
    ("file", "path", "new"),
    [
        ("eval/after.jsonl", "task", ...),
        ("eval/after.jsonl", "task/reference_calls", ...),
        ("eval/after.jsonl", "task/user_turns/0/0/content", ...),
        ("eval/after.jsonl", "rewards", ["x"]),
        ("rollouts/step_000001.jsonl", "advantages", ["x"]),
        ("summary.json", "eval/after/score", ...),
        ("summary.json", "eval", [1]),
        ("summary.json", "seconds", {"a": "b"}),
    ],
)
def test_run_folders(file: str, path: str, new: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2, warmup=1, tasks=2, passed=(0, 1, 2))
    target = run / file if (run / file).is_file() else next((run / "rollouts").glob("*.jsonl"))
    lines = target.read_text().splitlines() if target.suffix == ".jsonl" else [target.read_text()]
    lines[0] = json.dumps(changed(json.loads(lines[0]), path, new))
    target.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=rf"{target.name}.*repair the file or remove it.*field"):
        write_report(run)


def test_bytes_that_are_no_text_in_a_run_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2, warmup=1, tasks=2, passed=(0, 1, 2))
    for name in ("config.yaml", "summary.json"):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(b"\xff" + whole)
        with pytest.raises(DataError, match=name):
            write_report(run)
        (run / name).write_bytes(whole)
