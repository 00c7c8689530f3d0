"""The state machine of a rollout server, for every order of events."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pact_nemo.serving.health import Event, Health, HealthLimits, State

LIMITS = HealthLimits(heartbeat_timeout_s=10.0, max_restarts=2)
STEPS = st.lists(st.tuples(st.sampled_from(Event), st.floats(0, 20), st.integers(0, 3)), max_size=60)


def run(*events: tuple[Event, float, int | None]) -> Health:
    health = Health()
    for event, now, version in events:
        health = health.after(event, now, LIMITS, version=version)
    return health


def test_a_life() -> None:
    health = run((Event.READY, 1, None), (Event.LOADED, 2, 0))
    assert health.state is State.HEALTHY and health.serves(0) and not health.serves(1)
    health = health.after(Event.MISS, 8, LIMITS)
    assert health.state is State.SUSPECT and health.serves(0)
    assert health.after(Event.BEAT, 9, LIMITS).state is State.HEALTHY
    hung = health.after(Event.MISS, 12, LIMITS)
    assert hung.state is State.DEAD and hung.reason == "no heartbeat for 10 s" and not hung.serves(0)
    assert hung.after(Event.BEAT, 13, LIMITS) == hung, "a late answer brings it not back"
    again = hung.after(Event.RESTART, 14, LIMITS)
    assert again.state is State.STARTING and again.restarts == 1 and again.version is None
    assert not again.after(Event.READY, 15, LIMITS).serves(0), "not before it was loaded"


def test_a_refit_stops_service_until_it_is_done() -> None:
    health = run((Event.READY, 1, None), (Event.LOADED, 2, 4), (Event.REFIT, 3, None))
    assert health.state is State.LOADING and not health.serves(4) and not health.serves(5)
    assert health.after(Event.BEAT, 4, LIMITS) == health
    assert health.after(Event.LOADED, 5, LIMITS, version=5).serves(5)
    assert health.after(Event.FAILED, 5, LIMITS, reason="torn").reason == "torn"


@pytest.mark.parametrize("event", [Event.EXITED, Event.FAILED, Event.STALE])
def test_restarts_are_bounded(event: Event) -> None:
    health = Health()
    for _ in range(LIMITS.max_restarts):
        health = health.after(event, 1, LIMITS).after(Event.RESTART, 1, LIMITS)
        assert health.state is State.STARTING
    health = health.after(event, 1, LIMITS).after(Event.RESTART, 1, LIMITS)
    assert health.state is State.LOST
    assert all(health.after(any_event, 2, LIMITS, version=1) == health for any_event in Event)


def test_a_restart_that_was_abandoned_is_not_counted() -> None:
    dead = run((Event.READY, 1, None), (Event.LOADED, 2, 0), (Event.EXITED, 3, None))
    for step in ((), (Event.READY,)):
        health = dead.after(Event.RESTART, 4, LIMITS)
        for event in step:
            health = health.after(event, 5, LIMITS)
        health = health.after(Event.ABANDONED, 6, LIMITS, reason="it hung")
        assert health.state is State.DEAD and health.restarts == 0 and health.reason == "it hung"
    served = run((Event.READY, 1, None), (Event.LOADED, 2, 0))
    assert served.after(Event.ABANDONED, 3, LIMITS) == served, "there was none"


@given(STEPS)
@example(
    [(Event.READY, 0.0, 0), (Event.LOADED, 0.0, 0), (Event.RESTART, 0.0, 0)]
)  # nobody restarts a healthy server: it serves on
@example([(Event.READY, 0.0, 0), (Event.LOADED, 0.0, 0), (Event.ABANDONED, 0.0, 0)])  # nor was one under way here
def test_whatever_happens(steps: list[tuple[Event, float, int]]) -> None:
    health, now, loaded = Health(), 0.0, None
    for event, passed, version in steps:
        now += passed
        before, health = health, health.after(event, now, LIMITS, version=version)
        if event is Event.LOADED and before.state is State.LOADING:
            loaded = version
        elif event in (Event.EXITED, Event.FAILED, Event.STALE, Event.REFIT):
            loaded = None
        for asked in range(4):  # it serves what was loaded last, with nothing in between, or nothing
            assert not health.serves(asked) or asked == loaded
        assert health.restarts <= LIMITS.max_restarts and abs(health.restarts - before.restarts) <= 1
        assert health.restarts >= before.restarts or event is Event.ABANDONED
        assert health.heard <= now and health.since <= now
        if before.state is State.DEAD:
            assert health.state in (State.DEAD, State.LOST, State.STARTING) and (
                health == before or event is Event.RESTART
            )
        if before.state is State.LOST:
            assert health == before
        if event is Event.MISS and before.state in (State.HEALTHY, State.SUSPECT):
            assert (health.state is State.DEAD) == (now - before.heard >= LIMITS.heartbeat_timeout_s)
