"""Packing token trees into rows: nothing lost, nothing seen that a separate sequence would not see."""

from __future__ import annotations

import pytest
import torch

from pact_nemo.errors import DataError
from pact_nemo.policy.megatron_import import prepare_megatron
from pact_nemo.policy.packing import PackedMicroBatch, Run, pack, plan_rows, zigzag_positions
from pact_nemo.policy.trees import Segment, TokenTree
from tests.workers.policy_kit import make_trees

prepare_megatron()
from pact_nemo.policy.attention import AttentionPlan, plan_attention  # noqa: E402
from pact_nemo.policy.config import PolicyConfig  # noqa: E402
from pact_nemo.policy.distributed import init_distributed  # noqa: E402
from pact_nemo.policy.microbatches import to_local  # noqa: E402
from pact_nemo.policy.process_groups import initialize_model_parallel  # noqa: E402


def model_parallel_of_one() -> None:
    init_distributed(60)
    initialize_model_parallel(PolicyConfig(), seed=1)


def scored_contexts(trees: list[TokenTree]) -> list[tuple[tuple[int, ...], int]]:
    """Per scored token of all trees, in flat order: (all tokens before it on its path, the token). Straight from the
    definition.
    """
    found = []
    for tree in trees:
        for index, segment in enumerate(tree.segments):
            prefix: list[int] = []
            parent = tree.segments[index].parent
            while parent >= 0:
                prefix = [*tree.segments[parent].token_ids.tolist(), *prefix]
                parent = tree.segments[parent].parent
            for position, scored in enumerate(segment.scored):
                if scored:
                    ids = segment.token_ids.tolist()
                    found.append((tuple(prefix + ids[:position]), ids[position]))
    return found


def plan_to_mask(plan: AttentionPlan) -> torch.Tensor:
    """[queries, keys] bool: which key a query sees, by carrying out the plan."""
    starts = [0]
    for length in plan.piece_lengths:
        starts.append(starts[-1] + length)
    rows = []
    for queries, call in zip(plan.query_lengths, plan.calls, strict=True):
        keys = [key for piece in call.pieces for key in range(starts[piece], starts[piece + 1])]
        for row in range(queries):
            seen = torch.zeros(starts[-1], dtype=torch.bool)
            seen[keys[: len(keys) - queries + row + 1]] = True
            rows.append(seen)
    return torch.stack(rows)


def contexts_of(batch: PackedMicroBatch) -> dict[int, tuple[tuple[int, ...], int]]:
    """Flat index -> (tokens visible to the predicting position, target), through the attention plan."""
    mask = plan_to_mask(plan_attention(batch.runs))
    found = {}
    for source, target, flat in zip(
        batch.source_index.tolist(), batch.target_ids.tolist(), batch.flat_index.tolist(), strict=True
    ):
        visible = mask[source].nonzero()[:, 0]
        assert batch.position_ids[visible].tolist() == list(range(len(visible))), "positions count up along the path"
        found[flat] = (tuple(batch.tokens[visible].tolist()), target)
    return found


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize(("budget", "ranks", "multiple"), [(1, 1, 1), (60, 1, 1), (200, 3, 8), (10_000, 2, 4)])
def test_each_scored_token_sees_exactly_its_own_sequence(
    share_prefix: bool, budget: int, ranks: int, multiple: int
) -> None:
    trees = make_trees(9, seed=3)
    packed = pack(trees, budget, share_prefix=share_prefix, data_parallel=ranks, multiple=multiple)
    seen: dict[int, tuple[tuple[int, ...], int]] = {}
    weights = torch.full((sum(tree.num_scored for tree in trees),), float("nan"))
    for batch in (batch for rows in packed for batch in rows):
        assert len(batch.tokens) % multiple == 0 and len(batch.tokens) - batch.used < multiple
        assert plan_to_mask(plan_attention(batch.runs)).any(1).all(), "a token that sees nothing gives NaN"
        contexts = contexts_of(batch)
        assert not contexts.keys() & seen.keys()
        seen.update(contexts)
        weights[batch.flat_index] = batch.streams["weight"]
    assert [seen[i] for i in range(len(seen))] == scored_contexts(trees)
    assert torch.equal(weights, torch.cat([tree.streams["weight"] for tree in trees]))


