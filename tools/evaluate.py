#!/usr/bin/env python
"""Score any model in an environment with its official check: a Hugging Face folder (served by vLLM here) or a
chat-completions server by URL.

    python tools/evaluate.py --model runs/latest/hf --environment bfcl --out eval/mine
    python tools/evaluate.py --model http://127.0.0.1:8000/v1 --name Qwen3-4B --environment toolhop \\
        tasks.path=ToolHop.json environment_config.scenario=free
    python tools/evaluate.py --model /models/Qwen3-4B --environment shop.py:Shop --json model.tool_format=hermes

Every task is played, or with ``--held-out`` the run's held-out split only. Episodes are kept in
``OUT/episodes.jsonl`` as they are finished, so that an evaluation that was cut goes on where it stopped. An environment
with a leaderboard has its score files written in that layout.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pact_nemo import checkout

checkout.enter(__file__)

from rich.console import Console
from rich.table import Table

from pact_nemo.chat.template import ChatFormat
from pact_nemo.config.limits import evaluation_limits
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config, open_episodes
from pact_nemo.data.tasks import build_environment
from pact_nemo.environments.base import Environment, Task
from pact_nemo.environments.order import play_in_order
from pact_nemo.environments.registry import ENVIRONMENTS, environment_spec
from pact_nemo.errors import PactError, ServerError
from pact_nemo.monitoring.held_out_scores import episode_rewards, summarise
from pact_nemo.preflight.token_ids import check_served_folder
from pact_nemo.rollouts.chat_episode import play_by_chat
from pact_nemo.rollouts.episode import SeedPath
from pact_nemo.rollouts.types import Rollout
from pact_nemo.runtime.files import write_json_atomic
from pact_nemo.runtime.terminal import command
from pact_nemo.serving.chat_endpoint import Complete, Seeded, chat_endpoint
from pact_nemo.tracking.episodes import dump_evaluation
from pact_nemo.tracking.terminal import RunProgress
from pact_nemo.training.generation import Generator
from tools.evaluations.chosen import chosen_tasks, model_folder
from tools.evaluations.kept import identity, kept_rollouts, open_folder

REPOSITORY = checkout.ROOT


@contextmanager
def player(
    config: Config, options: argparse.Namespace, environment: Environment, progress: RunProgress
) -> Iterator[Any]:
    """A function tasks -> rollouts, for either kind of model."""
    folder = model_folder(options.model)
    if folder is None:
        key = os.environ.get("OPENAI_API_KEY", "none")
        complete = chat_endpoint(
            options.model, options.name, key, config.rollout.server.request_timeout_s, config.evaluation.temperature
        )
        limits = evaluation_limits(config)
        seeds = SeedPath(config.run.seed, "evaluate") if config.evaluation.temperature > 0 else None

        def samples(task: Task) -> list[Rollout]:
            return [
                play_by_chat(environment, task, sample, drawing(complete, seeds, task, sample), limits)
                for sample in range(config.evaluation.samples)
            ]

        def by_chat(tasks: list[Task]) -> list[Rollout]:
            made = sum(play_in_order(tasks, samples, open_episodes(config)), [])
            if all(rollout.status == "failed" for rollout in made):
                raise ServerError(f"all {len(made)} episodes failed; the first: {made[0].error}")
            return made

        yield by_chat
        return
    settings = config.model
    chat = ChatFormat.from_pretrained(folder, settings.tool_format, settings.template_kwargs, settings.earlier_thoughts)
    check_served_folder(folder, chat.tokenizer)
    generator = Generator(config, chat, environment, progress, options.out / "server.log")
    try:
        generator.launch(folder)
        generator.wait_ready()
        yield lambda tasks: generator.evaluation(tasks, name="evaluate", version=0)[0]
    finally:
        generator.close()


def drawing(complete: Seeded, seeds: SeedPath | None, task: Task, sample: int) -> Complete:
    """``complete`` for one episode: each of its requests has a seed of its own; None: none is sent."""
    if seeds is None:
        return complete
    turns = itertools.count()
    return lambda messages, tools: complete(messages, tools, seeds.seed(task.id, sample, next(turns)))


def verdicts(rollouts: list[Rollout]) -> dict[str, tuple[bool, str | None]]:
    """Task id -> (passed, the checker's reason or why there is no verdict)."""
    return {
        rollout.task_id: (False, rollout.error)
        if rollout.outcome is None
        else (rollout.outcome.success, rollout.outcome.reason)
        for rollout in rollouts
    }


def prerequisites(tasks: list[Task], rollouts: list[Rollout]) -> dict[str, Any]:
    """Of episodes that others build on: how many there are, which failed, and the tasks that could not be played for
    it.
    """
    failed = {rollout.task_id for rollout in rollouts if rollout.status == "failed"}
    lost = sorted(task.id for task in tasks if not task.prepares and task.id in failed and failed & set(task.after))
    return {
        "n": sum(task.prepares for task in tasks),
        "failed": sorted(task.id for task in tasks if task.prepares and task.id in failed),
        "not_played": lost,
    }


def evaluate(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    folder = model_folder(options.model)
    environment = build_environment(config, folder=options.out)
    started = time.monotonic()
    try:
        every, tasks = chosen_tasks(config, environment, folder, held_out=options.held_out, limit=options.limit)
        episodes = open_folder(options.out, identity(config, options.model, options.name, every))
        rollouts = kept_rollouts(episodes, every, config.evaluation.samples)
        done = {rollout.task_id for rollout in rollouts}
        left = [task for task in tasks if task.id not in done]
        with RunProgress(total_steps=0, enabled=not options.json) as progress:
            if done:
                progress.message(f"{len(tasks) - len(left)} of {len(tasks)} tasks were played before")
            if left:
                with player(config, options, environment, progress) as play:
                    for start in range(0, len(left), options.chunk):
                        rollouts += play(left[start : start + options.chunk])
                        played = {rollout.task_id for rollout in rollouts}
                        dump_evaluation(
                            episodes,
                            [t for t in every if t.id in played],
                            rollouts,
                            episode_rewards(config, every, rollouts)[0],
                        )
    finally:
        environment.close()
    wanted = {task.id for task in tasks}
    rollouts = [rollout for rollout in rollouts if rollout.task_id in wanted]
    _, call_rewards = episode_rewards(config, tasks, rollouts)
    score = summarise(tasks, rollouts, call_rewards, 0, time.monotonic() - started).to_dict()
    name = options.name if folder is None else folder.resolve().name
    result = {
        "model": options.model,
        "name": name,
        "benchmark": config.environment,
        "tasks": config.tasks.scored if options.held_out else "all",
        **score,
        **counted(rollouts, tasks),
    }
    if any(task.prepares for task in tasks):
        result["prerequisites"] = prerequisites(tasks, rollouts)
    write_scores = environment_spec(config.environment).write_scores
    if write_scores is not None and config.evaluation.samples == 1:  # a leaderboard has one verdict a task
        write_scores(options.out, name, [task for task in tasks if not task.prepares], verdicts(rollouts))
    write_json_atomic(options.out / "result.json", result)
    return result


def settings_of(options: argparse.Namespace) -> Config:
    """The settings of ``--config``, in the environment that the options or else those files name."""
    if options.config and options.environment is None:
        return load_config(options.config, options.overrides)
    name = options.environment or "bfcl"
    full = REPOSITORY / "conf" / (f"pact_{name}.yaml" if name in ENVIRONMENTS else "pact.yaml")
    return load_config(options.config or [full], [f"environment={name}", *options.overrides])


def counted(rollouts: list[Rollout], tasks: list[Task]) -> dict[str, Any]:
    """Episodes behind each further metric; how many failed through no fault of the policy, and why the first did. Those
    count 0 in the score and are in no further metric.
    """
    own = {task.id for task in tasks if not task.prepares}
    metrics = Counter(
        name for r in rollouts if r.outcome is not None and r.task_id in own for name in r.outcome.metrics
    )
    lost = [r for r in rollouts if r.status == "failed" and r.task_id in own]
    return {
        "metric_counts": dict(sorted(metrics.items())),
        "first_failure": f"{lost[0].task_id}: {lost[0].error}" if lost else None,
    }


def tasks_in(text: str) -> int:
    """A number of tasks. Raises ArgumentTypeError below 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number, at least 1")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="HF folder, or base URL of a chat-completions server (key in OPENAI_API_KEY)"
    )
    parser.add_argument("--name", default="default", help="the model's name at that server")
    parser.add_argument(
        "--environment",
        "--benchmark",
        metavar="NAME",
        help="bfcl, ftrl, toolhop, own, or one of your own: module:factory, path/to/file.py:factory;"
        " default: what --config says, else bfcl",
    )
    parser.add_argument(
        "--config",
        action="append",
        metavar="YAML",
        help="settings as for the recipes; default: the environment's full settings",
    )
    parser.add_argument("--out", type=Path, default=Path("eval"))
    parser.add_argument(
        "--held-out", action="store_true", help="only the tasks that a run with these settings is evaluated on"
    )
    parser.add_argument("--limit", type=tasks_in, help="only the first tasks")
    parser.add_argument("--chunk", type=tasks_in, default=256, help="tasks between two saves")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    try:
        result = evaluate(settings_of(options), options)
    except PactError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(result))
        return 0
    table = Table(
        "category",
        "tasks",
        "score",
        title=f"{result['name']} on {result['benchmark']}, {result['tasks']} tasks: {result['score']:.4f}",
    )
    for category, row in result["categories"].items():
        table.add_row(category, str(row["n"]), f"{row['score']:.4f}")
    for metric, value in result["metrics"].items():
        table.add_row(f"mean {metric}", str(result["metric_counts"][metric]), f"{value:.4f}")
    Console().print(table)
    if result["failed"]:
        print(
            f"{result['failed']} of {result['n']} episodes failed through no fault of the policy and count 0, the"
            f" first: {result['first_failure']}\nthe same command plays them again"
        )
    before = result.get("prerequisites", {"failed": []})
    if before["failed"]:
        print(
            f"{len(before['failed'])} episodes that others build on failed: {', '.join(before['failed'])}\n"
            f"{len(before['not_played'])} tasks were not played for it and count 0; the same command plays them again"
        )
    return 0


if __name__ == "__main__":
    command(main)
