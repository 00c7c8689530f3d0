"""What the benches share: PACT batches (recorded or of given lengths), models of given shapes, interleaved timing, and
the report.

A recorded batch is what a finished run dumped (``runs/<run>/rollouts``): real tasks, traces and rollouts. A synthetic
one has real structure (``grow_tree`` and ``with_streams`` lay it out) and random tokens, so that lengths can be chosen.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from pact_nemo.batches.prompt_groups import Gate, PromptGroup, TraceUse, form_group
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config
from pact_nemo.environments.base import Outcome, Task
from pact_nemo.methods.registry import make_method
from pact_nemo.objective.components import CALL, OTHER, REASONING
from pact_nemo.planning.workload import Lengths
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.rollouts.types import Rollout, Turn
from pact_nemo.runtime.collective import on_rank_zero, rank
from pact_nemo.traces.spans import TraceTokens
from pact_nemo.training.collect import groups_of_step
from pact_nemo.training.open_run import open_run
from pact_nemo.training.run import TrainingRun, trace_schedule
from pact_nemo.training.state import new_state
from pact_nemo.training.stopwatch import Stopwatch
from pact_nemo.training.update import update

BOUNDARY = 8  #: tokens of the turn between h* and tau in synthetic batches


# ----------------------------------------------------------------------------------------------------------------------


def recorded_groups(
    run: Path, steps: list[int], *, method: str | None = None, words: list[str] | None = None
) -> tuple[Config, list[list[PromptGroup]]]:
    """The prompt groups of a finished run's dumped steps, formed by the run's method or by another one.

    Returns:
        the run's config with ``method``, and per step its groups.
    """
    with tempfile.TemporaryDirectory() as folder:
        extra = [f"method={method}"] if method is not None else []
        extra += [
            f"trainer.replay={run.resolve()}",
            f"run.root={folder}",
            "trainer.dump_rollouts=false",
            "objective.kl_coef=0",
            *(words or []),
        ]
        config = load_config(run / "config.yaml", extra)
        found = []
        with open_run(config, None) as opened:
            for step in steps:
                opened.state.step = step
                found.append(groups_of_step(opened)[0])
        kl = load_config(run / "config.yaml", words).objective.kl_coef
    return replace(config, objective=replace(config.objective, kl_coef=kl)), found


def synthetic_groups(
    config: Config, lengths: Lengths, prompts: int, *, vocabulary: int, seed: int = 0, spread: float = 0.0
) -> list[PromptGroup]:
    """Groups of random tokens and rewards.

    Args:
        config: ``objective`` decides the method, K and the gate.
        lengths: mean lengths; responses alternate between two turns of the policy and an observation.
        spread: lengths of responses vary evenly by this share of the mean to either side.
        seed: of tokens, lengths and rewards.
    """
    random = np.random.default_rng(seed)

    def tokens(count: int) -> list[int]:
        return [int(token) for token in random.integers(10, vocabulary, count)]

    groups = []
    method, gate = make_method(config), Gate(seed, 0, config.objective.anchor_prob)
    for index in range(prompts):
        prompt_ids, rollouts = tokens(lengths.prompt), []
        for k in range(config.objective.group_size):
            size = max(4, round(lengths.response * (1 + spread * random.uniform(-1, 1))))
            written = max(2, round(size * lengths.policy_share))
            first = written // 2
            mask = [1] * first + [0] * (size - written) + [1] * (written - first)
            turns = [Turn(0, first, "", observations=[""]), Turn(size - (written - first), size, "")]
            score = float(random.integers(0, 2)) if k > 1 else float(k)  # never all alike
            outcome = Outcome(score == 1.0, score)
            rollouts.append(
                Rollout(
                    f"bench_{index}", k, prompt_ids, tokens(size), mask, [-1.0 * m for m in mask], turns, outcome, 0
                )
            )
        task = Task(f"bench_{index}", f"bench_{index}", "bench", (), (), ())
        trace = synthetic_trace(tokens(lengths.trace)) if lengths.trace and method.uses_traces else None
        groups.append(form_group(task, rollouts, TraceUse(trace), method, gate))
    return groups


def synthetic_trace(token_ids: list[int]) -> TraceTokens:
    """Half reasoning of the lowest level, a third calls, the rest observations; one turn."""
    size = len(token_ids)
    reasoning, calls = size // 2, size // 3
    component = [int(REASONING)] * reasoning + [int(CALL)] * calls + [int(OTHER)] * (size - reasoning - calls)
    level = [0 if c == REASONING else -1 for c in component]
    return TraceTokens(token_ids, component, level, [0] * size, [size])


def stand_in(config: Config, policy: MegatronPolicy) -> TrainingRun:
    """What :func:`pact_nemo.training.update.update` reads of a run, without a run folder, server or dataset."""
    state = new_state(config)
    found = SimpleNamespace(
        config=config,
        policy=policy,
        method=make_method(config),
        boundary_ids=[5] * BOUNDARY,
        schedule=trace_schedule(config, state.clock),
        state=state,
        progress=_Quiet(),
    )
    return cast(TrainingRun, found)


def still_policy(config: Config, model: Path) -> MegatronPolicy:
    """A policy whose weights no step changes (its learning rate is 0), with itself as the reference if there is a KL
    term.
    """
    policy = MegatronPolicy(config.policy, replace(config.optimizer, lr=0.0), model, seed=0, total_steps=1)
    if config.objective.kl_coef > 0:
        policy.load_reference(model)
    return policy


class _Quiet:
    """A progress display that shows nothing."""

    @contextmanager
    def phase(self, name: str, *, brief: bool = False) -> Iterator[None]:
        yield


def timed_step(run: TrainingRun, groups: list[PromptGroup]) -> dict[str, float]:
    """One step from finished rollouts to new weights: seconds of ``score``, ``update`` and ``total``, and ``tokens`` of
    the update.
    """
    watch = Stopwatch(run.progress)
    record = update(run, groups, watch)
    times = {key.removeprefix("time/"): value for key, value in watch.times.items()}
    return times | {"total": watch.total(), "tokens": float(record.get("tokens/trained", 0.0))}


# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama.

    Attributes:
        hidden, ffn: numbers of a token between layers, and within the feed-forward.
        layers, heads, kv_heads: how many; ``kv_heads`` of each layer's ``heads`` have keys and values of their own.
        vocabulary: rows of the embedding.
        tied: the output matrix is the embedding.
        positions: tokens of the longest sequence.
    """

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    positions: int = 65536


