"""Resuming: bit for bit under the same layout, to rounding under another one, and never from a torn checkpoint."""

from __future__ import annotations

import errno
import functools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pact_nemo.checkpoints import resume, resume_folders, resume_manifest
from pact_nemo.errors import CheckpointError, ConfigError
from pact_nemo.policy import offload
from pact_nemo.policy.config import OptimizerConfig, PolicyConfig
from pact_nemo.policy.policy import MegatronPolicy
from tests.workers.policy_kit import launch, loss_fn, make_model, make_trees
from tests.workers.policy_worker import run_jobs

TREES = make_trees(4, seed=21)
OPTIMIZER = {"lr": 1e-3, "eps": 1e-5, "lr_schedule": "linear", "warmup_steps": 1, "weight_decay": 0.01}


def build(path: Path, **config: Any) -> MegatronPolicy:
    settings = PolicyConfig(**{"precision": "fp32", "micro_batch_tokens": 96, "logprob_chunk": 16, **config})
    return MegatronPolicy(settings, OptimizerConfig(**OPTIMIZER), path, seed=1, total_steps=4)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("hf"), "llama")


@pytest.mark.parametrize("distributed_optimizer", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_steps_are_one_step_and_one_resumed(
    precision: str, distributed_optimizer: bool, hf: Path, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"precision": precision, "distributed_optimizer": distributed_optimizer}
    straight = build(hf, **config)
    initial = straight.logprobs(TREES)
    straight.update(TREES, loss_fn)
    expected = straight.update(TREES, loss_fn)

    first = build(hf, **config)
    first.update(TREES, loss_fn)
    folder = resume.save(first, tmp_path, {"sampler": [1, 2], "x": None})
    drawn = torch.rand(4)
    resumed = build(hf, **config)
    resumed.load_reference(hf)
    torch.rand(7)
    assert resume.load(resumed, folder) == {"sampler": [1, 2], "x": None}
    assert torch.equal(torch.rand(4), drawn), "random-number state"
    result = resumed.update(TREES, loss_fn)
    assert (result.loss, result.grad_norm, result.lr, resumed.step) == (
        expected.loss,
        expected.grad_norm,
        expected.lr,
        2,
    )
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.chunks[0].parameters(), straight.chunks[0].parameters(), strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(resumed.reference_logprobs(TREES), initial, strict=True)), (
        "the reference is not the checkpoint"
    )


def test_a_step_after_resuming_differs_if_adam_forgot_its_past(hf: Path, tmp_path: Path) -> None:
    """The previous test can fail: weights alone are not enough."""
    straight = build(hf)
    straight.update(TREES, loss_fn)
    straight.export_hf(tmp_path / "weights", dtype="float32")
    forgetful = build(tmp_path / "weights")
    forgetful.step = 1
    straight.update(TREES, loss_fn)
    forgetful.update(TREES, loss_fn)
    assert not all(
        torch.equal(a, b)
        for a, b in zip(forgetful.chunks[0].parameters(), straight.chunks[0].parameters(), strict=True)
    )


DENSE_ROUTES = [("one", "tp2"), ("tp2", "tp2"), ("pp2", "one"), ("pp2vp2", "one"), ("dp2", "pp2vp2"), ("cp2", "dp2")]
MOE_ROUTES = [("one", "ep2"), ("ep2", "tp2sp"), ("tp2sp", "pp2"), ("tp2sp", "tp2sp")]


