#!/usr/bin/env python
"""Writes tasks.jsonl and traces.jsonl for an MCP server: 40 questions about the time elsewhere, and conversations.

    python examples/clock/make_data.py

The server is ``mcp-server-time``. The zones have no summer time, so an answer is right all year.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
SEED, COUNT = 11, 40
ZONES = {  # minutes ahead of UTC
    "Asia/Tokyo": 540,
    "Asia/Singapore": 480,
    "Asia/Kolkata": 330,
    "Asia/Dubai": 240,
    "Africa/Lagos": 60,
    "America/Bogota": -300,
    "America/Phoenix": -420,
}
DAY = "2026-11-27"


def clock(minutes: int) -> str:
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


def row_of(number: int, random_: random.Random) -> tuple[dict, dict]:
    """A task, and what an expert did."""
    here, there = random_.sample(list(ZONES), 2)
    start = 60 * random_.randrange(8, 15)
    answer = clock(start + ZONES[there] - ZONES[here])
    task = {"id": f"clock_{number}", "question": f"It is {clock(start)} in {here}. What time is it in {there}?"}
    call = {"source_timezone": here, "time": clock(start), "target_timezone": there}
    seen = {"target": {"timezone": there, "datetime": f"{DAY}T{answer}:00"}}
    made = {"id": "call_1", "type": "function", "function": {"name": "convert_time", "arguments": json.dumps(call)}}
    messages = [
        {"role": "user", "content": task["question"]},
        {"role": "assistant", "content": "I convert the time.", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "call_1", "content": json.dumps(seen)},
        {"role": "assistant", "content": f"It is {answer} there."},
    ]
    return {**task, "answer": answer}, {"task_id": task["id"], "messages": messages}


def main() -> None:
    random_ = random.Random(SEED)
    rows = [row_of(number, random_) for number in range(COUNT)]
    for name, part in (("tasks", 0), ("traces", 1)):
        text = "".join(json.dumps(row[part]) + "\n" for row in rows)
        (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
