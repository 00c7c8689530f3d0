"""The policy in one process, against Hugging Face models, plain autograd and torch's AdamW."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pact_nemo.policy.architectures import check_architecture
from pact_nemo.policy.config import PolicyConfig
from pact_nemo.policy.distributed import init_distributed
from pact_nemo.policy.packing import pack
from pact_nemo.policy.trees import Place, Segment, TokenTree, TreeBuilder
from tests.workers.policy_kit import VOCAB, loss_fn, make_trees
from tests.workers.small_policy import build

from pact_nemo.policy import bridge as bridges  # isort: skip
from pact_nemo.policy import microbatches, model  # isort: skip
from pact_nemo.policy.process_groups import initialize_model_parallel  # isort: skip
from pact_nemo.policy.provider import build_provider, configure_provider  # isort: skip

FAMILIES = ["llama", "llama3", "qwen2", "qwen3", "qwen3_moe"]


def hf_logprobs(hf: Any, trees: list[TokenTree]) -> torch.Tensor:
    """Flat log-probs of all scored tokens: every segment scored in its own full sequence by transformers."""
    values = []
    for tree in trees:
        for index, segment in enumerate(tree.segments):
            prefix: list[int] = []
            parent = tree.segments[index].parent
            while parent >= 0:
                prefix = [*tree.segments[parent].token_ids.tolist(), *prefix]
                parent = tree.segments[parent].parent
            ids = torch.tensor(prefix + segment.token_ids.tolist())
            logprobs = hf(ids[None]).logits[0].log_softmax(-1)
            values += [
                logprobs[len(prefix) + i - 1, ids[len(prefix) + i]] for i, scored in enumerate(segment.scored) if scored
            ]
    return torch.stack(values)


def load_hf(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_transformers_and_weights_come_back_bit_for_bit(
    family: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    policy = build(models(family), policy={"trainable": False})
    trees = make_trees(5, seed=11, scale=3)
    with torch.no_grad():
        expected = hf_logprobs(load_hf(models(family)), trees)
    torch.testing.assert_close(torch.cat(policy.logprobs(trees)), expected, rtol=0, atol=1e-5)
    policy.export_hf(tmp_path / "out", dtype="float32")
    before, after = load_file(models(family) / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (models(family) / name).read_bytes()
    assert load_hf(tmp_path / "out").config.to_dict() | {"_name_or_path": ""} == load_hf(
        models(family)
    ).config.to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_an_update_equals_autograd_and_adamw_on_separate_sequences(
    family: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    trees = make_trees(5, seed=12)
    hf = load_hf(models(family))
    plain = [p for name, p in hf.named_parameters() if p.dim() == 1]
    decayed = [p for name, p in hf.named_parameters() if p.dim() > 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-3,
        eps=1e-5,
        betas=(0.8, 0.9),
    )
    streams = {"weight": torch.cat([tree.streams["weight"] for tree in trees])}
    policy = build(models(family), optimizer={"weight_decay": 0.1, "betas": [0.8, 0.9], "clip_grad": 0.5})
    for _ in range(2):
        logprobs = hf_logprobs(hf, trees)
        loss, metrics = loss_fn(logprobs, streams)
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), 0.5)
        adamw.step()
        result = policy.update(trees, loss_fn)
        assert result.loss == pytest.approx(loss.item(), abs=1e-6)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5) and norm > 0.5, "clipping is at work"
        assert result.metrics == pytest.approx({name: value.item() for name, value in metrics.items()}, rel=1e-5)
        assert result.tokens == sum(tree.num_tokens for tree in trees)
        torch.testing.assert_close(torch.cat(result.logprobs), logprobs.detach(), rtol=0, atol=1e-5)
    policy.export_hf(tmp_path, dtype="float32")
    weights = load_hf(tmp_path).state_dict()
    for name, value in hf.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5, msg=name)


def test_updates_with_a_rate_of_their_own_take_nothing_of_the_schedule(models: Callable[[str], Path]) -> None:
    trees = make_trees(2, seed=12)
    policy = build(models("llama"), optimizer={"lr_schedule": "linear", "warmup_steps": 2})
    rates = [policy.update(trees, loss_fn, lr=lr).lr for lr in (3e-4, 2e-4, None, None, 3e-4, None, None)]
    # two of four steps up to 1e-3, then two down to 0
    assert rates == pytest.approx([3e-4, 2e-4, 5e-4, 1e-3, 3e-4, 5e-4, 0.0]) and policy.step == 7


@pytest.mark.parametrize("distributed", [True, False])
def test_the_cosine_of_two_gradients_equals_autograd_and_changes_no_update(
    distributed: bool, models: Callable[[str], Path]
) -> None:
    first = make_trees(3, seed=12)
    second = [first[0], *make_trees(2, seed=13)]  # something in common, so that the cosine is not 0
    hf = load_hf(models("llama"))
    gradients = []
    for trees in (first, second):
        hf.zero_grad()
        loss_fn(hf_logprobs(hf, trees), {"weight": torch.cat([tree.streams["weight"] for tree in trees])})[0].backward()
        gradients.append(
            torch.cat([param.grad.flatten().double() for param in hf.parameters() if param.grad is not None])
        )
    norms = [gradient.norm().item() for gradient in gradients]
    policy, untouched = (build(models("llama"), distributed_optimizer=distributed) for _ in range(2))
    cosine, *found = policy.gradient_cosine(first, second, loss_fn)
    assert (
        cosine == pytest.approx((gradients[0] @ gradients[1]).item() / (norms[0] * norms[1]), abs=1e-5)
        and 0.01 < abs(cosine) < 0.99
    )
    assert found == pytest.approx(norms, rel=1e-5)
    assert policy.gradient_cosine(first, first, loss_fn)[0] == pytest.approx(1.0, abs=1e-6)
    for _ in range(2):
        ours, theirs = policy.update(first, loss_fn), untouched.update(first, loss_fn)
        assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
    for ours, theirs in zip(policy.logprobs(second), untouched.logprobs(second), strict=True):
        assert torch.equal(ours, theirs)


VARIANTS: dict[str, dict[str, Any]] = {
    "one_tree_per_row": {"micro_batch_tokens": 1},
    "all_in_one_row": {"micro_batch_tokens": 10_000},
    "no_sharing": {"share_prefix": False},
    "no_sharing_small_rows": {"share_prefix": False, "micro_batch_tokens": 40},
    "one_logit_row": {"logprob_chunk": 1},
    "recompute_full": {"recompute": "full"},
    "recompute_selective": {"recompute": "selective"},
    "plain_optimizer": {"distributed_optimizer": False},
}


@pytest.fixture(scope="module")
def baseline(models: Callable[[str], Path]) -> dict[str, Any]:
    policy, trees = build(models("qwen3")), make_trees(6, seed=13)
    return {
        "trees": trees,
        "results": [policy.update(trees, loss_fn) for _ in range(2)],
        "after": policy.logprobs(trees),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_result_depends_on_no_setting_of_how_it_is_computed(
    variant: str, baseline: dict[str, Any], models: Callable[[str], Path]
) -> None:
    policy = build(models("qwen3"), **VARIANTS[variant])
    for expected in baseline["results"]:
        result = policy.update(baseline["trees"], loss_fn)
        assert result.loss == pytest.approx(expected.loss, abs=1e-6)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert result.metrics == pytest.approx(expected.metrics, rel=1e-5)
        torch.testing.assert_close(result.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(policy.logprobs(baseline["trees"]), baseline["after"], rtol=0, atol=1e-5)


def rewound_trees(count: int, *, seed: int) -> list[TokenTree]:
    """x -> {tau_k, h -> b -> tau_k} where every tau and h has several contexts, each cut back to some length, now and
    then into x or b.
    """
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(draw.randint(low, high))]

    def grow(builder: TreeBuilder, at: Place, strands: list[tuple[int, list[int]]]) -> Place:
        """Returns the end of the first strand."""
        ends, length = [], 0
        for keep, ids in strands:
            at = builder.add(ids, [draw.random() < 0.5 for _ in ids], builder.back(at, length - keep))
            length = keep + len(ids)
            ends.append(at)
        return ends[0]

    trees = []
    for _ in range(count):
        builder = TreeBuilder(tokens(6, 9))
        taus = []
        for _ in range(3):
            taus.append([(0, tokens(6, 9)), (draw.randint(-2, 5), tokens(5, 8)), (draw.randint(1, 4), tokens(3, 6))])
        for tau in taus:
            grow(builder, builder.root, tau)
        trace = grow(builder, builder.root, [(0, tokens(6, 9)), (draw.randint(-2, 5), tokens(4, 6))])
        words = tokens(3, 4)
        boundary = builder.add(words, [False] * len(words), trace)
        for tau in taus:
            grow(builder, boundary, tau)
        tree = builder.build()
        tree.streams = {"weight": torch.tensor([draw.uniform(-0.01, 0.01) for _ in range(tree.num_scored)])}
        trees.append(tree)
    return trees


def test_trees_equal_separate_sequences_to_the_last_digits_in_float64(models: Callable[[str], Path]) -> None:
    config = PolicyConfig(precision="fp32", logprob_chunk=7)
    init_distributed(config.init_timeout_s)
    initialize_model_parallel(config, seed=1)
    bridge, architecture = bridges.load_bridge(models("qwen3")), check_architecture(models("qwen3"))
    provider = build_provider(architecture)
    configure_provider(provider, config, cuda=False)
    provider.params_dtype = torch.float64
    (network,) = model.build_chunks(provider, architecture, config, cuda=False)
    bridge.load_hf_weights([network])
    trees = [*make_trees(4, seed=14), *rewound_trees(2, seed=15)]

    def run(share_prefix: bool, budget: int, mask_dtype: torch.dtype | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        network.zero_grad()
        flat = torch.zeros(sum(tree.num_scored for tree in trees), dtype=torch.float64)
        for row in pack(trees, budget, share_prefix=share_prefix)[0]:
            batch = microbatches.to_local(row, device=torch.device("cpu"), mask_dtype=mask_dtype)
            logprobs = network(batch.tokens, batch.tree.position_ids[None], None, packed_seq_params=batch.tree)
            loss_fn(logprobs, batch.streams)[0].backward()
            flat[row.flat_index] = logprobs.detach()
        return flat, [param.grad.clone() for param in network.parameters()]

    separate, separate_grads = run(False, 1, None)  # plain causal attention only
    assert separate.dtype == torch.float64
    for mask_dtype in (torch.float64, None):  # stored masks (CPU), and masks that the kernel knows (CUDA)
        shared, shared_grads = run(True, 200, mask_dtype)
        torch.testing.assert_close(shared, separate, rtol=0, atol=1e-12)
        for one, other in zip(shared_grads, separate_grads, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_cut_of_the_loss_over_calls_does_not_matter_and_empty_calls_never_happen(
    models: Callable[[str], Path],
) -> None:
    sizes: list[int] = []

    def counting(
        logprob: torch.Tensor, streams: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        sizes.append(logprob.shape[0])
        return loss_fn(logprob, streams)

    trees = make_trees(4, seed=15)
    policy = build(models("llama"), micro_batch_tokens=1)
    policy.update(trees, counting)
    assert len(sizes) >= 4 and all(sizes) and sum(sizes) == sum(tree.num_scored for tree in trees)


def test_an_update_without_tokens_leaves_a_zero_loss_and_gradient(models: Callable[[str], Path]) -> None:
    policy = build(models("llama"))
    result = policy.update([], loss_fn)
    assert (result.loss, result.grad_norm, result.metrics, result.logprobs) == (0.0, 0.0, {}, [])
    assert policy.logprobs([]) == []


def test_temperature_and_entropy(models: Callable[[str], Path]) -> None:
    policy = build(models("llama"), policy={"trainable": False})
    ids = [3, 1, 4, 1, 5, 9]
    temperatures = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.7])  # of each scored token
    segments = [Segment(ids[:3], -1, [False, True, True]), Segment(ids[3:], 0, [True] * 3)]
    with torch.no_grad():
        logits = load_hf(models("llama"))(torch.tensor([ids])).logits[0, :-1]
    logprobs, entropies = policy.logprobs_and_entropies(
        [TokenTree(segments, temperatures=temperatures), TokenTree(segments)]
    )
    plain = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(
        logprobs[1], plain.log_prob(torch.tensor(ids[1:])), rtol=0, atol=1e-5
    )  # 1 where a tree says nothing
    distribution = torch.distributions.Categorical(logits=logits / temperatures[:, None])
    torch.testing.assert_close(logprobs[0], distribution.log_prob(torch.tensor(ids[1:])), rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies[0], distribution.entropy(), rtol=0, atol=1e-5)
