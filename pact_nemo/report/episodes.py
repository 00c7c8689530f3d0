"""Choosing episodes and laying them out turn by turn."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from pact_nemo.chat.tool_formats import TOOL_FORMATS
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.calls import shown
from pact_nemo.errors import DataError
from pact_nemo.report.charts import reading
from pact_nemo.report.data import Row, Run, read_rows, rollout_files
from pact_nemo.report.stats import passed
from pact_nemo.traces.schema import Trace
from pact_nemo.traces.segments import NO_LEVEL

MAX_CHARS = 6000  #: a longer text is cut in the page, with a word on how much is missing
TRAINING = "training"
TRAINING_CARDS = 4  #: prompts of training steps shown: of the first, the last and evenly spaced steps between them
TRAINING_SAMPLES = 2  #: rollouts of each: the one with the highest and the one with the lowest advantage


@dataclass(frozen=True)
class Part:
    """A stretch of an assistant message. ``kind``: reasoning, call, error (call text that could not be read) or
    answer.
    """

    kind: str
    text: str
    label: str = ""


@dataclass
class TurnView:
    number: int
    messages: list[tuple[str, str]]  #: (role, text) of what the user said before this turn
    parts: list[Part]
    errors: list[str]
    observations: list[str]
    reward: str
    advantage: str
    cut: bool  #: the server stopped it at the token limit


@dataclass
class EpisodeView:
    stage: str
    label: str
    success: bool
    verdict: str
    reason: str
    reward: str
    seconds: str
    turns: list[TurnView]


@dataclass
class TraceView:
    source: str
    verified: bool
    turns: list[TurnView]


@dataclass
class Card:
    """One task and what became of it."""

    task_id: str
    category: str
    heading: str
    prompt: list[tuple[str, str]]  #: (role, text) of the first user turn
    references: list[str]
    episodes: list[EpisodeView] = field(default_factory=list)
    trace: TraceView | None = None


def shorten(text: str) -> str:
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}\n… {len(text) - MAX_CHARS} more characters"


def parts_of(turn: Row, tool_format: str) -> list[Part]:
    """Split an assistant message into reasoning and call text, at the place where the run's own tool format splits
    it.
    """
    text = turn["text"]
    if not text:
        return []
    if not turn["calls"] and not turn["call_errors"]:
        return [Part("answer", shorten(text))]
    parser = TOOL_FORMATS.get(tool_format)
    reasoning = parser.parse(text).reasoning if parser is not None else ""
    at = text.find(reasoning) + len(reasoning) if reasoning else 0
    parts = [Part("reasoning", shorten(text[:at]))] if text[:at].strip() else []
    kind = "call" if turn["calls"] else "error"
    return [*parts, Part(kind, shorten(text[at:].strip("\n")))]


def _number(values: Any, index: int) -> str:
    """A signed reading; empty where a file has none for this turn."""
    if not isinstance(values, list) or index >= len(values) or values[index] is None:
        return ""
    return f"{'+' if values[index] > 0 else ''}{reading(float(values[index]))}"


def view_episode(row: Row, stage: str, label: str, tool_format: str) -> EpisodeView:
    """Raises DataError when a key is missing."""
    try:
        user_turns = row["task"]["user_turns"]
        turns, shown = [], 0  # the card shows the first user turn
        for index, turn in enumerate(row["turns"]):
            told: list[Row] = []
            while shown < turn["user_turn"] and shown + 1 < len(user_turns):
                shown += 1
                told += user_turns[shown]
            said = (row["turns"][index - 1].get("reply") if index else None) or told  # older files have the task's only
            messages = [(message["role"], shorten(message["content"])) for message in said]
            turns.append(
                TurnView(
                    number=index + 1,
                    messages=messages,
                    parts=parts_of(turn, tool_format),
                    errors=list(turn["call_errors"]),
                    observations=[shorten(text) for text in turn["observations"]],
                    reward=_number(row.get("rewards"), index),
                    advantage=_number(row.get("advantages"), index),
                    cut=turn["finish_reason"] == "length",
                )
            )
        success = passed(row)
        status = row["status"]
        verdict = (
            ("passed, cut off" if status == "truncated" else "passed")
            if success
            else "failed to run"
            if status == "failed"
            else "cut off"
            if status == "truncated"
            else "not passed"
        )
        reasons = [
            row["outcome"]["reason"] if row["outcome"] and row["outcome"]["reason"] != "ok" else "",
            row.get("error") or "",
        ]
        total = sum(value for value in row.get("rewards") or [] if value is not None)
        return EpisodeView(
            stage,
            label,
            success,
            verdict,
            " · ".join(r for r in reasons if r),
            reading(total),
            f"{row.get('seconds') or 0.0:.1f}",
            turns,
        )
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"episode of {row.get('task_id')!r} is not a rollout row: {type(error).__name__}: {error}"
        ) from error


def view_trace(trace: Trace) -> TraceView:
    """The expert's turns, with the type and the prefix level of every reasoning segment."""
    turns = []
    pending: list[tuple[str, str]] = []
    for index, turn in enumerate(trace.turns):
        parts = []
        for segment, level in zip(turn.segments, turn.segment_levels, strict=True):
            label = segment.type.replace("_", " ") + ("" if level == NO_LEVEL else f" · L{level}")
            parts.append(Part("none" if level == NO_LEVEL else f"L{level}", shorten(segment.text.strip()), label))
        parts += [Part("call", shorten(shown(call))) for call in turn.calls]
        turns.append(
            TurnView(index + 1, pending, parts, [], [shorten(text) for text in turn.observations], "", "", False)
        )
        closing = turn.said or turn.closing_message
        pending = [("assistant", shorten(closing))] if closing else []
        pending += [(message["role"], shorten(message["content"])) for message in turn.user_messages_after]
    return TraceView(trace.source, trace.verified, turns)


