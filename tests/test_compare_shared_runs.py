"""A run that two plans ask for is run once: the other takes its result, and says from where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pact_nemo.checkpoints.manifest import write_manifest
from tools.comparisons import running
from tools.comparisons.plan import Arm, Block, Cell, Plan, settings_for
from tools.comparisons.results import Result, read_result, write_result
from tools.comparisons.runner import weights_of
from tools.comparisons.running import run_plan

MINE = Cell("sft4", "own_trace", 1)
PLAN = Plan(
    name="mine",
    seeds=[1],
    set=["tasks.max_eval=24"],
    starts={"sft4": Arm("sft", ["warmup.steps=4"])},
    arms={"own_trace": Arm("pact", ["optimizer.lr=3e-5"])},
    grid=[Block(["sft4"], ["own_trace"])],
)


class Ran(Exception):
    """The run was started."""


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Digest of the start's weights; a run that is started raises Ran."""
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "model.safetensors").write_bytes(b"weights")
    write_manifest(hf, 0)

    def ran(*_: object) -> None:
        raise Ran

    monkeypatch.setattr(running, "_start", lambda *_: (hf, 0.0))
    monkeypatch.setattr(running, "run_one", ran)
    return weights_of(hf)


def others(tmp_path: Path, settings: str, weights: str, start: str = "begin") -> Result:
    """A result that another plan has."""
    kept = Result("theirs", start, "q04", "pact", 1, ["a=b"], {"after": {"t": 0.5}}, {}, {}, 900.0, {})
    kept = replace(kept, settings=settings, weights=weights)
    write_result(tmp_path / "evidence" / "theirs" / f"{start}-q04-seed1.json", kept)
    return kept


def test_the_run_of_another_plan_is_taken_with_its_source(tmp_path: Path, policy: str) -> None:
    others(tmp_path, settings_for(PLAN, MINE), policy)
    (tmp_path / "evidence" / "theirs" / "figures.json").write_text("[1, 2]")  # no result: not looked at
    said: list[str] = []
    mine = tmp_path / "evidence" / "mine"
    results = run_plan(PLAN, tmp_path / "runs", mine, note=said.append)
    assert results == [read_result(mine / "sft4-own_trace-seed1.json")]
    found = results[0]
    assert (found.plan, found.start, found.arm) == ("mine", "sft4", "own_trace")
    assert found.taken_from == "theirs/begin-q04-seed1.json" and found.score() == 0.5
    assert found.words == ["tasks.max_eval=24", "warmup.steps=0", "evaluation.before=false", "optimizer.lr=3e-5"]
    assert any(said_one.endswith("theirs/begin-q04-seed1.json") for said_one in said)
    # its 900 seconds are not this plan's: the budget is whole
    more = replace(PLAN, hours=0.1, seeds=[1, 2], grid=[Block(["sft4"], ["own_trace"], [1, 2])])
    with pytest.raises(Ran):
        run_plan(more, tmp_path / "runs", mine, note=said.append)


@pytest.mark.parametrize("other", ["seed", "rate", "weights", "unknown weights", "published"])
def test_a_run_that_differs_is_not_taken(other: str, tmp_path: Path, policy: str) -> None:
    plan = replace(PLAN, arms={"own_trace": Arm("pact", ["optimizer.lr=1e-5"])}) if other == "rate" else PLAN
    cell = replace(MINE, seed=2) if other == "seed" else MINE
    weights = {"weights": policy[::-1], "unknown weights": ""}.get(other, policy)
    others(tmp_path, settings_for(plan, cell), weights, "published" if other == "published" else "begin")
    with pytest.raises(Ran):
        run_plan(PLAN, tmp_path / "runs", tmp_path / "evidence" / "mine", note=lambda _: None)


def test_a_start_of_unknown_weights_takes_nothing(tmp_path: Path, policy: str) -> None:
    (tmp_path / "hf" / "manifest.json").unlink()
    others(tmp_path, settings_for(PLAN, MINE), "")
    with pytest.raises(Ran):
        run_plan(PLAN, tmp_path / "runs", tmp_path / "evidence" / "mine", note=lambda _: None)
