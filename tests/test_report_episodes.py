"""How the page shows one episode or trace: its messages in parts, its turns, its verdict."""

from __future__ import annotations

import pytest
from fixtures.run_folders import episode, trace

from pact_nemo.report.episodes import parts_of, view_episode, view_trace


def test_messages_are_split_where_the_tool_format_splits_them() -> None:
    text = "I look first.\n[cat(file_name='a')]"
    turn = {"text": text, "calls": [{"name": "cat", "arguments": {"file_name": "a"}}], "call_errors": []}
    assert [(p.kind, p.text) for p in parts_of(turn, "pythonic")] == [
        ("reasoning", "I look first."),
        ("call", "[cat(file_name='a')]"),
    ]
    assert [p.kind for p in parts_of(turn | {"calls": [], "call_errors": ["bad"]}, "pythonic")] == [
        "reasoning",
        "error",
    ]
    assert [p.kind for p in parts_of(turn | {"calls": []}, "pythonic")] == ["answer"]
    hermes = 'Think.\n<tool_call>\n{"name": "cat", "arguments": {}}\n</tool_call>'
    assert [p.text for p in parts_of(turn | {"text": hermes}, "hermes")] == ["Think.", hermes.partition("\n")[2]]
    assert [p.kind for p in parts_of(turn, "a format of tomorrow")] == ["call"]


def test_turns_show_reward_advantage_and_the_users_later_words() -> None:
    row = episode(0, success=True, advantages=[0.5, -1.25])
    row["task"]["user_turns"].append([{"role": "user", "content": "Now sort it."}])
    row["turns"][1]["user_turn"] = 1
    view = view_episode(row, "after", "after RL", "pythonic")
    assert [(t.reward, t.advantage) for t in view.turns] == [("+1", "+0.5"), ("+1", "-1.25")]
    assert [t.messages for t in view.turns] == [[], [("user", "Now sort it.")]]
    assert view.verdict == "passed" and view.reward == "2"


def test_the_words_of_a_simulated_user_are_shown() -> None:
    """The task doesn't know them; the rollout does."""
    row = episode(0, success=True)
    row["turns"][0]["reply"] = [{"role": "user", "content": "And sort it."}]
    row["turns"][1]["user_turn"] = 1
    view = view_episode(row, "training", "sample 0", "pythonic")
    assert view.turns[0].messages == [] and view.turns[1].messages == [("user", "And sort it.")]


@pytest.mark.parametrize(
    ("status", "outcome", "verdict"),
    [
        ("failed", None, "failed to run"),
        ("truncated", False, "cut off"),
        ("truncated", True, "passed, cut off"),
        ("ok", False, "not passed"),
    ],
)
def test_verdicts_tell_whose_fault_it_was(status: str, outcome: bool | None, verdict: str) -> None:
    row = episode(0, success=bool(outcome)) | {"status": status}
    row["outcome"] = None if outcome is None else row["outcome"]
    assert view_episode(row, "after", "after", "pythonic").verdict == verdict


def test_trace_segments_carry_type_and_level() -> None:
    parts = view_trace(trace(0)).turns[0].parts
    assert [(p.kind, p.label) for p in parts] == [
        ("L1", "tool selection · L1"),
        ("L3", "required arg grounding · L3"),
        ("none", "explicit call preview"),
        ("call", ""),
    ]
