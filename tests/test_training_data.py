"""What a dataset refuses before anything heavy starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pact_nemo.chat.template import ChatFormat
from pact_nemo.chat.tool_formats import tool_format
from pact_nemo.checkpoints.embedded import EMBEDDED_CONFIG, materialise_embedded_model
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config
from pact_nemo.data.dataset import Dataset, build_dataset, check_server_length
from pact_nemo.data.task_traces import find_traces, with_reference_calls
from pact_nemo.data.tasks import build_environment, load_tasks, prompts_of_step
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.ftrl import FTRLConfig
from pact_nemo.environments.splits import split
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.objective.components import OTHER
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.traces.filters import why_not
from pact_nemo.traces.schema import ReasoningSegment, Trace, write_traces

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data() -> tuple[Config, Dataset, ChatFormat]:
    words = ["tasks.max_train=12", "tasks.max_eval=2", "rollout.server.max_model_len=480"]
    config = load_config(REPO / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml", words)
    chat = ChatFormat.from_pretrained(
        materialise_embedded_model(REPO / ".cache" / "pact_nemo"), config.model.tool_format
    )
    return config, build_dataset(config, build_environment(config), chat), chat


def with_positions(config: Config, folder: Path, positions: int) -> Config:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**EMBEDDED_CONFIG, "max_position_embeddings": positions}))
    return replace(config, model=replace(config.model, path=str(folder)))


def test_a_server_longer_than_the_model_is_refused_by_name(
    data: tuple[Config, Dataset, ChatFormat], tmp_path: Path
) -> None:
    config, _, _ = data
    check_server_length(config)
    with pytest.raises(ConfigError, match=r"max_model_len=480 exceeds the model's 256 positions"):
        check_server_length(with_positions(config, tmp_path / "m", 256))


def test_a_trace_is_cut_where_prompt_trace_and_response_exceed_the_positions(
    data: tuple[Config, Dataset, ChatFormat], tmp_path: Path
) -> None:
    config, dataset, chat = data
    longest = {}
    for task in dataset.train:
        prompt = len(chat.prompt_ids(list(task.user_turns[0]), list(task.tools)))
        longest[task.id] = min(
            prompt + config.rollout.sampling.max_response_tokens, config.rollout.server.max_model_len
        ) + len(chat.boundary_ids())
    whole = {task_id: longest[task_id] + len(tokens) for task_id, tokens in dataset.trace_tokens.items()}
    positions = sorted(whole.values())[len(whole) // 2]
    short = build_dataset(with_positions(config, tmp_path / "m", positions), build_environment(config), chat)
    for task_id, total in whole.items():
        kept = len(short.trace_tokens.get(task_id, ()))
        assert (
            (kept == len(dataset.trace_tokens[task_id])) if total <= positions else longest[task_id] + kept <= positions
        )
    too_long = sum(total > positions for total in whole.values())
    assert too_long and short.dropped["trace_cut"] == dataset.dropped["trace_cut"] + too_long


def test_a_batch_holds_no_prompt_twice_and_none_is_asked_for_more_than_there_are(
    data: tuple[Config, Dataset, ChatFormat],
) -> None:
    _, dataset, _ = data
    for step in range(9):
        ids = [task.id for task in prompts_of_step(dataset.train, step, 5, seed=1)]
        assert len(set(ids)) == 5
    with pytest.raises(ConfigError, match="batch of 13"):
        prompts_of_step(dataset.train, 0, 13, seed=1)


def test_traces_that_name_the_answer_are_left_out_of_a_run_too(
    data: tuple[Config, Dataset, ChatFormat], tmp_path: Path
) -> None:
    config, dataset, chat = data
    trace = next(iter(dataset.traces.values()))
    leaking = replace(
        trace, turns=(replace(trace.turns[0], segments=(ReasoningSegment("other", "It is Xanadu."),)), *trace.turns[1:])
    )
    tasks = {task.id: task for task in dataset.train}
    assert why_not(trace, replace(tasks[trace.task_id], reference_answer="Xanadu")) is None
    assert why_not(leaking, replace(tasks[trace.task_id], reference_answer="Xanadu")) == "answer_leaked"


def test_a_trace_file_that_gives_no_task_a_trace_is_refused(
    data: tuple[Config, Dataset, ChatFormat], tmp_path: Path
) -> None:
    config, dataset, chat = data
    stranger = replace(next(iter(dataset.traces.values())), task_id="another_task")
    unverified = replace(next(iter(dataset.traces.values())), verified=False)
    write_traces(tmp_path / "t.jsonl", [stranger, unverified])
    given = replace(config, traces=replace(config.traces, path=str(tmp_path / "t.jsonl")))
    with pytest.raises(
        ConfigError, match=r"gives none of the 12 training tasks a trace.*'trace_rejected_unverified': 1.*task_id"
    ) as caught:
        build_dataset(given, build_environment(given), chat)
    assert "make_traces" in str(caught.value)


def test_the_share_of_tasks_without_a_trace_is_told_and_limited(
    data: tuple[Config, Dataset, ChatFormat], tmp_path: Path
) -> None:
    config, dataset, chat = data
    write_traces(tmp_path / "t.jsonl", [dataset.traces[task_id] for task_id in dataset.trace_tokens][:9])
    told: list[str] = []
    given = replace(config, traces=replace(config.traces, path=str(tmp_path / "t.jsonl"), max_missing=0.25))
    fewer = build_dataset(given, build_environment(given), chat, note=told.append)
    assert (
        fewer.without_trace == 3
        and fewer.without_reference_calls == 0
        and "3 of 12 training tasks (25%) have no trace" in told
    )
    limited = replace(given, traces=replace(given.traces, max_missing=0.2))
    with pytest.raises(
        ConfigError, match=r"3 of 12 training tasks \(25%\) have no trace, more than traces.max_missing=0.2"
    ):
        build_dataset(limited, build_environment(limited), chat)


@pytest.mark.parametrize("bad_rows", ["quarantine", "strict"])
def test_a_tool_that_the_format_cannot_call_is_refused_when_its_task_is_loaded(
    data: tuple[Config, Dataset, ChatFormat], tmp_path: Path, bad_rows: str
) -> None:
    config, _, chat = data
    schema = {"name": "flights.search", "parameters": {"type": "object", "properties": {"from": {"type": "string"}}}}
    source = "def flights_search(**given):\n    return given\n"
    row = {
        "messages": [{"role": "user", "content": "Fly."}],
        "tools": [schema],
        "codes": {"flights.search": source},
        "unsolved_set": {"flights.search": ["from"]},
    }
    (tmp_path / "odd.json").write_text(json.dumps([row, row]))
    tasks = replace(config.tasks, path=str(tmp_path / "odd.json"))
    config = replace(
        config,
        environment="ftrl",
        environment_config=FTRLConfig(),
        tasks=tasks,
        run=replace(config.run, bad_rows=bad_rows),
    )
    assert chat.tool_format.name == "pythonic"
    quarantine = Quarantine(bad_rows)
    error = ConfigError if bad_rows == "quarantine" else DataError
    with pytest.raises(error, match=r"'flights\.search' can't be called.*plain identifier.*model\.tool_format=hermes"):
        build_dataset(config, build_environment(config, quarantine), chat, quarantine=quarantine)
    tool_format("hermes").check_tools(build_environment(config).tasks()[0].tools)


def test_a_control_is_the_whole_trace_of_another_group_and_the_same_whenever_it_is_drawn(
    data: tuple[Config, Dataset, ChatFormat],
) -> None:
    config, own, chat = data
    config = replace(config, traces=replace(config.traces, control="other_task"))
    dataset = build_dataset(config, build_environment(config), chat)
    assert dataset.trace_tokens == own.trace_tokens  # what SFT teaches
    groups = {task.id: task.group for task in dataset.train}
    drawn = {}
    with_trace = [task for task in dataset.train if task.id in dataset.trace_tokens]
    for task in with_trace:
        for step in range(5):
            control = dataset.control_for(task.id, 3, step)
            assert control is not None and not control.cut and len(control) <= dataset.rooms[task.id]
            owners = {name for name, trace in dataset.trace_tokens.items() if trace.token_ids == control.token_ids}
            assert any(groups[name] != task.group for name in owners)
            drawn[task.id, step] = control.token_ids
            assert dataset.control_for(task.id, 3, step) == control
    assert any(drawn[task.id, 0] != drawn[task.id, 1] for task in with_trace)
    assert all(dataset.control_for(task.id, 3, 0) is None for task in dataset.train if task not in with_trace)
    assert own.control_for(own.train[0].id, 3, 0) is None


def test_a_control_that_no_trace_fits_and_one_that_would_change_nothing_are_refused(
    data: tuple[Config, Dataset, ChatFormat],
) -> None:
    config, own, chat = data
    one = replace(config, traces=replace(config.traces, control="other_task"), tasks=replace(config.tasks, max_train=1))
    with pytest.raises(ConfigError, match=r"traces.control=other_task: no whole trace"):
        build_dataset(one, build_environment(one), chat)
    for word in ("method=grpo", "objective.trace_rl=false"):
        with pytest.raises(ConfigError, match="conditions on nothing"):
            load_config(REPO / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml", ["traces.control=none", word])


def test_without_a_trace_the_boundary_closes_an_empty_assistant_message(
    data: tuple[Config, Dataset, ChatFormat],
) -> None:
    _, own, chat = data
    prompt = chat.prompt_ids(list(own.train[0].user_turns[0]), list(own.train[0].tools))
    text = chat.tokenizer.decode([*prompt, *chat.boundary_after_nothing_ids()])
    assert text.endswith(
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nThe reference attempt ends here. Now solve the task"
        " yourself from the start.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_empty_message_in_an_opened_thought_is_refused(
    data: tuple[Config, Dataset, ChatFormat], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatFormat, "opens_thought", True)
    with pytest.raises(ConfigError, match="traces.control=none: the generation prompt of .* opens a thought"):
        data[2].boundary_after_nothing_ids()


def test_few_traces_are_those_of_the_first_tasks_and_the_same_tasks_are_trained_on(
    data: tuple[Config, Dataset, ChatFormat],
) -> None:
    config, own, chat = data
    few = replace(config, traces=replace(config.traces, max_tasks=3))
    dataset = build_dataset(few, build_environment(few), chat)
    assert [task.id for task in dataset.train] == [task.id for task in own.train]
    asked_for = [task.id for task in own.train if task.id in own.traces][:3]  # one of them may be too long to be used
    assert [*dataset.traces] == asked_for and [*dataset.trace_tokens] == [
        name for name in asked_for if name in own.trace_tokens
    ]
    assert all(dataset.trace_tokens[name] == own.trace_tokens[name] for name in dataset.trace_tokens)
    assert dataset.dropped["trace_not_asked_for"] == len(own.traces) - 3


def _misspelt(call: ToolCall) -> ToolCall:
    """A call that the environment answers otherwise."""
    wrong = {key: f"{value}x" if isinstance(value, str) else value for key, value in call.arguments.items()}
    return replace(call, arguments=wrong)


@pytest.mark.parametrize("quality", [False, True])
def test_a_task_whose_trace_is_left_out_keeps_its_reference_calls(
    data: tuple[Config, Dataset, ChatFormat], tmp_path: Path, quality: bool
) -> None:
    """The reward is no use of the trace; a trace that fails when it is executed anew is no reference."""
    config, own, chat = data
    found = [own.traces[task.id] for task in own.train if task.id in own.traces]
    last = found[-1]
    turns = [replace(turn, calls=tuple(map(_misspelt, turn.calls))) for turn in last.turns]
    path = _written(tmp_path, [*found[:-1], replace(last, turns=tuple(turns)) if quality else last])
    few = replace(config, traces=replace(config.traces, path=path, max_tasks=2, quality=quality))
    environment = build_environment(few)
    bare = [replace(task, reference_calls=()) for task in own.train]
    given = find_traces(few, environment, bare, [], Quarantine("strict"))
    rewarded = [with_reference_calls(task, given.references.get(task.id)) for task in bare]
    assert [*given.sources] == [trace.task_id for trace in found[:2]], "only these are taught and shown"
    assert {task.id for task in rewarded if any(task.reference_calls)} == {
        trace.task_id for trace in found if trace is not last or not quality
    }
    assert given.dropped.get("trace_replay_failed", 0) == 0, "counted among those that are asked for"


def test_a_run_that_hardly_uses_its_traces_says_so(data: tuple[Config, Dataset, ChatFormat]) -> None:
    config, _, chat = data
    said: list[str] = []
    few = replace(config, traces=replace(config.traces, max_tasks=2))
    few = replace(few, trainer=replace(few.trainer, steps=10, batch_size=6))
    build_dataset(few, build_environment(few), chat, note=said.append)
    assert any(line.startswith("warning: about") and "traces.share=0.5" in line for line in said)
    said.clear()
    enough = replace(few, traces=replace(few.traces, share=0.34))
    build_dataset(enough, build_environment(enough), chat, note=said.append)
    assert any(line.startswith("about 12 of RL's 60 prompts use a trace") for line in said)  # 2 of 6, gate 0.4
    said.clear()
    none = replace(few, objective=replace(few.objective, trace_rl=False, sft_coef=0.0))
    build_dataset(none, build_environment(none), chat, note=said.append)
    assert not any("prompts use a trace" in line for line in said), "nothing of RL does"


def test_held_out_traces_are_measured_and_never_among_those_that_are_trained_on(
    data: tuple[Config, Dataset, ChatFormat], tmp_path: Path
) -> None:
    config, own, chat = data
    assert own.held_out_traces == []
    measuring = replace(config, diagnostics=replace(config.diagnostics, trace_every=2, trace_tasks=2))
    dataset = build_dataset(measuring, build_environment(measuring), chat)
    measured = [task.id for task, _ in dataset.held_out_traces]
    assert (
        measured and set(measured) <= {task.id for task in own.held_out} and not set(measured) & set(own.trace_tokens)
    )
    assert (dataset.traces, dataset.trace_tokens, dataset.dropped) == (own.traces, own.trace_tokens, own.dropped)
    assert all(sum(token != OTHER for token in trace.component) > 5 for _, trace in dataset.held_out_traces)
    # from a file: one that names held-out tasks as well changes nothing but the measurement
    held = [dataset.traces[name] for name in dataset.traces]
    made = build_dataset(
        replace(measuring, traces=replace(config.traces, path=_written(tmp_path, held))),
        build_environment(config),
        chat,
    )
    assert made.held_out_traces == [] and made.trace_tokens == own.trace_tokens


def _written(folder: Path, traces: list[Trace]) -> str:
    write_traces(folder / "traces.jsonl", traces)
    return str(folder / "traces.jsonl")


def test_a_request_that_is_held_out_is_not_trained_on_in_another_scenario(
    data: tuple[Config, Dataset, ChatFormat],
) -> None:
    _, _, chat = data
    config = load_config(REPO / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml")
    environment = build_environment(config)
    train, held_out = split(environment.tasks(), held_out=config.tasks.held_out, seed=config.tasks.split_seed)
    twice = {str(task.user_turns) for task in train} & {str(task.user_turns) for task in held_out}
    assert len(twice) == 1, "BFCL has such a request"
    train, held_out, dropped = load_tasks(config, environment, chat, Quarantine("strict"))
    assert dropped["held_out_too"] == 1 and not twice & {str(task.user_turns) for task in train}
