"""What ends an episode early, in training and in evaluation: the one place that knows."""

from __future__ import annotations

from pact_nemo.config.schema import Config
from pact_nemo.environments import ftrl, toolhop
from pact_nemo.environments.bfcl import environment as bfcl
from pact_nemo.serving.config import EpisodeLimits

_ENDLESS = 1 << 30


def official_turns(benchmark: str) -> int:
    """Assistant turns that a benchmark's own evaluation allows after one user turn, the closing message among them."""
    if benchmark == "bfcl":
        return bfcl.official_turns()
    return ftrl.OFFICIAL_TURNS if benchmark == "ftrl" else toolhop.OFFICIAL_TURNS


def training_limits(config: Config) -> EpisodeLimits:
    """Limits of training rollouts: ``rollout.sampling`` and the server's length."""
    sampling = config.rollout.sampling
    return EpisodeLimits(
        max_turns_per_user_turn=sampling.max_turns_per_user_turn,
        max_turns=sampling.max_turns,
        max_turn_tokens=sampling.max_turn_tokens,
        max_response_tokens=sampling.max_response_tokens,
        max_model_len=config.rollout.server.max_model_len,
    )


def evaluation_limits(config: Config) -> EpisodeLimits:
    """Limits of held-out episodes: assistant turns by ``evaluation.max_turns_per_user_turn`` alone, tokens as in
    training.
    """
    sampling, turns = config.rollout.sampling, config.evaluation.max_turns_per_user_turn
    return EpisodeLimits(
        max_turns_per_user_turn=turns if turns is not None else official_turns(config.tasks.benchmark),
        max_turns=_ENDLESS,
        max_turn_tokens=sampling.max_turn_tokens,
        max_response_tokens=sampling.max_response_tokens,
        max_model_len=config.rollout.server.max_model_len,
    )