def test_rows_respect_the_budget_and_ranks_get_equally_many() -> None:
    trees = make_trees(20, seed=5)
    sizes = [tree.num_tokens for tree in trees]
    budget = max(sizes) + 3
    packed = pack(trees, budget, data_parallel=4, group_of=2)
    assert len({len(rows) for rows in packed}) == 1 and len(packed[0]) % 2 == 0
    assert all(batch.used <= budget for rows in packed for batch in rows)
    loads = [sum(batch.used for batch in rows) for rows in packed]
    assert max(loads) - min(loads) <= max(sizes)
    assert sum(loads) == sum(sizes)


def test_a_rank_looks_at_the_tokens_of_its_own_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    trees = make_trees(20, seed=5)
    plan = plan_rows(trees, 60, data_parallel=4, multiple=8)
    looked_at: list[TokenTree] = []
    part = TokenTree.part
    monkeypatch.setattr(TokenTree, "part", lambda tree, cut: looked_at.append(tree) or part(tree, cut))
    mine = plan.build(2)
    assert len(looked_at) == sum(len(row) for row in plan.rows[2]) < sum(len(row) for rank in plan.rows for row in rank)
    monkeypatch.undo()
    for row, same in zip(mine, pack(trees, 60, data_parallel=4, multiple=8)[2], strict=True):
        assert torch.equal(row.tokens, same.tokens) and torch.equal(row.flat_index, same.flat_index)
    assert plan.used == sum(row.used for rank in range(4) for row in plan.build(rank))


def test_segments_refuse_to_be_written_to() -> None:
    ids = [1, 2, 3]
    tree = TokenTree([Segment(ids, -1, [False, True, True])])
    assert tree.num_scored == 2
    with pytest.raises(ValueError, match="read-only"):
        tree.segments[0].scored[1] = False


def test_fewer_trees_than_ranks_are_cut_until_the_ranks_are_even() -> None:
    trees = make_trees(3, seed=5)
    total, largest = sum(tree.num_tokens for tree in trees), max(tree.num_tokens for tree in trees)
    packed = pack(trees, 10_000, data_parallel=8)
    loads = [sum(batch.used for batch in rows) for rows in packed]
    assert max(loads) < 0.75 * largest and sum(loads) > total  # at the price of repeated prefixes
    flat = torch.cat([batch.flat_index for rows in packed for batch in rows])
    assert sorted(flat.tolist()) == list(range(sum(tree.num_scored for tree in trees)))
    assert sum(batch.used for rows in pack(trees, 10_000, data_parallel=1) for batch in rows) == total


def test_a_tree_over_the_budget_is_cut_and_only_a_single_sequence_may_exceed_it() -> None:
    trees = make_trees(8, seed=1)
    longest = max(chain.num_tokens for tree in trees for chain, _ in tree.chains())
    for budget in (2, 40, 60):
        (rows,) = pack(trees, budget)
        assert max(row.used for row in rows) <= max(budget, longest)
        assert all(row.used <= budget or len([run for run in row.runs if run.parent < 0]) == 1 for row in rows)
    (rows,) = pack(trees, 60)
    whole, chains = (
        sum(tree.num_tokens for tree in trees),
        sum(chain.num_tokens for tree in trees for chain, _ in tree.chains()),
    )
    assert whole <= sum(row.used for row in rows) < chains, "cut pieces still share what they can"


@pytest.mark.parametrize("budget", [0, 25, 45, 10_000])
def test_pieces_keep_every_context_and_score_each_token_once(budget: int) -> None:
    for tree in make_trees(8, seed=4):
        expected = scored_contexts([tree])
        found: dict[int, tuple[tuple[int, ...], int]] = {}
        for piece, index in tree.pieces(budget):
            contexts = scored_contexts([piece])
            assert len(contexts) == len(index) and not found.keys() & set(index)
            found |= dict(zip(index, contexts, strict=True))
            torch.testing.assert_close(piece.streams["weight"], tree.streams["weight"][index])
        assert [found[i] for i in range(len(expected))] == expected


def test_no_trees_give_one_empty_row_per_rank() -> None:
    packed = pack([], 100, data_parallel=2, multiple=4)
    assert [[(len(batch.tokens), len(batch.target_ids)) for batch in rows] for rows in packed] == [[(4, 0)], [(4, 0)]]


