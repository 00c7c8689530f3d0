"""What one optimizer step tells: its loss, gradient norm and metrics, and the log-probabilities before it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class UpdateResult:
    """One optimizer step.

    Attributes:
        loss: sum of the loss function over all scored tokens of all trees.
        grad_norm: global L2 norm of the gradient of ``loss`` before clipping.
        metrics: the loss function's metrics: sums over the step, maxima for names starting with ``max/``.
        lr: learning rate of this step.
        tokens: tree tokens that went through the model.
        logprobs: per tree [S] float32 log-probs before the step, in nats, detached.
        moved: share of the bfloat16 weights that the step changed; None where the policy computes in float32.
        entropies: per tree [S] float32 entropies of the distributions, likewise; empty unless they were asked for.
    """

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    lr: float
    tokens: int
    logprobs: list[torch.Tensor]
    moved: float | None = None
    entropies: list[torch.Tensor] = field(default_factory=list)
