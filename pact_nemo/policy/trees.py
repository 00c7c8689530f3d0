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

import torch

from pact_nemo.errors import DataError


@dataclass
class Segment:
    """A run of tokens with one parent.

    Attributes:
        token_ids: [n] ids, n >= 1.
        parent: index of the parent segment in ``TokenTree.segments`` (always a smaller index), -1 for the root.
        scored: [n] bools; True where the log-prob of this token given its predecessors is wanted. A root's first token
            can't be scored.
    """

    token_ids: list[int]
    parent: int
    scored: list[bool]


@dataclass
class TokenTree:
    """Segments in topological order, with per-scored-token streams.

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

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.segments)

    @property
    def num_scored(self) -> int:
        return sum(sum(s.scored) for s in self.segments)

    def pieces(self, budget: int) -> list[tuple[TokenTree, list[int]]]:
        """Subtrees of at most ``budget`` tokens where that is possible, each with the indices of its scored tokens
        among this tree's.

        A piece has as many leaves, in order, as fit beside all of their ancestors, which later pieces repeat; a leaf
        that is too long with its ancestors makes a piece of its own. Every scored token is scored in exactly one piece:
        the first that has its segment.
        """
        offsets, total = [], 0
        for segment in self.segments:
            offsets.append(total)
            total += sum(segment.scored)
        has_child = {s.parent for s in self.segments}
        groups: list[set[int]] = []
        size = 0
        for leaf in range(len(self.segments)):
            if leaf in has_child:
                continue
            path, node = set(), leaf
            while node != -1:
                path.add(node)
                node = self.segments[node].parent
            more = sum(len(self.segments[node].token_ids) for node in path - (groups[-1] if groups else set()))
            if groups and size + more <= budget:
                groups[-1] |= path
                size += more
            else:
                groups.append(path)
                size = sum(len(self.segments[node].token_ids) for node in path)
        done: set[int] = set()
        found = []
        for group in groups:
            nodes = sorted(group)
            number = {node: position for position, node in enumerate(nodes)} | {-1: -1}
            segments: list[Segment] = []
            index: list[int] = []
            for node in nodes:
                segment = self.segments[node]
                own = node not in done
                segments.append(
                    Segment(
                        segment.token_ids,
                        number[segment.parent],
                        segment.scored if own else [False] * len(segment.scored),
                    )
                )
                index += range(offsets[node], offsets[node] + sum(segment.scored)) if own else ()
            done |= group
            temperatures = self.temperatures[index] if self.temperatures is not None else None
            found.append(
                (
                    TokenTree(segments, {name: stream[index] for name, stream in self.streams.items()}, temperatures),
                    index,
                )
            )
        return found

    def chains(self) -> list[tuple[TokenTree, list[int]]]:
        """Separate root-to-leaf chains, one segment each, with the indices of their scored tokens among this tree's
        scored tokens.
        """
        found = []
        for piece, index in self.pieces(0):
            token_ids = [token for segment in piece.segments for token in segment.token_ids]
            scored = [flag for segment in piece.segments for flag in segment.scored]
            found.append((TokenTree([Segment(token_ids, -1, scored)], piece.streams, piece.temperatures), index))
        return found


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
            extreme(segment.token_ids) for segment in tree.segments if segment.token_ids for extreme in (min, max)
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

    def __init__(self, root: Sequence[int]):
        self._strands: list[tuple[list[int], Place | None, list[bool]]] = [(list(root), None, [False] * len(root))]
        self.num_scored = 0

    @property
    def root(self) -> Place:
        """The end of the root."""
        return Place(0, len(self._strands[0][0]))

    def add(self, token_ids: Sequence[int], scored: Sequence[bool], at: Place) -> Place:
        """Let a strand begin at ``at``. Returns its end; ``at`` where there are no tokens."""
        if len(token_ids) != len(scored):
            raise ValueError(f"{len(token_ids)} tokens with {len(scored)} scored flags")
        if not len(token_ids):
            return at
        self._strands.append((list(token_ids), at, list(scored)))
        self.num_scored += sum(scored)
        return Place(len(self._strands) - 1, len(token_ids))

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