def random_llama(folder: Path, size: LlamaShape, *, dtype: str = "float32", tokenizer: Path | None = None) -> Path:
    """An untrained Llama as a Hugging Face folder; with the tokenizer files of another folder where a server needs
    some.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.positions,
        tie_word_embeddings=size.tied,
        dtype=dtype,
    )
    AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype)).save_pretrained(folder)
    for path in tokenizer.glob("tokenizer*") if tokenizer is not None else ():
        shutil.copy(path, folder)
    return folder


# ----------------------------------------------------------------------------------------------------------------------


def interleaved(rounds: int, contestants: Mapping[str, Callable[[], Any]], *, warm_up: int = 1) -> dict[str, list[Any]]:
    """What each contestant returned in each round. The order turns by one every round, so that none is always first;
    warm-up rounds are dropped.
    """
    names = list(contestants)
    found: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            value = contestants[name]()
            if number >= warm_up:
                found[name].append(value)
        print(
            f"round {number + 1 - warm_up} of {rounds}" if number >= warm_up else "warm-up", file=sys.stderr, flush=True
        )
    return found


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_ratio(top: list[float], bottom: list[float]) -> tuple[float, list[float]]:
    """Median of the rounds' own ratios (other work on the machine slows whole rounds), and their smallest and
    largest.
    """
    ratios = [a / b for a, b in zip(top, bottom, strict=True)]
    return statistics.median(ratios), [min(ratios), max(ratios)]


class PeakMemory:
    """Largest resident set of this process above that at the start, in bytes, sampled every millisecond; CUDA's own
    counter with a GPU.
    """

    def __enter__(self) -> PeakMemory:
        self._stop = threading.Event()
        self._start = self._peak = _resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self._peak = max(self._peak, _resident())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, _resident())

    @property
    def bytes(self) -> int:
        return self._peak - self._start


def _resident() -> int:
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ----------------------------------------------------------------------------------------------------------------------


def report(options: Namespace, title: str, rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """Print a small table and then every entry of ``result`` but lists, the ratio and its goal last; with ``--json``
    ``result`` as one object.

    ``result`` has ``ratio`` and ``goal``, a text such as ``<= 1.35``."""
    if rank() != 0:
        return
    if options.json:
        print(json.dumps({**result, "rows": list(rows)}))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    table = Table(title=title, title_justify="left")
    for column in rows[0] if rows else ():
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{value:,.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    for name, value in result.items():
        if name not in ("ratio", "goal") and not isinstance(value, list | dict):
            print(f"{name}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value}")
    if "ratio" in result:
        print(f"ratio {result['ratio']:.3f}, goal {result['goal']}")


@contextmanager
def scratch(folder: Path, name: str) -> Iterator[Path]:
    """A temporary folder that every rank knows, removed at the end."""

    def make() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=f"bench-{name}-", dir=folder)

    path = Path(on_rank_zero(make)).resolve()
    try:
        yield path
    finally:
        if rank() == 0:
            shutil.rmtree(path, ignore_errors=True)
