"""Token trees: how sequences that share prefixes reach the model.

For one prompt the training step needs ``[x; tau_k]``, ``[x; h*; b; tau_k]`` and the SFT sequence ``[x; h*]``. Written
as a tree,

    x --+-- tau_1 .. tau_K                (prompt-only context)
        +-- h* -- b --+-- tau_1 .. tau_K  (trace-conditioned context)

every shared prefix is stored and computed once. Where a tau or the SFT sequence has several contexts, because thoughts
of earlier messages are no longer in them, it is a small tree itself, which branches off where its contexts part. A
token attends to its own segment up to itself and to all of its ancestors; its position is its depth in tokens from the
root. That is exactly what it would see in the separate sequence, so results are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from pact_nemo.errors import DataError


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that refuses to be written to: sizes and counts are kept once they were asked for."""
    view = array.view()
    view.flags.writeable = False
    return view


class Segment:
    """A run of tokens with one parent.

    Attributes:
        token_ids: [n] int64 ids, n >= 1.
        parent: index of the parent segment in ``TokenTree.segments`` (always a smaller index), -1 for the root.
        scored: [n] bools; True where the log-prob of this token given its predecessors is wanted. A root's first token
            can't be scored.
    """

    def __init__(self, token_ids: npt.ArrayLike, parent: int, scored: npt.ArrayLike):
        self.token_ids = _read_only(np.asarray(token_ids, dtype=np.int64))
        self.parent = parent
        self.scored = _read_only(np.asarray(scored, dtype=bool))

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Cut:
    """A part of a tree: some of its leaves with all of their ancestors.

    Attributes:
        nodes: indices of the segments, ascending.
        own: for each of them, whether this part scores its tokens.
        tokens: of the segments.
        scored: tokens that this part scores.
    """

    nodes: list[int]
    own: list[bool]
    tokens: int
    scored: int


@dataclass
class TokenTree:
    """Segments in topological order, with per-scored-token streams. The segments don't change once they are here.

    Attributes:
        segments: parents before children.
        streams: name -> [S] tensor over the scored tokens in segment order, then token order. The policy carries them
            untouched to the loss function; it knows none of their names.
        temperatures: [S] float32 divisors of the logits that each scored token is scored with; None = 1 for all of
            them.
    """

    segments: list[Segment]
    streams: dict[str, torch.Tensor] = field(default_factory=dict)
    temperatures: torch.Tensor | None = None

    @cached_property
    def sizes(self) -> list[int]:
        """Tokens of each segment."""
        return [len(segment) for segment in self.segments]

    @cached_property
    def counts(self) -> list[int]:
        """Scored tokens of each segment."""
        return [int(np.count_nonzero(segment.scored)) for segment in self.segments]

    @property
    def num_tokens(self) -> int:
        return sum(self.sizes)

    @property
    def num_scored(self) -> int:
        return sum(self.counts)

    def whole(self) -> Cut:
        """All of the tree."""
        return Cut(
            list(range(len(self.segments))), [True] * len(self.segments), tokens=self.num_tokens, scored=self.num_scored
        )

    def cuts(self, budget: int) -> list[Cut]:
        """Parts of at most ``budget`` tokens where that is possible.

        A part has as many leaves, in order, as fit beside all of their ancestors, which later parts repeat; a leaf that
        is too long with its ancestors makes a part of its own. Every scored token is scored in exactly one part: the
        first that has its segment.
        """
        has_child = {segment.parent for segment in self.segments}
        groups: list[set[int]] = []
        size = 0
        for leaf in range(len(self.segments)):
            if leaf in has_child:
                continue
            path, node = set(), leaf
            while node != -1:
                path.add(node)
                node = self.segments[node].parent
            more = sum(self.sizes[node] for node in path - (groups[-1] if groups else set()))
            if groups and size + more <= budget:
                groups[-1] |= path
                size += more
            else:
                groups.append(path)
                size = sum(self.sizes[node] for node in path)
        done: set[int] = set()
        found = []
        for group in groups:
            nodes = sorted(group)
            own = [node not in done for node in nodes]
            scored = sum(self.counts[node] for node, first in zip(nodes, own, strict=True) if first)
            found.append(Cut(nodes, own, sum(self.sizes[node] for node in nodes), scored))
            done |= group
        return found

    def part(self, cut: Cut) -> tuple[TokenTree, np.ndarray]:
        """A part as a tree of its own, with the [S] int64 indices of its scored tokens among this tree's."""
        if len(cut.nodes) == len(self.segments) and all(cut.own):
            return self, np.arange(self.num_scored)
        offsets = np.cumsum([0, *self.counts])
        number = {node: position for position, node in enumerate(cut.nodes)} | {-1: -1}
        segments = [
            Segment(
                self.segments[node].token_ids,
                number[self.segments[node].parent],
                self.segments[node].scored if own else np.zeros(self.sizes[node], dtype=bool),
            )
            for node, own in zip(cut.nodes, cut.own, strict=True)
        ]
        mine = [node for node, own in zip(cut.nodes, cut.own, strict=True) if own]
        index = np.concatenate([np.arange(offsets[node], offsets[node + 1]) for node in mine] or [np.arange(0)])
        chosen = torch.from_numpy(index)
        temperatures = self.temperatures[chosen] if self.temperatures is not None else None
        return TokenTree(segments, {name: stream[chosen] for name, stream in self.streams.items()}, temperatures), index

    def pieces(self, budget: int) -> list[tuple[TokenTree, np.ndarray]]:
        """The :meth:`cuts`, each as a tree of its own with the indices of its scored tokens among this tree's."""
        return [self.part(cut) for cut in self.cuts(budget)]

    def chains(self) -> list[tuple[TokenTree, np.ndarray]]:
        """Separate root-to-leaf chains, one segment each, with the indices of their scored tokens among this tree's
        scored tokens.
        """
        return [(piece.joined(), index) for piece, index in self.pieces(0)]

    def joined(self) -> TokenTree:
        """A tree without branches as a single segment."""
        token_ids = np.concatenate([segment.token_ids for segment in self.segments])
        scored = np.concatenate([segment.scored for segment in self.segments])
        return TokenTree([Segment(token_ids, -1, scored)], self.streams, self.temperatures)


