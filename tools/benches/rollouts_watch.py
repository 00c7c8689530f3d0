"""A rollout phase watched from outside: timers around environment, chat format and client, the server's own counts, and
the shares they make.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from pact_nemo.chat.template import ChatFormat
from pact_nemo.environments.base import Environment, Outcome, Session, Task, ToolCall
from pact_nemo.serving.client import Completion, GenerationRequest, RolloutClient
from pact_nemo.serving.endpoint import ServerEndpoint

SAMPLE_SECONDS = 0.2
CODE = ("environment", "tokens")
Interval = tuple[float, float]


@dataclass
class Record:
    """What happened in a phase, in seconds of ``time.perf_counter``.

    Attributes:
        code: intervals of each kind of :data:`CODE`.
        requests: from sending a request to its completion.
        ended: when each episode was through, in that order.
        samples: (when, running, waiting) of the server.
    """

    start: float = field(default_factory=time.perf_counter)
    code: dict[str, list[Interval]] = field(default_factory=lambda: {name: [] for name in CODE})
    requests: list[Interval] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    samples: list[tuple[float, float, float]] = field(default_factory=list)

    @contextmanager
    def running(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.code[kind].append((start, time.perf_counter()))


class Timed:
    """Stands before an object and times every call of some of its methods."""

    def __init__(self, inner: Any, record: Record, kind: str, names: tuple[str, ...]):
        self._inner, self._record, self._kind, self._names = inner, record, kind, names

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name not in self._names:
            return value

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._record.running(self._kind):
                return value(*args, **kwargs)

        return timed


class TimedSession:
    def __init__(self, inner: Session, record: Record, tool_seconds: float):
        self.task, self._inner, self._record, self._tool_seconds = inner.task, inner, record, tool_seconds

    def execute(self, calls: list[ToolCall]) -> list[str]:
        with self._record.running("environment"):
            time.sleep(self._tool_seconds)
            return self._inner.execute(calls)

    def next_user_turn(self, message: str = "") -> tuple[list[dict[str, str]], list[dict[str, Any]]] | None:
        with self._record.running("environment"):
            return self._inner.next_user_turn(message)

    def outcome(self) -> Outcome:
        with self._record.running("environment"):
            return self._inner.outcome()

    def close(self) -> None:
        with self._record.running("environment"):
            self._inner.close()


@dataclass
class TimedEnvironment:
    inner: Environment
    record: Record
    tool_seconds: float

    def tasks(self) -> list[Task]:
        return self.inner.tasks()

    def start(self, task: Task) -> Session:
        with self.record.running("environment"):
            return TimedSession(self.inner.start(task), self.record, self.tool_seconds)

    def close(self) -> None:
        self.inner.close()


class TimedChat(Timed):
    def __init__(self, chat: ChatFormat, record: Record):
        super().__init__(chat, record, "tokens", ("prompt_ids", "continuation_ids", "decode"))
        self.tool_format = Timed(chat.tool_format, record, "tokens", ("parse", "render_observation"))


class TimedClient(RolloutClient):
    record: Record

    async def generate(self, request: GenerationRequest) -> Completion:
        start = time.perf_counter()
        try:
            return await super().generate(request)
        finally:
            self.record.requests.append((start, time.perf_counter()))


@contextmanager
def sampling_server(endpoint: ServerEndpoint, record: Record) -> Iterator[None]:
    """Read how many sequences run and wait, from a thread."""
    stop = threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=endpoint.url, headers=endpoint.headers, timeout=30.0, trust_env=False) as http:
            while not stop.is_set():
                text = http.get("/metrics").raise_for_status().text
                record.samples.append(
                    (
                        time.perf_counter(),
                        gauge(text, "vllm:num_requests_running"),
                        gauge(text, "vllm:num_requests_waiting"),
                    )
                )
                stop.wait(SAMPLE_SECONDS)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def gauge(text: str, name: str) -> float:
    """Sum over all labels of one Prometheus gauge."""
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


def analyse(record: Record, *, limit: int, concurrency: int, episodes: int) -> dict[str, float]:
    """The shares that the module's text names, and seconds."""
    end = record.ended[-1]
    until = record.ended[max(0, -(-9 * episodes // 10) - 1)]
    top = min(limit, max(running for _, running, _ in record.samples))
    full = next(when for when, running, _ in record.samples if running >= top)
    until = max(until, full)
    drain = max(record.ended[max(0, episodes - limit)], full)
    steps = [(start, 1.0, "asked") for start, _ in record.requests] + [
        (stop, -1.0, "asked") for _, stop in record.requests
    ]
    intervals = [pair for kind in CODE for pair in record.code[kind]]
    steps += [(start, 1.0, "code") for start, _ in intervals] + [(stop, -1.0, "code") for _, stop in intervals]
    steps += [(when, 1.0, "ended") for when in record.ended]
    level = {"asked": 0.0, "code": 0.0, "ended": 0.0}
    asked = bare = 0.0
    before = record.start
    for when, change, name in sorted(steps):
        inside = max(0.0, min(when, until) - max(before, full))
        asked += min(limit, level["asked"]) * inside
        slots = min(limit, concurrency, episodes - level["ended"])
        if level["code"] > 0 and level["asked"] < slots:
            bare += max(0.0, min(when, end) - before)
        level[name] += change
        before = max(before, when)
    wall = end - record.start
    return {
        "phase s": wall,
        "busy": mean_between(record.samples, full, until) / limit,
        "busy from 0": mean_between(record.samples, record.start, until) / limit,
        "before drain": mean_between(record.samples, full, drain) / limit,
        "asked": asked / max(until - full, 1e-9) / limit,
        **{f"{kind} s": sum(stop - start for start, stop in record.code[kind]) for kind in CODE},
        "not hidden": bare / wall,
    }


def mean_between(samples: list[tuple[float, float, float]], start: float, end: float) -> float:
    """Mean of the running sequences, each sample holding until the next one."""
    total = 0.0
    for (when, running, _), following in zip(samples, [*(when for when, _, _ in samples[1:]), end], strict=True):
        total += running * max(0.0, min(following, end) - max(when, start))
    return total / max(end - start, 1e-9)
