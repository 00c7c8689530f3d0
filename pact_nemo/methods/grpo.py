"""GRPO (arXiv 2402.03300): a group-normalised outcome reward, one advantage per rollout."""

from __future__ import annotations

from typing import ClassVar

from pact_nemo.methods.base import Method


class GRPO(Method):
    """What :class:`Method` does by itself."""

    source: ClassVar[str] = "arXiv 2402.03300: group-normalised outcome reward, one advantage per rollout"
