"""When a run saves, goes on and ends before its end."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pact_nemo.checkpoints import kl_reference, resume, resume_folders
from pact_nemo.config.schema import Config
from pact_nemo.errors import Interrupted, PactError
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.runtime.collective import on_rank_zero
from pact_nemo.runtime.files import remove_unfinished
from pact_nemo.runtime.interrupt import StopRequest
from pact_nemo.tracking.run_folder import Workspace
from pact_nemo.tracking.terminal import RunProgress
from pact_nemo.training.served_weights import ServedWeights, tidy
from pact_nemo.training.state import RunState

log = logging.getLogger(__name__)


@dataclass
class Checkpointer:
    """Checkpoints of one run. Every method is collective.

    Attributes:
        saving: a checkpoint that is being written beside the steps.
    """

    config: Config
    workspace: Workspace
    policy: MegatronPolicy
    weights: ServedWeights
    state: RunState
    progress: RunProgress
    stop: StopRequest
    saving: resume.BackgroundSave | None = None

    def due(self) -> bool:
        """Whether the step that was finished is one to save: every ``trainer.checkpoint_every`` steps and the last."""
        trainer, step = self.config.trainer, self.state.step
        return step == trainer.steps or bool(trainer.checkpoint_every and step % trainer.checkpoint_every == 0)

    def in_trainers_turn(self) -> None:
        """Begin to save a finished step, where one is due, while the trainer has the memory that it shares with the
        engines: they need not sleep for it again. :meth:`after_step` makes the checkpoint visible, once the step is
        recorded. Where nothing is shared nothing is done.
        """
        if not self.weights.sharing.on or not self.due() or on_rank_zero(self._path().exists):
            return
        start = time.perf_counter()
        with self.progress.phase("checkpoint", brief=True):
            self.finish_saving(wait=True)
            self.saving = resume.BackgroundSave(self.policy, self.workspace.checkpoints, self.state.as_row())
        self.state.spend("checkpoint", time.perf_counter() - start)

    def after_step(self) -> None:
        """Save where one is due, or finish what :meth:`in_trainers_turn` began."""
        trainer, step = self.config.trainer, self.state.step
        background = trainer.async_checkpoint and step != trainer.steps
        begun = self.saving is not None and self.saving.final == self._path()
        if begun:
            assert self.saving is not None
            self.saving.renew(self.state.as_row())
        self.finish_saving(wait=begun and not background)
        if self.due() and not begun:
            with self.progress.phase("checkpoint", brief=True):
                self.save(background=background)

    def _path(self) -> Path:
        return resume_folders.checkpoint_path(self.workspace.checkpoints, self.policy.step)

    def save(self, *, background: bool = False) -> None:
        """Save now, or start to, then delete all but the newest ``trainer.keep_checkpoints``."""
        start = time.perf_counter()
        self.finish_saving(wait=True)
        if on_rank_zero(self._path().exists):
            return  # nothing has been trained since; what stands under a checkpoint's name is whole
        self.weights.sharing.trainer()
        if background:
            self.saving = resume.BackgroundSave(self.policy, self.workspace.checkpoints, self.state.as_row())
        else:
            resume.save(self.policy, self.workspace.checkpoints, self.state.as_row())
            self._prune()
        self.state.spend("checkpoint", time.perf_counter() - start)

    def finish_saving(self, *, wait: bool) -> None:
        """Make a checkpoint that was written in the background visible, once it is whole; ``wait`` for that."""
        if self.saving is None or not (wait or self.saving.finished()):
            return
        saving, self.saving = self.saving, None
        saving.finish()
        self._prune()

    def _prune(self) -> None:
        folder, keep = self.workspace.checkpoints, self.config.trainer.keep_checkpoints
        on_rank_zero(lambda: tidy(lambda: resume_folders.prune(folder, keep), self.progress.message))

    def restore(self) -> bool:
        """Continue from the newest complete checkpoint; torn newer ones are removed with a warning. False when there is
        none: the run starts from its beginning.

        Raises:
            CheckpointError: the checkpoint belongs to another seed or model, was annealed by another kind of clock, or
                has another warm-up than RL is to start after: the KL reference would be another one.
        """
        folder = on_rank_zero(self._newest)
        if folder is None:
            on_rank_zero(lambda: self.weights.forget_exports_after(-1))
            return False
        self.state.load(resume.load(self.policy, folder), str(folder))
        wanted, done = self.config.warmup.steps, self.state.warmup_step
        self.policy.unscheduled = done  # a warm-up step is one update, and has warmup.lr
        kl_reference.check_warmup(folder, wanted=wanted, done=done, rl_steps=self.state.step)
        if self.config.policy.fp8 == "delayed":
            self.progress.message(
                "policy.fp8=delayed: what its scales look back on is in no checkpoint, so they begin anew and the"
                " resumed run is not the uncut one to the bit"
            )
        on_rank_zero(lambda: self.weights.forget_exports_after(self.state.version))
        return True

    def _newest(self) -> Path | None:
        root = self.workspace.checkpoints
        resume_folders.remove_unfinished(root)
        # exports that were cut off: the final one, the reference
        for place in (self.workspace.folder, self.weights.reference_path.parent):
            if place.is_relative_to(self.workspace.folder):
                remove_unfinished(place)
        folder = resume_folders.latest_complete(root)
        for step in resume_folders.steps(root):
            torn = resume_folders.checkpoint_path(root, step)
            if folder is None or torn.name > folder.name:
                log.warning("removing %s: it is not complete", torn)
                shutil.rmtree(torn)
        return folder

    def leave_if_asked(self) -> None:
        """Between two steps: if a rank was asked to stop, checkpoint and raise.

        Raises:
            Interrupted: says how to go on.
        """
        if self.stop.agreed():
            self.leave()

    def leave(self) -> NoReturn:
        """Checkpoint what is finished and raise Interrupted."""
        state = self.state
        self.weights.sharing.trainer(end=True)
        done = f"after step {state.step}" if state.step else f"after warm-up step {state.warmup_step}"
        if self.policy.step > 0:
            self.save()
            done += ", which is checkpointed"
        else:
            done = "before the first step"
        self.finish_saving(wait=True)
        raise Interrupted(f"{self.stop.name}: stopped {done}; go on with --resume {self.workspace.folder}")

    def give_up(self, problem: PactError) -> NoReturn:
        """Checkpoint what is finished and raise the problem, of the same type, with how to go on."""
        self.weights.sharing.trainer(end=True)
        remedy = ""
        if self.policy.step > 0:
            self.save()
            remedy = f"\nWhat was finished before is checkpointed: go on with --resume {self.workspace.folder}"
        self.finish_saving(wait=True)
        raise type(problem)(f"step {self.state.step + 1}: {problem}{remedy}") from problem
