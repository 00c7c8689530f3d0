"""Typed failures, raised at the boundary where they happen.

Every message names the file, row and key concerned (where there is one) and the remedy. The core never sees a
half-parsed row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class PactError(Exception):
    """Base of every error that the project raises on purpose."""


class ConfigError(PactError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class DataError(PactError):
    """A task, trace or rollout row on disk is not what its schema says.

    Args:
        message: what is wrong and what to do about it.
        file: path of the file, if the row came from one.
        line: 1-based line (JSONL) or row number.
        field: dotted path of the offending key, e.g. ``turns[2].calls[0].name``.
    """

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None, field: str | None = None):
        where = ":".join(str(part) for part in (file, line) if part is not None)
        prefix = f"{where}: " if where else ""
        suffix = f" [field {field}]" if field else ""
        super().__init__(f"{prefix}{message}{suffix}")
        self.file, self.line, self.field = file, line, field


class ToolCallError(PactError):
    """A policy-written tool call can't be parsed or names no known tool. Data, not a crash: shown to the model as an
    observation.
    """


class EnvironmentFailure(PactError):
    """The environment itself broke (not the policy's fault): the rollout is masked and counted."""


class ServerError(PactError):
    """The rollout server is dead, unreachable, late, or serves another weight version than asked for."""


class ServerLost(PactError):
    """The rollout server is given up after its last restart: no ServerError, because it ends the run and not just one
    episode.
    """


class CheckpointError(PactError):
    """A checkpoint or export is torn, incomplete, or belongs to another configuration."""


class NumericsError(PactError):
    """NaN or Inf in a loss, gradient, log-probability or reward; raised before the optimizer step.

    Args:
        message: what is not finite, and where.
        names: the loss, metrics or norms concerned.
        logprobs: where an update was refused: each tree's log-probs [S] of its forward pass, as tensors.
    """

    def __init__(self, message: str, *, names: Sequence[str] = (), logprobs: list[Any] | None = None):
        super().__init__(message)
        self.names, self.logprobs = list(names), logprobs


class TooManyFailures(PactError):
    """More episodes than the configuration allows failed for reasons that aren't the policy's; what was finished is
    checkpointed.
    """


class Interrupted(PactError):
    """The run was asked to stop (a signal) and did so at a safe point. Not a failure: it can be resumed."""


class MissingDependency(PactError):
    """An optional package is absent or is the wrong one; the message says what to install."""
