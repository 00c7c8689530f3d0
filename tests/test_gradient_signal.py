"""How much of a mini-batch's gradient is signal: against drawn gradients whose true share is known, and against the
terms' own gradients.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pact_nemo.batches.prompt_trees import PromptTree
from pact_nemo.monitoring.gradient_signal import halves, measure, term_of, terms_of
from pact_nemo.objective.gradient_noise import prompts_for_half, signal_share
from pact_nemo.policy.config import LoraConfig, OptimizerConfig, PolicyConfig
from pact_nemo.policy.policy import MegatronPolicy
from tests.workers.pact_kit import PACT, make_pact_prompts, pact_terms
from tests.workers.policy_kit import make_model


def test_the_share_and_the_prompts_are_those_that_the_gradients_were_drawn_with() -> None:
    draw = np.random.default_rng(1)
    prompts, dimension, noise = 16, 200_000, 3.0
    truth = draw.normal(size=dimension) / math.sqrt(dimension)  # |g|^2 = 1
    each = truth + noise / math.sqrt(dimension) * draw.normal(size=(prompts, dimension))  # s^2 = 9
    one, other = each[::2].sum(0) / prompts, each[1::2].sum(0) / prompts
    share = signal_share([float(one @ other)], [float(np.linalg.norm(one + other))])
    assert share == pytest.approx(1 / (1 + noise**2 / prompts), rel=0.02)
    assert prompts_for_half(share, prompts) == pytest.approx(noise**2, rel=0.02)
    assert signal_share([-0.1], [1.0]) == 0.0 and prompts_for_half(0.0, 16) == math.inf
    assert signal_share([0.0], [0.0]) is None


def test_prompts_without_an_advantage_do_not_raise_the_share() -> None:
    """At six prompts of which a fifth has an advantage, half of the measurements have a half without a gradient: what
    is left out with them is noise.
    """
    draw = np.random.default_rng(0)
    count, dimension, live, noise = 6, 2000, 0.2, 5.0
    truth = draw.normal(size=dimension) / math.sqrt(dimension)

    def mini_batch() -> np.ndarray:
        each = truth / live + noise / math.sqrt(dimension) * draw.normal(size=(count, dimension))
        return each * (draw.random(count) < live)[:, None] / count  # type: ignore[no-any-return]

    whole = [float(np.sum(mini_batch().sum(0) ** 2)) for _ in range(1500)]
    products, norms = [], []
    for _ in range(1500):
        parts = mini_batch()
        one, other = parts[::2].sum(0), parts[1::2].sum(0)
        products.append(float(one @ other))
        norms.append(float(np.linalg.norm(one + other)))
    assert signal_share(products, norms) == pytest.approx(1 / np.mean(whole), rel=0.12)  # |g|^2 = 1


def test_halves_have_every_prompt_once_and_are_drawn_without_the_gate() -> None:
    prompts = make_pact_prompts(14)
    first, second = halves(prompts, seed=1, step=2)
    assert sorted(id(p) for p in [*first, *second]) == sorted(id(p) for p in prompts)
    assert halves(prompts, seed=1, step=3)[0] != first
    several = [sum(p.group.anchored for p in halves(prompts, seed=1, step=step)[0]) for step in range(40)]
    share = sum(p.group.anchored for p in prompts) / 14
    assert len({*several}) > 2 and np.mean(several) == pytest.approx(7 * share, abs=0.7)


@pytest.mark.parametrize(("size", "traced"), [(8, 0.1), (16, 0.1), (32, 0.04)])
def test_the_share_is_right_where_few_prompts_have_the_term(size: int, traced: float) -> None:
    """Halves with as many prompts of the term each agree too well, by up to a half."""
    draw = np.random.default_rng(7)
    tree = make_pact_prompts(1)[0]
    products, norms, sums = [], [], []
    for step in range(2500):
        has = draw.random(size) < traced
        prompts = [
            replace(tree, group=replace(tree.group, anchored=not own, task=replace(tree.group.task, id=str(i))))
            for i, own in enumerate(has)
        ]
        gradients = {
            str(i): own * (draw.normal(0, 1, 4) + np.array([2.0, 0, 0, 0])) / size for i, own in enumerate(has)
        }
        one, other = (sum(gradients[p.group.task.id] for p in half) for half in halves(prompts, seed=1, step=step))
        products.append(float(one @ other))
        norms.append(float(np.linalg.norm(one + other)))
        sums.append(one + other)
    true = float(np.sum(np.mean(sums, axis=0) ** 2) / np.mean(np.square(norms)))
    assert signal_share(products, norms) == pytest.approx(true, abs=0.25 * true + 0.004)


@pytest.mark.parametrize("rank", [0, 8])
def test_a_term_is_measured_as_if_it_were_alone(rank: int, tmp_path: Path) -> None:
    prompts = make_pact_prompts(8)
    policy = MegatronPolicy(
        PolicyConfig(precision="fp32", lora=LoraConfig(rank=rank)),
        OptimizerConfig(lr=1e-3),
        make_model(tmp_path / "m", "llama"),
        seed=1,
        total_steps=2,
    )
    record = measure(policy, prompts, PACT, seed=1, step=2)
    first, second = halves(prompts, seed=1, step=2)
    for term, names in terms_of(PACT).items():
        # the loss of the term alone, written down from the streams that have weight in it
        def alone(
            logprobs: torch.Tensor, streams: dict[str, torch.Tensor], names: tuple[str, ...] = names
        ) -> tuple[torch.Tensor, dict]:  # type: ignore[type-arg]
            zero = {
                name: torch.zeros_like(value)
                for name, value in streams.items()
                if name.startswith("w_") and name not in names
            }
            return pact_terms(logprobs, {**streams, **zero, "entropy": torch.zeros_like(logprobs)})

        cosine, norm, other = policy.gradient_cosine([p.tree for p in first], [p.tree for p in second], alone)
        assert record[f"signal/{term}_cosine"] == pytest.approx(cosine, abs=1e-5)
        assert record[f"signal/{term}_product"] == pytest.approx(cosine * norm * other, rel=1e-3, abs=1e-9)
        assert record[f"signal/{term}_norm"] == pytest.approx(
            math.sqrt(norm**2 + other**2 + 2 * cosine * norm * other), rel=1e-4
        )
    assert term_of([p for p in prompts if p.group.anchored], terms_of(PACT)["sft"]) == []
    anchored = [p for p in prompts if p.group.anchored]
    assert not any(key.startswith("signal/sft") for key in measure(policy, anchored, PACT, seed=1, step=2))
    # one half alone has the SFT term: nothing agrees with it
    first, second = halves(prompts, seed=1, step=2)
    names = terms_of(PACT)["sft"]
    zeroed = [replace(p, tree=replace(p.tree, streams={**p.tree.streams, **silent(p, names)})) for p in second]
    alone_in_first = measure(policy, [*first, *zeroed], PACT, seed=1, step=2)
    assert alone_in_first["signal/sft_product"] == 0.0 == alone_in_first["signal/sft_share"]
    assert alone_in_first["signal/sft_norm"] > 0 and "signal/sft_cosine" not in alone_in_first


def silent(prompt: PromptTree, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(prompt.tree.streams[name]) for name in names if name in prompt.tree.streams}
