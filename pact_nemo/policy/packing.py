"""From token trees to packed micro-batches: one row of tokens each, whole trees side by side.

Everything here is a deterministic function of the trees and the layout, so that all ranks compute the same plan without
talking.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pact_nemo.errors import DataError
from pact_nemo.policy.trees import TokenTree

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


@dataclass
class _Builder:
    """Row under construction."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    flat: list[int] = field(default_factory=list)
    streams: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def add(self, tree: TokenTree, flat: list[int]) -> None:
        """Append a tree; ``flat`` gives the flat index of each of its scored tokens in (segment, token) order."""
        children: list[list[int]] = [[] for _ in tree.segments]
        offsets, total = [], 0
        for index, segment in enumerate(tree.segments):
            if segment.parent >= 0:
                children[segment.parent].append(index)
            offsets.append(total)
            total += sum(segment.scored)
        order: list[int] = []
        last = {-1: (-1, -1, -1)}  # segment -> (run, row position of its last token, depth of its last token)
        stack = [index for index, segment in enumerate(tree.segments) if segment.parent < 0][::-1]
        while stack:
            index = stack.pop()
            segment = tree.segments[index]
            run, source, depth = last[segment.parent]
            start = len(self.tokens)
            if segment.parent >= 0 and len(children[segment.parent]) == 1:
                self.runs[run].length += len(segment.token_ids)  # an only child continues its parent's run
            else:
                self.runs.append(Run(start, len(segment.token_ids), run))
                run = len(self.runs) - 1
            for token, scored in zip(segment.token_ids, segment.scored, strict=True):
                depth += 1
                if scored:
                    self.source.append(source)
                    self.target.append(token)
                source = len(self.tokens)
                self.tokens.append(token)
                self.positions.append(depth)
            last[index] = (run, source, depth)
            order += range(offsets[index], offsets[index] + sum(segment.scored))
            # children without descendants first: siblings then lie side by side, and a branch goes on right after
            # itself
            kids = children[index]
            stack += sorted(kids, key=lambda kid: (len(children[kid]) == 0, -kid))
        self.flat += [flat[i] for i in order]
        self.streams.append({name: stream[order] for name, stream in tree.streams.items()})

    def finish(
        self, multiple: int, names: list[str], dtypes: dict[str, torch.dtype], filler: list[int]
    ) -> PackedMicroBatch:
        """Pad with ``filler`` to a multiple. What is padded with is computed like everything else, so it has to be
        something that adds no magnitude of its own: scales of low-precision formats are taken over all tokens of a row.
        """
        used = len(self.tokens)
        pad = -max(used, 1) % multiple + (1 if used == 0 else 0)
        padding: list[int] = []
        positions: list[int] = []
        while len(padding) < pad:
            piece = filler[: pad - len(padding)]
            self.runs.append(Run(used + len(padding), len(piece), -1))
            padding += piece
            positions += range(len(piece))
        return PackedMicroBatch(
            tokens=torch.tensor(self.tokens + padding, dtype=torch.int64),
            position_ids=torch.tensor(self.positions + positions, dtype=torch.int64),
            runs=self.runs,
            source_index=torch.tensor(self.source, dtype=torch.int64),
            target_ids=torch.tensor(self.target, dtype=torch.int64),
            streams={
                name: (
                    torch.cat([streams[name] for streams in self.streams])
                    if self.streams
                    else torch.empty(0, dtype=dtypes[name])
                )
                for name in names
            },
            flat_index=torch.tensor(self.flat, dtype=torch.int64),
            used=used,
        )


def check_trees(trees: list[TokenTree]) -> None:
    """Refuse trees that can't be scored.

    Raises:
        DataError: a segment is empty, comes before its parent, has a scored list of another length, scores the first
            token of a root, or a stream's length isn't the number of scored tokens or trees don't carry the same
            streams.
    """
    for number, tree in enumerate(trees):
        where = f"trees[{number}]"
        for index, segment in enumerate(tree.segments):
            here = f"{where}.segments[{index}]"
            if not segment.token_ids or len(segment.token_ids) != len(segment.scored):
                raise DataError(
                    f"{len(segment.token_ids)} tokens with {len(segment.scored)} scored flags; equal and at least one",
                    field=here,
                )
            if not -1 <= segment.parent < index:
                raise DataError(f"parent {segment.parent} doesn't come before the segment", field=here)
            if segment.parent < 0 and segment.scored[0]:
                raise DataError("the first token of a root has no predecessor and can't be scored", field=here)
        if tree.streams.keys() != trees[0].streams.keys():
            raise DataError(
                f"streams {sorted(tree.streams)} differ from those of the first tree, {sorted(trees[0].streams)}",
                field=where,
            )
        for name, stream in tree.streams.items():
            if stream.shape != (tree.num_scored,):
                raise DataError(
                    f"stream has shape {tuple(stream.shape)}, the tree scores {tree.num_scored} tokens",
                    field=f"{where}.{name}",
                )


