"""Runs policies as told by a JSON file; started under torchrun by ``policy_kit.launch``. ``run_jobs`` does the same in
this process.

The file: {"out": path, "jobs": [{"name", "hf_path", "config": {...}, "optimizer": {...}, "trees": {...}, "actions":
[[verb, argument], ...]}]}. Every rank's answer to every action must agree; rank 0 writes them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from pact_nemo.checkpoints import resume
from pact_nemo.checkpoints.hf import export_version
from pact_nemo.checkpoints.megatron_bridge.reading import CheckpointWeights
from pact_nemo.checkpoints.megatron_bridge.writing import export_bridge_to
from pact_nemo.errors import NumericsError, PactError
from pact_nemo.policy import bridge, offload
from pact_nemo.policy import policy as policy_module
from pact_nemo.policy.config import LoraConfig, OptimizerConfig, PolicyConfig
from pact_nemo.policy.distributed import exit_rank
from pact_nemo.policy.export import writer as export_writer
from pact_nemo.policy.export.layout import LayoutSettings
from pact_nemo.policy.model_source import ModelSource
from pact_nemo.policy.policy import MegatronPolicy
from tests.workers.pact_kit import make_pact_trees, pact_terms
from tests.workers.policy_kit import loss_fn, make_trees


def broken_loss(
    logprob: torch.Tensor, streams: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Infinite for the one token with the largest weight, so that a single rank sees it."""
    loss, metrics = loss_fn(logprob, streams)
    bad = (streams["weight"] > 0.999 * streams["top"]).float().sum()
    return loss + torch.where(bad > 0, torch.tensor(float("inf")), torch.tensor(0.0)), {
        **metrics,
        "bad": bad / (1.0 - bad),
    }


def perform(policy: MegatronPolicy, trees: list[Any], verb: str, argument: Any) -> Any:
    if verb == "logprobs":
        return [row.tolist() for row in policy.logprobs(trees)]
    if verb == "entropies":
        return [row.tolist() for row in policy.logprobs_and_entropies(trees)[1]]
    if verb == "reference":
        return [row.tolist() for row in policy.reference_logprobs(trees)]
    if verb == "update":
        result = policy.update(trees, loss_fn)
        return {**vars(result), "logprobs": [row.tolist() for row in result.logprobs]}
    if verb == "pact_update":  # old log-probs near the policy's own, so that some ratios are clipped and none explodes
        batch = make_pact_trees(argument)
        for tree, now in zip(batch, policy.logprobs(batch), strict=True):
            tree.streams["old_logprobs"] = now + tree.streams["old_logprobs"] + 5.5
        result = policy.update(batch, pact_terms, entropy=True)
        rows = {name: [row.tolist() for row in getattr(result, name)] for name in ("logprobs", "entropies")}
        return {**vars(result), **rows}
    if verb == "gradient_cosine":
        return policy.gradient_cosine(trees[::2], trees[1::2], loss_fn)
    if verb == "broken_update":
        top = max(float(tree.streams["weight"].max()) for tree in trees)
        for tree in trees:
            tree.streams["top"] = torch.full((tree.num_scored,), top)
        try:
            policy.update(trees, broken_loss)
        except NumericsError as error:
            return str(error)
        finally:
            for tree in trees:
                del tree.streams["top"]
        return None
    if verb == "export":
        return sorted(policy.export_hf(Path(argument), dtype="float32"))
    if verb == "export_bridge":
        return export_bridge_to(policy, argument, version=1).name
    if verb == "digest":  # of all weights in Hugging Face's names, whatever the layout
        return weights_digest(policy)
    if verb == "adapter":
        Path(argument).mkdir(exist_ok=True)
        return policy.export_adapter(argument)
    if verb == "load_reference":
        return policy.load_reference(argument)
    if verb == "export_version":
        return export(policy, **argument)
    if verb == "away":
        return away(policy, **argument)
    if verb == "save":
        return str(resume.save(policy, argument, {"note": policy.step}))
    if verb == "load":
        return resume.load(policy, argument)
    raise ValueError(verb)


def weights_digest(policy: MegatronPolicy) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(
        (name, tensor.clone()) for name, tensor in bridge.export_weights(policy.bridge, policy.chunks)
    ):
        digest.update(name.encode() + tensor.float().numpy().tobytes())
    return digest.hexdigest()


