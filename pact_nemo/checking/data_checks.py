"""Rows, tools and lengths: what can be told without an episode."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checking.findings import Finding, Level
from pact_nemo.checking.plays import Expert, Play
from pact_nemo.config.schema import Config
from pact_nemo.data.tasks import prompt_length
from pact_nemo.environments.base import Environment, Task
from pact_nemo.environments.sessions import CUT, shown_to_policy
from pact_nemo.errors import DataError
from pact_nemo.objective.components import Component
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.traces.closings import with_closings
from pact_nemo.traces.schema import Trace
from pact_nemo.traces.spans import TraceTokens, encode_trace


def row_findings(quarantine: Quarantine) -> list[Finding]:
    """Rows of either file that can't be read."""
    found = []
    for row in quarantine.rows:
        where = ":".join(str(part) for part in (row.error.file, row.error.line) if part is not None)
        text = str(row.error)
        found.append(Finding("error", "row", where, text.removeprefix(f"{where}: ") if where else text))
    return found


def tool_findings(tasks: Sequence[Task], called: Counter[str]) -> list[Finding]:
    """Tools as the model sees them, against what it needs to know and what the traces show."""
    tools: dict[str, dict[str, Any]] = {tool["name"]: tool for task in tasks for tool in task.tools}
    found = []
    for name, tool in tools.items():
        if not (tool.get("description") or "").strip():
            found.append(
                Finding("warning", "tool", name, "has no description", "say what it does in its docstring's first line")
            )
        for argument, schema in tool["parameters"].get("properties", {}).items():
            if not any(key in schema for key in ("type", "enum", "anyOf", "oneOf", "allOf", "$ref", "const")):
                where = f"{name}({argument})"
                found.append(Finding("warning", "tool", where, "has no type", "give the argument a type hint"))
    unused = [name for name in tools if not called[name]]
    if called and unused:
        found.append(Finding("note", "tool", "", f"no trace calls {', '.join(unused)}"))
    return found


def kind_of(schema: Mapping[str, Any]) -> str:
    """What an argument may be, for people: ``integer | null``, ``"mon" | "tue"``, ``array of string``, ``any``."""
    options = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if options is not None:
        return " | ".join(json.dumps(option, ensure_ascii=False) for option in options)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " | ".join(dict.fromkeys(kind_of(one) for one in schema[key]))
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if schema.get("allOf"):
        return kind_of(schema["allOf"][0])
    kind = schema.get("type", "any")
    if isinstance(kind, list | tuple):
        return " | ".join(map(str, kind))
    items = schema.get("items")
    return f"array of {kind_of(items)}" if kind == "array" and isinstance(items, Mapping) and items else str(kind)


def name_findings(environment: Environment) -> list[Finding]:
    """Names that the tool format can't carry, and those that the model sees in their place."""
    names: Callable[[], dict[str, Any]] = getattr(environment, "shown_names", dict)
    table = names()
    shown = [f"{own} as {alias}" for own, alias in table.get("tools", {}).items()]
    shown += [
        f"{tool}({own}) as {tool}({alias})"
        for tool, arguments in table.get("arguments", {}).items()
        for own, alias in arguments.items()
    ]
    text = f"the model sees {', '.join(shown[:8])}{f' and {len(shown) - 8} more' if len(shown) > 8 else ''}"
    return [Finding("note", "name", "", text)] if shown else []


def task_findings(environment: Environment, tasks: Sequence[Task]) -> list[Finding]:
    """Requests that stand in several tasks and have different answers. An environment whose episodes begin with more
    than the request says with what (``beginning_of``); of others, equal requests are not compared.
    """
    beginning: Callable[[Task], str] | None = getattr(environment, "beginning_of", None)
    if beginning is None:
        return []
    alike: dict[str, list[Task]] = {}
    for task in tasks:
        alike.setdefault(beginning(task), []).append(task)
    found = []
    for same in alike.values():
        answers = {f"{task.reference_answer} {task.reference_calls}" for task in same}
        if len(answers) > 1:
            names = ", ".join(task.id for task in same[:4])
            text = f"the same request has {len(answers)} different answers"
            found.append(Finding("error", "task", names, text, "keep the right one, or tell them apart in the request"))
    return found


def closing_findings(config: Config, tasks: Sequence[Task]) -> list[Finding]:
    """Tasks that want words in the answer, where one closing message is taught for all."""
    wanting = [task for task in tasks if task.reference_answer is not None]
    taught = {
        "warmup.closing": config.warmup.closing if config.warmup.steps else None,
        "traces.closing": config.traces.closing,
    }
    found = []
    for key, closing in taught.items():
        other = [
            task for task in wanting if closing and str(task.reference_answer).casefold() not in closing.casefold()
        ]
        if other:
            text = f"{len(other)} of {len(tasks)} tasks want words in the answer; {key}={closing!r} teaches another one"
            found.append(Finding("warning", "closing", "", text, f"set {key}=null, so that the model's own words stay"))
    return found


def dropped_findings(path: str | None, dropped: Mapping[str, int]) -> list[Finding]:
    """Sound conversations that hold nothing to learn."""
    why = {
        "no_user_message": ("have no user message", "export them whole"),
        "no_call": ("call no tool", "they teach nothing here; leave them out"),
        "nothing_before_assistant": (
            "begin with the assistant",
            "take its greeting out, so that the user's words come first",
        ),
    }
    return [
        Finding("warning", f"trace:{reason}", str(path), f"{count} conversations {why[reason][0]}", why[reason][1])
        for reason, count in dropped.items()
    ]


