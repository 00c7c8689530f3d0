"""A small coverage-guided mutator: valid inputs are mutated as bytes and as JSON; an input that reaches a new line of
the watched modules joins the corpus. Everything follows from the seed.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import CodeType, FrameType, ModuleType
from typing import Any

Arc = tuple[str, int, int]
WATCHED = 400  #: first inputs of a run that are all watched; later every fourth is

#: bytes that are special to one reader or another
TOKENS = (
    b"\x00",
    b"\xff",
    b"\xc3\x28",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"\\u0000",
    b"\xe2\x80\xa8",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"-0",
    b"9" * 400,
    b"9" * 5000,
    b"[" * 300,
    b'{"a":' * 200,
    b"]" * 50,
    b"'",
    b'"',
    b"\\",
    b"\n",
    b"\r\n",
    b"\t",
    b"null",
    b"true",
    b"{}",
    b"[]",
    b"()",
    b"[f(a=",
    b"<tool_call>",
    b"</tool_call>",
    b'{"name": "f", "arguments": {}}',
    b"; ",
    b"<|python_tag|>",
    b"__import__('os')",
    b"${",
    b"${oc.env:HOME}",
    b"!!python/object/apply:os.system",
    b"&a ",
    b"*a",
    b"<<: ",
    b": ",
    b"- ",
    b"../",
    b"{{",
    b"}}",
    b"{%",
    b"%}",
    b"(" * 120,
    b"-" * 300,
    b"f(" * 90,
)
#: values that a JSON place is given instead of its own
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**63,
    -(10**30),
    10**400,
    0.5,
    -1.5e300,
    "",
    " ",
    "a",
    "\x00",
    "\u2028",
    "é" * 40,
    "\ud800",
    "x" * 3000,
    "[1, 2]",
    "null",
    "../../etc/passwd",
    "__class__",
    [],
    {},
    [[]],
    [None],
    [{}],
    [""],
    {"": None},
    {"name": 1},
    {"type": "object"},
    [["a", 1]],
    float("nan"),
    float("inf"),
    {"__proto__": []},
)


class Coverage:
    """Lines (with the line before, where Python tells) that run in the watched modules, seen first now."""

    def __init__(self, modules: Sequence[ModuleType]):
        self.files = {module.__file__ for module in modules}
        self.seen: set[Arc] = set()
        self.news = 0

    def _note(self, arc: Arc) -> None:
        if arc not in self.seen:
            self.seen.add(arc)
            self.news += 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect while the block runs; ``news`` counts what it was first to reach."""
        self.news = 0
        if hasattr(sys, "monitoring"):
            with self._monitoring():
                yield
            return
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        name, last = frame.f_code.co_filename, frame.f_lineno

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                self._note((name, last, frame.f_lineno))
                last = frame.f_lineno
            return line

        return line

    @contextmanager
    def _monitoring(self) -> Iterator[None]:
        events: Any = sys.monitoring  # type: ignore[attr-defined]
        tool = 4

        def line(code: CodeType, number: int) -> Any:
            if code.co_filename in self.files:
                self._note((code.co_filename, 0, number))
            return events.DISABLE  # each line tells once, so the many later inputs cost nothing

        events.use_tool_id(tool, "fuzzing")
        try:
            events.register_callback(tool, events.events.LINE, line)
            events.set_events(tool, events.events.LINE)
            yield
        finally:
            events.set_events(tool, 0)
            events.free_tool_id(tool)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside a JSON value."""
    found, todo = [], [value]
    while todo:
        item = todo.pop()
        pairs = (
            list(enumerate(item)) if isinstance(item, list) else list(item.items()) if isinstance(item, dict) else []
        )
        for key, child in pairs:
            found.append((item, key))
            todo.append(child)
    return found


def mutate_json(value: Any, rng: random.Random) -> Any:
    """One to three changes in a JSON value (changed in place): another value, no value, a copy, a renamed key, or one
    of its own parts elsewhere.
    """
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = _places(value)
        if not places:
            return copy.deepcopy(rng.choice(VALUES))
        container, key = rng.choice(places)
        kind = rng.randrange(7)
        if kind <= 2:
            container[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3:
            del container[key]
        elif kind == 4:
            other, its = rng.choice(places)
            container[key] = (
                json.loads(json.dumps(other[its]))
                if its in range(len(other)) or isinstance(other, dict) and its in other
                else None
            )
        elif kind == 5:
            if isinstance(container, list):
                container.insert(key, copy.deepcopy(container[key]))
            else:
                container[rng.choice(("", "name", "x", f"{key}2", "\x00", "unknown"))] = container.pop(key)
        else:
            deep: Any = container[key]
            for _ in range(rng.choice((1, 5, 70, 300))):
                deep = [deep]
            container[key] = deep
    return value


def mutate_bytes(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """A few flips, cuts, copies and insertions; ``other`` is what a splice takes its tail from."""
    buffer = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(buffer) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(buffer):
            buffer[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del buffer[at : at + rng.choice((1, 1, 4, 30, 1000))]
        elif kind in (2, 3):
            buffer[at:at] = rng.choice(TOKENS)
        elif kind == 4:
            buffer[at:at] = buffer[at : at + rng.choice((1, 8, 60))]
        elif kind == 5:
            buffer[at : at + 1] = rng.randbytes(rng.choice((1, 2, 8)))
        else:
            buffer[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(buffer[:200_000])


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Mutate as JSON lines where the input is that, as bytes otherwise and now and then."""
    if rng.random() < 0.6:
        lines = data.split(b"\n")
        index = rng.randrange(len(lines))
        try:
            value = json.loads(lines[index])
            lines[index] = json.dumps(mutate_json(value, rng)).encode()
            return b"\n".join(lines)
        except (ValueError, RecursionError):
            pass
    return mutate_bytes(data, other, rng)