_Piece = tuple[TokenTree, list[int]]  # and the flat index of each of its scored tokens
_PIECE_SHARES = (0.3, 0.4, 0.5, 0.7, 1.0, 1.3)  # sizes of pieces that are tried, over a rank's share of all tokens


def _cut(trees: list[TokenTree], limit: int, *, share_prefix: bool) -> list[_Piece]:
    """All trees in pieces of at most ``limit`` tokens where that is possible; pieces that score nothing need no
    computing.
    """
    pieces: list[_Piece] = []
    offset = 0
    for tree in trees:
        flat = list(range(offset, offset + tree.num_scored))
        if share_prefix and tree.num_tokens <= limit:
            pieces.append((tree, flat))
        else:
            parts = tree.pieces(limit) if share_prefix else tree.chains()
            pieces += [(part, [flat[i] for i in index]) for part, index in parts]
        offset += tree.num_scored
    return [piece for piece in pieces if piece[1]]


def _deal(pieces: list[_Piece], ranks: int) -> list[int]:
    """The rank of each piece: largest first, to the rank with the fewest tokens so far."""
    loads, found = [0] * ranks, [0] * len(pieces)
    for index in sorted(range(len(pieces)), key=lambda i: (-pieces[i][0].num_tokens, i)):
        found[index] = loads.index(min(loads))
        loads[found[index]] += pieces[index][0].num_tokens
    return found


def _fullest(pieces: list[_Piece], ranks: list[int]) -> int:
    """Tokens of the rank that has most."""
    loads = [0] * (max(ranks, default=0) + 1)
    for (piece, _), rank in zip(pieces, ranks, strict=True):
        loads[rank] += piece.num_tokens
    return max(loads)


def _first_fit(sizes: list[int], ranks: list[int], token_budget: int, data_parallel: int) -> list[list[list[int]]]:
    """Per rank its rows, each the indices of its pieces: the largest first, into the first row with room."""
    bins: list[list[list[int]]] = [[] for _ in range(data_parallel)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for row in bins[ranks[index]]:
            if sum(sizes[i] for i in row) + sizes[index] <= token_budget:
                row.append(index)
                break
        else:
            bins[ranks[index]].append([index])
    return bins


def pack(
    trees: list[TokenTree],
    token_budget: int,
    *,
    share_prefix: bool = True,
    data_parallel: int = 1,
    multiple: int = 1,
    group_of: int = 1,
) -> list[list[PackedMicroBatch]]:
    """Pack trees into micro-batches for every data-parallel rank.

    A tree larger than ``token_budget`` is cut into pieces that repeat shared prefixes (:meth:`TokenTree.pieces`), so a
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

    Returns:
        per data-parallel rank, its micro-batches (at least one, the same number on each rank).

    Raises:
        DataError: see :func:`check_trees`.
    """
    check_trees(trees)
    names = sorted(trees[0].streams) if trees else []
    dtypes = {name: trees[0].streams[name].dtype for name in names}
    limits = {token_budget}
    if share_prefix and data_parallel > 1:  # smaller pieces even the ranks out, and repeat more prefixes
        share = sum(tree.num_tokens for tree in trees) / data_parallel
        limits |= {max(1, min(token_budget, round(share * part))) for part in _PIECE_SHARES}
    cuts = [_cut(trees, limit, share_prefix=share_prefix) for limit in sorted(limits, reverse=True)]
    pieces, ranks = min(((cut, _deal(cut, data_parallel)) for cut in cuts), key=lambda found: _fullest(*found))
    bins = _first_fit([piece.num_tokens for piece, _ in pieces], ranks, token_budget, data_parallel)
    rows = max(1, max(len(bin_) for bin_ in bins))
    rows += -rows % group_of
    packed = []
    for bin_ in bins:
        batches = []
        for row in bin_ + [[] for _ in range(rows - len(bin_))]:
            builder = _Builder()
            for index in sorted(row):
                builder.add(*pieces[index])
            first = pieces[min(row, default=0)][0].segments[0].token_ids if pieces else [PAD_TOKEN]
            batches.append(builder.finish(multiple, names, dtypes, list(first)))
        packed.append(batches)
    return packed


def zigzag_positions(length: int, rank: int, size: int) -> torch.Tensor:
    """[length / size] int64 row positions of one context-parallel rank: chunks ``rank`` and ``2 * size - 1 - rank`` of
    ``2 * size``.

    Late tokens see more keys than early ones; pairing an early chunk with a late one balances the attention work.
    """
    chunk = length // (2 * size)
    first, second = rank * chunk, (2 * size - 1 - rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(second, second + chunk)])
