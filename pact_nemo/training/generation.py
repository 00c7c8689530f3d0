"""Rank 0's side of generation: the server, its client, episodes, refit. It is handed tasks, never traces."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pact_nemo.chat.template import ChatFormat
from pact_nemo.config.limits import evaluation_limits, training_limits
from pact_nemo.config.lora import adapter_room
from pact_nemo.config.schema import Config, open_episodes
from pact_nemo.environments.base import Environment, Task
from pact_nemo.errors import ServerError
from pact_nemo.policy.distributed import new_store
from pact_nemo.rollouts.batch import run_batch
from pact_nemo.rollouts.episode import EpisodeSetup, SeedPath
from pact_nemo.rollouts.types import Rollout
from pact_nemo.runtime.collective import on_rank_zero, rank
from pact_nemo.serving.adapters import AdapterRoom
from pact_nemo.serving.config import EpisodeLimits, RolloutServerConfig, Sampling
from pact_nemo.serving.fleet import Fleet
from pact_nemo.serving.launch import on_cuda
from pact_nemo.serving.nodes import job_engines
from pact_nemo.serving.refit import RefitReport
from pact_nemo.serving.remote import Keeper, RemoteServer
from pact_nemo.serving.server import RolloutServer
from pact_nemo.serving.supervisor import SupervisedServer
from pact_nemo.tracking.terminal import RunProgress


class Generator:
    """Owns the rollout engines of a run, or knows servers that run elsewhere. Made, launched and closed on every rank;
    used on rank 0 only, and not at all in a replay.

    Attributes:
        on_request: called with the body of every generation request just before it is sent.
        check: called a few times a second while episodes are played; what it raises ends them.
    """

    def __init__(
        self, config: Config, chat: ChatFormat, environment: Environment, progress: RunProgress, log_file: Path
    ):
        self._config, self._chat, self._environment, self._progress = config, chat, environment, progress
        self._log_file = log_file
        self._source: Path | None = None
        self._fleet = self._fleet_of([])
        self._keepers: list[Keeper] = []
        self._ready = False
        self.on_request: Callable[[dict[str, Any]], None] | None = None
        self.check: Callable[[], None] | None = None

    def _fleet_of(self, engines: list[SupervisedServer]) -> Fleet:
        share = self._config.rollout.server.min_engines_share
        return Fleet(engines, min_share=share, note=self._progress.message)

    def launch(self, source: Path, exports: Path | None = None) -> None:
        """Start the engines on the model as it came (version 0) and return at once. Collective: a node's first rank
        starts those of its node.

        Args:
            exports: where refits will load from; None: there are none.
        """
        if self._config.trainer.replay is not None:
            return
        self._source = source
        settings = self._config.rollout.server
        adapters = adapter_room(self._config, cuda=on_cuda(settings)) if exports is not None else None
        if settings.url is not None or settings.engines == "1":
            servers = self._few(settings, source, adapters) if rank() == 0 else []
        else:
            shared = (exports,) if exports is not None else ()
            found = job_engines(settings, source, self._log_file, new_store, shared, adapters)
            self._keepers, servers = found.keepers, found.servers
        note = self._progress.message
        self._fleet = self._fleet_of(
            [SupervisedServer(one, note=note, on_request=self._requested, like=source) for one in servers]
        )
        on_rank_zero(lambda: [server.launch() for server in servers])

    def _few(
        self, settings: RolloutServerConfig, source: Path, adapters: AdapterRoom | None
    ) -> list[RolloutServer | RemoteServer]:
        """Those that run elsewhere, or one on this node."""
        urls = [url.strip() for url in settings.url.split(",")] if settings.url is not None else [None]
        each = [replace(settings, url=url) for url in urls]
        return [RolloutServer(one, source, log_file=self._log_file, version=0, adapters=adapters) for one in each]

    @property
    def measures_memory(self) -> bool:
        """Whether the engines look at how much memory of the trainer's GPUs is free while they start: nothing else may
        take any then, so they have to be waited for before the policy is built.
        """
        settings = self._config.rollout.server
        return self._config.trainer.replay is None and settings.url is None and on_cuda(settings)

    def wait_ready(self) -> None:
        """Block until every engine answers; on rank 0. Raises ServerError with the end of its log when one doesn't."""
        if self._ready:
            return
        seconds, count = self._fleet.wait_ready(), len(self._fleet.engines)
        self._ready = count > 0
        if self._ready:
            what = f"{count} rollout servers" if count > 1 else "rollout server"
            self._progress.message(f"{what} ready after {seconds:.0f} s")

    def _requested(self, body: dict[str, Any]) -> None:
        if self.on_request is not None:
            self.on_request(body)

    def _play(
        self,
        name: str,
        tasks: list[Task],
        samples: int,
        limits: EpisodeLimits,
        sampling: Sampling,
        step: int | str,
        version: int,
    ) -> list[Rollout]:
        if not self._ready:
            raise ServerError("the rollout server was not started on this rank")
        self._fleet.check_version(version)
        with self._progress.phase(name, total=len(tasks) * samples) as phase:
            started = time.perf_counter()

            def show(done: int, total: int, tokens: int) -> None:
                phase.update(done, f"{tokens / max(time.perf_counter() - started, 1e-9):.0f} tokens/s")

            seeds = SeedPath(self._config.run.seed, step)
            setup = EpisodeSetup(
                self._environment, self._chat, limits, sampling, seeds, one_prompt=isinstance(step, int)
            )
            rollouts = asyncio.run(
                run_batch(
                    tasks,
                    samples,
                    setup,
                    clients=self._fleet.routes(len(tasks)),
                    concurrency=self._in_flight,
                    on_progress=show,
                    check=self.check,
                )
            )
        self._refuse_all_failed(name, rollouts)
        return rollouts

    def _in_flight(self) -> int:
        """Episodes that are played at once: fewer when an engine is given up, so that requests don't wait longer."""
        return open_episodes(self._config, len(self._fleet.living))

    def _refuse_all_failed(self, name: str, rollouts: list[Rollout]) -> None:
        """Nothing can be learnt or scored from a batch in which no episode was played: stop and say why."""
        if all(rollout.status == "failed" for rollout in rollouts):
            cause, count = Counter(str(rollout.error) for rollout in rollouts).most_common(1)[0]
            for engine in self._fleet.living:
                engine.server.check_alive()
            raise ServerError(f"{name}: all {len(rollouts)} episodes failed; most often ({count} times): {cause}")

    def rollouts(self, tasks: list[Task], k: int, *, step: int, version: int) -> list[Rollout]:
        """K training rollouts per task, ordered by (task, sample)."""
        sampling = Sampling(self._config.rollout.sampling.temperature, self._config.rollout.sampling.top_p)
        return self._play(f"step {step + 1} rollouts", tasks, k, training_limits(self._config), sampling, step, version)

    def evaluation(self, tasks: list[Task], *, name: str, version: int) -> tuple[list[Rollout], float]:
        """Held-out episodes and the seconds they took."""
        started = time.perf_counter()
        settings, limits = self._config.evaluation, evaluation_limits(self._config)
        rollouts = self._play(
            f"evaluation {name}",
            tasks,
            settings.samples,
            limits,
            Sampling(settings.temperature),
            f"eval/{name}",
            version,
        )
        return rollouts, time.perf_counter() - started

    def refit(self, folder: Path, version: int) -> list[RefitReport]:
        """Make every server load an export, all at the same time; see :func:`pact_nemo.serving.refit.refit_all`. One
        that dies, hangs or fails meanwhile is restarted and given the export.

        Raises:
            CheckpointError: the export is not whole or not what is due; no server was touched.
            ServerLost: too few servers are left.
        """
        if not self._ready:
            raise ServerError("the rollout server was not started on this rank")
        return self._fleet.refit(folder, version, like=self._source)

    def sleep(self, *, drop: bool) -> None:
        """See :meth:`pact_nemo.serving.fleet.Fleet.sleep`."""
        self._fleet.sleep(drop=drop)

    def wake(self, part: str | None) -> None:
        """See :meth:`pact_nemo.serving.fleet.Fleet.wake`."""
        self._fleet.wake(part)

    def counts(self) -> dict[str, float]:
        """See :meth:`pact_nemo.serving.fleet.Fleet.counts`; nothing without a server."""
        return self._fleet.counts() if self._ready else {}

    def peak_memory_bytes(self) -> int:
        return self._fleet.peak_memory_bytes()

    def close(self) -> None:
        """Stop what this rank started; on every rank."""
        for keeper in self._keepers:
            keeper.stop()
        self._fleet.close()