def check_token_ids(trees: Sequence[TokenTree], rows: int) -> None:
    """Token ids without a row in the embedding are refused: under tensor parallelism they would be computed with
    zeros.

    Args:
        trees: whose ids are looked at.
        rows: of the embedding.

    Raises:
        DataError: names the first tree and id.
    """
    for index, tree in enumerate(trees):
        extremes = [
            int(extreme(segment.token_ids)) for segment in tree.segments if len(segment) for extreme in (np.min, np.max)
        ]
        strange = next((token for token in extremes if not 0 <= token < rows), None)
        if strange is not None:
            raise DataError(
                f"tree {index}: the model has no row for token id {strange}, only for 0 to {rows - 1}; use its own"
                " tokenizer"
            )


@dataclass(frozen=True)
class Place:
    """A place between two tokens of a tree that is being put together: behind the first ``tokens`` tokens of strand
    ``strand``.
    """

    strand: int
    tokens: int


class TreeBuilder:
    """Puts a tree together from strands of tokens, each of which begins at any place of an earlier one.

    Segments are cut where strands branch off. Scored tokens stay in the order of their strands, then token order.

    Attributes:
        num_scored: scored tokens so far.

    Args:
        root: [n] ids of the first strand, n >= 1; none of them is scored.
    """

    def __init__(self, root: npt.ArrayLike):
        ids = np.asarray(root, dtype=np.int64)
        self._strands: list[tuple[np.ndarray, Place | None, np.ndarray]] = [(ids, None, np.zeros(len(ids), dtype=bool))]
        self.num_scored = 0

    @property
    def root(self) -> Place:
        """The end of the root."""
        return Place(0, len(self._strands[0][0]))

    def add(self, token_ids: npt.ArrayLike, scored: npt.ArrayLike, at: Place) -> Place:
        """Let a strand begin at ``at``. Returns its end; ``at`` where there are no tokens.

        Args:
            token_ids: [n] ids.
            scored: [n] bools.
        """
        ids, flags = np.asarray(token_ids, dtype=np.int64), np.asarray(scored, dtype=bool)
        if len(ids) != len(flags):
            raise ValueError(f"{len(ids)} tokens with {len(flags)} scored flags")
        if not len(ids):
            return at
        self._strands.append((ids, at, flags))
        self.num_scored += int(np.count_nonzero(flags))
        return Place(len(self._strands) - 1, len(ids))

    def back(self, place: Place, tokens: int) -> Place:
        """The place that lies ``tokens`` tokens before ``place`` on its way from the root. ValueError before the root's
        first token.
        """
        while tokens >= place.tokens:
            tokens -= place.tokens
            parent = self._strands[place.strand][1]
            if parent is None:
                raise ValueError("nothing of the root would be left")
            place = parent
            if not tokens:
                return place
        return Place(place.strand, place.tokens - tokens)

    def build(self) -> TokenTree:
        """The tree."""
        cuts: list[set[int]] = [{len(ids)} for ids, _, _ in self._strands]
        for _, at, _ in self._strands[1:]:
            assert at is not None
            cuts[at.strand].add(at.tokens)
        segments: list[Segment] = []
        node: dict[Place, int] = {}
        for strand, (ids, at, scored) in enumerate(self._strands):
            parent, start = -1 if at is None else node[at], 0
            for end in sorted(cuts[strand]):
                segments.append(Segment(ids[start:end], parent, scored[start:end]))
                parent, start = len(segments) - 1, end
                node[Place(strand, end)] = parent
        return TokenTree(segments)


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
            if not len(segment) or len(segment) != len(segment.scored):
                raise DataError(
                    f"{len(segment)} tokens with {len(segment.scored)} scored flags; equal and at least one",
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
