#!/usr/bin/env python
"""Writes talks.jsonl: 40 conversations in OpenAI format, and nothing else. Their requests are the tasks.

python examples/units/make_data.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from units import to_celsius, to_kilometres  # beside this file

HERE = Path(__file__).parent

SEED, COUNT = 3, 40


def conversation(number: int, random_: random.Random) -> dict:
    value = random_.randrange(20, 400)
    if number % 2:
        words, call, result = (
            f"How many kilometres are {value} miles?",
            ("to_kilometres", {"miles": value}),
            to_kilometres,
        )
    else:
        words, call, result = f"How warm is {value} F in Celsius?", ("to_celsius", {"fahrenheit": value}), to_celsius
    found = result(value)
    made = {"id": "call_1", "type": "function", "function": {"name": call[0], "arguments": json.dumps(call[1])}}
    messages = [
        {"role": "system", "content": "You convert units with your tools."},
        {"role": "user", "content": words},
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "call_1", "content": json.dumps(found)},
        {"role": "assistant", "content": f"{found}."},
    ]
    return {"messages": messages}


def main() -> None:
    random_ = random.Random(SEED)
    rows = [conversation(number, random_) for number in range(COUNT)]
    (HERE / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
