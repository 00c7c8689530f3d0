"""The weights that the rollout servers have: exports, refits and the frozen KL reference."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pact_nemo.checkpoints import kl_reference
from pact_nemo.checkpoints.adapter_exports import is_adapter
from pact_nemo.checkpoints.embedded import materialise_embedded_model
from pact_nemo.checkpoints.failures import delete_folder
from pact_nemo.checkpoints.hf import export_version
from pact_nemo.checkpoints.manifest import export_path, prune_exports, read_manifest, verify_manifest
from pact_nemo.checkpoints.megatron_bridge.hf_copy import copy_as_hf
from pact_nemo.checkpoints.megatron_bridge.reading import CheckpointWeights
from pact_nemo.checkpoints.quantised import materialise
from pact_nemo.config.lora import refit_kind
from pact_nemo.config.schema import Config
from pact_nemo.errors import CheckpointError
from pact_nemo.policy.config import ADAPTER
from pact_nemo.policy.export.fp8_block import FP8_BLOCK
from pact_nemo.policy.model_folder import check_model_folder
from pact_nemo.policy.model_source import model_source
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.runtime.collective import on_rank_zero
from pact_nemo.serving.launch import on_cuda
from pact_nemo.tracking.run_folder import Workspace
from pact_nemo.training.generation import Generator
from pact_nemo.training.state import RunState
from pact_nemo.training.time_sharing import TimeSharing

log = logging.getLogger(__name__)


def model_path(config: Config) -> Path:
    """The HF folder to start from: the user's, or a copy in the cache of their Megatron-Bridge checkpoint or of the
    embedded model. Collective.
    """
    if config.model.path is not None:
        source = model_source(config.model.path, config.model.hf_config)
        if source.checkpoint is None:
            return source.described
        return copy_as_hf(source, Path(config.run.cache_dir), config.policy, seed=config.run.seed)
    return on_rank_zero(lambda: materialise_embedded_model(Path(config.run.cache_dir)))


def weights_elsewhere(config: Config) -> CheckpointWeights | None:
    """What the policy reads its weights from where that is no HF folder."""
    if config.model.path is None:
        return None
    source = model_source(config.model.path, config.model.hf_config)
    return CheckpointWeights(source) if source.checkpoint is not None else None


def served_path(config: Config, source: Path) -> Path:
    """The HF folder that rollout servers start from, on one rank only: ``source``, or where it or the refits are FP8, a
    copy of it in the cache that has the refits' dtype."""
    dtype = config.rollout.export_dtype
    if config.trainer.replay is not None or not (dtype == FP8_BLOCK or check_model_folder(source).quantised):
        return source
    return materialise(source, Path(config.run.cache_dir), dtype)


@dataclass
class ServedWeights:
    """Exports of a run's policy, and the servers that load them. A replayed run has no server.

    Attributes:
        source: the HF folder that the run starts from.
        note: shows a line to the user.
    """

    config: Config
    workspace: Workspace
    policy: MegatronPolicy
    generator: Generator
    source: Path
    state: RunState
    note: Callable[[str], None]
    sharing: TimeSharing

    def export(self, version: int) -> Path:
        """Write the current weights, or the adapters alone (``rollout.lora_refit``), as ``exports/v<version>``:
        complete and checksummed before the folder has its name.
        """
        self.sharing.trainer(drop=True)
        folder = export_path(self.workspace.exports, version)

        kind = refit_kind(self.config, cuda=on_cuda(self.config.rollout.server))

        def is_there() -> bool:
            """A whole export of this version; :meth:`forget_exports_after` removed those that an earlier attempt wrote
            after its last checkpoint. One of the other kind (the run is resumed with another ``rollout.lora_refit``) is
            removed here.
            """
            if not folder.exists():
                return False
            if is_adapter(verify_manifest(folder, expect_version=version)) == (kind == ADAPTER):
                return True
            delete_folder(folder, "the version is exported again")
            return False

        if not on_rank_zero(is_there):
            dtype = self.config.rollout.export_dtype
            export_version(self.policy, self.workspace.exports, version, kind=kind, dtype=dtype)
        return folder

    def refit(self, exported: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Export, then make the servers load it. A replayed run only counts the version.

        Args:
            exported: called in between, while the trainer still has the memory that both share.

        Returns:
            seconds by part, of the slowest server: ``refit/export``, ``verify``, ``pause``, ``reload``, ``finish``;
            ``refit/bytes``; and what became of servers since the last refit: ``server/restarts``, ``rollout/reissued``.
        """
        self.state.version += 1
        if self.config.trainer.replay is not None:
            return {}
        start = time.perf_counter()
        version = self.state.version
        folder = self.export(version)
        export_s = time.perf_counter() - start
        exported()

        def reload() -> dict[str, float]:
            reports = self.generator.refit(folder, version)
            keep = self.config.rollout.keep_exports
            tidy(lambda: prune_exports(self.workspace.exports, keep=keep, protect={version}), self.note)
            parts = {
                f"refit/{part}": max(getattr(report, f"{part}_s") for report in reports)
                for part in ("verify", "pause", "reload", "finish")
            }
            counts = self.generator.counts()
            return {"refit/export": export_s, **parts, "refit/bytes": float(reports[0].bytes), **counts}

        with self.sharing.loading():
            return on_rank_zero(reload)

    def serve_current(self) -> None:
        """After a resume: make the servers load the restored weights before they answer anything."""
        if self.config.trainer.replay is not None:
            return
        folder, version = self.export(self.state.version), self.state.version
        with self.sharing.loading():
            on_rank_zero(lambda: self.generator.refit(folder, version))

    @property
    def reference_path(self) -> Path:
        """The frozen KL reference: the policy that RL starts from; where there is a warm-up, its result, kept in full
        precision.
        """
        return kl_reference.reference_of(self.workspace.folder) if self.config.warmup.steps > 0 else self.source

    def freeze_reference(self) -> None:
        """Keep the policy that RL starts from for the KL term; written once, so that a resumed run reads the same
        one.

        Raises:
            CheckpointError: RL has begun, and the reference is missing or of another warm-up.
        """
        if self.config.objective.kl_coef == 0:
            return
        self.sharing.trainer()
        path, steps, rl_steps = self.reference_path, self.config.warmup.steps, self.state.step
        if steps and not on_rank_zero(lambda: kl_reference.stands(path, warmup_steps=steps, rl_steps=rl_steps)):
            facts = {kl_reference.WARMUP_STEPS: steps}
            export_version(self.policy, path.parent, 0, dtype=self.policy.weight_dtype, extra=facts)
        self.policy.load_reference(path)

    def forget_exports_after(self, version: int) -> None:
        """Remove what an attempt wrote after the checkpoint that the run goes on from: the same version numbers will be
        other weights. Likewise the KL reference, where the warm-up has still to end.
        """
        if self.state.warmup_step < self.config.warmup.steps and self.reference_path.exists():
            delete_folder(self.reference_path, "the KL reference is made again")
        for folder in (*self.workspace.exports.glob("v*"), *self.workspace.results):
            if not folder.exists():
                continue
            try:
                newer = read_manifest(folder).version > version
            except CheckpointError:
                newer = True
            if newer:
                log.warning("removing %s: it is newer than the checkpoint", folder)
                shutil.rmtree(folder)


def tidy(delete: Callable[[], object], note: Callable[[str], None]) -> None:
    """Delete what is old. That it can't be done, or must not (the newest is not whole), is said and ends no run: the
    old ones stay.
    """
    try:
        delete()
    except CheckpointError as error:
        note(f"nothing old was deleted: {error}")
