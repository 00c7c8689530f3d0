"""A bad row is kept apart and counted, or stops the run; what is too long goes by a named policy; nothing else of the
data changes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checkpoints.embedded import materialise_embedded_model
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config
from pact_nemo.data.dataset import build_dataset
from pact_nemo.data.tasks import build_environment
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.ftrl import FTRLEnvironment
from pact_nemo.environments.rows import read_rows
from pact_nemo.environments.toolhop import ToolHopEnvironment
from pact_nemo.errors import ConfigError, DataError, ToolCallError
from pact_nemo.monitoring.diagnostics import data_record
from pact_nemo.report.page import left_out
from pact_nemo.runtime.quarantine import FILE, Quarantine
from pact_nemo.runtime.strict_json import MAX_DEPTH, loads
from pact_nemo.traces.schema import Trace, read_traces, write_traces
from pact_nemo.traces.spans import encode_trace, fit_trace
from tests.faults.targets_rows import FTRL_ROW, TOOLHOP_ROW, TRACE
from tests.fixtures.chat_models import chat_format

ROOT = Path(__file__).resolve().parents[2]

BAD_LINES = {
    b"{": "not valid JSON",
    b"[1]": "not an object",
    b'{"a": NaN}': "NaN is not JSON",
    b'{"a": 1e999}': "too large",
    b'{"a": ' + b"9" * 5000 + b"}": "not valid JSON",
    b'{"a": "\\ud800"}': "surrogate",
    b'{"a": "\xff"}': "not UTF-8",
    b"[" * 100_000: "nested deeper",
    b'{"a": ' + b"[" * (MAX_DEPTH + 5) + b"]" * (MAX_DEPTH + 5) + b"}": "nested deeper",
    b"\x00": "not valid JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: str(line[:20]))
def test_one_bad_line_is_one_bad_row(line: bytes, tmp_path: Path) -> None:
    good = json.dumps(FTRL_ROW).encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n" + line + b"\n\n" + good + b"\n")
    with pytest.raises(DataError, match=f"x.jsonl:2: .*{BAD_LINES[line]}"):
        FTRLEnvironment(path, None).tasks()  # type: ignore[arg-type]
    quarantine = Quarantine("quarantine")
    tasks = FTRLEnvironment(path, None, quarantine=quarantine).tasks()  # type: ignore[arg-type]
    assert [task.id for task in tasks] == ["x_0", "x_3"]  # the ids of good rows don't depend on the bad ones
    (row,) = [json.loads(text) for text in quarantine.write(tmp_path).read_text(encoding="utf-8").splitlines()]  # type: ignore[union-attr]
    assert row["file"] == str(path) and row["row"] == 2 and BAD_LINES[line] in row["error"] and row["raw"]
    assert quarantine.by_file() == {"x.jsonl": 1}


def test_an_id_twice_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (TOOLHOP_ROW, TOOLHOP_ROW | {"question": "Other?"}, TOOLHOP_ROW | {"id": 8})
        )
    )
    quarantine = Quarantine("quarantine")
    tasks = ToolHopEnvironment(path, None, quarantine=quarantine).tasks()  # type: ignore[arg-type]
    assert [task.id for task in tasks] == ["toolhop_7", "toolhop_8"]
    assert (
        "row 1 has the id 'toolhop_7' already" in str(quarantine.rows[0].error) and quarantine.rows[0].error.line == 2
    )


def test_a_hundred_thousand_bad_rows_are_kept_without_their_frames(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"{\n" * 100_000)
    quarantine = Quarantine("quarantine")
    assert read_rows(path, quarantine) == [] and len(quarantine) == 100_000
    assert all(row.error.__traceback__ is None and row.error.__cause__ is None for row in quarantine.rows)


def test_files_that_are_no_rows_stop_a_run_under_either_policy(tmp_path: Path) -> None:
    for name, data in {
        "x.json": b"[{}, {",
        "y.json": b"{}",
        "z.parquet": b"PAR1",
        "e.parquet": b"",
        "u.json": b"\xff",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            read_rows(tmp_path / name, Quarantine("quarantine"))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert read_rows(tmp_path / "empty.jsonl") == []


def test_bad_traces_go_the_same_way(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    write_traces(path, [TRACE, replace(TRACE, task_id="t#1")])
    good = path.read_bytes()
    path.write_bytes(good + good.split(b"\n")[0] + b"\n" + b'{"version": 1}\n' + b"\xff\n")
    with pytest.raises(DataError, match=r"traces.jsonl:3: .*already.*take the line out"):
        read_traces(path)
    quarantine = Quarantine("quarantine")
    assert [trace.task_id for trace in read_traces(path, quarantine)] == ["t#0", "t#1"]
    assert [row.error.line for row in quarantine.rows] == [3, 4, 5]


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e400", "[" * 200, '"\\udc00"', '{"\\ud800": 1}'])
def test_strict_json_refuses_what_python_takes(text: str) -> None:
    with pytest.raises(ValueError, match="."):
        loads(text)
    assert loads('\ufeff{"a": [1, 2.5, "\\ud83d\\ude00"]}') == {"a": [1, 2.5, "😀"]}


def test_half_a_surrogate_pair_in_a_call_is_an_error_observation() -> None:
    from pact_nemo.chat.tool_formats import TOOL_FORMATS
    from pact_nemo.environments.calls import check_call

    for name, text in (
        ("hermes", '<tool_call>\n{"name": "ls", "arguments": {"a": "\\ud800"}}\n</tool_call>'),
        ("llama3_json", '{"name": "ls", "parameters": {"a": {"\\udc00": 1}}}'),
        ("pythonic", "[ls(a='\\ud800')]"),
    ):
        parsed = TOOL_FORMATS[name].parse(text)
        assert parsed.calls == [] and "surrogate" in parsed.errors[0]
    with pytest.raises(ToolCallError):
        check_call(ToolCall("ls", {"a": ["\ud800"]}))


# -- what is too long
# ----------------------------------------------------------------------------------------------------------------------


def _long_trace() -> Trace:
    return replace(TRACE, turns=(TRACE.turns[0], replace(TRACE.turns[1], segments=TRACE.turns[0].segments * 4)))


@pytest.mark.parametrize("kind", ["smollm/pythonic", "qwen2_5/hermes", "llama3/llama3_json"])
def test_an_overlong_trace_is_cut_where_its_policy_says(kind: str) -> None:
    chat, trace = chat_format(kind), _long_trace()
    whole = encode_trace(trace, chat)
    first = whole.turn_ends[0]
    for room in range(len(whole) + 1):
        turn, segment, drop = (fit_trace(trace, chat, room, policy) for policy in ("turn", "segment", "drop"))
        assert max(len(turn), len(segment), len(drop)) <= room
        assert len(turn) == (len(whole) if room == len(whole) else first if room >= first else 0)
        assert len(drop) == (len(whole) if room == len(whole) else 0)
        assert len(segment) >= len(turn) and segment.cut == turn.cut == drop.cut == (room < len(whole))
        if len(segment) > len(turn) and room < len(
            whole
        ):  # whole reasoning segments of the turn that didn't fit, then the message's end, no call
            kept = segment.turn_ends[-1]
            assert kept == len(segment) and segment.token_ids[: len(turn)] == turn.token_ids
            text = chat.decode(
                [
                    t
                    for t, c in zip(segment.token_ids[len(turn) :], segment.component[len(turn) :], strict=True)
                    if c == 3
                ]
            )
            torn = trace.turns[len(turn.turn_ends)].segments
            assert text in {"".join(s.text for s in torn[:count]) for count in range(1, len(torn) + 1)}
    assert any(len(fit_trace(trace, chat, room, "segment")) > first for room in range(first + 1, len(whole)))


@pytest.fixture(scope="module")
def small() -> tuple[Config, ChatFormat]:
    words = ["tasks.max_train=8", "tasks.max_eval=2", "rollout.server.max_model_len=480"]
    config = load_config(ROOT / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml", words)
    return config, ChatFormat.from_pretrained(
        materialise_embedded_model(ROOT / ".cache" / "pact_nemo"), config.model.tool_format
    )


def test_what_a_run_leaves_out_is_counted_in_metrics_and_report(
    small: tuple[Config, ChatFormat], tmp_path: Path
) -> None:
    config, chat = small
    plain = build_dataset(config, build_environment(config), chat)
    path = tmp_path / "traces.jsonl"
    write_traces(path, list(plain.traces.values()))
    path.write_bytes(path.read_bytes() + b"{torn\n")
    lengths = sorted(len(tokens) for tokens in plain.trace_tokens.values())
    traces = replace(config.traces, path=str(path), max_tokens=lengths[0], max_missing=None)

    quarantine = Quarantine(config.run.bad_rows)
    for overlong in ("turn", "segment", "drop"):
        quarantine = Quarantine(config.run.bad_rows)
        changed = replace(config, traces=replace(traces, overlong=overlong))
        found = build_dataset(changed, build_environment(changed, quarantine), chat, quarantine=quarantine)
        absent = plain.dropped["trace_too_long"]  # of these nothing fitted from the start
        too_long = sum(length > lengths[0] for length in lengths) + absent
        assert (
            too_long > absent
            and found.dropped["trace_cut"] == too_long
            and found.dropped["rows_quarantined"] == len(quarantine) == 1
        )
        assert found.dropped["trace_too_long"] == len(plain.trace_tokens) - len(found.trace_tokens) + absent
        assert found.dropped["trace_too_long"] == too_long or overlong != "drop"
        assert all(len(tokens) <= lengths[0] for tokens in found.trace_tokens.values())
        record = data_record(found.dropped, [])
        assert (
            record["data/rows_quarantined"] == 1 and record["data/traces_too_long"] == found.dropped["trace_too_long"]
        )
        assert "1 bad rows" in left_out(found.dropped)
    assert quarantine.write(tmp_path) == tmp_path / FILE
    assert Quarantine("quarantine").write(tmp_path) is None and not (tmp_path / FILE).exists()

    strict = replace(config, run=replace(config.run, bad_rows="strict"), traces=traces)
    with pytest.raises(DataError, match=r"traces.jsonl:\d+: not a JSON line"):
        build_dataset(strict, build_environment(strict), chat)


def test_overlong_prompts_are_dropped_or_stop_the_run(small: tuple[Config, ChatFormat]) -> None:
    config, chat = small
    whole = build_dataset(config, build_environment(config), chat)
    tight = replace(
        config, tasks=replace(config.tasks, max_prompt_tokens=config.tasks.max_prompt_tokens - 60, max_eval=2)
    )
    found = build_dataset(tight, build_environment(tight), chat)
    assert found.dropped["prompt_too_long"] > whole.dropped["prompt_too_long"]
    stop = replace(tight, tasks=replace(tight.tasks, overlong="stop"))
    with pytest.raises(DataError, match=r"has \d+ tokens: raise tasks.max_prompt_tokens"):
        build_dataset(stop, build_environment(stop), chat)


@pytest.mark.parametrize("word", ["run.bad_rows=ignore", "tasks.overlong=turn", "traces.overlong=stop"])
def test_policies_are_known_names(word: str) -> None:
    with pytest.raises(ConfigError, match=word.partition("=")[0].replace(".", r"\.")):
        load_config(None, [word])


def test_settings_that_python_takes_and_no_run_can_use() -> None:
    words: Any = [
        "optimizer.lr=.nan",
        "objective.gamma=.inf",
        'run.label="\\0"',
        "run.seed=1" + "0" * 40,
        "optimizer.betas=[0.9,{a: 1}]",
        "run=3",
        "a=[",
        "run.label=${run.label}",
        "run.label=${x.y}",
        "traces.components=[{a: 1}]",
    ]
    for word in words:
        with pytest.raises(ConfigError):
            load_config(None, [word])
