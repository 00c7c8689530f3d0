"""From token trees to packed micro-batches: one row of tokens each, whole trees side by side.

Everything here is a deterministic function of the trees and the layout, so that all ranks compute the same plan without
talking.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pact_nemo.policy.trees import Cut, Segment, TokenTree, check_trees

PAD_TOKEN = 0


@dataclass
class Run:
    """A stretch of consecutive row positions with one parent run: a segment, or a chain of segments without branches.

    Attributes:
        start: first row position.
        length: tokens, at least 1.
        parent: index into ``PackedMicroBatch.runs``, -1 for a root.
    """

    start: int
    length: int
    parent: int

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass
class PackedMicroBatch:
    """One packed row.

    Attributes:
        tokens: [T] int64 token ids; the last ``T - used`` are padding: the row's first tokens again, as sequences of
            their own.
        position_ids: [T] int64 depth of each token in its tree.
        runs: attention structure; a token sees its own run up to itself and all ancestors of the run.
        source_index: [S] int64 row position whose hidden state predicts the scored token.
        target_ids: [S] int64 the scored tokens.
        streams: name -> [S] per-token values of the trees' streams.
        flat_index: [S] int64 where each scored token lies in the concatenation of all trees' scored tokens.
        used: tokens that belong to trees.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    runs: list[Run]
    source_index: torch.Tensor
    target_ids: torch.Tensor
    streams: dict[str, torch.Tensor]
    flat_index: torch.Tensor
    used: int


class _Builder:
    """Row under construction, in arrays of one segment each."""

    def __init__(self) -> None:
        self.length = 0
        self.runs: list[Run] = []
        self._arrays: dict[str, list[np.ndarray]] = {
            name: [] for name in ("tokens", "positions", "source", "target", "flat")
        }
        self._streams: list[dict[str, torch.Tensor]] = []

    def add(self, tree: TokenTree, flat: np.ndarray) -> None:
        """Append a tree; ``flat`` gives the flat index of each of its scored tokens in (segment, token) order."""
        children: list[list[int]] = [[] for _ in tree.segments]
        for index, segment in enumerate(tree.segments):
            if segment.parent >= 0:
                children[segment.parent].append(index)
        offsets = np.cumsum([0, *tree.counts])
        order: list[np.ndarray] = []
        last = {-1: (-1, -1, -1)}  # segment -> (run, row position of its last token, depth of its last token)
        stack = [index for index, segment in enumerate(tree.segments) if segment.parent < 0][::-1]
        while stack:
            index = stack.pop()
            segment = tree.segments[index]
            run, before, depth = last[segment.parent]
            if segment.parent >= 0 and len(children[segment.parent]) == 1:
                self.runs[run].length += len(segment)  # an only child continues its parent's run
            else:
                self.runs.append(Run(self.length, len(segment), run))
                run = len(self.runs) - 1
            self._add_segment(segment, before, depth)
            last[index] = (run, self.length - 1, depth + len(segment))
            order.append(np.arange(offsets[index], offsets[index + 1]))
            # children without descendants first: siblings then lie side by side, and a branch goes on right after
            # itself
            kids = children[index]
            stack += sorted(kids, key=lambda kid: (len(children[kid]) == 0, -kid))
        in_order = np.concatenate(order)
        self._arrays["flat"].append(flat[in_order])
        chosen = torch.from_numpy(in_order)
        self._streams.append({name: stream[chosen] for name, stream in tree.streams.items()})

    def _add_segment(self, segment: Segment, before: int, depth: int) -> None:
        """``before``: row position of its parent's last token, whose depth is ``depth``."""
        scored = np.flatnonzero(segment.scored)
        source = self.length - 1 + scored
        source[scored == 0] = before
        self._arrays["source"].append(source)
        self._arrays["target"].append(segment.token_ids[scored])
        self._arrays["tokens"].append(segment.token_ids)
        self._arrays["positions"].append(np.arange(depth + 1, depth + 1 + len(segment)))
        self.length += len(segment)

    def finish(self, multiple: int, streams: dict[str, torch.dtype], filler: np.ndarray) -> PackedMicroBatch:
        """Pad with ``filler`` to a multiple. What is padded with is computed like everything else, so it has to be
        something that adds no magnitude of its own: scales of low-precision formats are taken over all tokens of a row.
        """
        used = self.length
        left = -max(used, 1) % multiple + (1 if used == 0 else 0)
        while left:
            piece = filler[:left]
            self.runs.append(Run(self.length, len(piece), -1))
            self._arrays["tokens"].append(piece)
            self._arrays["positions"].append(np.arange(len(piece)))
            self.length += len(piece)
            left -= len(piece)
        joined = {
            name: torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64))
            for name, parts in self._arrays.items()
        }
        return PackedMicroBatch(
            tokens=joined["tokens"],
            position_ids=joined["positions"],
            runs=self.runs,
            source_index=joined["source"],
            target_ids=joined["target"],
            streams={
                name: torch.cat([own[name] for own in self._streams]) if self._streams else torch.empty(0, dtype=dtype)
                for name, dtype in streams.items()
            },
            flat_index=joined["flat"],
            used=used,
        )


