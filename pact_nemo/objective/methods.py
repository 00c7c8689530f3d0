"""The methods that share the loop: what each lets the policy's update see, and how it teaches the trace. One row each;
the mathematics that PACT doesn't have is in :mod:`pact_nemo.objective.baselines`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Teaching = Literal["annealed", "nll", "phi", "shaped"]
Rewards = Literal["matching", "outcome", "toolrl", "ftrl"]


@dataclass(frozen=True)
class Method:
    """What a method uses of what is there.

    Attributes:
        rewards: ``matching`` of tool turns and the outcome (eq. 24-28); ``outcome`` alone (eq. 28); ``toolrl`` and
            ``ftrl``: what those papers reward (:mod:`pact_nemo.objective.baseline_rewards`).
        turn_level: the turn-level advantage (eq. 30-31) on top of the trajectory advantage.
        teaching: how trace tokens enter the update: None = not at all; ``annealed`` the component-aware SFT term (eq.
            9-11); ``nll`` all reasoning and call tokens at weight 1; ``phi`` the same, times CHORD's phi; ``shaped``
            LUFFY's off-policy term.
        trace_rl: the ratio of un-anchored prompts is evaluated under [x; h*] (eq. 7-8); False: under x, for every
            prompt.
        mixed: mu weighs the SFT term and 1 - mu the RL terms (CHORD), in place of beta_SFT.
        source: where it is from.
        defaults: settings of the objective that the method's public code has another value for than this project's
            default, with that value. ``docs/objective.md`` lists them with what else differs, and why.
    """

    rewards: Rewards
    turn_level: bool
    teaching: Teaching | None
    trace_rl: bool
    mixed: bool
    source: str
    defaults: Mapping[str, object] = field(default_factory=dict)

    @property
    def gated(self) -> bool:
        """Whether the anchoring gate applies: it chooses between contexts, so only where there are two."""
        return self.trace_rl


_CHORD = {"kl_coef": 0.0, "aggregation": "token-mean", "sft_aggregation": "token-mean", "mu_schedule": "cosine"}
METHODS = {
    "pact": Method("matching", True, "annealed", True, False, "arXiv 2606.16215"),
    "matchtir": Method("matching", True, None, False, False, "arXiv 2601.10712; the row L_RL^x of PACT's table 2"),
    "grpo": Method(
        "outcome",
        False,
        None,
        False,
        False,
        "arXiv 2402.03300: group-normalised outcome reward, one advantage per rollout",
    ),
    "toolrl": Method(
        "toolrl",
        False,
        None,
        False,
        False,
        "arXiv 2504.13958: format and correctness reward, group-normalised",
        {"aggregation": "token-mean", "matching": "greedy", "toolrl_strict": True},
    ),
    "ftrl": Method(
        "ftrl",
        False,
        None,
        False,
        False,
        "arXiv 2508.08791: reward of each turn by the sub-questions it solves, group-normalised sum",
        {"aggregation": "token-mean", "ftrl_count_malformed": False},
    ),
    "chord": Method(
        "outcome", False, "nll", False, True, "arXiv 2508.11408, CHORD-mu", {**_CHORD, "mu_start": 0.9, "mu_end": 0.05}
    ),
    "chord_phi": Method(
        "outcome", False, "phi", False, True, "arXiv 2508.11408, CHORD-phi", {**_CHORD, "mu_start": 0.1, "mu_end": 0.1}
    ),
    "sft": Method(
        "outcome",
        False,
        None,
        False,
        False,
        "supervised fine-tuning on the traces: the warm-up stage for the whole budget, no RL step",
    ),
    "luffy": Method(
        "outcome",
        False,
        "shaped",
        False,
        False,
        "arXiv 2504.14945",
        {"kl_coef": 0.0, "aggregation": "constant-length", "advantage_std": False, "clip": False},
    ),
}
