"""The weights of tokens, by hand: those of RL by each aggregation, and the weighted mean of SFT."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pact_nemo.objective.weights import rl_weights, sft_weights


def test_rl_weights_by_hand() -> None:
    counts, usable = [[2, 3], [5, 4]], [[True, True], [True, False]]
    assert rl_weights(counts, usable, num_prompts=2) == [[1 / 8, 1 / 12], [1 / 10, 0.0]]
    assert rl_weights(counts, usable, num_prompts=2, aggregation="token-mean") == [[0.1, 0.1], [0.1, 0.0]]
    assert rl_weights(counts, usable, num_prompts=2, aggregation="constant-length", constant_length=10) == [
        [1 / 40, 1 / 40],
        [1 / 20, 0.0],
    ]
    with pytest.raises(ValueError, match="median"):
        rl_weights(counts, usable, num_prompts=2, aggregation="median")


def test_failed_and_empty_rollouts_leave_the_mean_over_k_and_a_dead_prompt_stays_in_the_batch() -> None:
    counts, usable = [[4, 0, 2, 9], [3, 3]], [[True, True, True, False], [False, False]]
    assert rl_weights(counts, usable, num_prompts=2) == [[1 / 16, 0.0, 1 / 8, 0.0], [0.0, 0.0]]
    assert rl_weights(counts, usable, num_prompts=2, aggregation="token-mean") == [[1 / 6, 0.0, 1 / 6, 0.0], [0.0, 0.0]]
    assert rl_weights([[0]], [[True]], num_prompts=1, aggregation="token-mean") == [[0.0]]
    with pytest.raises(ValueError, match="shorter|longer"):
        rl_weights([[1, 2]], [[True]], num_prompts=1)
    with pytest.raises(ValueError, match="num_prompts"):
        rl_weights(counts, usable, num_prompts=0)


def test_sft_weights_are_a_weighted_mean_and_z_zero_is_skipped() -> None:
    masks = [np.array([1.0, 0.0, 0.5]), np.zeros(3), np.ones(2), np.zeros(0)]
    weights = sft_weights(masks, [False, False, True, False], num_prompts=4, beta=0.1)
    assert weights[0] == pytest.approx(0.1 * np.array([1.0, 0.0, 0.5]) / 1.5 / 4)
    assert [w.tolist() for w in weights[1:]] == [[0.0] * 3, [0.0] * 2, []]
    for bad in (math.nan, -1.0):
        with pytest.raises(ValueError, match="m_n"):
            sft_weights([np.array([1.0, bad])], [False], num_prompts=1, beta=0.1)


def test_sft_tokens_can_share_one_denominator_over_the_mini_batch() -> None:
    masks = [np.array([1.0, 0.5, 0.0]), np.array([1.0]), np.array([2.0]), np.zeros(2), np.zeros(0)]
    found = sft_weights(masks, [False, False, True, False, True], num_prompts=5, beta=0.4, aggregation="token-mean")
    assert [row.tolist() for row in found] == [
        pytest.approx([0.16, 0.08, 0.0]),
        pytest.approx([0.16]),
        [0.0],
        [0.0, 0.0],
        [],
    ]
    with pytest.raises(ValueError, match="SFT aggregation"):
        sft_weights(masks, [False] * 5, num_prompts=5, beta=0.4, aggregation="mean")
