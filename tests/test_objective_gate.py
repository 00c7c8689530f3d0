"""The gate: drawn from its key alone, the same in every process, with the right frequency and without a bias."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pact_nemo.objective.gate import anchored, uniform


def test_gate_is_a_function_of_its_key_with_the_right_frequency() -> None:
    # literal draws: a resumed run, another process or another platform must see these same ones
    assert [int(anchored(7, step, "multi_turn_base_3", 0.4)) for step in range(12)] == [
        0,
        1,
        0,
        0,
        1,
        1,
        0,
        0,
        1,
        0,
        0,
        1,
    ]
    share = np.mean([anchored(1, s, f"p{i}", 0.4) for s in range(40) for i in range(100)])
    assert abs(share - 0.4) < 4 * math.sqrt(0.24 / 4000)
    assert not any(anchored(1, s, "p", 0.0) for s in range(50)) and all(anchored(1, s, "p", 1.0) for s in range(50))
    assert len({tuple(anchored(seed, s, "p", 0.5) for s in range(30)) for seed in range(5)}) == 5


def test_gate_is_the_same_in_another_process_and_in_any_order() -> None:
    prompts = ("a", "multi_turn_base_12#3", "é\u2028", "1,2", "1")
    keys = [(seed, step, prompt) for seed in (0, 7) for step in (0, 1, 23) for prompt in prompts]
    here = [anchored(*key, 0.4) for key in keys]
    assert [anchored(*key, 0.4) for key in reversed(keys)] == here[::-1]
    code = f"from pact_nemo.objective.gate import anchored; print([anchored(*k, 0.4) for k in {keys!a}])"
    root = Path(__file__).resolve().parents[1]
    for hash_seed in ("1", "2"):
        environment = dict(os.environ, PYTHONHASHSEED=hash_seed)
        there = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=True
        )
        assert there.stdout == f"{here}\n"
    assert len({uniform("gate", *key) for key in keys}) == len(keys) and uniform("a", 1, 23) != uniform("a", 12, 3)
    with pytest.raises(ValueError, match="q=1.5"):
        anchored(0, 0, "p", 1.5)


def test_q_zero_is_never_even_for_the_smallest_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pact_nemo.objective.gate.uniform", lambda *key: 0.0)
    assert not anchored(0, 0, "p", 0.0) and anchored(0, 0, "p", 2**-53)


def test_the_gate_is_not_biased_along_steps_or_prompts() -> None:
    draws = np.array([[uniform("gate", 3, step, f"p{i}") for i in range(60)] for step in range(60)])
    assert 0.0 <= draws.min() and draws.max() < 1.0
    counts = np.histogram(draws, bins=10, range=(0, 1))[0]
    assert ((counts - 360) ** 2 / 360).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    for axis in (0, 1):
        assert np.abs(draws.mean(axis=axis) - 0.5).max() < 5 * math.sqrt(1 / 12 / 60)
