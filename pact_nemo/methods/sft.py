"""Supervised fine-tuning on the traces: the warm-up stage for the whole budget, no RL step."""

from __future__ import annotations

from typing import ClassVar

from pact_nemo.methods.base import Method


class SFT(Method):
    """``warmup.steps`` is its length; ``trainer.steps`` is 0."""

    source: ClassVar[str] = "supervised fine-tuning on the traces: the warm-up stage for the whole budget, no RL step"
    trains_by_rl: ClassVar[bool] = False
    reward_settings: ClassVar[tuple[str, ...]] = ()