@pytest.mark.parametrize(
    ("family", "routes"), [("llama", DENSE_ROUTES), pytest.param("qwen3_moe", MOE_ROUTES, marks=pytest.mark.slow)]
)
def test_resuming_under_other_layouts(family: str, routes: list[tuple[str, str]], tmp_path: Path) -> None:
    hf = make_model(tmp_path / "hf", family)
    layouts: dict[str, dict[str, Any]] = {
        "one": {},
        "tp2": {"tensor_parallel": 2},
        "pp2": {"pipeline_parallel": 2},
        "pp2vp2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
        "dp2": {},
        "cp2": {"context_parallel": 2},
        "ep2": {"expert_parallel": 2},
        "tp2sp": {"tensor_parallel": 2, "sequence_parallel": True},
    }

    def job(name: str, layout: str, actions: list[list[Any]]) -> dict[str, Any]:
        return {"name": name, "hf_path": str(hf), "config": layouts[layout], "optimizer": OPTIMIZER, "actions": actions}

    saves = {source: [["update", None], ["save", str(tmp_path / source)], ["update", None]] for source, _ in routes}
    saves.setdefault("one", [["update", None], ["update", None]]).append(["export", str(tmp_path / "straight")])
    loads = {
        (source, target): [
            ["load", str(tmp_path / source / "step_000001")],
            ["update", None],
            ["export", str(tmp_path / f"{source}-{target}")],
        ]
        for source, target in routes
    }
    straight = run_jobs([job("one", "one", saves["one"])])
    many = [job(source, source, actions) for source, actions in saves.items() if source != "one"]
    many += [
        job(f"{source}-{target}", target, actions) for (source, target), actions in loads.items() if target != "one"
    ]
    answers = launch(2, many, tmp_path)
    straight |= {source: answers.pop(source) for source in saves if source != "one"}
    resumed = answers | run_jobs(
        [job(f"{source}-one", "one", actions) for (source, target), actions in loads.items() if target == "one"]
    )
    assert len(resumed) == len(routes)
    expected = load_file(tmp_path / "straight" / "model.safetensors")
    for name, got in resumed.items():
        assert got[0] == {"note": 1}
        assert got[1]["loss"] == pytest.approx(straight["one"][-2]["loss"], abs=1e-6), name
        assert got[1]["grad_norm"] == pytest.approx(straight["one"][-2]["grad_norm"], rel=1e-5), name
        weights = load_file(tmp_path / name / "model.safetensors")
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-5, msg=f"{name} {key}")
    (same,) = [source for source, target in routes if source == target]
    assert resumed[f"{same}-{same}"][1] == straight[same][2], "the same layout: bit for bit"


