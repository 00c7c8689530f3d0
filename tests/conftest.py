"""Order of the tests: files that take minutes first, so that no process is left alone with one of them at the end.
And the code that is tested: this checkout's, in the tests' processes as well.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")))
)

#: files of more than half a minute on two cores, the longest first; a file that is not named here only comes later
LONG = (
    "test_training_runs",
    "test_tracking_run",
    "test_rollouts_server",
    "test_policy_parallel",
    "test_checkpoints_resume",
    "test_policy_export_parallel",
    "test_question_runs",
    "test_planning_activations",
    "test_output_lost",
    "test_traces_spans",
    "test_saves",
    "test_training_fast_paths",
    "test_planning_timing",
    "test_tracking",
    "test_hangs",
    "test_policy_model_folder",
    "test_benches",
    "test_terminal",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
