"""When an update is refused because a number is NaN or Inf: which term, which sample, and everything needed to look at
it again.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from pact_nemo.batches.prompt_trees import PromptTree
from pact_nemo.errors import NumericsError
from pact_nemo.runtime.files import write_json_atomic

NAMES = {"x": "under x", "h": "under the trace", "sft": "the trace itself"}


def suspects(members: list[PromptTree], logprobs: list[torch.Tensor] | None) -> list[dict[str, Any]]:
    """Every span of tokens with a number that isn't finite.

    Args:
        members: the mini-batch.
        logprobs: [S] of each of them, from the refused update's forward pass; None = not known.

    Returns:
        ``task``, ``rollout`` (None: the trace), ``context``, ``what`` (``logprobs`` or a stream's name) and ``tokens``,
        how many.
    """
    found = []
    for i, prompt in enumerate(members):
        numbers = dict(prompt.tree.streams) | ({"logprobs": logprobs[i]} if logprobs is not None else {})
        for what, values in numbers.items():
            if not values.is_floating_point():
                continue
            broken = ~torch.isfinite(values.cpu())
            if not broken.any():
                continue
            for (context, k), (start, end) in prompt.spans.items():
                count = int(broken[start:end].sum())
                if count:
                    rollout = None if context == "sft" else k
                    found.append(
                        {
                            "task": prompt.group.task.id,
                            "rollout": rollout,
                            "context": context,
                            "what": what,
                            "tokens": count,
                        }
                    )
    return found


def suspects_in_words(found: list[dict[str, Any]]) -> str:
    """The first three of :func:`suspects` in words."""
    if not found:
        return "all log-probs and streams of the batch are finite: the gradient overflowed on its way back"
    parts = [
        f"{row['what']} of {row['task']}, "
        + (f"rollout {row['rollout']}, " if row["rollout"] is not None else "")
        + NAMES[row["context"]]
        for row in found[:3]
    ]
    return "; ".join(parts) + (f"; {len(found) - 3} more" if len(found) > 3 else "")


def dump(path: Path, error: NumericsError, members: list[PromptTree], found: list[dict[str, Any]]) -> None:
    """Write the refused mini-batch: what was broken, the suspects, and each prompt's tokens, spans and streams (not
    finite: as text).
    """
    prompts = []
    for i, prompt in enumerate(members):
        streams = {name: _plain(values) for name, values in prompt.tree.streams.items()}
        if error.logprobs is not None:
            streams["logprobs"] = _plain(error.logprobs[i])
        segments = [
            {"token_ids": s.token_ids.tolist(), "parent": s.parent, "scored": s.scored.astype(int).tolist()}
            for s in prompt.tree.segments
        ]
        spans = [
            {"context": context, "rollout": k, "start": start, "end": end}
            for (context, k), (start, end) in prompt.spans.items()
        ]
        prompts.append({"task": prompt.group.task.id, "segments": segments, "spans": spans, "streams": streams})
    write_json_atomic(path, {"message": str(error), "broken": error.names, "suspects": found, "prompts": prompts})


def _plain(values: torch.Tensor) -> list[float | str]:
    return [value if math.isfinite(value) else str(value) for value in values.double().cpu().tolist()]