@pytest.fixture(scope="module")
def saved(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two checkpoints."""
    root = tmp_path_factory.mktemp("saved")
    policy = build(hf)
    for _ in range(2):
        policy.update(TREES, loss_fn)
        resume.save(policy, root, {"step": policy.step})
    return root


def truncate(folder: Path) -> None:
    path = next((folder / "weights").glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = next((folder / "weights").glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "bytes, the manifest says"),
    "flipped bit": (flip, "SHA-256"),
    "missing file": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "missing manifest": (lambda folder: (folder / "manifest.json").unlink(), "incomplete"),
    "broken manifest": (lambda folder: (folder / "manifest.json").write_text("{"), "incomplete"),
    "other schema": (lambda folder: (folder / "manifest.json").write_text('{"schema": 99, "files": {}}'), "schema 99"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_torn_checkpoints_are_refused_and_the_older_one_is_found_on_request(
    kind: str, saved: Path, hf: Path, tmp_path: Path
) -> None:
    damage, message = DAMAGE[kind]
    root = tmp_path / "root"
    shutil.copytree(saved, root)
    newest = resume_folders.latest(root)
    assert newest == root / "step_000002" == resume_folders.latest_complete(root)
    damage(newest)
    policy = build(hf)
    before = [param.detach().clone() for param in policy.chunks[0].parameters()]
    with pytest.raises(CheckpointError, match=message):
        resume.load(policy, newest)
    assert all(torch.equal(a, b) for a, b in zip(policy.chunks[0].parameters(), before, strict=True))
    assert resume_folders.latest(root) == newest, "no silent fallback"
    older = resume_folders.latest_complete(root)
    assert older == root / "step_000001"
    assert resume.load(policy, older) == {"step": 1} and policy.step == 1


def test_checkpoints_of_another_model_are_refused(saved: Path, tmp_path: Path) -> None:
    other = build(make_model(tmp_path, "qwen3"))
    with pytest.raises(CheckpointError, match="doesn't fit this model"):
        resume.load(other, saved / "step_000002")


def test_of_large_checkpoints_only_small_files_are_hashed(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume_manifest, "HASH_TOTAL", 1000)
    monkeypatch.setattr(resume_manifest, "HASH_LIMIT", 1000)
    folder = resume.save(build(hf), tmp_path, {})
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files["state.json"]["sha256"] and any(entry["sha256"] is None for entry in files.values())
    truncate(folder)
    with pytest.raises(CheckpointError, match="bytes, the manifest says"):
        resume_manifest.verify(folder)


def test_a_step_is_saved_once_and_a_failed_save_leaves_nothing_behind(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = build(hf)
    resume.save(policy, tmp_path, {})
    with pytest.raises(CheckpointError, match="exists already"):
        resume.save(policy, tmp_path, {})
    policy.step = 1
    with pytest.raises(ValueError, match="not JSON compliant"):
        resume.save(policy, tmp_path, {"loss": float("nan")})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000000"]
    assert resume_folders.latest(tmp_path) == tmp_path / "step_000000"


def slow_writer(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None] = lambda: None) -> None:
    """Megatron's writers, forked from here, wait until the trainer is a step further; ``then`` runs in them first."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    original = filesystem_async._write_item

    @functools.wraps(original)  # megatron looks at its signature
    def write_item(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        then()
        return original(*args, **kwargs)

    monkeypatch.setattr(filesystem_async, "_write_item", write_item)


def test_a_save_in_the_background_has_the_weights_of_its_step(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the steps that are made while it is being written."""
    policy = build(hf)
    policy.update(TREES, loss_fn)
    policy.export_hf(tmp_path / "then", dtype="float32")
    slow_writer(monkeypatch)
    saving = resume.BackgroundSave(policy, tmp_path / "checkpoints", {"note": "a"})
    assert not saving.finished()
    losses = [policy.update(TREES, loss_fn).loss for _ in range(2)]
    assert resume_folders.latest(tmp_path / "checkpoints") is None, "nothing to be seen before it is whole"
    saving.finish()
    policy.export_hf(tmp_path / "now", dtype="float32")
    again = build(hf)
    folder = resume_folders.latest(tmp_path / "checkpoints")
    assert folder is not None and resume.load(again, folder) == {"note": "a"} and again.step == 1
    again.export_hf(tmp_path / "loaded", dtype="float32")
    then, now, loaded = (load_file(tmp_path / name / "model.safetensors") for name in ("then", "now", "loaded"))
    assert all(torch.equal(loaded[name], then[name]) for name in then)
    assert not all(torch.equal(now[name], then[name]) for name in then)
    assert [again.update(TREES, loss_fn).loss for _ in range(2)] == losses, "moments and main weights, too"


def test_a_save_in_the_background_outlives_the_trainers_turn(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's memory is given back while it is being written; the loop's state is that of the end."""
    monkeypatch.setattr(offload, "SMALLEST", 100)
    policy = build(hf)
    policy.update(TREES, loss_fn)
    policy.export_hf(tmp_path / "then", dtype="float32")
    slow_writer(monkeypatch)
    saving = resume.BackgroundSave(policy, tmp_path / "checkpoints", {"seconds": 1.0})
    memory = offload.trainer_memory(policy.wrapped, policy.optimizer, weights=True)
    memory.release()
    assert not saving.finished()
    saving.renew({"seconds": 2.0})
    assert resume_folders.latest(tmp_path / "checkpoints") is None, "nothing to be seen before it is recorded"
    saving.finish()
    memory.restore()
    again = build(hf)
    folder = resume_folders.latest(tmp_path / "checkpoints")
    assert folder is not None and resume.load(again, folder) == {"seconds": 2.0}
    again.export_hf(tmp_path / "loaded", dtype="float32")
    then, loaded = (load_file(tmp_path / name / "model.safetensors") for name in ("then", "loaded"))
    assert all(torch.equal(loaded[name], then[name]) for name in then)
    assert again.update(TREES, loss_fn).loss == policy.update(TREES, loss_fn).loss


def test_a_failed_save_in_the_background_is_told_and_leaves_nothing(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = build(hf)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        slow_writer(patched, full)
        saving = resume.BackgroundSave(policy, tmp_path, {})
        with pytest.raises(CheckpointError, match="(No space left|OSError).*the previous checkpoint stands"):
            saving.finish()
    assert list(tmp_path.iterdir()) == []
    resume.BackgroundSave(policy, tmp_path, {}).finish()
    assert resume_folders.latest(tmp_path) == tmp_path / "step_000000"


def test_policies_without_an_optimizer_cannot_be_saved(hf: Path, tmp_path: Path) -> None:
    policy = MegatronPolicy(
        PolicyConfig(precision="fp32"), OptimizerConfig(), hf, seed=1, total_steps=1, trainable=False
    )
    with pytest.raises(ConfigError, match="export it instead"):
        resume.save(policy, tmp_path, {})


def test_finding_and_pruning(tmp_path: Path) -> None:
    assert resume_folders.latest(tmp_path) is None and resume_folders.latest_complete(tmp_path / "absent") is None
    for step in (3, 20, 1000000):
        folder = resume_folders.checkpoint_path(tmp_path, step)
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"schema": 1, "files": {}}))
    (tmp_path / ".step_000021.9.tmp").mkdir()
    assert resume_folders.steps(tmp_path) == [3, 20, 1000000]
    with pytest.raises(CheckpointError, match="latest is missing"):
        resume_folders.latest(tmp_path)
    assert resume_folders.prune(tmp_path, 2) == [3] and resume_folders.steps(tmp_path) == [20, 1000000]
    (tmp_path / "latest").write_text("step_000003\n")
    with pytest.raises(CheckpointError, match="not there"):
        resume_folders.latest(tmp_path)
    with pytest.raises(CheckpointError, match="keep=0"):
        resume_folders.prune(tmp_path, 0)
