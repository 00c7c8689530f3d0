"""Sliding windows: along a tree they are those of its sequences, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pact_nemo.policy import attention
from pact_nemo.policy.attention import lower_right_mask, plan_attention
from pact_nemo.policy.packing import pack, zigzag_positions
from tests.workers.architecture_kit import build, config_of, few_threads, wanted, write_model  # noqa: F401 - a fixture
from tests.workers.policy_kit import make_trees


@pytest.mark.parametrize("name", ["mistral, window", "qwen3, biases, window"])
@pytest.mark.parametrize(
    "settings", [{}, {"share_prefix": False}, {"fused_elementwise": False}], ids=["plain", "separate", "unfused"]
)
def test_windows_along_a_tree_are_those_of_its_sequences(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    write_model(tmp_path, config_of(name))
    trees = make_trees(4, seed=5)
    got = build(tmp_path, **settings).logprobs(trees)
    for tree, scored in zip(trees, got, strict=True):
        for sequence, index in tree.chains():
            ids = [token for segment in sequence.segments for token in segment.token_ids]
            flags = [flag for segment in sequence.segments for flag in segment.scored]
            want = wanted(tmp_path, ids)[torch.tensor(flags[1:])]
            torch.testing.assert_close(scored[index], want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", [1, 3, 8, 100])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_windowed_plan_shows_each_token_the_last_positions_of_its_path(
    window: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "WINDOW_BLOCK", 4)
    (row,) = pack(make_trees(2, seed=8), 10_000, multiple=2 * ranks)[0]
    length = row.tokens.shape[0]
    parents = {}
    for start, stop, parent in ((run.start, run.stop, run.parent) for run in row.runs):
        for position in range(start, stop):
            parents[position] = position - 1 if position > start else row.runs[parent].stop - 1 if parent >= 0 else -1
    for rank in range(ranks):
        mine = zigzag_positions(length, rank, ranks) if ranks > 1 else None
        plan = plan_attention(row.runs, mine, window=window)
        plan.add_masks(torch.float32)
        starts = [sum(plan.piece_lengths[:piece]) for piece in range(len(plan.piece_lengths) + 1)]
        queries = iter(mine.tolist() if mine is not None else range(length))
        for count, call in zip(plan.query_lengths, plan.calls, strict=True):
            keys = [position for piece in call.pieces for position in range(starts[piece], starts[piece + 1])]
            mask = call.mask if call.mask is not None else lower_right_mask(count, len(keys), torch.float32)
            assert count <= 4 and len(keys) < 4 + window
            for line in mask:
                position, path = next(queries), []
                while position >= 0 and len(path) < window:
                    path.append(position)
                    position = parents[position]
                assert [key for key, value in zip(keys, line.tolist(), strict=True) if value == 0] == path[::-1]
        assert next(queries, None) is None
