"""FTRL rows as training data: reference calls, traces and the reward of the final answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checkpoints.embedded import materialise_embedded_model
from pact_nemo.config.load import load_config
from pact_nemo.data.dataset import build_dataset
from pact_nemo.data.tasks import build_environment
from pact_nemo.environments.base import Outcome, ToolCall
from pact_nemo.environments.ftrl import FTRLEnvironment
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.methods.rewards import matching_rewards
from pact_nemo.rollouts.types import Rollout, Turn
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.sandbox import Limits, Sandbox
from pact_nemo.traces.recorded import recorded_trace
from tests.workers.question_rows import ftrl_row, write

REPO = Path(__file__).resolve().parents[1]
FRANCE, PERU, PARIS = (
    ToolCall("find", {"place": "France"}),
    ToolCall("find", {"place": "Peru"}),
    ToolCall("population", {"city": "Paris"}),
)


def written(*calls: ToolCall) -> list[dict[str, Any]]:
    return [{"name": call.name, "parameters": call.arguments} for call in calls]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(1, Limits(seconds=3.0)) as box:
        yield box


def test_a_rows_own_calls_are_its_trace_where_they_bring_every_answer_in(tmp_path: Path, sandbox: Sandbox) -> None:
    path = write(
        tmp_path / "x.jsonl",
        ftrl_row(ground_truth=written(PERU, FRANCE, PARIS)),
        ftrl_row(ground_truth=written(FRANCE)),  # leaves answers open: the search takes over
        ftrl_row(),
    )
    environment = FTRLEnvironment(path, sandbox)
    own, short, without = (recorded_trace(environment, task, "compact") for task in environment.tasks())
    assert own is not None and own.verified and own.source == "ground_truth"
    assert [turn.calls for turn in own.turns] == [(PERU,), (FRANCE,), (PARIS,)]
    assert own.turns[0].observations == ('{"capital": "Lima"}',)
    assert short is not None and without is not None and {short.source, without.source} == {"recorded"}
    assert short.turns == without.turns


def settings(path: Path, *words: str) -> Any:
    small = ["tasks.held_out=1", "sandbox.workers=1", "trainer.batch_size=1", "trainer.mini_batch_size=1"]
    return load_config(REPO / "conf" / "pact_ftrl-smollm2_135m-cpu.yaml", [f"tasks.path={path}", *small, *words])


def test_training_tasks_have_their_rows_calls_and_an_answer_to_compare_with(tmp_path: Path) -> None:
    def row(place: str, **changes: Any) -> dict[str, Any]:
        return ftrl_row(
            messages=[{"role": "user", "content": f"Please call tools.\nQuestion: who lives in {place}?"}], **changes
        )

    path = write(
        tmp_path / "rows.jsonl",
        *(row(place, ground_truth=written(FRANCE, PARIS, PERU)) for place in ("Rome", "Oslo", "Bern")),
        row("Bonn", answer=None),
        row("Lyon", answer=" ?! "),
    )
    chat = ChatFormat.from_pretrained(materialise_embedded_model(REPO / ".cache" / "pact_nemo"), "pythonic")
    for words, left_out in (([], 2), (["objective.outcome=checker"], 0)):
        config = settings(path, *words)
        assert config.objective.outcome == ("checker" if words else "answer_f1")
        quarantine = Quarantine("quarantine")
        environment = build_environment(config, quarantine)
        dataset = build_dataset(config, environment, chat, quarantine=quarantine)
        environment.close()
        everything = {task.id: task for task in [*dataset.train, *dataset.held_out]}
        assert len(quarantine) <= left_out and ("rows_3" in {t.id for t in dataset.train}) <= bool(words)
        for task in dataset.train:
            if task.id in ("rows_0", "rows_1", "rows_2"):  # in the row's order, whatever the trace does
                assert task.reference_calls == ((FRANCE, PARIS, PERU),)
            assert "<answer></answer>" in task.user_turns[0][-1]["content"]
        assert len(everything) + len(quarantine) == 5
        assert all("no reference answer" in str(bad.error) for bad in quarantine.rows)
    for policy, kind in (("strict", DataError), ("quarantine", ConfigError)):
        config = settings(path, "environment_config.answer_rule=as_written", f"run.bad_rows={policy}")
        environment = build_environment(config)
        with pytest.raises(kind, match="<answer></answer>" if policy == "strict" else "no training task is left"):
            build_dataset(config, environment, chat)


@pytest.mark.parametrize(
    ("text", "status", "reward"),
    [
        ("<answer>2161000</answer>", "ok", 1.0),
        ("<think>so</think>\n\n<answer>2161000 people</answer>", "ok", 2 / 3),
        ("2161000", "ok", 0.0),
        ("<think><answer>2161000</answer></think>\n\nDone.", "ok", 0.0),
        ("<answer>2161000</answer>", "truncated", 0.0),
    ],
)
def test_the_final_turn_is_paid_the_f1_of_its_tagged_answer(
    tmp_path: Path, text: str, status: Any, reward: float
) -> None:
    (task,) = FTRLEnvironment(write(tmp_path / "x.jsonl", ftrl_row(ground_truth=written(FRANCE, PARIS))), None).tasks()  # type: ignore[arg-type]
    turns = [Turn(0, 1, "[find(...)]", calls=[FRANCE], observations=["x"]), Turn(1, 2, text)]
    rollout = Rollout(task.id, 0, [1], [1, 1], [1, 1], [0.0, 0.0], turns, Outcome(False, 0.3), 0, status=status)
    objective = settings(tmp_path / "x.jsonl").objective
    np.testing.assert_allclose(matching_rewards(task, rollout, objective), [1.0, reward], atol=1e-12)
    checked = matching_rewards(task, rollout, replace(objective, outcome="checker"))
    np.testing.assert_allclose(checked, [1.0, 0.3], atol=1e-12)
