"""Low-rank adapters in one process: against transformers and ``peft`` on the exported adapter, finite differences, full
training and a checkpoint; and what is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pact_nemo.checkpoints import resume
from pact_nemo.errors import CheckpointError, ConfigError
from pact_nemo.planning.memory import state_bytes
from pact_nemo.planning.shape import Layout, ModelShape, rank_parameters
from pact_nemo.planning.shape import adapter_parameters as adapter_parameters_of
from pact_nemo.policy.config import LORA_TARGETS, LoraConfig
from pact_nemo.policy.policy import MegatronPolicy
from tests.test_policy_model import hf_logprobs, load_hf
from tests.workers.policy_kit import loss_fn, make_trees
from tests.workers.small_policy import build

TREES = make_trees(4, seed=31)
ATTENTION = ["linear_qkv", "linear_proj"]
FAMILIES = ["llama", "llama3", "qwen2", "qwen3", "llama_biases", "mistral", "qwen3_moe"]


def lora(family: str = "llama", **fields: Any) -> LoraConfig:
    targets = {"targets": ATTENTION} if family == "qwen3_moe" else {}
    return LoraConfig(**{"rank": 4, "alpha": 6.0, **targets, **fields})


def adapter_parameters(policy: MegatronPolicy) -> dict[str, torch.nn.Parameter]:
    return {name: param for name, param in policy.chunks[0].named_parameters() if param.requires_grad}


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@contextmanager
def adapted(model: Any, folder: Path) -> Iterator[Any]:
    """A transformers model with an adapter folder's matrices added to its own, as the PEFT format means them."""
    settings, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    hooks = []
    for name, inner in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        outer = tensors[name.replace("lora_A", "lora_B")]
        module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))

        def add(module: Any, inputs: Any, output: Any, inner: torch.Tensor = inner, outer: torch.Tensor = outer) -> Any:
            return output + settings["lora_alpha"] / settings["r"] * (inputs[0] @ inner.T @ outer.T)

        hooks.append(module.register_forward_hook(add))
    yield model
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_the_base_then_of_base_and_adapter(
    family: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    base = build(models(family), policy={"trainable": False}).logprobs(TREES)
    policy = build(models(family), lora=lora(family))
    assert same(policy.logprobs(TREES), base), "B is 0"
    for _ in range(2):
        policy.update(TREES, loss_fn)
    trained = torch.cat(policy.logprobs(TREES))
    assert (trained - torch.cat(base)).abs().max() > 0.05
    policy.export_adapter(tmp_path)
    policy.export_hf(tmp_path / "merged", dtype="float32")
    with torch.no_grad(), adapted(load_hf(models(family)), tmp_path) as model:
        torch.testing.assert_close(trained, hf_logprobs(model, TREES), rtol=0, atol=1e-5)
        torch.testing.assert_close(trained, hf_logprobs(load_hf(tmp_path / "merged"), TREES), rtol=0, atol=1e-5)
    assert torch.equal(torch.cat(policy.logprobs(TREES)), trained), "an export changes nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_the_adapter_as_it_is(family: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    policy = build(models(family), lora=lora(family))
    for _ in range(2):
        policy.update(TREES, loss_fn)
    policy.export_adapter(tmp_path)
    model = peft.PeftModel.from_pretrained(load_hf(models(family)), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(policy.logprobs(TREES)), hf_logprobs(model, TREES), rtol=0, atol=1e-5)


def test_only_adapters_have_gradients_moments_and_room_in_a_checkpoint(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    policy, full = build(models("llama"), lora=lora()), build(models("llama"))
    before = {name: param.clone() for name, param in policy.chunks[0].named_parameters()}
    policy.update(TREES, loss_fn)
    parameters = adapter_parameters(policy)
    assert len(parameters) == 2 * 4 * 4 and all(".adapter." in name for name in parameters)
    moved = {name for name, param in policy.chunks[0].named_parameters() if not torch.equal(before[name], param)}
    assert moved and moved <= parameters.keys()
    trained = sum(param.numel() for param in parameters.values())
    (buffer,) = policy.wrapped[0].buffers
    assert trained <= buffer.grad_data.numel() < trained + 64 * len(parameters)  # each begins at a multiple of 64
    folders = {name: resume.save(one, tmp_path / name, {}) for name, one in (("lora", policy), ("full", full))}
    sizes = {
        name: sum(file.stat().st_size for file in (folder / "weights").glob("*.distcp"))
        for name, folder in folders.items()
    }
    assert sizes["lora"] < 0.4 * sizes["full"]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_plan_counts_what_is_trained(family: str, models: Callable[[str], Path]) -> None:
    policy = build(models(family), lora=lora(family))
    policy.update(TREES, loss_fn)
    shape = ModelShape.of(policy.architecture)
    numbers = [param.numel() for param in adapter_parameters(policy).values()]
    assert adapter_parameters_of(shape, policy.config.lora) == sum(numbers)
    state = state_bytes(rank_parameters(shape, Layout(1), 0, policy.config.lora), Layout(1), policy.config)
    assert state.weights == 4 * sum(param.numel() for param in policy.chunks[0].parameters())
    assert (state.gradients, state.optimizer) == (4 * sum(numbers), 8 * sum(numbers))


def test_gradients_are_finite_differences_of_the_loss(models: Callable[[str], Path]) -> None:
    policy = build(models("qwen3"), lora=lora())
    for _ in range(2):
        policy.update(TREES, loss_fn, lr=1e-2)  # B is no longer 0, so that A has a gradient
    policy._backward(TREES, loss_fn)
    streams = {"weight": torch.cat([tree.streams["weight"] for tree in TREES])}

    def loss() -> float:
        return float(loss_fn(torch.cat(policy.logprobs(TREES)).double(), streams)[0])

    for part in ("linear_in", "linear_out"):
        params = [param for name, param in adapter_parameters(policy).items() if part in name]
        gradients = [param.main_grad.clone() for param in params]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        values, losses, reach = [param.detach().clone() for param in params], [], 0.02
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for param, value, gradient in zip(params, values, gradients, strict=True):
                    param.copy_(value + sign * reach * gradient / norm)
            losses.append(loss())
        with torch.no_grad():
            for param, value in zip(params, values, strict=True):
                param.copy_(value)
        assert (losses[0] - losses[1]) / (2 * reach) == pytest.approx(norm.item(), rel=2e-3)


def test_a_full_rank_carries_the_whole_gradient_and_follows_full_training(models: Callable[[str], Path]) -> None:
    """With B = 0 the gradient of B is scale * (gradient of W) A^T, from which a square A gives that of W back."""
    targets = ["linear_qkv", "linear_proj", "linear_fc1"]
    adapter, full = build(models("llama"), lora=lora(rank=64, alpha=64.0, targets=targets)), build(models("llama"))
    adapter._backward(TREES, loss_fn)
    full._backward(TREES, loss_fn)
    expected = dict(full.chunks[0].named_parameters())
    found = adapter_parameters(adapter)
    for name, outer in found.items():
        if not name.endswith("linear_out.weight"):
            continue
        stem = name.removesuffix(".adapter.linear_out.weight")
        inner = found[f"{stem}.adapter.linear_in.weight"].double()
        whole = torch.linalg.solve(inner.T, outer.main_grad.double(), left=False)
        torch.testing.assert_close(whole.float(), expected[f"{stem}.weight"].main_grad, rtol=1e-3, atol=1e-4)
    losses = {}
    for name, policy in (("adapter", adapter), ("full", full)):
        losses[name] = [policy.update(TREES, loss_fn, lr=2e-3).loss for _ in range(12)]
    fell = {name: values[0] - values[-1] for name, values in losses.items()}
    assert losses["adapter"][0] == losses["full"][0] and fell["adapter"] > 0.5 * fell["full"] > 0


def test_the_reference_is_the_base_without_a_copy(models: Callable[[str], Path], tmp_path: Path) -> None:
    policy = build(models("llama"), lora=lora())
    base = policy.logprobs(TREES)
    policy.load_reference(models("llama"))
    for _ in range(2):
        policy.update(TREES, loss_fn)
    trained, places = policy.logprobs(TREES), [param.data_ptr() for param in policy.chunks[0].parameters()]
    assert same(policy.reference_logprobs(TREES), base) and not same(trained, base)
    assert same(policy.logprobs(TREES), trained), "the adapters are back"
    assert [param.data_ptr() for param in policy.chunks[0].parameters()] == places
    with pytest.raises(ConfigError, match=r"kl_coef=0.*policy\.lora\.rank=0"):
        policy.load_reference(models("llama3"))


@pytest.mark.parametrize("distributed_optimizer", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_steps_are_one_step_and_one_resumed(
    precision: str, distributed_optimizer: bool, models: Callable[[str], Path], tmp_path: Path
) -> None:
    config: dict[str, Any] = {"precision": precision, "distributed_optimizer": distributed_optimizer, "lora": lora()}
    straight = build(models("llama"), **config)
    straight.update(TREES, loss_fn)
    expected = straight.update(TREES, loss_fn)
    first = build(models("llama"), **config)
    first.update(TREES, loss_fn)
    folder = resume.save(first, tmp_path, {})
    resumed = build(models("llama"), **config)
    resume.load(resumed, folder)
    assert same(resumed.logprobs(TREES), first.logprobs(TREES)), "the adapters are there"
    result = resumed.update(TREES, loss_fn)
    assert (result.loss, result.grad_norm, result.lr) == (expected.loss, expected.grad_norm, expected.lr)
    assert same(list(resumed.chunks[0].parameters()), list(straight.chunks[0].parameters()))


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        ({}, {"alpha": 7.0}, r"step_000000 has policy\.lora\.alpha=6\.0, this run 7\.0"),
        ({}, {"rank": 8}, r"step_000000 has policy\.lora\.rank=4, this run 8"),
        ({}, {"targets": ["linear_qkv"]}, r"has policy\.lora\.targets=\['linear_fc1', .*this run \['linear_qkv'\]"),
        ({"targets": ["linear_qkv"]}, {}, r"has policy\.lora\.targets=\['linear_qkv'\], this run \['linear_fc1', "),
        ({}, None, r"step_000000 holds adapters; resume with policy\.lora\.rank=4"),
        (None, {}, r"step_000000 holds all weights; resume with policy\.lora\.rank=0"),
    ],
)
def test_a_checkpoint_that_means_something_else_here_is_refused(
    saved: dict[str, Any] | None,
    here: dict[str, Any] | None,
    message: str,
    models: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    def policy(words: dict[str, Any] | None) -> MegatronPolicy:
        return build(models("llama"), **({} if words is None else {"lora": lora(**words)}))

    folder = resume.save(policy(saved), tmp_path, {})
    with pytest.raises(CheckpointError, match=message):
        resume.load(policy(here), folder)


def test_adapters_of_another_base_are_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = resume.save(build(models("llama"), lora=lora()), tmp_path, {})
    other = build(models("llama"), lora=lora())
    assert other.adapters is not None
    other.adapters.base = "another"
    with pytest.raises(CheckpointError, match=r"step_000000: .*other base weights than those of model\.path"):
        resume.load(other, folder)


def test_the_digest_of_a_base_is_of_its_weights(models: Callable[[str], Path], tmp_path: Path) -> None:
    policy = build(models("llama"), lora=lora())
    again = build(models("llama"), lora=lora())
    policy.update(TREES, loss_fn)
    policy.export_hf(tmp_path, dtype="float32")
    other = build(tmp_path, lora=lora())
    digests = [one.adapters.base for one in (policy, again, other) if one.adapters is not None]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(("size", "low", "high"), [(1e-5, 0.0, 0.05), (1e-4, 0.05, 0.5), (3e-3, 0.95, 1.05)])
def test_an_update_too_small_for_the_bases_dtype_is_in_the_merged_export(
    size: float, low: float, high: float, models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Merging rounds once, to the export's dtype: the float32 export of a bf16 policy has the product to the last
    digit. How much of it the bfloat16 export has is said.
    """
    policy = build(models("llama"), precision="bf16", lora=lora())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, param in adapter_parameters(policy).items():
            if "linear_out" in name:
                param.copy_(torch.randn(param.shape, generator=generator) * size)
    for dtype in ("float32", "bfloat16"):
        policy.export_hf(tmp_path / dtype, dtype=dtype)
    policy.export_adapter(tmp_path)
    tensors, base = load_file(tmp_path / "adapter_model.safetensors"), load_file(models("llama") / "model.safetensors")
    exact, rounded = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16"))
    changed, stored, whole = 0, 0.0, 0.0
    for name, value in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        want = value.bfloat16().double()
        if f"{stem}.lora_A.weight" in tensors:
            inner, outer = (tensors[f"{stem}.lora_{part}.weight"].double() for part in "AB")
            want = want + 1.5 * outer @ inner
            changed += int((rounded[name] != value.bfloat16()).sum())
            change = exact[name].double() - value.bfloat16().double()
            stored += float(((rounded[name].double() - value.bfloat16().double()) * change).sum())
            whole += float(change.square().sum())
        torch.testing.assert_close(exact[name].double(), want, rtol=1e-6, atol=1e-9)
        assert torch.equal(rounded[name], exact[name].bfloat16())
    assert changed > 0
    assert policy.adapters is not None and policy.adapters.kept() == pytest.approx(stored / whole, rel=1e-4)
    assert low < policy.adapters.kept() < high


@pytest.mark.parametrize("targets", [list(LORA_TARGETS), ["linear_fc2"]])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputing_layers_changes_no_gradient(
    recompute: str, targets: list[str], models: Callable[[str], Path]
) -> None:
    config = lora(targets=targets)
    plain, again = build(models("llama"), lora=config), build(models("llama"), lora=config, recompute=recompute)
    for _ in range(2):
        ours, theirs = again.update(TREES, loss_fn), plain.update(TREES, loss_fn)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-6) and ours.grad_norm > 0.01
