"""Whether a rollout server may be asked: a state machine without I/O. What happens, and when, is told to it
(:mod:`pact_nemo.serving.supervisor`).

    STARTING --ready--> LOADING --loaded(v)--> HEALTHY <--beat/miss--> SUSPECT --no beat for heartbeat_timeout_s--> DEAD
                           ^----- refit ---------'
    STARTING, LOADING --abandoned--> DEAD, as before that restart
    any but LOST: exited, failed, stale --> DEAD --restart--> STARTING, or LOST once max_restarts are used up

A server serves only after a load of the version that is asked for: one that was restarted has to be loaded first,
whatever it says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class State(StrEnum):
    """Where a server stands."""

    STARTING = "starting"  #: the process was started, it does not answer yet
    LOADING = "loading"  #: it answers, its weights are being set
    HEALTHY = "healthy"
    SUSPECT = "suspect"  #: a heartbeat is overdue; still asked
    DEAD = "dead"  #: gone, hung, or with other weights than asked for; not asked any more
    LOST = "lost"  #: dead for good


class Event(StrEnum):
    """What can happen to it."""

    READY = "ready"  #: it answers for the first time
    LOADED = "loaded"  #: weights, label and prefix cache are those of ``version``
    BEAT = "beat"  #: its engine answered a heartbeat
    MISS = "miss"  #: a heartbeat has not been answered so far
    REFIT = "refit"  #: other weights are about to be loaded
    EXITED = "exited"  #: the process is gone
    FAILED = "failed"  #: a start or a load did not succeed
    STALE = "stale"  #: it computes with other weights than it was given
    RESTART = "restart"  #: to be started anew
    ABANDONED = "abandoned"  #: nobody waits for that restart any more: it is not at the server's charge


@dataclass(frozen=True)
class HealthLimits:
    """When to give up: seconds without a heartbeat until a server counts as hung; restarts in all."""

    heartbeat_timeout_s: float
    max_restarts: int


@dataclass(frozen=True)
class Health:
    """State of one server.

    Attributes:
        since: when the state began, on the caller's monotonic clock.
        heard: last sign of life.
        version: weights that it serves; None while that isn't known.
        restarts: so far.
        reason: why it is dead or suspect.
    """

    state: State = State.STARTING
    since: float = 0.0
    heard: float = 0.0
    version: int | None = None
    restarts: int = 0
    reason: str = ""

    def serves(self, version: int) -> bool:
        """Whether requests for that version may be sent."""
        return self.state in (State.HEALTHY, State.SUSPECT) and self.version == version

    def after(
        self, event: Event, now: float, limits: HealthLimits, *, version: int | None = None, reason: str = ""
    ) -> Health:
        """The state that an event leads to. Events that a state doesn't expect change nothing: a late answer brings no
        dead server back.
        """
        if self.state is State.LOST:
            return self
        if self.state is State.DEAD:
            if event is not Event.RESTART:
                return self
            if self.restarts >= limits.max_restarts:
                return self._to(State.LOST, now)
            return replace(self._to(State.STARTING, now), restarts=self.restarts + 1, heard=now, version=None)
        if event is Event.ABANDONED and self.state in (State.STARTING, State.LOADING):
            return replace(self._to(State.DEAD, now), version=None, reason=reason, restarts=max(0, self.restarts - 1))
        if event in (Event.EXITED, Event.FAILED, Event.STALE):
            return replace(self._to(State.DEAD, now), version=None, reason=reason or event.value)
        if event is Event.READY and self.state is State.STARTING:
            return replace(self._to(State.LOADING, now), heard=now)
        if event is Event.REFIT and self.state in (State.HEALTHY, State.SUSPECT):
            return replace(self._to(State.LOADING, now), version=None)
        if event is Event.LOADED and self.state is State.LOADING and version is not None:
            return replace(self._to(State.HEALTHY, now), heard=now, version=version, reason="")
        if event is Event.BEAT and self.state in (State.HEALTHY, State.SUSPECT):
            return replace(
                self if self.state is State.HEALTHY else self._to(State.HEALTHY, now),
                heard=max(now, self.heard),
                reason="",
            )
        if event is Event.MISS and self.state in (State.HEALTHY, State.SUSPECT):
            silent = now - self.heard
            if silent >= limits.heartbeat_timeout_s:
                return replace(
                    self._to(State.DEAD, now), version=None, reason=reason or f"no heartbeat for {silent:.0f} s"
                )
            return (
                self
                if self.state is State.SUSPECT
                else replace(self._to(State.SUSPECT, now), reason="a heartbeat is overdue")
            )
        return self

    def _to(self, state: State, now: float) -> Health:
        return replace(self, state=state, since=now)
