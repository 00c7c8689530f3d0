"""Rehearsing from outside: a process for all cases that use the same layers, and what it found as text."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from pact_nemo import checkout
from pact_nemo.planning.memory import GIB
from pact_nemo.rehearsal.case import Case, Outcome, Phase
from pact_nemo.rehearsal.guard import build_guard

MODULE = "pact_nemo.rehearsal.rank"


def rehearse(cases: Sequence[Case]) -> list[Outcome]:
    """Every case's outcome, in order. They run one after another, in a process with Transformer Engine's stand-in and
    one without.

    Raises:
        MissingDependency: there is no C++ compiler.
        RuntimeError: a process ended before it had played its cases.
    """
    found: dict[int, Outcome] = {}
    for engine in (False, True):
        wanted = [index for index, case in enumerate(cases) if case.transformer_engine is engine]
        if wanted:
            found |= zip(wanted, _run([cases[index] for index in wanted], engine), strict=True)
    return [found[index] for index in range(len(cases))]


def _run(cases: list[Case], engine: bool) -> list[Outcome]:
    paths = [str(checkout.ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {
        # a launcher's own variables would make it a rank of that job
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "CUDA_VISIBLE_DEVICES": "",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, "-m", MODULE, str(build_guard()), *(["--transformer-engine"] if engine else [])]
    words = json.dumps([dataclasses.asdict(case) for case in cases])
    done = subprocess.run(command, input=words, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != len(cases):
        raise RuntimeError(f"the rehearsal's process ended with {done.returncode}: {done.stderr[-2000:]}")
    return [_outcome(json.loads(line), case) for line, case in zip(lines, cases, strict=True)]


def _outcome(found: dict[str, object], case: Case) -> Outcome:
    phases = tuple(Phase(**phase) for phase in found.pop("phases"))  # type: ignore[attr-defined]
    return Outcome(**{**found, "case": case, "phases": phases, "modules": tuple(found["modules"])})  # type: ignore[arg-type]


def describe(outcome: Outcome) -> list[str]:
    """An outcome as lines of text."""
    case = outcome.case
    engine = "Transformer Engine's layers" if case.transformer_engine else "local layers"
    lines = [f"{case.recipe}, pipeline stage {case.stage}, {engine}"]
    if outcome.fault:
        return [*lines, *(f"  {line}" for line in outcome.fault.rstrip().splitlines())]
    lines[0] += f": {outcome.parameters / 1e6:,.0f} M parameters, {outcome.rows} rows of {outcome.row_tokens:,} tokens"
    for phase in outcome.phases:
        beside, eight = "", f"; {100 * phase.in_fp8:.0f} % of the products in FP8" if phase.in_fp8 else ""
        if phase.planned is not None:
            beside = f", planned {phase.planned / GIB:.2f} ({100 * (phase.planned / phase.peak - 1):+.1f} %)"
        lines.append(f"  {phase.name:<20}{phase.peak / GIB:8.2f} GiB{beside}; {phase.operations:,} operations{eight}")
    lines.append(f"  {sum(outcome.reads.values()):,} numbers read back to the host in an update")
    lines += [f"    {count:6,}  {line}" for line, count in outcome.reads.items()]
    return lines
