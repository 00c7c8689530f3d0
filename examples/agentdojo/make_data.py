#!/usr/bin/env python
"""Writes the user tasks of an AgentDojo suite, and its own solutions as conversations in OpenAI's format.

    python examples/agentdojo/make_data.py banking data      # data/banking-tasks.jsonl, data/banking-traces.jsonl

A solution that AgentDojo's own checker does not accept is left out by name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent


def suites() -> Any:
    """The module beside this file."""
    spec = importlib.util.spec_from_file_location("agentdojo_suites", HERE / "suites.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def solved(shop: type, name: str) -> tuple[dict, dict | None]:
    """The row of a user task, and the conversation of its solution; None where it does not solve it."""
    task = shop.suite.user_tasks[name]
    row = {"id": name, "question": task.PROMPT, "info": {"user_task": name}}
    episode = shop(row)
    messages: list[dict] = [{"role": "user", "content": task.PROMPT}]
    calls = []
    for index, call in enumerate(task.ground_truth(episode._before)):
        arguments = json.loads(json.dumps(dict(call.args), default=str))
        try:
            text = getattr(episode, call.function)(**arguments)
        except Exception as error:
            print(f"{name}: {call.function}: {type(error).__name__}: {error}")
            return row, None
        shown = {"name": call.function, "arguments": json.dumps(arguments)}
        messages.append({"role": "assistant", "content": None, "tool_calls": [_call(index, shown)]})
        messages.append({"role": "tool", "tool_call_id": f"call_{index}", "content": text})
        calls.append({"name": call.function, "arguments": arguments})
    answer = task.GROUND_TRUTH_OUTPUT or "Done."
    messages.append({"role": "assistant", "content": answer})
    if not calls or episode.score(SimpleNamespace(answer=answer, calls=calls)) < 1.0:
        print(f"{name}: its solution is {'no call' if not calls else 'not accepted by its own checker'}; left out")
        return row, None
    return row, {"task_id": name, "messages": messages}


def _call(index: int, function: dict) -> dict:
    return {"id": f"call_{index}", "type": "function", "function": function}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=["banking", "slack", "travel", "workspace"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    shop = getattr(suites(), options.suite.title())
    pairs = [solved(shop, name) for name in shop.suite.user_tasks]
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = {"tasks": [row for row, _ in pairs], "traces": [trace for _, trace in pairs if trace is not None]}
    for kind, found in rows.items():
        path = options.folder / f"{options.suite}-{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        print(f"{path}: {len(found)}")


if __name__ == "__main__":
    main()
