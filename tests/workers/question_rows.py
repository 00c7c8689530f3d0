"""Rows of FTRL and ToolHop as published, with two tools that run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FIND = "def find(place):\n    return {'capital': {'France': 'Paris', 'Peru': 'Lima'}.get(place, 'unknown')}\n"
POP = (
    "def population(city, year=2020):\n    if city == 'Paris': return 'about 2,161,000 people'\n    raise"
    " KeyError(city)\n"
)


def function(name: str, **properties: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties)[:1],
    }
    return {"type": "function", "function": {"name": name, "description": f"{name} it", "parameters": schema}}


def ftrl_row(**changes: Any) -> dict[str, Any]:
    row = {
        "messages": [{"role": "user", "content": "Question: how many people live in the capital of France?"}],
        "tools": json.dumps([function("find", place="string"), function("population", city="string", year="integer")]),
        "codes": json.dumps({"find": FIND, "population": POP}),
        "unsolved_set": json.dumps({"find": ["Paris", "Lima"], "population": ["2161000"]}),
        "solve_rate": 0.0,
        "data_source": "self/multi_hop",
        "split": "test",
        "answer": "2161000",
    }
    return row | changes


def toolhop_row(**changes: Any) -> dict[str, Any]:
    row = {
        "id": 7,
        "question": "How many people live in the capital of France?",
        "answer": "2161000",
        "answer_type": "number",
        "sub_task": {"What is the capital of France?": "Paris", "How many people live in Paris?": "2161000"},
        "tools": {
            "What is the capital of France?": function("find", place="string")["function"],
            "How many people live in Paris?": function("population", city="string")["function"],
        },
        "functions": [FIND, POP],
    }
    return row | changes


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
