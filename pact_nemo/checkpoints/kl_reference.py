"""The frozen KL reference of a run with a warm-up: the policy that RL starts from, and which warm-up it is of."""

from __future__ import annotations

from pathlib import Path

from pact_nemo.checkpoints.failures import delete_folder
from pact_nemo.checkpoints.manifest import export_path, read_manifest
from pact_nemo.errors import CheckpointError

WARMUP_STEPS = "warmup_steps"  #: a fact of its manifest: after how many warm-up steps it was made


def reference_of(run_folder: Path) -> Path:
    """Where a run with a warm-up has its reference."""
    return export_path(run_folder / "reference", 0)


def check_warmup(folder: Path, *, wanted: int, done: int, rl_steps: int) -> None:
    """Whether a checkpoint can be gone on from with this warm-up.

    Args:
        folder: the checkpoint, for messages.
        wanted: ``warmup.steps``.
        done: warm-up steps that the checkpoint has.
        rl_steps: RL steps that it has.

    Raises:
        CheckpointError: it has more warm-up steps, or RL has begun after fewer: the KL reference would be another one.
    """
    if done > wanted:
        more = "" if rl_steps else " or more"
        raise CheckpointError(f"{folder} has {done} warm-up steps; resume with warmup.steps={done}{more}")
    if rl_steps and done < wanted:
        raise CheckpointError(
            f"warmup.steps={wanted}: {folder} has {rl_steps} RL steps after {done} warm-up steps, and the warm-up comes"
            f" before RL; resume with warmup.steps={done}, or start a new run"
        )


def stands(folder: Path, *, warmup_steps: int, rl_steps: int) -> bool:
    """Whether the reference is there. Before RL one of another warm-up is deleted, to be made again. To be called on
    one rank.

    Args:
        folder: of the reference.
        warmup_steps: steps of the warm-up that RL starts after.
        rl_steps: finished RL steps. From the first on nothing but the folder has the reference.

    Raises:
        CheckpointError: RL has begun, and the reference is missing or of another warm-up.
    """
    if not folder.exists():
        if rl_steps:
            raise CheckpointError(
                f"objective.kl_coef is above 0 and {folder} is missing: the KL reference is the policy after"
                f" warmup.steps={warmup_steps}, and the run is {rl_steps} RL steps past it; bring that folder back,"
                " resume with objective.kl_coef=0, or start a new run"
            )
        return False
    # an older version of this package says nothing: before RL it is made again, later it is what there is
    made_after = read_manifest(folder).extra.get(WARMUP_STEPS, warmup_steps if rl_steps else None)
    if made_after == warmup_steps:
        return True
    if rl_steps:
        raise CheckpointError(
            f"{folder} is the policy after {made_after} warm-up steps, RL began after warmup.steps={warmup_steps}:"
            " bring the right folder back, resume with objective.kl_coef=0, or start a new run"
        )
    delete_folder(folder, "the KL reference is made again")
    return False
