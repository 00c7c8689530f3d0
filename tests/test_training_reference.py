"""The KL reference is the policy after the warm-up that RL began with, however often the run was resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pact_nemo.checkpoints import resume
from pact_nemo.checkpoints.kl_reference import WARMUP_STEPS
from pact_nemo.checkpoints.manifest import new_export
from pact_nemo.checkpoints.resume_manifest import write_manifest
from pact_nemo.config.load import load_config
from pact_nemo.errors import CheckpointError
from pact_nemo.training import served_weights
from pact_nemo.training.checkpointer import Checkpointer
from pact_nemo.training.served_weights import ServedWeights
from pact_nemo.training.state import check_resume, new_state


class Attempt:
    """One attempt of a run in ``folder``, restored from a checkpoint of so many steps; -1 warm-up steps: from none.
    The policy's weights are a text that says which steps it has.
    """

    def __init__(self, folder: Path, words: str, warmup_step: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = load_config(None, ["trainer.steps=20", "objective.kl_coef=0.001", *words.split()])
        self.reference: str | None = None
        policy: Any = SimpleNamespace(
            weight_dtype="float32", load_reference=self._load, name=f"{max(warmup_step, 0)}+{step}"
        )
        self.policy, self.state = policy, new_state(self.config)
        space: Any = SimpleNamespace(folder=folder, exports=folder / "exports", results=(), checkpoints=folder)
        sharing: Any = SimpleNamespace(trainer=lambda **_: None)
        parts: Any = (None, folder / "source", self.state, print, sharing)
        self.weights = ServedWeights(self.config, space, policy, *parts)
        self.said: list[str] = []
        progress, nothing = SimpleNamespace(message=self.said.append), None
        self.keeper = Checkpointer(self.config, space, policy, self.weights, self.state, progress, nothing)  # type: ignore[arg-type]
        row = {**self.state.as_row(), "warmup_step": warmup_step, "step": step, "version": 1}
        found = folder / f"step_{warmup_step + step:06d}" if warmup_step >= 0 else None
        monkeypatch.setattr(Checkpointer, "_newest", lambda self: found)
        monkeypatch.setattr(resume, "load", lambda policy, folder: row)
        monkeypatch.setattr(served_weights, "export_version", self._export)
        self.keeper.restore()
        if self.state.warmup_step >= self.config.warmup.steps:
            self.weights.freeze_reference()

    def _load(self, path: Path) -> None:
        weights = path / "model.safetensors"
        self.reference = weights.read_text() if weights.exists() else str(path.name)

    def _export(self, policy: Any, root: Path, version: int, *, dtype: str, extra: dict[str, Any]) -> None:
        with new_export(root, version, extra) as folder:
            (folder / "model.safetensors").write_text(policy.name)

    def finish_warmup(self) -> None:
        self.state.warmup_step = self.config.warmup.steps
        self.policy.name = f"{self.state.warmup_step}+0"
        self.weights.freeze_reference()


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def of(words: str, warmup_step: int, step: int = 0) -> Attempt:
        return Attempt(tmp_path, words, warmup_step, step, monkeypatch)

    return of


def test_a_warm_up_that_goes_on_makes_the_reference_again(attempt: Any) -> None:
    first = attempt("warmup.steps=4", -1)
    first.finish_warmup()
    assert first.reference == "4+0"
    more = attempt("warmup.steps=8", 4)
    assert more.reference is None
    more.finish_warmup()
    assert more.reference == "8+0"
    assert attempt("warmup.steps=8", 8, 10).reference == "8+0"


def test_a_reference_that_a_cut_attempt_left_is_made_again(attempt: Any) -> None:
    """The attempt ended between the reference and its checkpoint: the steps are done again, on a GPU not to the bit."""
    attempt("warmup.steps=4", 2).finish_warmup()
    again = attempt("warmup.steps=4", 2)
    again.policy.name = "other"
    assert again.reference is None
    again.finish_warmup()
    assert again.reference == "4+0" and attempt("warmup.steps=4", 4).reference == "4+0"


def test_after_rl_began_the_reference_is_the_one_on_disk_or_the_run_is_refused(attempt: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"reference/v000000 is missing.*after warmup\.steps=4.*10 RL steps past"):
        attempt("warmup.steps=4", 4, 10)  # objective.kl_coef was 0 so far
    assert attempt("warmup.steps=4 objective.kl_coef=0", 4, 10).reference is None
    attempt("warmup.steps=2", -1).finish_warmup()
    with pytest.raises(CheckpointError, match=r"after 2 warm-up steps, RL began after warmup\.steps=4"):
        attempt("warmup.steps=4", 4, 10)
    assert not list(tmp_path.glob("reference/.*")), "nothing was deleted"


def test_without_a_warm_up_the_reference_is_the_source(attempt: Any, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    assert attempt("warmup.steps=0", 0, 10).reference == attempt("warmup.steps=0", -1).reference == "source"


def test_a_reference_of_an_older_version_is_taken_after_rl_began_and_made_again_before(
    attempt: Any, tmp_path: Path
) -> None:
    with new_export(tmp_path / "reference", 0) as folder:
        (folder / "model.safetensors").write_text("older")
    assert attempt("warmup.steps=4", 4, 10).reference == "older"
    assert attempt("warmup.steps=4", 4).reference == "4+0"


@pytest.mark.parametrize(("warmup_step", "step"), [(2, 0), (4, 0), (4, 10)])
def test_a_resumed_run_is_as_far_in_rls_schedule_as_it_was(attempt: Any, warmup_step: int, step: int) -> None:
    """Of the policy's updates those of the warm-up had warmup.lr, also in checkpoints of an older version."""
    found = attempt("warmup.steps=4 objective.kl_coef=0", warmup_step, step)
    assert found.policy.unscheduled == warmup_step


