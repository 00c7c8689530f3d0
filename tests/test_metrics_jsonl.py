"""metrics.jsonl: what is written, what a resume keeps, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.errors import DataError, NumericsError
from pact_nemo.tracking.jsonl import MetricsLog, read_metrics


def record(stage: str, step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "stage": stage, "loss/total": step / 10, **values}


def fill(folder: Path, resume_from: tuple[int, int] | None, records: list[dict[str, Any]]) -> None:
    with MetricsLog(folder, resume_from=resume_from) as log:
        for row in records:
            log.append(row)


def test_records_come_back_as_written_with_gaps(tmp_path: Path) -> None:
    rows = [
        record("warmup", 1),
        record("rl", 1, **{"latent/gap_success": None}),
        record("rl", 2, **{"latent/gap_success": 0.5}),
    ]
    fill(tmp_path, None, rows)
    assert read_metrics(tmp_path) == rows


def test_each_line_is_on_disk_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, resume_from=None) as log:
        log.append(record("rl", 1))
        assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_resume_drops_what_the_checkpoint_does_not_know_in_each_stage(tmp_path: Path) -> None:
    fill(
        tmp_path,
        None,
        [*(record("warmup", step) for step in range(1, 6)), *(record("rl", step) for step in range(1, 5))],
    )
    fill(tmp_path, (5, 2), [record("rl", 3, **{"loss/total": 9.0})])
    assert [(r["stage"], r["step"]) for r in read_metrics(tmp_path)] == [("warmup", s) for s in range(1, 6)] + [
        ("rl", s) for s in (1, 2, 3)
    ]


def test_a_torn_last_line_is_left_out_and_overwritten_on_resume(tmp_path: Path) -> None:
    fill(tmp_path, None, [record("rl", 1), record("rl", 2)])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "stage": "r')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    fill(tmp_path, (0, 2), [record("rl", 3)])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("{broken", None),
        ("[1]", None),
        ('{"step": 1}', "stage"),
        ('{"stage": "rl"}', "step"),
        ('{"stage": "rl", "step": true}', "step"),
    ],
)
def test_another_malformed_line_is_refused_and_the_file_left_alone(
    tmp_path: Path, line: str, field: str | None
) -> None:
    fill(tmp_path, None, [record("rl", 1)])
    path = tmp_path / "metrics.jsonl"
    text = path.read_text() + line + "\n" + json.dumps(record("rl", 2)) + "\n"
    path.write_text(text)
    with pytest.raises(DataError, match="metrics.jsonl:2") as caught:
        MetricsLog(tmp_path, resume_from=(0, 2))
    assert (caught.value.line, caught.value.field) == (2, field)
    assert path.read_text() == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_name_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    with MetricsLog(tmp_path, resume_from=None) as log:
        with pytest.raises(NumericsError, match="policy/grad_norm"):
            log.append(record("rl", 1, **{"policy/grad_norm": value}))
    assert read_metrics(tmp_path) == []


def test_a_folder_without_metrics_is_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
