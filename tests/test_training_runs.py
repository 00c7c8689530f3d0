"""Whole runs of the real recipe, replayed from dumped rollouts: resume is bit for bit, and no layout changes a
number.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pact_nemo.checkpoints.resume_manifest import verify
from pact_nemo.config.load import load_config
from pact_nemo.errors import ConfigError
from pact_nemo.objective.schedules import StepClock, TraceSchedule
from pact_nemo.training.collect import replayed
from tests.workers.recipe_runs import REPO, STEPS, recipe, records, weights
from tests.workers.scripted import write_replay

SLOW = pytest.mark.slow
ADAPTERS = ["policy.lora.rank=8", "policy.lora.alpha=16", "warmup.steps=0"]


@pytest.fixture(scope="module")
def plain(stage: dict[str, Any]) -> Path:
    return recipe(stage, "plain")


@pytest.fixture(scope="module")
def adapters(stage: dict[str, Any]) -> Path:
    return recipe(stage, "adapters", *ADAPTERS)


def test_a_replayed_run_trains_and_leaves_what_it_promises(plain: Path) -> None:
    rows = records(plain)
    assert [(r["stage"], r["step"]) for r in rows] == [("warmup", 1), ("rl", 1), ("rl", 2)]
    for row in rows[1:]:
        assert row["policy/updates"] == 2 and row["loss/kl"] is not None and row["policy/grad_norm"] > 0
    assert any(r["loss/rl_h"] != 0 for r in rows) and any(r["loss/sft_call"] > 0 for r in rows)
    summary = json.loads((plain / "summary.json").read_text())
    assert (summary["method"], summary["steps"], summary["warmup_steps"]) == ("pact", 2, 1)
    for name in (
        "config.yaml",
        "report.html",
        "traces.jsonl",
        "hf/config.json",
        "hf/tokenizer.json",
        "hf/chat_template.jinja",
    ):
        assert (plain / name).is_file(), name


def test_the_export_loads_in_transformers_as_it_is(plain: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(plain / "hf")
    tokenizer = AutoTokenizer.from_pretrained(plain / "hf")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text.endswith("assistant\n")
    assert torch.isfinite(model(**tokenizer(text, return_tensors="pt")).logits).all()


def test_two_steps_are_one_plus_one_resumed_bit_for_bit(stage: dict[str, Any]) -> None:
    """With everything that has a state on: the shipped adaptive annealing and gate, drawn and weighed traces. No
    horizon is set.
    """
    beyond = [
        "--config",
        str(REPO / "conf" / "ablations" / "adaptive.yaml"),
        "objective.schedule.horizon=null",
        "traces.quality=true",
        "traces.augment=[argument_order,call_order]",
    ]
    whole = recipe(
        stage,
        "whole",
        *beyond,
        "trainer.async_checkpoint=true",
        "trainer.checkpoint_every=1",
        "trainer.keep_checkpoints=2",
    )
    saved = sorted((whole / "checkpoints").iterdir())
    assert [path.name for path in saved] == [
        "latest",
        "step_000003",
        "step_000005",
    ]  # the first of them written beside the second step
    for path in saved[1:]:
        verify(path)
    first = recipe(stage, "halves", *beyond, "trainer.steps=1")
    assert [r["step"] for r in records(first)] == [1, 1]
    assert load_config(first / "config.yaml").objective.schedule.kind == "adaptive"
    resumed = recipe(
        stage, "halves", f"trainer.steps={STEPS}", resume=first
    )  # more steps than the first part was told of
    assert records(resumed) == records(whole)
    one, other = weights(whole), weights(resumed)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    (before,) = first.glob("hf-v*")  # the shorter run's export is kept, under its version
    assert not torch.equal(load_file(before / "model.safetensors")["model.norm.weight"], other["model.norm.weight"])
    rl = [row for row in records(whole) if row["stage"] == "rl"]
    assert rl[0]["trace/weight"] == 1.0 and 0.0 <= rl[-1]["anneal/progress"] <= 1.0


@pytest.mark.slow
def test_a_run_by_epochs_has_its_steps_wherever_they_are_read(stage: dict[str, Any]) -> None:
    """Twelve training tasks, four a step: an epoch has three steps. Annealing, learning rate, checkpoints and report go
    by them.
    """
    replay, words = stage["folder"] / "replay-epoch", [*stage["words"], "trainer.steps=null", "trainer.epochs=1"]
    write_replay(load_config(stage["preset"], words), Path(words[0].removeprefix("model.path=")), replay, 3)
    further = [
        "objective.schedule.horizon=null",
        "optimizer.lr_schedule=linear",
        "trainer.checkpoint_every=0",
        f"trainer.replay={replay}",
    ]
    run = recipe(stage, "epoch", "trainer.steps=null", "trainer.epochs=1", *further)
    rows = [row for row in records(run) if row["stage"] == "rl"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    resolved = load_config(run / "config.yaml")
    assert (resolved.trainer.steps, resolved.trainer.epochs) == (3, None)
    schedule = TraceSchedule(reasoning="segment", call="scale", clock=StepClock(3))
    assert [row["anneal/call_weight"] for row in rows] == pytest.approx(
        [schedule.call_weight(step) for step in range(3)]
    )
    # two updates a step, from optimizer.lr to 0; the warm-up's step has warmup.lr and takes nothing of the schedule
    peak = resolved.optimizer.lr
    assert [row["policy/lr"] for row in rows] == pytest.approx([peak * left / 6 for left in (4, 2, 0)])
    assert [path.name for path in sorted((run / "checkpoints").glob("step_*"))] == ["step_000007"]
    assert json.loads((run / "summary.json").read_text())["steps"] == 3


@pytest.mark.slow
def test_what_a_longer_or_a_cut_run_resumes_from(stage: dict[str, Any]) -> None:
    first = recipe(stage, "longer", "objective.schedule.horizon=null", "trainer.keep_checkpoints=2", "trainer.steps=1")
    longer = recipe(stage, "longer", "trainer.steps=2", resume=first)
    weight = [r["anneal/call_weight"] for r in records(longer) if r["stage"] == "rl"]
    annealed = load_config(longer / "config.yaml").objective.schedule.call_end
    assert (
        weight[0] >= weight[1] == pytest.approx(annealed)
    )  # step 2 of a horizon of 1, not of 2: more steps bring nothing back
    # cut between step 2 and its checkpoint, then resumed with another learning rate: the attempt's weights of the same
    # version are not taken
    shutil.rmtree(max((longer / "checkpoints").glob("step_*")))
    stale = weights(longer)
    recipe(stage, "longer", "optimizer.lr=1e-5", resume=longer)
    assert [(r["stage"], r["step"]) for r in records(longer)] == [("warmup", 1), ("rl", 1), ("rl", 2)]
    assert not torch.equal(weights(longer)["model.norm.weight"], stale["model.norm.weight"])


def test_sigterm_leaves_a_checkpoint_and_the_resumed_run_is_the_uncut_one(stage: dict[str, Any], plain: Path) -> None:
    words = ["--config", stage["preset"], *stage["words"], "run.name=term", "trainer.checkpoint_every=0"]
    run = stage["folder"] / "runs" / "term-pact-seed1234-1"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPO / "recipes" / "pact_bfcl.py"), *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:  # the warm-up is done, and step 1 begins
            if "warmup step 1 " in line or "rl step" in line:
                break
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=200)
    assert process.returncode == 75, said
    assert "SIGTERM: stopped after" in said and "--resume" in said
    before = records(run)
    assert len(before) < 3 and list((run / "checkpoints").glob("step_*"))
    assert records(recipe(stage, "term", resume=run)) == records(plain)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(run).items())


def test_replay_of_another_runs_rollouts_is_refused(stage: dict[str, Any]) -> None:
    path = stage["folder"] / "replay" / "rollouts" / "step_000000.jsonl"
    found = [json.loads(line)["task_id"] for line in path.read_text().splitlines()]
    assert [rollout.task_id for rollout in replayed(path, found)] == found
    with pytest.raises(ConfigError, match="differ from rollout 1 on"):
        replayed(path, [*found[4:], *found[:4]])
    with pytest.raises(ConfigError, match=f"holds {len(found)} rollouts, this step needs {len(found) + 4}"):
        replayed(path, [*found, *found[:4]])


@pytest.mark.parametrize(
    "layout",
    ["pipeline_parallel", *(pytest.param(f"{kind}_parallel", marks=SLOW) for kind in ("tensor", "context", "data"))],
)
@pytest.mark.parametrize("trained", ["plain", pytest.param("adapters", marks=SLOW)])
def test_two_processes_give_the_numbers_of_one(
    stage: dict[str, Any], trained: str, layout: str, request: pytest.FixtureRequest
) -> None:
    words = [] if layout == "data_parallel" else [f"policy.{layout}=2"]
    words += ADAPTERS if trained == "adapters" else []
    one = records(request.getfixturevalue(trained))
    for row, expected in zip(records(recipe(stage, f"{layout}-{trained}", *words, ranks=2)), one, strict=True):
        for key in (
            "loss/total",
            "policy/grad_norm",
            "loss/rl_h",
            "loss/sft_call",
            "latent/gap_failure",
            "policy/kl_ref",
        ):
            if expected.get(key) is not None:
                # TP, CP and DP sum in another order, and differ by 3e-5 once the first update has changed the weights
                rel = 1e-4 if layout != "pipeline_parallel" and row["stage"] == "rl" else 1e-5
                assert row[key] == pytest.approx(expected[key], rel=rel, abs=1e-6), (row["stage"], row["step"], key)


def test_another_seed_is_refused_on_resume(stage: dict[str, Any], plain: Path) -> None:
    command = [sys.executable, str(REPO / "recipes" / "pact_bfcl.py"), "--resume", str(plain), "run.seed=9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPO)
    assert done.returncode == 1 and "run.seed=1234" in done.stderr


def test_a_wrong_setting_and_a_dry_run_start_nothing(tmp_path: Path) -> None:
    recipe_file = str(REPO / "recipes" / "pact_bfcl.py")
    wrong = subprocess.run(
        [sys.executable, recipe_file, "trainer.stepz=3"], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert wrong.returncode == 2 and "stepz" in wrong.stderr
    dry = subprocess.run(
        [sys.executable, recipe_file, "--dry-run", "trainer.steps=7"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert dry.returncode == 0 and "steps: 7" in dry.stdout and "GiB" in dry.stdout and "7 steps x" in dry.stdout
    assert not list(tmp_path.iterdir())


def test_a_run_of_adapters_resumes_bit_for_bit_and_leaves_them_in_peft_format(
    stage: dict[str, Any], plain: Path, adapters: Path
) -> None:
    whole = adapters
    first = recipe(stage, "adapters-halves", *ADAPTERS, "trainer.steps=1")
    resumed = recipe(stage, "adapters-halves", f"trainer.steps={STEPS}", resume=first)
    assert records(resumed) == records(whole)
    rows = records(whole)
    assert rows[-1]["policy/kl_ref"] > 0 and all(row["policy/grad_norm"] > 0 for row in rows)
    one, other, base = weights(whole), weights(resumed), load_file(stage["folder"] / "model" / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    tensors = load_file(whole / "adapter" / "adapter_model.safetensors")
    settings = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    for name, value in one.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        want = base[name]
        if f"{stem}.lora_A.weight" in tensors:
            product = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
            want = want + settings["lora_alpha"] / settings["r"] * product
            assert product.abs().max() > 0
        torch.testing.assert_close(value, want, rtol=0, atol=1e-6, msg=name)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["adapter_export"] == str(whole / "adapter") and summary["adapter_change_in_hf"] == 1.0
    assert "of their change, the HF weights have 100.0%" in (whole / "run.log").read_text()  # float32
    (before,) = first.glob("adapter-v*")  # the shorter run's, under its version
    large = [sum(file.stat().st_size for file in run.glob("checkpoints/*/weights/*")) for run in (whole, plain)]
    assert large[0] < 0.1 * large[1]


def test_a_warm_up_before_a_reference_that_is_the_base_is_refused(stage: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"objective\.kl_coef=0 or warmup\.steps=0"):
        load_config(stage["preset"], [*stage["words"], *ADAPTERS[:2]])
