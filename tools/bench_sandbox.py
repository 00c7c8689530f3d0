#!/usr/bin/env python
"""Calls per second of the sandbox against plain ``exec`` in this process, at 1 and 8 workers, interleaved, medians.

    python tools/bench_sandbox.py --rounds 7 --calls 200

A figure is calls per second; the ratio is sandbox over exec.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.runtime.terminal import command
from pact_nemo.sandbox import Sandbox

SOURCE = """
def find(place, kind="capital", limit=5):
    rows = [{"place": "France", "capital": "Paris"}, {"place": "Peru", "capital": "Lima"}]
    found = [row[kind] for row in rows if row["place"] == place]
    return {"results": found[:limit]} if found else {"error": "nothing found"}
print(find("France"))
"""


def plain(calls: int) -> float:
    """Seconds of ``calls`` calls with nothing between them and this process."""
    started = time.perf_counter()
    for _ in range(calls):
        namespace: dict[str, object] = {"print": lambda *words: None}
        exec(compile(SOURCE, "<tool>", "exec"), namespace)
        namespace["find"](place="Peru")  # type: ignore[operator]
    return time.perf_counter() - started


def sandboxed(box: Sandbox, threads: ThreadPoolExecutor, calls: int) -> float:
    """Seconds of ``calls`` calls from as many threads as the sandbox has workers."""
    started = time.perf_counter()
    results = list(threads.map(lambda _: box.call(SOURCE, "find", {"place": "Peru"}), range(calls)))
    seconds = time.perf_counter() - started
    assert all(result.text == '{"results": ["Lima"]}' for result in results), results[0]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=200)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"plain exec": [], "sandbox, 1 worker": [], "sandbox, 8 workers": []}
    with Sandbox(1) as one, Sandbox(8) as eight, ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(8) as threads:
        for _ in range(arguments.rounds):
            seconds["plain exec"].append(plain(arguments.calls))
            seconds["sandbox, 1 worker"].append(sandboxed(one, thread, arguments.calls))
            seconds["sandbox, 8 workers"].append(sandboxed(eight, threads, arguments.calls))
        enforced = one.enforced()
    print(
        f"{platform.machine()}, Python {platform.python_version()}, {arguments.calls} calls a round, {arguments.rounds}"
        " interleaved rounds"
    )
    print("enforced: " + ", ".join(name for name, on in enforced.items() if on))
    print("| | calls/s (median) | range |\n|---|---|---|")
    for name, values in seconds.items():
        rates = sorted(arguments.calls / value for value in values)
        print(f"| {name} | {statistics.median(rates):,.0f} | {rates[0]:,.0f}-{rates[-1]:,.0f} |")


if __name__ == "__main__":
    command(main)
