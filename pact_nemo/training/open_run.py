"""From a config to a running experiment, and back to a clean machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist

from pact_nemo.chat.template import ChatFormat
from pact_nemo.config.schema import Config, settled, steps_of, to_yaml
from pact_nemo.planning.from_config import brief, run_plan
from pact_nemo.policy.device import init_distributed
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.runtime.files import write_text_atomic
from pact_nemo.runtime.interrupt import stop_request
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.runtime.terminal import RunLog, guarded_output, on_loss
from pact_nemo.traces.schema import write_traces
from pact_nemo.tracking import run_folder as workspaces
from pact_nemo.tracking.metrics_log import MetricsLog
from pact_nemo.tracking.run_folder import Workspace
from pact_nemo.tracking.terminal import RunProgress
from pact_nemo.training.dataset import Dataset, build_dataset, build_environment, check_batches
from pact_nemo.training.distributed import on_rank_zero, rank
from pact_nemo.training.experiment import Experiment, model_path, served_path
from pact_nemo.training.generation import Generator
from pact_nemo.training.preflight import chat_format, check_room, preflight


@contextmanager
def open_experiment(config: Config, resume: str | None) -> Iterator[Experiment]:
    """Build everything, start the rollout server, restore a checkpoint when resuming; stop and release it all at the
    end, however it ends.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(guarded_output())
        init_distributed(config.policy.init_timeout_s)
        stop = stack.enter_context(stop_request())
        opened: list[Workspace] = []  # rank 0's holds the folder's lock
        folder = on_rank_zero(lambda: _open_folder(config, resume, opened))
        space = opened[0] if opened else Workspace(Path(folder))
        space.place_exports(config.rollout.exports_dir)
        run_log = RunLog(space.run_log)
        stack.callback(run_log.close)
        stack.push(lambda kind, error, trace: _note_end(run_log, error))
        stack.enter_context(on_loss(lambda text: run_log.write(f"rank {rank()}: {text}; the run goes on")))
        progress = stack.enter_context(
            RunProgress(total_steps=config.trainer.steps or 0, enabled=rank() == 0, log=run_log)
        )
        progress.message(f"run folder {folder}")
        with progress.phase("set-up"):
            on_rank_zero(space.check_exports)
            if resume is None:
                on_rank_zero(lambda: check_room(config))
            checked: list[ChatFormat | None] = []
            on_rank_zero(lambda: checked.append(preflight(config, dist.get_world_size())))
            source = model_path(config)
            chat = next(filter(None, checked), None) or chat_format(config, source)
            quarantine = Quarantine(config.run.bad_rows)
            environment = build_environment(config, quarantine)
            stack.callback(environment.close)
            try:
                dataset = build_dataset(config, environment, chat, note=progress.message, quarantine=quarantine)
            finally:  # also where too little is left to train on: the file says why
                if rank() == 0 and (bad := quarantine.write(space.folder)) is not None:
                    progress.message(
                        f"{len(quarantine)} bad rows were left out ({quarantine.by_file()}), kept with their errors in"
                        f" {bad}"
                    )
            config = _settle(config, space, dataset, progress)
            check_batches(config, dataset.train, dataset.warmup_tasks(config.warmup.max_tasks))
            if rank() == 0:
                write_traces(space.traces, list(dataset.traces.values()))
            generator = Generator(config, chat, environment, progress, space.server_log)
            stack.callback(generator.close)
            generator.check = stop.raise_if_set
            on_rank_zero(
                lambda: generator.launch(served_path(config, source))
            )  # loads in the background while the policy is built
            policy = MegatronPolicy(
                config.policy,
                config.optimizer,
                source,
                seed=config.run.seed,
                total_steps=config.warmup.steps
                + progress.total_steps * (config.trainer.batch_size // config.trainer.mini_batch_size),
            )
            experiment = Experiment(
                config, space, chat, environment, dataset, policy, generator, progress, source, stop
            )
            if rank() == 0:
                plan = run_plan(config, world=dist.get_world_size())
                experiment.plan = plan.as_json()
                progress.message(brief(plan))
            restored = resume is not None and experiment.restore()
            if experiment.warmup_step >= config.warmup.steps:
                experiment.freeze_reference()
            if rank() == 0:
                experiment.metrics = stack.enter_context(
                    MetricsLog(
                        space.folder,
                        resume_from=(experiment.warmup_step, experiment.step) if resume is not None else None,
                    )
                )
            on_rank_zero(generator.wait_ready)
            if restored:
                progress.message(f"resumed after step {experiment.step} (weight version {experiment.version})")
                if experiment.version > 0:
                    experiment.serve_current()
        experiment.seconds["setup"] = experiment.seconds.get("setup", 0.0) + time.perf_counter() - started
        yield experiment


def _note_end(run_log: RunLog, error: BaseException | None) -> None:
    """Why the run ends before its end: standard error, where this is said as well, may be gone."""
    if error is not None and rank() == 0:
        run_log.write(f"{type(error).__name__}: {error}")


def _settle(config: Config, space: Workspace, dataset: Dataset, progress: RunProgress) -> Config:
    """The config with its length in steps, from the tasks that there are. Written down, so that a resumed run has the
    same length whatever becomes of the task file.
    """
    resolved = settled(config, len(dataset.train))
    progress.total_steps = steps_of(resolved, len(dataset.train))
    if resolved is not config:
        progress.message(
            f"{config.trainer.epochs} epochs of {len(dataset.train):,} training tasks, {config.trainer.batch_size} a"
            f" step: {progress.total_steps} steps"
        )
        on_rank_zero(lambda: write_text_atomic(space.config, to_yaml(resolved)))
    return resolved


def _open_folder(config: Config, resume: str | None, opened: list[Workspace]) -> str:
    opened.append(workspaces.reopen(resume) if resume is not None else workspaces.create(config))
    if resume is not None:
        write_text_atomic(opened[0].config, to_yaml(config))
    return str(opened[0].folder)