def away(policy: MegatronPolicy, *, weights: bool) -> Any:
    """Release and restore: whether anything was copied, every storage was given back, and all bits came back."""
    with mock.patch.object(offload, "SMALLEST", 100):  # the models are tiny
        memory = offload.trainer_memory(policy.wrapped, policy.optimizer, weights=weights)
    before = [view.clone() for view in memory.copied]
    memory.release()
    empty = all(view.untyped_storage().nbytes() == 0 for view in memory.copied)
    memory.restore()
    same = all(torch.equal(now, then) for now, then in zip(memory.copied, before, strict=True))
    return [bool(before), empty, same]


def export(
    policy: MegatronPolicy,
    root: str,
    version: int,
    *,
    dtype: str = "float32",
    file_bytes: int = 40_000,
    full_rank: int | None = None,
) -> Any:
    """Versioned export in small files, by as many ranks as there are; ``full_rank``'s disk is full. What became
    visible, or the error.
    """
    sizes = partial(LayoutSettings, min_writer_bytes=1, file_bytes=file_bytes)
    full = mock.patch.object(export_writer, "_write", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with (
        mock.patch.object(policy_module, "LayoutSettings", sizes),
        full if full_rank == dist.get_rank() else contextlib.nullcontext(),
    ):
        try:
            folder = export_version(policy, root, version, dtype=dtype)
        except PactError as error:
            dist.barrier()  # rank 0 removes the temporary folder once it has heard of the error
            return [
                type(error).__name__,
                "No space left on device" in str(error),
                sorted(path.name for path in Path(root).iterdir()),
            ]
    return [folder.name, len(list(folder.glob("*.safetensors")))]


def refusal(job: dict[str, Any]) -> list[list[str]]:
    """What every rank says of a folder that no policy can be built from: [type, message] by rank. ``job["refused"]``
    may name a weight that gets lost between the folder's check and the load."""
    original = policy_module.bridge.check_model_folder

    def check(path: Any) -> Any:
        folder = original(path)
        folder.entries.pop(job["refused"], None)
        return folder

    try:
        with mock.patch.object(policy_module.bridge, "check_model_folder", check):
            make_policy(job)
        answer = ["", "built"]
    except PactError as error:
        answer = [type(error).__name__, str(error)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, answer)
    return everyone


def make_policy(job: dict[str, Any]) -> MegatronPolicy:
    config = dict(job.get("config", {}))
    if "lora" in config:
        config["lora"] = LoraConfig(**config["lora"])
    further = dict(job.get("policy", {}))
    if "checkpoint" in job:
        further["weights"] = CheckpointWeights(ModelSource(Path(job["hf_path"]), Path(job["checkpoint"])))
    return MegatronPolicy(
        PolicyConfig(
            **{
                "precision": "fp32",
                "micro_batch_tokens": 96,
                "logprob_chunk": 16,
                "init_timeout_s": 120,
                **config,
            }
        ),
        OptimizerConfig(**{"lr": 1e-3, "weight_decay": 0.01, "eps": 1e-5, **job.get("optimizer", {})}),
        job["hf_path"],
        seed=1,
        total_steps=4,
        **further,
    )


def run_jobs(jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Answers to each job's actions by job name; collective."""
    results: dict[str, Any] = {}
    for job in jobs:
        if "refused" in job:
            results[job["name"]] = refusal(job)
            continue
        trees = make_trees(**job.get("trees", {"count": 6}))
        policy = make_policy(job)
        answers: list[Any] = []
        for verb, argument in job["actions"]:
            answer = perform(policy, trees, verb, argument)
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, answer)
            assert all(json.dumps(other) == json.dumps(answer) for other in everyone), (
                f"{job['name']} {verb}: ranks disagree: {everyone}"
            )
            answers.append(answer)
        results[job["name"]] = answers
    return results


def main() -> None:
    torch.set_num_threads(1)
    spec = json.loads(Path(sys.argv[1]).read_text())
    results = run_jobs(spec["jobs"])
    if dist.get_rank() == 0:
        Path(spec["out"]).write_text(json.dumps(results))
    dist.barrier()
    exit_rank(0)


if __name__ == "__main__":
    main()