def _card(row: Row, run: Run, heading: str) -> Card:
    task = row["task"]
    references = [shown(ToolCall(call["name"], call["arguments"])) for turn in task["reference_calls"] for call in turn]
    trace = run.traces.get(row["task_id"])
    prompt = (
        [(message["role"], shorten(message["content"])) for message in task["user_turns"][0]]
        if task["user_turns"]
        else []
    )
    return Card(
        row["task_id"],
        task["category"],
        heading,
        prompt,
        references,
        trace=view_trace(trace) if trace is not None else None,
    )


def _interest(outcomes: list[bool]) -> tuple[int, bool]:
    """Sort key: tasks whose verdict changed come first, gains before losses, then passed ones."""
    changed = len(set(outcomes)) > 1
    return (0 if changed else 1, not outcomes[-1])


def choose_tasks(run: Run, count: int) -> list[str]:
    """Held-out tasks to show: in turn from those gained, lost, never passed and always passed, so that no kind fills
    the page.

    Gained ones get two places in each round, those gained in the last stage (RL) first.
    """
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for stage in run.stages():
        for row in run.episodes.get(stage.name, []):
            if row.get("sample", 0) == 0:
                verdicts[row["task_id"]].append(passed(row))
    kinds: dict[tuple[bool, bool], list[str]] = defaultdict(list)
    for task_id, outcomes in verdicts.items():
        kinds[outcomes[0], outcomes[-1]].append(task_id)
    gained = kinds[False, True]
    gained.sort(key=lambda task_id: verdicts[task_id][-2])
    queues = [gained, gained, *(kinds[key] for key in ((True, False), (False, False), (True, True)))]
    chosen: list[str] = []
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return sorted(chosen, key=lambda task_id: _interest(verdicts[task_id]))


def held_out_cards(run: Run, count: int) -> list[Card]:
    """One card per chosen held-out task with its episode of every evaluation."""
    tool_format = str(run.setting("model.tool_format") or "")
    cards: dict[str, Card] = {}
    chosen = choose_tasks(run, count)
    for stage in run.stages():
        for row in run.episodes.get(stage.name, []):
            if row["task_id"] in chosen and row["sample"] == 0:
                card = cards.setdefault(row["task_id"], _card(row, run, f"{run.scored_tasks} task"))
                card.episodes.append(view_episode(row, stage.name, stage.label, tool_format))
    return [cards[task_id] for task_id in chosen]


def _strength(group: list[Row]) -> float:
    """Largest advantage of a group in absolute value: what the step learnt most from."""
    return max((abs(value) for row in group for value in row.get("advantages") or [] if value is not None), default=0.0)


def _advantage(row: Row) -> float:
    values = [value for value in row.get("advantages") or [] if value is not None]
    return sum(values) / len(values) if values else 0.0


def training_cards(run: Run) -> list[Card]:
    """Rollouts of the prompt that its step learnt most from, for steps evenly spaced from the first to the last dumped
    one.
    """
    files = rollout_files(run.folder)
    tool_format = str(run.setting("model.tool_format") or "")
    counts_from_zero = any(int(file.stem.removeprefix("step_")) == 0 for file in files)
    cards = []
    last = len(files) - 1
    for position in sorted({last * card // (TRAINING_CARDS - 1) for card in range(TRAINING_CARDS)}) if files else []:
        file = files[position]
        step = int(file.stem.removeprefix("step_")) + int(counts_from_zero)
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in read_rows(file):
            groups[row["task_id"]].append(row)
        if not groups:
            continue
        best = max(groups.values(), key=_strength)
        ranked = sorted(best, key=_advantage, reverse=True)
        picked = ranked if len(ranked) <= TRAINING_SAMPLES else [ranked[0], ranked[-1]]
        gate = best[0].get("anchored")
        heading = f"training step {step}" + (
            "" if gate is None else ", anchored to the prompt" if gate else ", trace-conditioned"
        )
        card = _card(best[0], run, heading)
        for row in picked:
            card.episodes.append(
                view_episode(row, TRAINING, f"rollout {row['sample'] + 1} of {len(best)}", tool_format)
            )
        cards.append(card)
    return cards