def test_unscored_trees_are_not_computed() -> None:
    unscored = TokenTree([Segment([1, 2, 3], -1, [False] * 3)])
    (batch,) = pack([unscored], 100)[0]
    assert batch.used == 0


def test_chains_score_each_token_once_in_the_same_order() -> None:
    (tree,) = make_trees(1, seed=8)
    index = [i for _, indices in tree.chains() for i in indices]
    assert sorted(index) == list(range(tree.num_scored))
    chains = [chain for chain, _ in tree.chains()]
    contexts = [context for chain in chains for context in scored_contexts([chain])]
    assert [contexts[index.index(i)] for i in range(tree.num_scored)] == scored_contexts([tree])
    assert [len(chain.segments) for chain in chains] == [1] * len(chains)


@pytest.mark.parametrize("size", [2, 3])
def test_zigzag_positions_deal_every_token_once_and_balance_the_work(size: int) -> None:
    length = 2 * size * 5
    dealt = [zigzag_positions(length, rank, size) for rank in range(size)]
    assert sorted(torch.cat(dealt).tolist()) == list(range(length))
    assert len({int(positions.sum()) for positions in dealt}) == 1, "the same number of visible keys on each rank"


@pytest.mark.parametrize("size", [2, 4])
def test_a_context_parallel_rank_sees_what_its_tokens_see_in_the_whole_row(size: int) -> None:
    trees = make_trees(5, seed=2)
    (batch,) = pack(trees, 10_000, multiple=2 * size)[0]
    whole = plan_to_mask(plan_attention(batch.runs))
    for rank in range(size):
        positions = zigzag_positions(len(batch.tokens), rank, size)
        assert torch.equal(plan_to_mask(plan_attention(batch.runs, positions)), whole[positions])


def test_rows_of_plain_sequences_for_kernels_without_trees() -> None:
    trees = make_trees(3, seed=4)
    (row,) = pack(trees, 10_000, share_prefix=False, multiple=16)[0]
    model_parallel_of_one()
    batch = to_local(row, device=torch.device("cpu"), mask_dtype=None, varlen=True).tree
    lengths = [chain.num_tokens for tree in trees for chain, _ in tree.chains() if chain.num_scored]
    boundaries = batch.cu_seqlens_q.tolist()
    assert (
        batch.qkv_format == "thd"
        and boundaries[0] == 0
        and boundaries[-1] == len(row.tokens)
        and len(row.tokens) % 16 == 0
    )
    found = [end - start for start, end in zip(boundaries, boundaries[1:], strict=False)]
    padding, first = (
        len(row.tokens) - row.used,
        row.runs[0].length,
    )  # of the row's first sequence again, as often as it fits
    again = [first] * (padding // first) + [padding % first] * (padding % first > 0)
    assert sorted(found) == sorted(lengths + again) and batch.max_seqlen_q == max(found)
    assert all(batch.position_ids[start] == 0 for start in boundaries[:-1])
    (shared,) = pack(trees, 10_000)[0]
    with pytest.raises(AssertionError, match="share_prefix=False"):
        to_local(shared, device=torch.device("cpu"), mask_dtype=None, varlen=True)


def test_only_children_continue_their_parents_run() -> None:
    chain = TokenTree([Segment([1, 2], -1, [False, True]), Segment([3], 0, [True]), Segment([4, 5], 1, [True, True])])
    (batch,) = pack([chain], 100)[0]
    assert batch.runs == [Run(0, 5, -1)]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (TokenTree([Segment([], -1, [])]), "0 tokens"),
        (TokenTree([Segment([1, 2], -1, [False])]), "2 tokens with 1 scored"),
        (TokenTree([Segment([1], 0, [False])]), "parent 0"),
        (TokenTree([Segment([1, 2], -1, [True, True])]), "first token of a root"),
        (TokenTree([Segment([1, 2], -1, [False, True])], {"w": torch.zeros(2)}), "scores 1 tokens"),
    ],
)
def test_malformed_trees_are_refused(tree: TokenTree, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pack([tree], 10)


def test_trees_with_different_streams_are_refused() -> None:
    first = TokenTree([Segment([1, 2], -1, [False, True])], {"w": torch.zeros(1)})
    second = TokenTree([Segment([1, 2], -1, [False, True])], {"v": torch.zeros(1)})
    with pytest.raises(DataError, match=r"trees\[1\]"):
        pack([first, second], 10)
