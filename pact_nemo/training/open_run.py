"""From a config to a run, and back to a clean machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pact_nemo.chat.template import ChatFormat
from pact_nemo.config.schema import Config, settled, steps_of, takes_turns, to_dict, to_yaml
from pact_nemo.data.dataset import Dataset, build_dataset
from pact_nemo.data.tasks import build_environment, check_batches
from pact_nemo.planning.from_config import engine_share, plan_in_one_line, run_plan
from pact_nemo.policy.distributed import init_distributed
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.preflight.chat import chat_format
from pact_nemo.preflight.checks import check_room, preflight
from pact_nemo.preflight.lengths import lengths_of
from pact_nemo.preflight.nodes import look_at_host, look_at_links
from pact_nemo.runtime.collective import on_rank_zero, rank
from pact_nemo.runtime.files import write_json_atomic, write_text_atomic
from pact_nemo.runtime.interrupt import StopRequest, stop_request
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.runtime.terminal import RunLog, guarded_output, on_loss
from pact_nemo.serving.launch import on_cuda
from pact_nemo.traces.schema import write_traces
from pact_nemo.tracking import run_folder
from pact_nemo.tracking.registry import check_trackers, open_trackers
from pact_nemo.tracking.run_folder import Workspace
from pact_nemo.tracking.terminal import RunProgress
from pact_nemo.training.generation import Generator
from pact_nemo.training.run import TrainingRun
from pact_nemo.training.served_weights import model_path, served_path, weights_elsewhere
from pact_nemo.training.state import check_resume
from pact_nemo.training.time_sharing import TimeSharing


@contextmanager
def open_run(config: Config, resume: str | None) -> Iterator[TrainingRun]:
    """Build everything, start the rollout server, restore a checkpoint when resuming; stop and release it all at the
    end, however it ends.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(guarded_output())
        init_distributed(config.policy.init_timeout_s)
        stop = stack.enter_context(stop_request())
        on_rank_zero(lambda: check_trackers(config.tracking.trackers))
        space = _open_folder(stack, config, resume)
        log = RunLog(space.run_log)
        stack.callback(log.close)
        stack.push(lambda kind, error, trace: _note_end(log, error))
        stack.enter_context(on_loss(lambda text: log.write(f"rank {rank()}: {text}; the run goes on")))
        steps = config.trainer.steps or 0
        progress = stack.enter_context(RunProgress(total_steps=steps, enabled=rank() == 0, log=log))
        progress.message(f"run folder {space.folder}")
        with progress.phase("set-up"):
            if config.policy.check_links:
                look_at_links(config, progress.message)
            look_at_host(config)
            on_rank_zero(space.check_exports)
            if resume is None:
                on_rank_zero(lambda: check_room(config))
            run = _build(stack, config, space, progress, stop)
            _begin(stack, run, resumed=resume is not None)
        run.state.spend("setup", time.perf_counter() - started)
        yield run


def _open_folder(stack: ExitStack, config: Config, resume: str | None) -> Workspace:
    """The run folder, made anew or opened again; rank 0's object holds its lock."""
    opened: list[Workspace] = []

    def make() -> str:
        opened.append(run_folder.reopen(resume) if resume is not None else run_folder.create(config))
        opened[0].take_logs()
        if resume is not None:
            opened[0].set_summary_aside(config)
            write_text_atomic(opened[0].config, to_yaml(config))
        return str(opened[0].folder)

    folder = on_rank_zero(make)
    space = opened[0] if opened else Workspace(Path(folder))
    space.place_exports(config.rollout.exports_dir)
    return space


def _build(stack: ExitStack, config: Config, space: Workspace, progress: RunProgress, stop: StopRequest) -> TrainingRun:
    """Check, read the data, and build policy and generation. On a CPU the servers load while the policy is built."""
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
            count, files = len(quarantine), quarantine.by_file()
            progress.message(f"{count} bad rows were left out ({files}), kept with their errors in {bad}")
    config = _settle(config, space, dataset, progress)
    check_batches(config, dataset.train, dataset.warmup_tasks(config.warmup.max_tasks), quarantine)
    on_rank_zero(lambda: check_resume(config, space))
    if rank() == 0:
        write_traces(space.traces, list(dataset.traces.values()))
        names: Callable[[], dict[str, Any]] = getattr(environment, "shown_names", dict)
        if table := names():
            write_json_atomic(space.names, table)
            progress.message(f"the model sees some tools or arguments under other names: {space.names}")
    plan = _plan(config, chat, dataset, progress)  # before the servers load: on a CPU it measures this machine
    served = _as_served(config)
    generator = Generator(served, chat, environment, progress, space.server_log)
    stack.callback(generator.close)
    generator.check = stop.raise_if_set
    generator.launch(on_rank_zero(lambda: served_path(config, source)), space.exports)
    sharing = TimeSharing(generator, progress, on=bool(served.rollout.server.time_sharing))
    if sharing.on or generator.measures_memory:  # the policy needs what an engine finds free as it starts
        on_rank_zero(generator.wait_ready)
    if sharing.on:
        sharing.before_policy()
    updates = progress.total_steps * (config.trainer.batch_size // config.trainer.mini_batch_size)
    policy = MegatronPolicy(
        config.policy,
        config.optimizer,
        source,
        seed=config.run.seed,
        total_steps=updates,
        weights=weights_elsewhere(config),
    )
    sharing.built(policy)
    run = TrainingRun(config, space, chat, environment, dataset, policy, generator, progress, source, stop, sharing)
    run.plan = plan
    return run


def _plan(config: Config, chat: ChatFormat, dataset: Dataset, progress: RunProgress) -> dict[str, Any] | None:
    """Memory and time that the run should take, said in one line; on rank 0 alone."""
    if rank() != 0:
        return None
    plan = run_plan(config, world=dist.get_world_size(), lengths=lengths_of(config, chat, dataset))
    progress.message(plan_in_one_line(plan))
    return plan.as_json()


def _as_served(config: Config) -> Config:
    """The config as the engines are started: whether they take turns with the trainer, and what of a GPU they get."""
    server = config.rollout.server
    cuda = server.url is None and on_cuda(server)
    sharing = takes_turns(config, cuda=cuda)
    share = engine_share(config, dist.get_world_size()) if sharing and cuda else server.gpu_memory_utilization
    server = replace(server, time_sharing=sharing, gpu_memory_utilization=share)
    return replace(config, rollout=replace(config.rollout, server=server))


def _begin(stack: ExitStack, run: TrainingRun, *, resumed: bool) -> None:
    """Restore what there is, open the metrics, and wait until the servers have the weights to begin with."""
    config, state = run.config, run.state
    restored = resumed and run.checkpoints.restore()
    if state.warmup_step >= config.warmup.steps:
        run.weights.freeze_reference()
    if rank() == 0:
        done = (state.warmup_step, state.step) if resumed else None
        trackers = open_trackers(
            run.workspace.folder, to_dict(config), resume_from=done, scores=state.scores, say=run.progress.message
        )
        run.recorder.trackers = stack.enter_context(trackers)
    if not run.sharing.on:
        on_rank_zero(run.generator.wait_ready)
    if restored:
        run.progress.message(f"resumed after step {state.step} (weight version {state.version})")
        if state.version > 0:
            run.weights.serve_current()


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
