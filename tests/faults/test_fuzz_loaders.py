"""No input, however broken, gets past a loader half parsed or stops it with anything but the typed error that names
place and remedy.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import tally
from tests.faults.fuzzing import Findings, fuzz
from tests.faults.targets import scratch, targets

TARGETS = targets()
SHORT = 60  # inputs each in the normal suite


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of bad rows are logged; pytest would keep every record."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    place = scratch(tmp_path)
    yield place
    shutil.rmtree(place, ignore_errors=True)


def run(name: str, folder: Path, inputs: int, seed: int) -> Findings:
    target = TARGETS[name]
    function, corpus = target.make(folder)
    found = fuzz(function, corpus, target.modules, target.refusals, inputs=inputs, seed=seed)
    assert not found.crashes, f"{found.crashed} of {found.inputs} inputs crashed {name}:\n{found.say()}"
    assert found.slowest < target.hang_s, f"an input kept {name} busy for {found.slowest:.1f} s: {found.slow[:600]!r}"
    assert found.reached > 0
    if target.refusals:
        assert found.refused > 0, "no mutation was bad enough to prove anything"
    return found


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_some_hundred_broken_inputs(name: str, folder: Path) -> None:
    run(name, folder, SHORT, seed=1)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_ten_thousand_broken_inputs(name: str, folder: Path) -> None:
    inputs = int(os.environ.get("PACT_FUZZ_INPUTS", TARGETS[name].long))
    found = run(name, folder, inputs, seed=int(os.environ.get("PACT_FUZZ_SEED", "2")))
    print(
        f"{name}: {found.inputs} inputs, {found.accepted} accepted, {found.refused} refused, "
        f"{found.reached} lines or arcs, slowest {found.slowest:.2f} s"
    )
    tally.record(
        f"bad data: {name}", injected=found.inputs, survived=found.accepted + found.refused, lost=found.crashed
    )
