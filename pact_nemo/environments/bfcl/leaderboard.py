"""Score files as bfcl-eval writes them, in the layout of its leaderboard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pact_nemo.environments.base import Task
from pact_nemo.runtime.files import write_text_atomic


def write_score_files(
    folder: Path, name: str, tasks: Sequence[Task], verdicts: Mapping[str, tuple[bool, str | None]]
) -> None:
    """``score/<model>/<group>/BFCL_v4_<category>_score.json``, e.g. of ``multi_turn``: the header line and one line per
    failed task. A category that bfcl-eval doesn't have (the training kinds of memory) gets no file.

    Args:
        folder: the files lie below it.
        name: of the model.
        tasks: every task that was played.
        verdicts: task id -> (passed, error type).
    """
    from bfcl_eval.constants.category_mapping import ALL_SCORING_CATEGORIES
    from bfcl_eval.utils import get_directory_structure_by_category, get_file_name_by_category

    for category in sorted({task.category for task in tasks} & set(ALL_SCORING_CATEGORIES)):
        rows = [(task.id, *verdicts[task.id]) for task in tasks if task.category == category]
        good = sum(passed for _, passed, _ in rows)
        lines: list[dict[str, Any]] = [{"accuracy": good / len(rows), "correct_count": good, "total_count": len(rows)}]
        lines += [
            {
                "id": task_id,
                "model_name": name,
                "test_category": category,
                "valid": False,
                "error": {"error_type": reason},
            }
            for task_id, passed, reason in rows
            if not passed
        ]
        path = folder / "score" / name.replace("/", "_") / get_directory_structure_by_category(category)
        write_text_atomic(
            path / get_file_name_by_category(category, is_score_file=True),
            "".join(json.dumps(line) + "\n" for line in lines),
        )
