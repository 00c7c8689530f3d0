"""Whether a rollout phase keeps its server busy: sequences running on the server against its limit, and work of ours that generation doesn't hide.

A real vLLM server, the config's own tasks, the product's batch and episode code (:func:`pact_nemo.rollouts.batch.run_batch`); many more episodes
than ``rollout.server.max_num_seqs``. The same episodes are played with several numbers of open episodes (``--factors``, times the limit), the
prefix cache emptied before each. ``/metrics`` of the server is read five times a second.

- busy: mean of the server's running sequences, from when all its slots were first taken until 90 % of the episodes have ended, over the limit;
- busy from 0: the same from the start of the phase;
- asked: over the same time as busy, requests under way as the client knows them, at most the limit, over the limit. What busy lacks to it is
  lost between client and engine;
- environment, tokens: seconds within the environment, and within template, tokeniser and call parser, summed over episodes (clock time, in
  threads of one process: waiting for the interpreter is in it);
- not hidden: share of the phase in which such code ran while fewer requests were under way than slots or open episodes.

``ratio`` is busy of the smallest factor that reaches the goal, or of the best one.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checkpoints.embedded import materialise_embedded_model
from pact_nemo.environments.base import Environment, Outcome, Session, Task, ToolCall
from pact_nemo.rollouts.batch import run_batch
from pact_nemo.rollouts.client import Completion, GenerationRequest, RolloutClient
from pact_nemo.rollouts.config import EpisodeLimits, Sampling
from pact_nemo.rollouts.endpoint import ServerEndpoint
from pact_nemo.rollouts.episode import SeedPath
from pact_nemo.rollouts.server import RolloutServer
from pact_nemo.rollouts.types import Rollout
from pact_nemo.training.config import Config, load_config
from pact_nemo.training.data import build_dataset, build_environment, prompts_of_step
from tools.benches.kit import report

GOAL = 0.8
SAMPLE_SECONDS = 0.2
CODE = ("environment", "tokens")
Interval = tuple[float, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("conf/pact_bfcl-smollm2_135m-cpu.yaml"))
    parser.add_argument("--limit", type=int, default=16, help="rollout.server.max_num_seqs")
    parser.add_argument("--episodes", type=int, default=96, help="rounded down to whole groups of K")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 1.25, 1.5, 2.0], help="open episodes, in units of the limit")
    parser.add_argument("--tool-seconds", type=float, default=0.0, help="let the calls of a turn take so much longer: tools that wait for something")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the config")


# ---------------------------------------------------------------------------------------------------------------------------- watching


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
                record.samples.append((time.perf_counter(), gauge(text, "vllm:num_requests_running"), gauge(text, "vllm:num_requests_waiting")))
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


# --------------------------------------------------------------------------------------------------------------------------- analysis


def analyse(record: Record, *, limit: int, concurrency: int, episodes: int) -> dict[str, float]:
    """The shares that the module's text names, and seconds."""
    end = record.ended[-1]
    until = record.ended[max(0, -(-9 * episodes // 10) - 1)]
    top = min(limit, max(running for _, running, _ in record.samples))
    full = next(when for when, running, _ in record.samples if running >= top)
    until = max(until, full)
    steps = [(start, 1.0, "asked") for start, _ in record.requests] + [(stop, -1.0, "asked") for _, stop in record.requests]
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


def choose(rows: list[dict[str, float]]) -> dict[str, float]:
    """The row of the fewest open episodes that reaches the goal, or the best one."""
    good = [row for row in rows if row["busy"] >= GOAL]
    return min(good, key=lambda row: row["concurrency"]) if good else max(rows, key=lambda row: row["busy"])


# -------------------------------------------------------------------------------------------------------------------------------- run


def run(options: Namespace) -> int:
    words = [f"rollout.server.max_num_seqs={options.limit}", "rollout.server.log_stats=true", *options.set]
    config = load_config(options.config, words)
    source = Path(config.model.path) if config.model.path is not None else materialise_embedded_model(Path(config.run.cache_dir))
    chat = ChatFormat.from_pretrained(source, config.model.tool_format)
    environment = build_environment(config)
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-rollouts-") as folder:
        server = RolloutServer(config.rollout.server, source, log_file=Path(folder) / "server.log")
        try:
            server.launch()
            tasks = build_dataset(config, environment, chat, note=lambda _: None).train
            k = config.objective.group_size
            tasks = prompts_of_step(tasks, 0, options.episodes // k, config.run.seed)
            server.wait_ready()
            play(config, server, environment, chat, tasks[: max(1, options.limit // k)], options.limit, 0.0)  # warm-up
            for factor in options.factors:
                server.admin().reset_prefix_cache()
                rows.append(play(config, server, environment, chat, tasks, max(1, round(factor * options.limit)), options.tool_seconds))
        finally:
            server.close()
            environment.close()
    best = choose(rows)
    result = {
        "limit": config.rollout.server.max_num_seqs,
        "episodes": len(tasks) * k,
        "concurrency that keeps it busy, over the limit": best["concurrency"] / options.limit,
        "configured concurrency, over the limit": config.rollout.sampling.concurrency / options.limit,
        "ratio": best["busy"],
        "goal": f">= {GOAL}",
    }
    report(options, f"rollout phases of {options.config.stem}", rows, result)
    return 0


def play(
    config: Config, server: RolloutServer, environment: Environment, chat: ChatFormat, tasks: list[Task], concurrency: int, tool_seconds: float
) -> dict[str, float]:
    """One rollout phase, watched."""
    settings, server_settings = config.rollout.sampling, config.rollout.server
    client = TimedClient(
        server.endpoint, weight_version=0, request_timeout_s=server_settings.request_timeout_s, connect_retries=0,
        admin_timeout_s=server_settings.refit_timeout_s,
    )  # fmt: skip
    limits = EpisodeLimits(
        max_turns_per_user_turn=settings.max_turns_per_user_turn,
        max_turns=settings.max_turns,
        max_turn_tokens=settings.max_turn_tokens,
        max_response_tokens=settings.max_response_tokens,
        max_model_len=server_settings.max_model_len,
    )
    record = Record()
    client.record = record

    def ended(*_: int) -> None:
        record.ended.append(time.perf_counter())

    with sampling_server(server.endpoint, record):
        rollouts: list[Rollout] = asyncio.run(
            run_batch(
                tasks,
                config.objective.group_size,
                environment=TimedEnvironment(environment, record, tool_seconds),
                chat=TimedChat(chat, record),
                clients=[client],
                limits=limits,
                sampling=Sampling(settings.temperature, settings.top_p),
                seeds=SeedPath(config.run.seed, 0),
                concurrency=concurrency,
                on_progress=ended,
            )
        )
    found = analyse(record, limit=server_settings.max_num_seqs, concurrency=concurrency, episodes=len(rollouts))
    tokens = sum(sum(rollout.loss_mask) for rollout in rollouts)
    counts = {"concurrency": concurrency, "failed": sum(rollout.status == "failed" for rollout in rollouts), "tokens/s": tokens / found["phase s"]}
    return {**counts, **found}
