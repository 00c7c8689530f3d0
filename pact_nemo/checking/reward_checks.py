"""What the reward says of the expert, of doing nothing and of another task's expert; whether episodes are apart."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from pact_nemo.checking.findings import Finding, Level
from pact_nemo.checking.plays import NOTHING, Play, Playing, Script, play
from pact_nemo.environments.base import Environment, Task
from pact_nemo.errors import EnvironmentFailure

_APART = "keep state in the instance; files and databases of a rollout in a folder of its own"
_BESIDE = "give each rollout its own port, lock and files; where the tools can't run twice, set agent.workers=1"
MANY, SOME = 0.5, 0.1  #: shares of the tasks from which a wrong verdict is an error, and a warning


def expert_findings(
    environment: Environment,
    tasks: Sequence[Task],
    scripts: Mapping[str, Script],
    told: Mapping[str, Sequence[str]],
) -> tuple[dict[str, Play], list[Finding]]:
    """Play each task's expert: what fails, what brings an error, what does not score.

    Args:
        told: task id -> the observations that its trace tells; an error among them is the trace's own.
    """
    plays = {task.id: play(environment, task, scripts[task.id]) for task in tasks if task.id in scripts}
    found = [
        Finding("error", "episode", name, str(one.failure), "an episode that fails is masked and teaches nothing")
        for name, one in plays.items()
        if one.failure is not None
    ]
    for name, one in plays.items():
        known = {text for text in told.get(name, ()) if text.startswith("Error")}
        for call, text in zip(one.calls, one.observations, strict=False):
            if text.startswith("Error") and text not in known:
                said = f"the expert's {call.name} gives {text[:160]!r}"
                found.append(Finding("error", "expert", name, said, "mend the call, the tool or the task's info"))
                break
    low = [name for name, one in plays.items() if one.failure is None and not one.success]
    if low:
        first = plays[low[0]].outcome
        assert first is not None
        text = f"the expert does not solve {len(low)} of {len(plays)} tasks, {low[0]} first: {first.reason}"
        remedy = "mend its calls, the answer, or score()"
        found.append(Finding("error" if len(low) > MANY * len(plays) else "warning", "reward", "", text, remedy))
    return plays, found


def nothing_findings(environment: Environment, tasks: Sequence[Task], experts: Mapping[str, Play]) -> list[Finding]:
    """Say a closing word and call nothing: that must not be a success.

    Args:
        experts: task id -> the expert's play; what fails that one, too, has been told.
    """
    plays = [play(environment, task, NOTHING) for task in tasks]
    told = {task_id: one.failure for task_id, one in experts.items()}
    failed = [
        one.failure
        for task, one in zip(tasks, plays, strict=True)
        if one.failure is not None and one.failure != told.get(task.id)
    ]
    found = []
    if failed:
        text = f"an episode without a call fails in {len(failed)} of {len(plays)} tasks: {failed[0]}"
        found.append(Finding("error", "episode", "", text, "score() has to judge an episode that did nothing, too"))
    won = [task.id for task, one in zip(tasks, plays, strict=True) if one.success]
    return [*found, *_wrongly_won("doing nothing", won, len(plays), "this reward can't teach")]


def other_findings(
    environment: Environment, tasks: Sequence[Task], scripts: Mapping[str, Script], plays: Mapping[str, Play]
) -> list[Finding]:
    """Play another task's expert: it must not solve this one, unless it does all that this one's does."""
    known = [task for task in tasks if task.id in plays and plays[task.id].success]
    pairs = []
    for index, task in enumerate(known):
        others = [*known[index + 1 :], *known[:index]]
        sound = (one for one in others if not _same_answer(task, one))
        other = next((one for one in sound if not _holds(scripts[one.id], scripts[task.id])), None)
        if other is not None:
            pairs.append((task, other))
    if not pairs:
        text = f"no two of {len(known)} tasks have different solutions: nobody knows whether the verdict looks at them"
        return [Finding("note", "reward", "", text)] if len(known) > 1 else []
    won = [task.id for task, other in pairs if play(environment, task, scripts[other.id]).success]
    return _wrongly_won("another task's expert", won, len(pairs), "the verdict does not look at the task")


def _same_answer(task: Task, other: Task) -> bool:
    """Of questions with few answers, yes and no say, another task's answer is the right one again and again."""
    return task.reference_answer is not None and task.reference_answer == other.reference_answer


