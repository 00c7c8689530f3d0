"""Rollouts on disk: what is written is read back; what isn't a rollout is refused by file, line and field."""

import json

import pytest

from pact_nemo.environments.base import Outcome, ToolCall
from pact_nemo.errors import DataError
from pact_nemo.rollouts.store import read_rollouts, write_rollouts
from pact_nemo.rollouts.types import Rollout, Turn


def rollout(sample=0):
    turns = [
        Turn(
            0,
            3,
            "[ls(a=True)]",
            [ToolCall("ls", {"a": True, "deep": {"x": [1, None, "é"]}})],
            ["bad"],
            ["out", "Error"],
            0,
            "stop",
        ),
        Turn(5, 6, "Done\u2028here.", [], [], [], 1, "length"),
    ]
    logprobs = [-0.1234567891234, -2.0, -1e-9, 0.0, 0.0, -3.5]
    return Rollout(
        "task_1",
        sample,
        [1, 2],
        [3, 4, 5, 6, 7, 8],
        [1, 1, 1, 0, 0, 1],
        logprobs,
        turns,
        Outcome(True, 0.5, "ok"),
        4,
        "ok",
        None,
        1.5,
    )


def test_round_trip(tmp_path):
    failed = Rollout("task_2", 1, [1], [], [], [], [], None, 4, "failed", "ServerError: gone")
    written = [rollout(), failed]
    write_rollouts(tmp_path / "r.jsonl", written)
    assert read_rollouts(tmp_path / "r.jsonl") == written


def test_a_writers_own_keys_are_left_out(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(rollout().to_dict() | {"rewards": [1.0], "task": {}}) + "\n")
    assert read_rollouts(path) == [rollout()]


def test_a_dump_without_visible_texts_gets_them_from_the_messages(tmp_path):
    thinking = rollout()
    thinking.turns[1] = Turn(5, 6, "<think>So?</think>\n\nDone.", [], [], [], 1, "stop")
    assert thinking.turns[1].visible == "Done."
    row = thinking.to_dict()
    for turn in row["turns"]:
        del turn["visible"]
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert read_rollouts(path) == [thinking] and Rollout.from_dict(row) == thinking
    path.write_text(json.dumps(row | {"turns": [row["turns"][0] | {"visible": 1}]}) + "\n")
    with pytest.raises(DataError, match="visible"):
        read_rollouts(path)


def test_nan_is_not_written(tmp_path):
    bad = rollout()
    bad.sampler_logprobs[0] = float("nan")
    with pytest.raises(ValueError):
        write_rollouts(tmp_path / "r.jsonl", [bad])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, field",
    [
        (lambda r: r.pop("token_ids"), "token_ids"),
        (lambda r: r.update(sample="0"), "sample"),
        (lambda r: r.update(sample=True), "sample"),
        (lambda r: r.update(status="fine"), "status"),
        (lambda r: r["loss_mask"].pop(), "loss_mask"),
        (lambda r: r["loss_mask"].__setitem__(0, 2), "loss_mask"),
        (lambda r: r["token_ids"].__setitem__(1, 1.5), "token_ids[1]"),
        (lambda r: r["sampler_logprobs"].__setitem__(1, None), "sampler_logprobs[1]"),
        (lambda r: r["turns"][1].update(end=99), "turns[1].end"),
        (lambda r: r["turns"][0]["calls"][0].pop("name"), "turns[0].calls[0].name"),
        (lambda r: r["turns"][0].update(observations=[1]), "turns[0].observations"),
        (lambda r: r["outcome"].update(success="yes"), "outcome.success"),
        (lambda r: r.update(turns={}), "turns"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, change, field):
    row = json.loads(json.dumps(rollout().to_dict()))
    change(row)
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(rollout().to_dict()) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        read_rollouts(path)
    assert (caught.value.file, caught.value.line, caught.value.field) == (str(path), 2, field)


def test_torn_and_absent_files(tmp_path):
    path = tmp_path / "r.jsonl"
    write_rollouts(path, [rollout(), rollout(1)])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="torn") as caught:
        read_rollouts(path)
    assert caught.value.line == 2
    with pytest.raises(DataError):
        read_rollouts(tmp_path / "none.jsonl")
