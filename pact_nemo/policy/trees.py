"""Token trees: how sequences that share prefixes reach the model.

For one prompt the training step needs ``[x; tau_k]``, ``[x; h*; b; tau_k]`` and the SFT sequence ``[x; h*]``. Written as a tree,

    x --+-- tau_1 .. tau_K                (prompt-only context)
        +-- h* -- b --+-- tau_1 .. tau_K  (trace-conditioned context)

every shared prefix is stored and computed once. A token attends to its own segment up to itself and to all of its ancestors; its
position is its depth in tokens from the root. That is exactly what it would see in the separate sequence, so results are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Segment:
    """A run of tokens with one parent.

    Attributes:
        token_ids: [n] ids, n >= 1.
        parent: index of the parent segment in ``TokenTree.segments`` (always a smaller index), -1 for the root.
        scored: [n] bools; True where the log-prob of this token given its predecessors is wanted. A root's first token can't be scored.
    """

    token_ids: list[int]
    parent: int
    scored: list[bool]


@dataclass
class TokenTree:
    """Segments in topological order, with per-scored-token streams.

    Attributes:
        segments: parents before children.
        streams: name -> [S] tensor over the scored tokens in segment order, then token order. The policy carries them untouched to the
            loss function; it knows none of their names.
    """

    segments: list[Segment]
    streams: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.segments)

    @property
    def num_scored(self) -> int:
        return sum(sum(s.scored) for s in self.segments)

    def chains(self) -> list[tuple[TokenTree, list[int]]]:
        """Separate root-to-leaf chains, each with the indices of its scored tokens among this tree's scored tokens.

        Every scored token is scored in exactly one chain: the first, in leaf order, that runs through its segment.
        """
        offsets, total = [], 0
        for segment in self.segments:
            offsets.append(total)
            total += sum(segment.scored)
        has_child = {s.parent for s in self.segments}
        done: set[int] = set()
        chains = []
        for leaf in range(len(self.segments)):
            if leaf in has_child:
                continue
            path, node = [], leaf
            while node != -1:
                path.append(node)
                node = self.segments[node].parent
            path.reverse()
            token_ids: list[int] = []
            scored: list[bool] = []
            index: list[int] = []
            for node in path:
                segment = self.segments[node]
                token_ids += segment.token_ids
                scored += segment.scored if node not in done else [False] * len(segment.token_ids)
                if node not in done:
                    index += range(offsets[node], offsets[node] + sum(segment.scored))
                    done.add(node)
            streams = {name: stream[index] for name, stream in self.streams.items()}
            chains.append((TokenTree([Segment(token_ids, -1, scored)], streams), index))
        return chains

    def unshared(self) -> list[TokenTree]:
        """The same work as separate root-to-leaf chains (each scored token exactly once), for kernels without tree attention."""
        return [chain for chain, _ in self.chains()]