def test_scales_that_no_checkpoint_holds_are_told(attempt: Any) -> None:
    words = "warmup.steps=4 objective.kl_coef=0"
    assert attempt(words, 4, 10).said == []
    found = attempt(f"{words} policy.fp8=delayed policy.fp8_bf16_layers=0 policy.fp8_emulate=true", 4, 10)
    assert [text.split(":")[0] for text in found.said] == ["policy.fp8=delayed"]


def test_a_run_is_resumed_with_the_warm_up_that_its_rl_began_after(attempt: Any) -> None:
    with pytest.raises(CheckpointError, match=r"step_000002 has 2 warm-up steps; resume with warmup\.steps=2 or more"):
        attempt("warmup.steps=1", 2)
    with pytest.raises(CheckpointError, match=r"step_000003 has 2 warm-up steps; resume with warmup\.steps=2$"):
        attempt("warmup.steps=1", 2, 1)
    more = r"warmup\.steps=8: .*step_000014 has 10 RL steps after 4 warm-up steps.*resume with warmup\.steps=4, or"
    for kl in ("objective.kl_coef=0.001", "objective.kl_coef=0"):
        with pytest.raises(CheckpointError, match=more):
            attempt(f"warmup.steps=8 {kl}", 4, 10)


def checkpoint(folder: Path, words: str, warmup_step: int, step: int) -> Any:
    """The config and run folder of a run whose newest whole checkpoint has so many steps."""
    config = load_config(None, ["trainer.steps=20", "objective.kl_coef=0.001", *words.split()])
    made = folder / "checkpoints" / f"step_{warmup_step + step:06d}"
    made.mkdir(parents=True)
    row = {**new_state(config).as_row(), "warmup_step": warmup_step, "step": step, "seed": 1234}
    (made / "state.json").write_text(json.dumps({"step": warmup_step + step, "ranks": 1, "caller": row}))
    write_manifest(made)
    return config, SimpleNamespace(folder=folder, checkpoints=folder / "checkpoints")


@pytest.mark.parametrize(
    ("words", "steps", "says"),
    [
        ("warmup.steps=1", (2, 0), r"has 2 warm-up steps; resume with warmup\.steps=2 or more"),
        ("warmup.steps=8", (4, 10), r"warmup\.steps=8: .* has 10 RL steps after 4"),
        ("warmup.steps=4", (4, 10), r"reference/v000000 is missing"),
        ("warmup.steps=4 run.seed=5 objective.kl_coef=0", (4, 10), r"was made with run\.seed=1234, the config says 5"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused_before_anything_is_started(
    tmp_path: Path, words: str, steps: tuple[int, int], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        check_resume(*checkpoint(tmp_path, words, *steps))


def test_what_can_be_gone_on_from_is_not_refused(tmp_path: Path) -> None:
    config, space = checkpoint(tmp_path, "warmup.steps=8", 4, 0)
    check_resume(config, space)
    shutil.rmtree(space.checkpoints)
    check_resume(config, space)  # a new run
    config, space = checkpoint(tmp_path, "warmup.steps=4", 4, 10)
    with new_export(tmp_path / "reference", 0, {WARMUP_STEPS: 4}) as folder:
        (folder / "model.safetensors").write_text("4+0")
    check_resume(config, space)
    assert (tmp_path / "reference" / "v000000").exists()


def test_a_checkpoint_that_is_not_whole_decides_nothing(tmp_path: Path) -> None:
    """The run goes on from the one before it."""
    config, space = checkpoint(tmp_path, "warmup.steps=4 objective.kl_coef=0", 2, 0)
    checkpoint(tmp_path, "warmup.steps=8", 8, 3)
    (space.checkpoints / "step_000011" / "stray").write_text("x")
    check_resume(config, space)
    (space.checkpoints / "step_000011" / "stray").unlink()
    with pytest.raises(CheckpointError, match="step_000011 has 8 warm-up steps"):
        check_resume(config, space)
