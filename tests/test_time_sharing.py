"""Trainer and engines in turn: the state machine against a model of the memory, the engines' side on server processes,
the trainer's on a real policy. Whole runs, and runs that are cut: faults/test_taking_turns.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pact_nemo.errors import ServerLost
from pact_nemo.policy import offload
from pact_nemo.runtime.turns import Move, Turn, Turns
from pact_nemo.serving.fleet import Fleet
from pact_nemo.serving.health import State
from pact_nemo.training.time_sharing import TimeSharing
from tests.faults.server_bench import Bench, content, play

WANTS = ("trainer", "drop", "engines", "load", "end")


@dataclass
class Memory:
    """What a GPU and its host would hold, by the meaning of each move alone.

    Attributes:
        trainer: where the trainer's values are: "device" or "host".
        weights, cache: whether the engine has memory for them on the device.
        content: of its weights: "good", "kept" (on the host) or "lost".
    """

    trainer: str = "host"  # not built yet: nothing of it is on the device
    weights: bool = True
    cache: bool = True
    content: str = "good"
    ended: bool = False

    def apply(self, move: Move) -> None:
        if move is Move.RELEASE:
            assert self.trainer == "device"
            self.trainer = "host"
        elif move is Move.RESTORE:
            assert self.trainer == "host"
            self.trainer = "device"
        elif move in (Move.SLEEP, Move.DROP):
            assert (self.weights or self.cache) and not self.ended, "no second sleep"
            kept = move is Move.SLEEP and self.content == "good"
            self.weights, self.cache, self.content = False, False, "kept" if kept else "lost"
        elif move is Move.END:
            self.weights, self.cache, self.content, self.ended = False, False, "lost", True
        elif move is Move.LOAD:
            assert self.weights and not self.ended
            self.content = "good"
        else:
            assert not self.ended
            assert move is Move.WAKE_CACHE or not self.weights, "it is awake"
            if move is Move.WAKE:
                assert self.content == "kept"
            self.weights = True
            self.cache = self.cache or move is not Move.MAKE_ROOM
            if self.content == "kept" and move is Move.WAKE:
                self.content = "good"
            elif move is Move.MAKE_ROOM:
                self.content = "lost"
        assert not (self.trainer == "device" and (self.weights or self.cache)), f"both own it after {move}"


def moves_to(state: Turns, want: str) -> tuple[Move, ...]:
    if want in ("trainer", "drop", "end"):
        return state.to_trainer(drop=want == "drop", end=want == "end")
    return state.to_engines(load=want == "load")


def opened() -> tuple[Turns, Memory]:
    """A run that has just built its trainer, beside engines that sleep with their first weights."""
    state, memory = Turns(), Memory()
    for move in (Move.SLEEP, Move.RESTORE):
        state = state.after(move)
        memory.apply(move)
    return state, memory


@given(st.lists(st.tuples(st.sampled_from(WANTS), st.none() | st.integers(0, 3)), max_size=30))
def test_both_never_own_it_and_whoever_is_wanted_is_there(wanted: list[tuple[str, int | None]]) -> None:
    """``int``: the run is killed after as many moves, and begins anew; or the move failed, and another is wanted."""
    state, memory = opened()
    for number, (want, cut) in enumerate(wanted):
        if memory.ended and want in ("engines", "load"):
            state, memory = opened()  # a run that ended its engines asks no more
        try:
            moves = moves_to(state, want)
        except RuntimeError:
            assert want == "engines" and memory.content == "lost" and memory.trainer in ("device", "host")
            continue
        for index, move in enumerate(moves):
            if cut is not None and index == cut and number % 2:
                break  # a failed move: state and memory are those of before it
            if cut is not None and index == cut:
                state, memory = opened()
                break
            state = state.after(move)
            memory.apply(move)
        else:
            assert state.turn is (Turn.TRAINER if want in ("trainer", "drop", "end") else Turn.ENGINES)
            assert memory.trainer == ("device" if state.turn is Turn.TRAINER else "host")
            assert state.answers == (memory.weights and memory.cache and memory.content == "good")
            assert state.answers or state.turn is Turn.TRAINER, "a wake was lost"


@pytest.mark.parametrize("move", list(Move))
def test_a_move_out_of_turn_is_refused(move: Move) -> None:
    allowed = {
        Move.RELEASE: {Turn.TRAINER},
        Move.RESTORE: {Turn.NOBODY},
        Move.SLEEP: {Turn.ENGINES},
        Move.DROP: {Turn.ENGINES, Turn.LOADING},
        Move.WAKE: {Turn.NOBODY},
        Move.MAKE_ROOM: {Turn.NOBODY},
        Move.LOAD: {Turn.LOADING, Turn.ENGINES},
        Move.WAKE_CACHE: {Turn.LOADING},
        Move.END: set(Turn),
    }[move]
    for turn in Turn:
        if turn in allowed:
            Turns(turn).after(move)
        else:
            with pytest.raises(RuntimeError, match=f"{move}: it is the turn of {turn}"):
                Turns(turn).after(move)
    if move in (Move.WAKE, Move.WAKE_CACHE):
        with pytest.raises(RuntimeError, match="no weights"):
            Turns(next(iter(allowed)), weights=False).after(move)


def test_engines_without_weights_are_not_woken_to_be_asked() -> None:
    with pytest.raises(RuntimeError, match="refit them before"):
        Turns(Turn.TRAINER, weights=False).to_engines(load=False)


# -- the engines' side
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., tuple[Fleet, Bench]]]:
    opened: list[Fleet] = []

    def start(*faults: dict[str, Any]) -> tuple[Fleet, Bench]:
        bench = Bench(tmp_path / str(len(opened)))
        bench.folder.mkdir()
        opened.append(Fleet([bench.launch(*faults, max_restarts=1)], min_share=0.5, note=bench.notes.append))
        return opened[-1], bench

    yield start
    for fleet in opened:
        fleet.close()


@pytest.mark.parametrize(
    "faults",
    [
        [],
        [{"at": 2, "of": "sleep", "do": "exit"}],
        [{"at": 2, "of": "sleep", "do": "fail"}],
        [{"at": 2, "of": "wake_up", "do": "exit"}],
        [{"at": 2, "of": "wake_up", "do": "fail"}],
        [{"at": 3, "of": "wake_up", "do": "fail"}],
        [{"at": 2, "of": "load", "do": "exit"}],
    ],
    ids=lambda faults: "-".join(f"{row['of']}-{row['at']}-{row['do']}" for row in faults) or "none",
)
def test_what_a_fleet_says_after_a_sleep_is_what_it_would_have_said(serve: Any, faults: list[dict[str, Any]]) -> None:
    plain, bench = serve()
    folder = [bench.export(version) for version in (1, 2)]
    expected = []
    for version in (1, 2):
        plain.refit(folder[version - 1], version, like=bench.folder / "model")
        expected.append(content(play(plain, version)))
    fleet, bench = serve(*faults)
    fleet.refit(folder[0], 1, like=bench.folder / "model")
    fleet.sleep(drop=False)
    fleet.wake(None)
    assert content(play(fleet, 1)) == expected[0]
    fleet.sleep(drop=True)
    fleet.wake("weights")
    fleet.refit(folder[1], 2, like=bench.folder / "model")
    fleet.wake("kv_cache")
    assert content(play(fleet, 2)) == expected[1]
    [engine] = fleet.engines
    assert engine.health.state is State.HEALTHY and engine.health.restarts == len(faults)


def test_engines_that_dropped_their_weights_have_no_version(serve: Any) -> None:
    fleet, _ = serve()
    [engine] = fleet.engines
    fleet.sleep(drop=True)
    fleet.wake(None)  # nobody does: what it samples now is of no weights
    assert engine.client.admin.weight_version() == "dropped"


def test_an_engine_that_never_wakes_is_given_up(serve: Any) -> None:
    fleet, bench = serve({"at": 1, "of": "wake_up", "do": "fail"})
    fleet.sleep(drop=False)
    (bench.folder / "no-start").touch()
    with pytest.raises(ServerLost, match="given up after 1 restarts"):
        fleet.wake(None)


# -- the trainer's side
# ----------------------------------------------------------------------------------------------------------------------


class Progress:
    """Remembers what was shown."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    @contextmanager
    def phase(self, name: str, *, brief: bool = False) -> Iterator[None]:
        self.shown.append(name)
        yield


