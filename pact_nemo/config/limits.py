"""What ends an episode early, in training and in evaluation: the one place that knows."""

from __future__ import annotations

from pact_nemo.config.schema import Config
from pact_nemo.environments.registry import environment_spec
from pact_nemo.serving.config import EpisodeLimits

_ENDLESS = 1 << 30


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
    """Limits of held-out episodes: assistant turns by ``evaluation.max_turns_per_user_turn``, by the benchmark's own
    limit where that is null, and as in training where there is none; tokens as in training.
    """
    sampling, turns = config.rollout.sampling, config.evaluation.max_turns_per_user_turn
    if turns is None:
        turns = environment_spec(config.environment).official_turns()
    return EpisodeLimits(
        max_turns_per_user_turn=turns if turns is not None else sampling.max_turns_per_user_turn,
        max_turns=_ENDLESS,
        max_turn_tokens=sampling.max_turn_tokens,
        max_response_tokens=sampling.max_response_tokens,
        max_model_len=config.rollout.server.max_model_len,
    )
