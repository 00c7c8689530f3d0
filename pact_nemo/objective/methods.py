"""The methods that share the loop: what each lets the policy's update see. Where one differs in mathematics, its function has a module of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """What a method uses of what is there.

    Attributes:
        traces: the trace-conditioned surrogate and the SFT term; False sends every prompt through the prompt-only surrogate.
        call_rewards: the matching reward of tool turns (eq. 24-27); False leaves the outcome reward of the final turn (eq. 28).
        turn_level: the turn-level advantage (eq. 30-31) on top of the trajectory advantage.
        source: where it is from.
    """

    traces: bool
    call_rewards: bool
    turn_level: bool
    source: str


METHODS = {
    "pact": Method(True, True, True, "arXiv 2606.16215"),
    "matchtir": Method(False, True, True, "arXiv 2601.10712; the row L_RL^x of PACT's table 2"),
    "grpo": Method(False, False, False, "arXiv 2402.03300: group-normalised outcome reward, one advantage per rollout"),
}