class Engines:
    """Stands for a generator; looks at the policy's memory whenever it is told something."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.policy: Any = None
        self.broken = False

    def _told(self, what: str) -> None:
        self.told.append(what)
        if self.policy is not None:
            held = [p.data.untyped_storage().nbytes() for chunk in self.policy.chunks for p in chunk.parameters()]
            held += [buffer.grad_data.untyped_storage().nbytes() for c in self.policy.wrapped for buffer in c.buffers]
            assert not any(size for size in held if size >= 100), "it was told before the trainer had left"
        if self.broken:
            raise ServerLost("none is left")

    def sleep(self, *, drop: bool) -> None:
        self._told("drop" if drop else "sleep")

    def wake(self, part: str | None) -> None:
        self._told(f"wake {part}")

    def close(self) -> None:
        self._told("end")


def test_a_trainer_leaves_before_the_engines_wake_and_goes_on_bit_for_bit(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.workers.policy_kit import loss_fn, make_trees
    from tests.workers.small_policy import build

    monkeypatch.setattr(offload, "SMALLEST", 100)
    plain, moved = (build(models("llama"), precision="bf16") for _ in range(2))
    engines, progress, trees = Engines(), Progress(), make_trees(4)
    sharing = TimeSharing(engines, progress, on=True)  # type: ignore[arg-type]
    sharing.before_policy()
    sharing.built(moved)
    engines.policy = moved
    sharing.engines()
    sharing.engines()  # their turn already
    sharing.trainer(drop=True)
    updates = [policy.update(trees, loss_fn) for policy in (plain, moved)]
    with sharing.loading():
        assert engines.told[-1] == "wake weights" and not sharing.state.answers
    assert sharing.state.answers
    sharing.trainer()
    updates += [policy.update(trees, loss_fn) for policy in (plain, moved)]
    assert updates[0].loss == updates[1].loss and updates[2].grad_norm == updates[3].grad_norm
    for one, other in zip(plain.chunks[0].parameters(), moved.chunks[0].parameters(), strict=True):
        assert torch.equal(one, other)
    assert engines.told == ["sleep", "wake None", "drop", "wake weights", "wake kv_cache", "sleep"]
    assert progress.shown == [
        "sleep",
        "release",
        "wake",
        "sleep",
        "restore",
        "release",
        "wake",
        "wake",
        "sleep",
        "restore",
    ]
    seconds = sharing.seconds
    found = sharing.taken()
    assert set(found) == {
        *(f"time/{name}" for name in ("release", "restore", "sleep", "wake")),
        "moved/copied",
        "moved/dropped",
    }
    assert seconds == sum(found[key] for key in found if key.startswith("time/")) > 0
    assert found["moved/copied"] > found["moved/dropped"] > 0
    assert sharing.taken() == {} and sharing.seconds == 0

    # a load that fails leaves the engines awake by half; what is asked of the trainer then needs no answer of theirs
    with pytest.raises(ServerLost), sharing.loading():
        raise ServerLost("too few are left")
    assert sharing.state.turn is Turn.LOADING
    sharing.trainer(end=True)
    assert engines.told[-1] == "end" and plain.update(trees, loss_fn).loss == moved.update(trees, loss_fn).loss

    engines.broken, sharing.state = True, replace(sharing.state, weights=True)
    with pytest.raises(ServerLost):
        sharing.engines()
    assert sharing.state.turn is Turn.NOBODY  # the trainer has left; they did not come


def test_where_nothing_is_shared_nothing_is_moved() -> None:
    engines = Engines()
    sharing = TimeSharing(engines, Progress(), on=False)  # type: ignore[arg-type]
    sharing.before_policy()
    sharing.trainer(end=True)
    sharing.engines()
    with sharing.loading():
        pass
    assert engines.told == [] and sharing.taken() == {}
