#!/usr/bin/env python
"""What the processes of a user's own class cost: rollouts a second and milliseconds a call, against the same class
called in a plain loop, interleaved, medians.

    python tools/bench_own_tools.py --rounds 7 --rollouts 64 --calls 10

A rollout is an instance, its calls, and its end. "One at a time" times each call alone. "At once" starts all rollouts
together, each in a thread of the caller, as training does.

"Busy" is what a rollout server would be: of the time from the start to a rollout's end, the part in which the rollout
waits for the server and not for its tools; the mean over all rollouts. Generation is a wait here, of ``--generation``
seconds a turn, and takes no core from the tools. Phases of rollouts are ``--pause`` seconds apart, as updates are
between those of a training. A real server's figure is ``tools/bench.py rollouts``.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.environments.own.settings import ISOLATION, OwnConfig
from pact_nemo.environments.own.workers import ClassHost
from pact_nemo.runtime.plugins import load_plugin
from pact_nemo.runtime.terminal import command

SOURCE = '''
class Shop:
    def __init__(self, task):
        self.stock = dict(task["info"]["stock"])

    def take(self, sku: str, count: int = 1) -> dict:
        """Take articles from the stock."""
        self.stock[sku] -= count
        return {"sku": sku, "left": self.stock[sku], "price": 2.5}
'''
TASK = {"id": "t", "info": {"stock": {f"sku-{index}": 1_000_000 for index in range(50)}}}
ARGUMENTS = {"sku": "sku-7", "count": 2}


@dataclass
class Timed:
    """Of one round: its length, and those of the starts, calls and ends in it, in seconds."""

    seconds: float
    starts: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)


def timed(into: list[float], call: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    found = call()
    into.append(time.perf_counter() - started)
    return found


def plain(shop: type, rollouts: int, calls: int) -> Timed:
    """Nothing between the class and this process."""
    found = Timed(0.0)
    started = time.perf_counter()
    for _ in range(rollouts):
        instance = timed(found.starts, lambda: shop(TASK))
        for _ in range(calls):
            timed(found.calls, lambda: instance.take(**ARGUMENTS))  # noqa: B023
    found.seconds = time.perf_counter() - started
    return found


def hosted(host: ClassHost, threads: ThreadPoolExecutor, rollouts: int, calls: int) -> Timed:
    """The same through a host, as many rollouts at once as there are threads."""
    found = Timed(0.0)

    def rollout(_: int) -> str:
        tools = timed(found.starts, lambda: host.open(TASK))
        for _ in range(calls):
            text: str = timed(found.calls, lambda: tools.call("take", ARGUMENTS))
        timed(found.ends, tools.close)
        return text

    started = time.perf_counter()
    texts = list(threads.map(rollout, range(rollouts)))
    found.seconds = time.perf_counter() - started
    assert set(texts) == {f'{{"sku": "sku-7", "left": {1_000_000 - 2 * calls}, "price": 2.5}}'}, texts[0]
    return found


def busy(host: ClassHost, threads: ThreadPoolExecutor, rollouts: int, calls: int, generation: float) -> float:
    """Share of a rollout server's time that tools leave to it, in [0, 1]."""
    started = time.perf_counter()

    def rollout(_: int) -> float:
        tools = host.open(TASK)
        for _ in range(calls):
            time.sleep(generation)
            tools.call("take", ARGUMENTS)
        tools.close()
        return calls * generation / (time.perf_counter() - started)

    return statistics.mean(threads.map(rollout, range(rollouts)))


def busy_after_pauses(
    host: ClassHost, threads: ThreadPoolExecutor, words: argparse.Namespace, generation: float
) -> float:
    """:func:`busy`, the median of three phases."""
    found = []
    for _ in range(3):
        time.sleep(words.pause)
        found.append(busy(host, threads, words.rollouts, words.calls, generation))
    return statistics.median(found)


def table(rounds: dict[str, list[Timed]], rollouts: int, calls: int) -> str:
    """One line a contestant. Each figure is the median over the rounds; of starts, calls and ends, of each round's
    median. "Wall a call" is a round's length over its calls.
    """
    head = "| | rollouts/s | range | start ms | call ms | end ms | wall a call, ms |\n|---|---|---|---|---|---|---|"
    lines = [head]
    for name, found in rounds.items():
        rates = sorted(rollouts / each.seconds for each in found)
        parts = [[getattr(each, part) for each in found] for part in ("starts", "calls", "ends")]
        shown = [f"{1e3 * middle(part):.3f}" for part in parts]
        wall = 1e3 * statistics.median(each.seconds for each in found) / (rollouts * calls)
        lines.append(
            f"| {name} | {statistics.median(rates):,.0f} | {rates[0]:,.0f}-{rates[-1]:,.0f} | {' | '.join(shown)} |"
            f" {wall:.3f} |"
        )
    return "\n".join(lines)


def middle(rounds: list[list[float]]) -> float:
    return statistics.median(statistics.median(values) if values else 0.0 for values in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--generation", type=float, nargs="+", default=[0.1, 0.5], help="seconds of a turn")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two phases of rollouts")
    words = parser.parse_args()
    count, calls = words.rollouts, words.calls
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(1) as one,
        ThreadPoolExecutor(count) as all_of_them,
    ):
        Path(folder).chmod(0o755)  # in the sandbox it is read under another user id
        file = Path(folder) / "bench_shop.py"
        file.write_text(SOURCE)
        file.chmod(0o644)
        reference = f"{file}:Shop"
        shop: type = load_plugin("bench", reference, {})
        hosts = {
            kind: ClassHost(reference, OwnConfig(tools=reference, workers=count, isolation=kind)) for kind in ISOLATION
        }
        contestants: dict[str, Callable[[], Timed]] = {
            "plain loop": lambda: plain(shop, count, calls),
        }
        for kind, host in hosts.items():
            contestants[f"{kind}, one at a time"] = partial(hosted, host, one, count, calls)
            contestants[f"{kind}, {count} at once"] = partial(hosted, host, all_of_them, count, calls)
        rounds: dict[str, list[Timed]] = {name: [] for name in contestants}
        for number in range(words.rounds + 1):  # the first warms up
            for name, contestant in contestants.items():
                found = contestant()
                if number:
                    rounds[name].append(found)
        shares = {
            (kind, seconds): busy_after_pauses(host, all_of_them, words, seconds)
            for kind, host in hosts.items()
            for seconds in words.generation
        }
        for host in hosts.values():
            host.close()
    print(
        f"{platform.machine()}, Python {platform.python_version()}, {count} rollouts of {calls} calls a round,"
        f" {words.rounds} interleaved rounds"
    )
    print(table(rounds, count, calls))
    for (kind, seconds), share in shares.items():
        print(f"busy, {kind}, {count} at once, {seconds:g} s of generation a turn: {share:.3f}")
    name = f"process, {count} at once"
    pairs = zip(rounds[name], rounds["plain loop"], strict=True)
    ratio = statistics.median(ours.seconds / plain_one.seconds for ours, plain_one in pairs)
    alone = middle([each.calls for each in rounds["process, one at a time"]])
    added = 1e3 * (alone - middle([each.calls for each in rounds["plain loop"]]))
    print(f"a call alone: {added:.3f} ms more than in the plain loop; {name}: {ratio:,.0f} times its time")


if __name__ == "__main__":
    command(main)
