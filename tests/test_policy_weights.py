"""The policy's weights: the reference beside them, steps that are refused, main weights in float32, exports, and what
can't be built.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pact_nemo.checkpoints.hf import export_version
from pact_nemo.checkpoints.manifest import verify_manifest
from pact_nemo.errors import CheckpointError, ConfigError, NumericsError
from pact_nemo.policy.config import PolicyConfig
from tests.workers.policy_kit import VOCAB, loss_fn, make_model, make_trees
from tests.workers.small_policy import build

from pact_nemo.policy.provider import build_provider, configure_provider  # isort: skip


def test_reference_logprobs_stay_those_of_the_initial_weights(models: Callable[[str], Path]) -> None:
    trees = make_trees(3, seed=16)
    policy = build(models("qwen2"))
    policy.load_reference(models("qwen2"))
    initial = policy.logprobs(trees)
    policy.update(trees, loss_fn)
    trained = policy.logprobs(trees)
    before = [param.detach().clone() for param in policy.chunks[0].parameters()]
    assert all(torch.equal(a, b) for a, b in zip(policy.reference_logprobs(trees), initial, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(policy.chunks[0].parameters(), before, strict=True)), (
        "restored bit for bit"
    )
    assert not any(torch.equal(a, b) for a, b in zip(trained, initial, strict=True))
    policy.update(trees, loss_fn)
    assert not torch.equal(policy.logprobs(trees)[0], trained[0]), "the optimizer still reaches the weights"
    with pytest.raises(ConfigError, match="load_reference"):
        build(models("qwen2")).reference_logprobs(trees)


def test_another_checkpoint_can_become_the_reference(models: Callable[[str], Path], tmp_path: Path) -> None:
    trees = make_trees(3, seed=19)
    other = make_model(tmp_path, "qwen2", seed=5)
    expected = build(other).logprobs(trees)
    policy = build(models("qwen2"))
    before = policy.logprobs(trees)
    policy.load_reference(other)
    assert all(torch.equal(a, b) for a, b in zip(policy.reference_logprobs(trees), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(policy.logprobs(trees), before, strict=True))
    result = policy.update(trees, loss_fn, lr=0.0)
    assert result.lr == 0.0
    assert all(torch.equal(a, b) for a, b in zip(policy.logprobs(trees), before, strict=True)), (
        "a learning rate of 0 changes nothing"
    )


@pytest.mark.parametrize("kind", ["loss", "metric", "gradient", "log-prob"])
def test_non_finite_numbers_are_refused_and_change_nothing(kind: str, models: Callable[[str], Path]) -> None:
    trees = make_trees(3, seed=17)
    policy, untouched = build(models("llama")), build(models("llama"))
    before = [param.detach().clone() for param in policy.chunks[0].parameters()]

    def broken(logprob: torch.Tensor, streams: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = loss_fn(logprob, streams)
        if kind == "loss":
            loss = loss + torch.tensor(float("nan"))
        elif kind == "metric":
            metrics["bad_metric"] = torch.tensor(float("inf"))
        elif kind == "log-prob":  # -Inf leaves the loss finite, as ratios are cut
            metrics["nonfinite/rl_x"] = torch.tensor(1.0)
        else:
            loss = loss + (logprob * 0.0).abs().sqrt().sum()  # value 0, gradient NaN
        return loss, metrics

    named = {"loss": "loss", "metric": "bad_metric", "gradient": "grad_norm", "log-prob": "nonfinite/rl_x"}
    with pytest.raises(NumericsError, match=named[kind]):
        policy.update(trees, broken)
    assert policy.step == 0
    assert all(torch.equal(a, b) for a, b in zip(policy.chunks[0].parameters(), before, strict=True))
    assert policy.update(trees, loss_fn).grad_norm == untouched.update(trees, loss_fn).grad_norm, (
        "no trace of it in the next step"
    )


def test_bf16_trains_with_float32_main_weights(models: Callable[[str], Path]) -> None:
    trees = make_trees(5, seed=18)
    exact = build(models("llama")).logprobs(trees)
    policy = build(models("llama"), precision="bf16", optimizer={"lr": 1e-5})
    assert {param.dtype for param in policy.chunks[0].parameters()} == {torch.bfloat16}
    torch.testing.assert_close(policy.logprobs(trees), exact, rtol=0, atol=0.25)
    mains = [
        param
        for part in policy.optimizer.chained_optimizers
        for group in part.param_groups
        for param in group["params"]
    ]
    before = [main.clone() for main in mains]
    result = policy.update(trees, loss_fn)
    assert all(main.dtype == torch.float32 for main in mains)
    changed = torch.cat([(a - b).abs().flatten() for a, b in zip(mains, before, strict=True)])
    assert 0 < changed.max() < 2e-5, "steps far below bf16 resolution of the weights are kept"
    assert result.grad_norm == pytest.approx(build(models("llama")).update(trees, loss_fn).grad_norm, rel=0.05)


def test_exports_are_versioned_whole_and_in_the_dtype_asked_for(models: Callable[[str], Path], tmp_path: Path) -> None:
    policy = build(models("llama3"), policy={"trainable": False})
    folder = export_version(policy, tmp_path, 7, extra={"step": 7})
    manifest = verify_manifest(folder, expect_version=7)
    assert folder.name == "v000007" and manifest.extra == {"dtype": "bfloat16", "step": 7}
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(CheckpointError, match="exists already"):
        export_version(policy, tmp_path, 7)
    with pytest.raises(ConfigError, match="int8"):
        policy.export_hf(tmp_path / "x", dtype="int8")


def test_what_cannot_be_built_is_refused_with_a_reason(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        build(tmp_path)
    policy = build(models("llama"), policy={"trainable": False})
    refusals = {
        "expert_parallel": "dense models need 1",
        "pipeline_parallel": "4 layers",
        "tensor_parallel": "8 attention heads",
    }
    for field, message in refusals.items():
        provider = build_provider(policy.architecture)
        with pytest.raises(ConfigError, match=message):
            configure_provider(provider, PolicyConfig(**{field: 3}), cuda=False)
    with pytest.raises(ConfigError, match="trainable"):
        policy.update(make_trees(1), loss_fn)
    assert policy.provider.vocab_size == VOCAB