def drift_findings(used: dict[str, Expert], plays: dict[str, Play], limit: int | None = None) -> list[Finding]:
    """Traces whose observations are others than those that their tools give now; ``limit``: characters from which the
    tools' are cut."""
    changed = []
    for task_id, (trace, _) in used.items():
        told = shown_to_policy([text for turn in trace.turns for text in turn.observations], limit)
        if task_id in plays and _differ(told, plays[task_id].observations):
            changed.append(task_id)
    if not changed:
        return []
    text = f"the tools now observe something else than {len(changed)} of {len(used)} traces tell, {changed[0]} first"
    return [Finding("note", "trace", "", text, "the policy sees the tools' text, the trace teaches the told one")]


def _differ(told: Sequence[str], seen: Sequence[str]) -> bool:
    """Whether observations differ in more than where they were cut."""
    if len(told) != len(seen):
        return True
    for then, now in zip(told, seen, strict=True):
        whole = not (then.endswith(CUT) or now.endswith(CUT))
        then, now = then.removesuffix(CUT), now.removesuffix(CUT)
        if then != now and (whole or not (then.startswith(now) or now.startswith(then))):
            return True
    return False


def length_findings(config: Config, chat: ChatFormat, tasks: Sequence[Task], used: dict[str, Expert]) -> list[Finding]:
    """Token lengths against the limits of prompts, traces, responses and turns."""
    found: list[Finding] = []
    prompts: list[int] = []
    for task in tasks:
        try:
            prompts.append(prompt_length(chat, task))
        except DataError as error:
            found.append(Finding("error", "prompt", "", str(error)))
    encoded = [encode_trace(with_closings(trace, config.traces.closing), chat) for trace, _ in used.values()]
    traces = [len(tokens.token_ids) for tokens in encoded]
    turns = [_most_turns(trace) for trace, _ in used.values()]
    observed = [
        max((len(text) for turn in trace.turns for text in turn.observations), default=0) for trace, _ in used.values()
    ]
    measured = {
        "prompts": prompts,
        "traces": traces,
        "calls": [_longest_call(tokens) for tokens in encoded],
        "turns": turns,
        "all turns": [_all_turns(trace) for trace, _ in used.values()],
        "observed": observed,
    }
    for level, what, of, limit, setting, fate in _limits(config):
        if measured[of] and limit is not None:
            found.append(_share(level, what, measured[of], limit, setting, fate))
    return found


def _limits(config: Config) -> list[tuple[Level, str, str, int | None, str, str]]:
    """Of each limit: how bad it is to be beyond, what is limited, by which measure, value, setting, and what becomes of
    it.
    """
    sampling, limits, stuck = config.rollout.sampling, config.tasks, "can't be finished"
    here, everywhere = sampling.max_turns_per_user_turn, sampling.max_turns
    told, evaluated = "assistant turns of a user turn", config.evaluation.max_turns_per_user_turn
    prefix, closing = "rollout.sampling.", "closing one included"
    seen, seen_key = limits.max_observation_chars, "tasks.max_observation_chars"
    return [
        ("warning", "prompts", "prompts", limits.max_prompt_tokens, "tasks.max_prompt_tokens", "are left out"),
        ("warning", "traces", "traces", config.traces.max_tokens, "traces.max_tokens", "are cut"),
        ("error", "expert solutions", "traces", sampling.max_response_tokens, f"{prefix}max_response_tokens", stuck),
        ("error", "calls of a message", "calls", sampling.max_turn_tokens, f"{prefix}max_turn_tokens", stuck),
        ("error", f"{told}, its {closing}", "turns", here, f"{prefix}max_turns_per_user_turn", stuck),
        ("error", f"assistant turns, the {closing}", "all turns", everywhere, f"{prefix}max_turns", stuck),
        ("warning", f"{told}, in evaluations", "turns", evaluated, "evaluation.max_turns_per_user_turn", stuck),
        ("warning", "characters of the longest observation", "observed", seen, seen_key, "are cut for the policy"),
    ]


def _longest_call(tokens: TraceTokens) -> int:
    """Tokens of the calls of the assistant message that has most of them."""
    called = Counter(turn for turn, what in zip(tokens.turn, tokens.component, strict=True) if what == Component.CALL)
    return max(called.values(), default=0)


def _all_turns(trace: Trace) -> int:
    """Assistant turns of all user turns, with the messages that close them."""
    return sum(bool(turn.calls) for turn in trace.turns) + 1 + len(trace.later_user_turns)


def _most_turns(trace: Trace) -> int:
    """Assistant turns of the longest user turn, with the message that closes it."""
    counts = Counter(turn.user_turn for turn in trace.turns if turn.calls)
    return 1 + max(counts.values(), default=0)


def _share(level: Level, what: str, sizes: Sequence[int], limit: int, setting: str, fate: str) -> Finding:
    """How long things are, and how many are beyond a limit."""
    over = sum(size > limit for size in sizes)
    text = f"{what}: median {statistics.median(sizes):g}, most {max(sizes)}; {setting}={limit}"
    if not over:
        return Finding("note", "length", "", text)
    return Finding(level, "length", "", f"{text}: {over} of {len(sizes)} {fate}", f"raise {setting}")