@dataclass(frozen=True)
class _Piece:
    """A part of a tree, and where the tree's scored tokens begin in the concatenation of all trees'."""

    tree: TokenTree
    cut: Cut
    offset: int


_PIECE_SHARES = (0.3, 0.4, 0.5, 0.7, 1.0, 1.3)  # sizes of pieces that are tried, over a rank's share of all tokens


def _cut(trees: list[TokenTree], limit: int, *, share_prefix: bool) -> list[_Piece]:
    """All trees in pieces of at most ``limit`` tokens where that is possible; pieces that score nothing need no
    computing.
    """
    pieces: list[_Piece] = []
    offset = 0
    for tree in trees:
        uncut = share_prefix and tree.num_tokens <= limit
        cuts = [tree.whole()] if uncut else tree.cuts(limit if share_prefix else 0)
        pieces += [_Piece(tree, cut, offset) for cut in cuts if cut.scored]
        offset += tree.num_scored
    return pieces


def _largest_first(pieces: list[_Piece]) -> list[int]:
    return sorted(range(len(pieces)), key=lambda i: (-pieces[i].cut.tokens, i))


def _deal(pieces: list[_Piece], ranks: int) -> list[int]:
    """The rank of each piece: largest first, to the rank with the fewest tokens so far."""
    loads, found = [(0, rank) for rank in range(ranks)], [0] * len(pieces)
    for index in _largest_first(pieces):
        load, found[index] = loads[0]
        heapq.heapreplace(loads, (load + pieces[index].cut.tokens, found[index]))
    return found


def _fullest(pieces: list[_Piece], ranks: list[int]) -> int:
    """Tokens of the rank that has most."""
    loads = [0] * (max(ranks, default=0) + 1)
    for piece, rank in zip(pieces, ranks, strict=True):
        loads[rank] += piece.cut.tokens
    return max(loads)


def _first_fit(pieces: list[_Piece], ranks: list[int], token_budget: int, data_parallel: int) -> list[list[list[int]]]:
    """Per rank its rows, each the indices of its pieces: the largest first, into the first row with room."""
    bins: list[list[list[int]]] = [[] for _ in range(data_parallel)]
    room: list[list[int]] = [[] for _ in range(data_parallel)]
    for index in _largest_first(pieces):
        rank, size = ranks[index], pieces[index].cut.tokens
        row = next((row for row, left in enumerate(room[rank]) if size <= left), None)
        if row is None:
            row = len(bins[rank])
            bins[rank].append([])
            room[rank].append(token_budget)
        bins[rank][row].append(index)
        room[rank][row] -= size
    return bins


