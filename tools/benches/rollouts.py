"""Whether a rollout phase keeps its server busy: sequences running on the server against its limit, and work of ours
that generation doesn't hide.

A real vLLM server, the config's own tasks, the product's batch and episode code
(:func:`pact_nemo.rollouts.batch.run_batch`); many more episodes than ``rollout.server.max_num_seqs``. The same episodes
are played with several numbers of open episodes (``--factors``, times the limit), the prefix cache emptied before each.
``/metrics`` of the server is read five times a second.

- busy: mean of the server's running sequences, from when all its slots were first taken until 90 % of the episodes have
  ended, over the limit;
- busy from 0: the same from the start of the phase;
- before drain: busy only until fewer episodes are left than slots. The bench's many episodes should outnumber the slots
  ten to one: else busy has a part of the inevitable drain in it;
- asked: over the same time as busy, requests under way as the client knows them, at most the limit, over the limit.
  What busy lacks to it is lost between client and engine;
- environment, tokens: seconds within the environment, and within template, tokeniser and call parser, summed over
  episodes (clock time, in threads of one process: waiting for the interpreter is in it);
- not hidden: share of the phase in which such code ran while fewer requests were under way than slots or open episodes.

``ratio`` is busy of the smallest factor that reaches the goal, or of the best one.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from pact_nemo.chat.template import ChatFormat
from pact_nemo.config.limits import training_limits
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config, open_episodes
from pact_nemo.data.dataset import build_dataset
from pact_nemo.data.tasks import build_environment, prompts_of_step
from pact_nemo.environments.base import Environment, Task
from pact_nemo.rollouts.batch import run_batch
from pact_nemo.rollouts.episode import EpisodeSetup, SeedPath
from pact_nemo.rollouts.types import Rollout
from pact_nemo.serving.config import Sampling
from pact_nemo.serving.server import RolloutServer
from pact_nemo.training.served_weights import model_path
from tools.benches.kit import report
from tools.benches.rollouts_watch import Record, TimedChat, TimedClient, TimedEnvironment, analyse, sampling_server

GOAL = 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("conf/pact_bfcl-smollm2_135m-cpu.yaml"))
    parser.add_argument("--limit", type=int, default=16, help="rollout.server.max_num_seqs")
    parser.add_argument("--episodes", type=int, default=96, help="rounded down to whole groups of K")
    parser.add_argument(
        "--factors", type=float, nargs="+", default=[1.0, 1.25, 1.5, 2.0], help="open episodes, in units of the limit"
    )
    parser.add_argument(
        "--tool-seconds",
        type=float,
        default=0.0,
        help="let the calls of a turn take so much longer: tools that wait for something",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the config")


def run(options: Namespace) -> int:
    words = [f"rollout.server.max_num_seqs={options.limit}", "rollout.server.log_stats=true", *options.set]
    config = load_config(options.config, words)
    source = model_path(config)
    settings = config.model
    chat = ChatFormat.from_pretrained(source, settings.tool_format, settings.template_kwargs, settings.earlier_thoughts)
    environment = build_environment(config)
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-rollouts-") as folder:
        server = RolloutServer(config.rollout.server, source, log_file=Path(folder) / "server.log")
        try:
            server.launch()
            tasks = build_dataset(config, environment, chat, note=lambda _: None).train
            k = config.objective.group_size
            tasks = prompts_of_step(tasks, 0, options.episodes // k, config.run.seed)
            server.wait_ready()
            play(config, server, environment, chat, tasks[: max(1, options.limit // k)], options.limit, 0.0)  # warm-up
            for factor in options.factors:
                server.admin().reset_prefix_cache()
                rows.append(
                    play(
                        config,
                        server,
                        environment,
                        chat,
                        tasks,
                        max(1, round(factor * options.limit)),
                        options.tool_seconds,
                    )
                )
        finally:
            server.close()
            environment.close()
    best, own = choose(rows), load_config(options.config)
    result = {
        "limit": config.rollout.server.max_num_seqs,
        "episodes": len(tasks) * k,
        "concurrency that keeps it busy, over the limit": best["concurrency"] / options.limit,
        "concurrency of the config, over its limit": open_episodes(own) / own.rollout.server.max_num_seqs,
        "ratio": best["busy"],
        "goal": f">= {GOAL}",
    }
    report(options, f"rollout phases of {options.config.stem}", rows, result)
    return 0


def play(
    config: Config,
    server: RolloutServer,
    environment: Environment,
    chat: ChatFormat,
    tasks: list[Task],
    concurrency: int,
    tool_seconds: float,
) -> dict[str, float]:
    """One rollout phase, watched."""
    server_settings = config.rollout.server
    client = TimedClient(
        server.endpoint,
        weight_version=0,
        request_timeout_s=server_settings.request_timeout_s,
        connect_retries=0,
        admin_timeout_s=server_settings.refit_timeout_s,
    )
    record = Record()
    client.record = record
    setup = EpisodeSetup(
        TimedEnvironment(environment, record, tool_seconds),
        TimedChat(chat, record),
        training_limits(config),
        Sampling(config.rollout.sampling.temperature, config.rollout.sampling.top_p),
        SeedPath(config.run.seed, 0),
    )

    def ended(*_: int) -> None:
        record.ended.append(time.perf_counter())

    with sampling_server(server.endpoint, record):
        rollouts: list[Rollout] = asyncio.run(
            run_batch(
                tasks,
                config.objective.group_size,
                setup,
                clients=[client],
                concurrency=concurrency,
                on_progress=ended,
            )
        )
    found = analyse(record, limit=server_settings.max_num_seqs, concurrency=concurrency, episodes=len(rollouts))
    tokens = sum(sum(rollout.loss_mask) for rollout in rollouts)
    counts = {
        "concurrency": concurrency,
        "failed": sum(rollout.status == "failed" for rollout in rollouts),
        "tokens/s": tokens / found["phase s"],
    }
    return {**counts, **found}


def choose(rows: list[dict[str, float]]) -> dict[str, float]:
    """The row of the fewest open episodes that reaches the goal, or the best one."""
    good = [row for row in rows if row["busy"] >= GOAL]
    return min(good, key=lambda row: row["concurrency"]) if good else max(rows, key=lambda row: row["busy"])
