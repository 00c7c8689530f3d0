"""The ``rollouts`` bench's arithmetic on a phase whose shares are known."""

from __future__ import annotations

import pytest

from tools.benches.rollouts import choose
from tools.benches.rollouts_watch import Record, analyse, gauge

METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="policy"} 3.0
vllm:num_requests_running{engine="1",model_name="policy"} 1.0
vllm:num_requests_waiting{engine="0",model_name="policy"} 7.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="policy",reason="capacity"} 6.0
"""


def test_gauges_are_summed_over_engines_and_no_other_is_taken_for_them() -> None:
    assert gauge(METRICS, "vllm:num_requests_running") == 4.0
    assert gauge(METRICS, "vllm:num_requests_waiting") == 7.0


def phase() -> Record:
    """Ten episodes, two slots. 0..1: one request; 1..9: two; from 5 to 6 one of them is with its tool instead; 9..10:
    one, the last tenth.
    """
    record = Record(start=0.0)
    record.requests = [(0.0, 10.0), (1.0, 5.0), (6.0, 9.0)]
    record.code["environment"] = [(5.0, 6.0), (3.0, 4.0)]  # the second is hidden: both slots are asked for meanwhile
    record.ended = [2.0] * 8 + [9.0, 10.0]
    record.samples = [(0.0, 1.0, 0.0), (1.0, 2.0, 0.0), (5.0, 1.0, 0.0), (6.0, 2.0, 0.0), (9.0, 1.0, 0.0)]
    return record


def test_shares_of_a_known_phase() -> None:
    found = analyse(phase(), limit=2, concurrency=2, episodes=10)
    assert found["phase s"] == 10.0
    assert found["busy"] == pytest.approx(
        15 / 16
    )  # from 1, when both slots are taken, to 9, when nine of ten have ended
    assert found["busy from 0"] == pytest.approx(16 / 18)
    assert found["before drain"] == pytest.approx(15 / 16)  # with 9 ended one episode is left for two slots
    assert found["asked"] == pytest.approx(15 / 16)
    assert found["environment s"] == pytest.approx(2.0) and found["tokens s"] == 0.0
    assert found["not hidden"] == pytest.approx(0.1)


def test_slots_without_open_episodes_are_not_asked_to_be_filled() -> None:
    record = phase()
    record.code["environment"] = [(9.0, 10.0)]  # one episode is left and its request is under way
    assert analyse(record, limit=2, concurrency=2, episodes=10)["not hidden"] == 0.0


def test_the_fewest_open_episodes_that_do_are_chosen() -> None:
    rows = [
        {"concurrency": 32.0, "busy": 0.95},
        {"concurrency": 16.0, "busy": 0.7},
        {"concurrency": 24.0, "busy": 0.85},
    ]
    assert choose(rows)["concurrency"] == 24.0
    assert choose(rows[1:2])["busy"] == 0.7
