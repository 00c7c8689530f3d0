#!/usr/bin/env python
"""Writes tasks.jsonl and traces.jsonl of the shop: 40 requests, and a conversation in OpenAI format for each.

    python examples/shop/make_data.py

Every third request asks for a price and has an answer. The others are orders, judged by the shop's state.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
SEED, COUNT = 5, 40


def task_of(number: int, random_: random.Random) -> dict:
    """One request with the stock that it starts from."""
    skus = [f"{letter}{random_.randrange(10, 99)}" for letter in random_.sample("ABCDEFGH", 3)]
    stock = {sku: {"price": random_.randrange(3, 60), "count": random_.randrange(4, 9)} for sku in skus}
    sku, count = random_.choice(skus), random_.randrange(1, 4)
    row = {"id": f"shop_{number}", "info": {"stock": stock}}
    if number % 3 == 0:
        return {**row, "question": f"What does article {sku} cost?", "answer": str(stock[sku]["price"])}
    call = {"name": "order", "arguments": {"sku": sku, "count": count}}
    return {**row, "question": f"Please order {count} of article {sku}.", "expected_calls": [call]}


def conversation_of(task: dict) -> dict:
    """What an expert did, as an OpenAI-compatible server logs it."""
    if "answer" in task:
        sku = task["question"].split()[3]
        name, arguments = "lookup", {"sku": sku}
        observation = json.dumps(task["info"]["stock"][sku])
        closing = f"It costs {task['answer']}."
    else:
        name, arguments = task["expected_calls"][0]["name"], task["expected_calls"][0]["arguments"]
        observation = f"ordered {arguments['count']} of {arguments['sku']}"
        closing = "Done."
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    messages = [
        {"role": "user", "content": task["question"]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": observation},
        {"role": "assistant", "content": closing},
    ]
    return {"task_id": task["id"], "messages": messages}


def main() -> None:
    random_ = random.Random(SEED)
    tasks = [task_of(number, random_) for number in range(COUNT)]
    for name, rows in (("tasks", tasks), ("traces", map(conversation_of, tasks))):
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