@dataclass
class Findings:
    """What a fuzzing run saw.

    Attributes:
        inputs: tried.
        accepted: inputs that the target took.
        refused: inputs that the target refused with an error it may raise.
        crashes: (input, what it raised) of everything else, one per kind and place.
        reached: lines or arcs of the watched modules.
        slowest: seconds of the slowest input.
        slow: that input.
    """

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: dict[str, tuple[bytes, BaseException]] = field(default_factory=dict)
    crashed: int = 0
    reached: int = 0
    slowest: float = 0.0
    slow: bytes = b""

    def say(self) -> str:
        """For a failing test: every kind of crash with an input that brings it about."""
        return "\n".join(
            f"{where}: {error!r}\n    input {data[:600]!r}" for where, (data, error) in self.crashes.items()
        )


def _where(error: BaseException) -> str:
    trace, place = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/pact_nemo/" in code.co_filename or "/tests/faults/" in code.co_filename:
            place = f"{code.co_filename.rsplit('/', 2)[-1]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {place}"


def fuzz(
    target: Callable[[bytes], None],
    corpus: Sequence[bytes],
    modules: Sequence[ModuleType],
    refusals: tuple[type[Exception], ...],
    *,
    inputs: int,
    seed: int = 0,
) -> Findings:
    """Call ``target`` with ``inputs`` mutations of ``corpus``.

    Args:
        target: takes an input, or raises one of ``refusals``; anything else is a crash.
        corpus: valid inputs; each is tried as it is first and must be accepted.
        modules: those whose lines guide the search.
        refusals: errors that refuse an input.
        inputs: how many.
        seed: of every choice.
    """
    rng, coverage, found = random.Random(seed), Coverage(modules), Findings()
    kept = list(corpus)
    for data in corpus:
        with coverage.watching():
            target(data)
    while found.inputs < inputs:
        base = rng.choice(kept)
        data = mutate(base, rng.choice(kept), rng)
        found.inputs += 1
        started = time.perf_counter()
        watch = found.inputs <= WATCHED or found.inputs % 4 == 0  # watching costs more than most loaders do
        try:
            with coverage.watching() if watch else nullcontext():
                target(data)
            found.accepted += 1
        except refusals:
            found.refused += 1
        except (Exception, RecursionError) as error:
            found.crashed += 1
            found.crashes.setdefault(_where(error), (data, error))
        took = time.perf_counter() - started
        if took > found.slowest:
            found.slowest, found.slow = took, data
        if watch and coverage.news and len(data) < 50_000:
            kept.append(data)
    found.reached = len(coverage.seen)
    return found