@dataclass(frozen=True)
class RowPlan:
    """What lies in which row of which data-parallel rank. Only sizes have been looked at so far.

    Attributes:
        rows: per rank, per row its pieces; equally many rows on all ranks, and at least one.
        share_prefix: False = each piece becomes one sequence.
        multiple: rows are padded to a multiple of this.
        streams: names and dtypes of the trees' streams.
        first: the piece that rows without one are filled with; None = there is none.
    """

    rows: list[list[list[_Piece]]]
    share_prefix: bool
    multiple: int
    streams: dict[str, torch.dtype]
    first: _Piece | None

    @property
    def used(self) -> int:
        """Tokens of trees on all ranks together."""
        return sum(piece.cut.tokens for rank in self.rows for row in rank for piece in row)

    def build(self, rank: int) -> list[PackedMicroBatch]:
        """The micro-batches of one data-parallel rank."""
        return [self._row(row) for row in self.rows[rank]]

    def _row(self, pieces: list[_Piece]) -> PackedMicroBatch:
        builder = _Builder()
        for piece in pieces:
            part, index = piece.tree.part(piece.cut)
            builder.add(part if self.share_prefix else part.joined(), piece.offset + index)
        return builder.finish(self.multiple, self.streams, self._filler(pieces[0] if pieces else self.first))

    def _filler(self, piece: _Piece | None) -> np.ndarray:
        """[n] int64: the first sequence of a piece."""
        if piece is None:
            return np.array([PAD_TOKEN])
        nodes = piece.cut.nodes[:1] if self.share_prefix else piece.cut.nodes
        return np.concatenate([piece.tree.segments[node].token_ids for node in nodes])


def plan_rows(
    trees: list[TokenTree],
    token_budget: int,
    *,
    share_prefix: bool = True,
    data_parallel: int = 1,
    multiple: int = 1,
    group_of: int = 1,
) -> RowPlan:
    """Deal trees to the rows of every data-parallel rank.

    A tree larger than ``token_budget`` is cut into pieces that repeat shared prefixes (:meth:`TokenTree.cuts`), so a
    row is never larger than the budget or the longest root-to-leaf sequence: memory has a bound. Over several ranks
    smaller pieces are tried, too, and the cut whose fullest rank has the fewest tokens is taken. Pieces are dealt to
    ranks by size (largest first to the least loaded rank: at most 4/3 of the best possible largest load of these
    pieces, Graham 1969), then packed first-fit-decreasing into rows of at most ``token_budget`` tokens (at most 11/9 of
    the fewest rows + 6/9, Dosa 2007). Ranks with fewer rows get empty ones: all ranks must run the same number of
    collectives.

    Args:
        trees: the same list on every rank.
        token_budget: tokens per row, before padding.
        share_prefix: False = cut every tree into separate root-to-leaf chains first.
        data_parallel: number of data-parallel ranks.
        multiple: rows are padded to a multiple of this (TP x CP x 2).
        group_of: the number of rows per rank is padded to a multiple of this (interleaved pipeline schedules need PP).

    Raises:
        DataError: see :func:`~pact_nemo.policy.trees.check_trees`.
    """
    check_trees(trees)
    limits = {token_budget}
    if share_prefix and data_parallel > 1:  # smaller pieces even the ranks out, and repeat more prefixes
        share = sum(tree.num_tokens for tree in trees) / data_parallel
        limits |= {max(1, min(token_budget, round(share * part))) for part in _PIECE_SHARES}
    cuts = [_cut(trees, limit, share_prefix=share_prefix) for limit in sorted(limits, reverse=True)]
    pieces, ranks = min(((cut, _deal(cut, data_parallel)) for cut in cuts), key=lambda found: _fullest(*found))
    bins = _first_fit(pieces, ranks, token_budget, data_parallel)
    count = max(1, max(len(bin_) for bin_ in bins))
    count += -count % group_of
    rows = [
        [[pieces[index] for index in sorted(row)] for row in bin_] + [[] for _ in range(count - len(bin_))]
        for bin_ in bins
    ]
    streams = {name: trees[0].streams[name].dtype for name in sorted(trees[0].streams)} if trees else {}
    return RowPlan(rows, share_prefix, multiple, streams, pieces[0] if pieces else None)


def pack(trees: list[TokenTree], token_budget: int, **layout: Any) -> list[list[PackedMicroBatch]]:
    """The rows of all ranks of :func:`plan_rows`, whose arguments it takes: per data-parallel rank, its
    micro-batches.
    """
    plan = plan_rows(trees, token_budget, **layout)
    return [plan.build(rank) for rank in range(len(plan.rows))]


def zigzag_positions(length: int, rank: int, size: int) -> torch.Tensor:
    """[length / size] int64 row positions of one context-parallel rank: chunks ``rank`` and ``2 * size - 1 - rank`` of
    ``2 * size``.

    Late tokens see more keys than early ones; pairing an early chunk with a late one balances the attention work.
    """
    chunk = length // (2 * size)
    first, second = rank * chunk, (2 * size - 1 - rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(second, second + chunk)])
