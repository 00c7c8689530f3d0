"""What a dataset refuses before anything heavy starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pact_nemo.chat.template import ChatFormat
from pact_nemo.chat.tool_formats import tool_format
from pact_nemo.checkpoints.embedded import EMBEDDED_CONFIG, materialise_embedded_model
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.quarantine import Quarantine
from pact_nemo.traces.filters import why_not
from pact_nemo.traces.schema import ReasoningSegment, write_traces
from pact_nemo.training.config import Config, load_config
from pact_nemo.training.data import Dataset, build_dataset, build_environment, check_server_length, prompts_of_step

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data() -> tuple[Config, Dataset, ChatFormat]:
    words = ["tasks.max_train=12", "tasks.max_eval=2", "rollout.server.max_model_len=480"]
    config = load_config(REPO / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml", words)
    chat = ChatFormat.from_pretrained(materialise_embedded_model(REPO / ".cache" / "pact_nemo"), config.model.tool_format)
    return config, build_dataset(config, build_environment(config), chat), chat


def with_positions(config: Config, folder: Path, positions: int) -> Config:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**EMBEDDED_CONFIG, "max_position_embeddings": positions}))
    return replace(config, model=replace(config.model, path=str(folder)))


def test_a_server_longer_than_the_model_is_refused_by_name(data: tuple[Config, Dataset, ChatFormat], tmp_path: Path) -> None:
    config, _, _ = data
    check_server_length(config)
    with pytest.raises(ConfigError, match=r"max_model_len=480 exceeds the model's 256 positions"):
        check_server_length(with_positions(config, tmp_path / "m", 256))


def test_a_trace_is_cut_where_prompt_trace_and_response_exceed_the_positions(data: tuple[Config, Dataset, ChatFormat], tmp_path: Path) -> None:
    config, dataset, chat = data
    longest = {}
    for task in dataset.train:
        prompt = len(chat.prompt_ids(list(task.user_turns[0]), list(task.tools)))
        longest[task.id] = min(prompt + config.rollout.sampling.max_response_tokens, config.rollout.server.max_model_len)
    whole = {task_id: longest[task_id] + len(tokens) for task_id, tokens in dataset.trace_tokens.items()}
    positions = sorted(whole.values())[len(whole) // 2]
    short = build_dataset(with_positions(config, tmp_path / "m", positions), build_environment(config), chat)
    for task_id, total in whole.items():
        kept = len(short.trace_tokens.get(task_id, ()))
        assert (kept == len(dataset.trace_tokens[task_id])) if total <= positions else longest[task_id] + kept <= positions
    too_long = sum(total > positions for total in whole.values())
    assert too_long and short.dropped["trace_cut"] == dataset.dropped["trace_cut"] + too_long


def test_a_batch_holds_no_prompt_twice_and_none_is_asked_for_more_than_there_are(data: tuple[Config, Dataset, ChatFormat]) -> None:
    _, dataset, _ = data
    for step in range(9):
        ids = [task.id for task in prompts_of_step(dataset.train, step, 5, seed=1)]
        assert len(set(ids)) == 5
    with pytest.raises(ConfigError, match="batch of 13"):
        prompts_of_step(dataset.train, 0, 13, seed=1)


def test_traces_that_name_the_answer_are_left_out_of_a_run_too(data: tuple[Config, Dataset, ChatFormat], tmp_path: Path) -> None:
    config, dataset, chat = data
    trace = next(iter(dataset.traces.values()))
    leaking = replace(trace, turns=(replace(trace.turns[0], segments=(ReasoningSegment("other", "It is Xanadu."),)), *trace.turns[1:]))
    tasks = {task.id: task for task in dataset.train}
    assert why_not(trace, replace(tasks[trace.task_id], reference_answer="Xanadu")) is None
    assert why_not(leaking, replace(tasks[trace.task_id], reference_answer="Xanadu")) == "answer_leaked"


def test_a_trace_file_that_gives_no_task_a_trace_is_refused(data: tuple[Config, Dataset, ChatFormat], tmp_path: Path) -> None:
    config, dataset, chat = data
    stranger = replace(next(iter(dataset.traces.values())), task_id="another_task")
    unverified = replace(next(iter(dataset.traces.values())), verified=False)
    write_traces(tmp_path / "t.jsonl", [stranger, unverified])
    given = replace(config, traces=replace(config.traces, path=str(tmp_path / "t.jsonl")))
    with pytest.raises(ConfigError, match=r"gives none of the 12 training tasks a trace.*'trace_rejected_unverified': 1.*task_id") as caught:
        build_dataset(given, build_environment(given), chat)
    assert "make_traces" in str(caught.value)


def test_the_share_of_tasks_without_a_trace_is_told_and_limited(data: tuple[Config, Dataset, ChatFormat], tmp_path: Path) -> None:
    config, dataset, chat = data
    write_traces(tmp_path / "t.jsonl", [dataset.traces[task_id] for task_id in dataset.trace_tokens][:9])
    told: list[str] = []
    given = replace(config, traces=replace(config.traces, path=str(tmp_path / "t.jsonl"), max_missing=0.25))
    fewer = build_dataset(given, build_environment(given), chat, note=told.append)
    assert fewer.without_trace == 3 and fewer.without_reference_calls == 0 and "3 of 12 training tasks (25%) have no trace" in told
    limited = replace(given, traces=replace(given.traces, max_missing=0.2))
    with pytest.raises(ConfigError, match=r"3 of 12 training tasks \(25%\) have no trace, more than traces.max_missing=0.2"):
        build_dataset(limited, build_environment(limited), chat)


@pytest.mark.parametrize("bad_rows", ["quarantine", "strict"])
def test_a_tool_that_the_format_cannot_call_is_refused_when_its_task_is_loaded(
    data: tuple[Config, Dataset, ChatFormat], tmp_path: Path, bad_rows: str
) -> None:
    config, _, chat = data
    schema = {"name": "flights.search", "parameters": {"type": "object", "properties": {"from": {"type": "string"}}}}
    source = "def flights_search(**given):\n    return given\n"
    row = {"messages": [{"role": "user", "content": "Fly."}], "tools": [schema], "codes": {"flights.search": source}, "unsolved_set": {}}
    (tmp_path / "odd.json").write_text(json.dumps([row, row]))
    tasks = replace(config.tasks, benchmark="ftrl", path=str(tmp_path / "odd.json"))
    config = replace(config, tasks=tasks, run=replace(config.run, bad_rows=bad_rows))
    assert chat.tool_format.name == "pythonic"
    quarantine = Quarantine(bad_rows)
    error = ConfigError if bad_rows == "quarantine" else DataError
    with pytest.raises(error, match=r"'flights\.search' can't be called.*plain identifier.*model\.tool_format=hermes"):
        build_dataset(config, build_environment(config, quarantine), chat, quarantine=quarantine)
    tool_format("hermes").check_tools(build_environment(config).tasks()[0].tools)