def _holds(script: Script, other: Script) -> bool:
    """Whether a script makes all calls of another one, and closes as it does."""
    left = [call for turn in script.calls for calls in turn for call in calls]
    for call in (call for turn in other.calls for calls in turn for call in calls):
        if call not in left:
            return False
        left.remove(call)
    return script.closing == other.closing


def _wrongly_won(who: str, won: Sequence[str], of: int, meaning: str) -> list[Finding]:
    text = f"{who} solves {len(won)} of {of} tasks"
    if len(won) <= SOME * of:
        return [Finding("note", "reward", "", text)]
    level: Level = "error" if len(won) > MANY * of else "warning"
    remedy = f"look at {', '.join(won[:4])}: give them an answer, or make the verdict stricter"
    said = meaning if level == "error" else f"on these, {meaning}"
    return [Finding(level, "reward", "", f"{text}: {said}", remedy)]


def session_findings(
    environment: Environment, tasks: Sequence[Task], scripts: Mapping[str, Script], plays: Mapping[str, Play]
) -> list[Finding]:
    """The same episode twice must observe the same; two at the same time must not see each other."""
    sound = [task for task in tasks if task.id in plays and plays[task.id].failure is None and plays[task.id].calls]
    found: list[Finding] = []
    steady = []
    for task in sound[:8]:
        gap = _first_gap(plays[task.id], play(environment, task, scripts[task.id]))
        if gap is None:
            steady.append(task)
        else:
            text = f"the same calls observe something else a second time: {gap}"
            remedy = "seed what is random, fix its clock; keep state in the instance, not in a class or file"
            found.append(Finding("warning", "repeat", task.id, text, remedy))
    for first, second in zip(steady, steady[1:], strict=False):
        seen = _interleaved(environment, (first, second), scripts)
        for task, one in zip((first, second), seen, strict=True):
            gap = _first_gap(plays[task.id], one)
            if gap is not None:
                text, remedy = f"two episodes at a time see each other: {gap}", _APART
                if one.failure is not None:
                    text, remedy = f"an episode fails while another one is open: {one.failure}", _BESIDE
                return [*found, Finding("error", "isolation", task.id, text, remedy)]
    return found


def _first_gap(told: Play, seen: Play) -> str | None:
    """The first thing in which two plays of the same script differ; None where there is none."""
    if seen.failure is not None:
        return seen.failure
    for call, then, now in zip(told.calls, told.observations, seen.observations, strict=False):
        if then != now:
            same = len(os.path.commonprefix([then, now]))
            start = max(same - 20, 0)  # what they have in common tells nothing
            return f"{call.name} gave {then[start : start + 80]!r}, then {now[start : start + 80]!r}"
    if len(told.observations) != len(seen.observations):
        return "another number of calls"
    return None if told.score == seen.score else "another score"


def _interleaved(
    environment: Environment, tasks: tuple[Task, Task], scripts: Mapping[str, Script]
) -> tuple[Play, Play]:
    """Both open at the same time, a turn of the one after a turn of the other."""
    try:
        one = Playing(environment, tasks[0], scripts[tasks[0].id])
    except EnvironmentFailure as error:
        return Play((), (), None, str(error)), Play((), (), None)
    try:
        two = Playing(environment, tasks[1], scripts[tasks[1].id])
    except EnvironmentFailure as error:
        one.session.close()
        return Play((), (), None), Play((), (), None, str(error))
    going = True
    while going:
        first, second = one.step(), two.step()
        going = first or second
    return one.finish(), two.finish()
