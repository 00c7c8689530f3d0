"""The methods that share the loop: what each lets the policy's update see, and how it teaches the trace. One row each; the mathematics that PACT
doesn't have is in :mod:`pact_nemo.objective.baselines`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Teaching = Literal["annealed", "nll", "phi", "shaped"]


@dataclass(frozen=True)
class Method:
    """What a method uses of what is there.

    Attributes:
        call_rewards: the matching reward of tool turns (eq. 24-27); False leaves the outcome reward of the final turn (eq. 28).
        turn_level: the turn-level advantage (eq. 30-31) on top of the trajectory advantage.
        teaching: how trace tokens enter the update: None = not at all; ``annealed`` the component-aware SFT term (eq. 9-11); ``nll`` all
            reasoning and call tokens at weight 1; ``phi`` the same, times CHORD's phi; ``shaped`` LUFFY's off-policy term.
        trace_rl: the ratio of un-anchored prompts is evaluated under [x; h*] (eq. 7-8); False: under x, for every prompt.
        mixed: mu weighs the SFT term and 1 - mu the RL terms (CHORD), in place of beta_SFT.
        source: where it is from.
    """

    call_rewards: bool
    turn_level: bool
    teaching: Teaching | None
    trace_rl: bool
    mixed: bool
    source: str

    @property
    def gated(self) -> bool:
        """Whether the anchoring gate applies: it chooses between contexts, so only where there are two."""
        return self.trace_rl


METHODS = {
    "pact": Method(True, True, "annealed", True, False, "arXiv 2606.16215"),
    "matchtir": Method(True, True, None, False, False, "arXiv 2601.10712; the row L_RL^x of PACT's table 2"),
    "grpo": Method(False, False, None, False, False, "arXiv 2402.03300: group-normalised outcome reward, one advantage per rollout"),
    "chord": Method(False, False, "nll", False, True, "arXiv 2508.11408, CHORD-mu"),
    "chord_phi": Method(False, False, "phi", False, True, "arXiv 2508.11408, CHORD-phi"),
    "sft": Method(False, False, None, False, False, "supervised fine-tuning on the traces: the warm-up stage for the whole budget, no RL step"),
    "luffy": Method(False, False, "shaped", False, False, "arXiv 2504.14945"),
}
