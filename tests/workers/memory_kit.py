"""Measured allocator peaks of small policies, for the tests of the planner. Under torchrun:
``memory_kit.py '[CASE, ...]' OUT``, a result a rank.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pact_nemo.policy.config import OptimizerConfig, PolicyConfig
from pact_nemo.policy.distributed import exit_rank
from pact_nemo.policy.trees import Segment, TokenTree

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 8192}
NARROW = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "vocab_size": 1000, **HEADS}
DEEP = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "vocab_size": 4000,
    **HEADS,
    "num_key_value_heads": 4,
}
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    **HEADS,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192, "norm_topk_prob": True}
SHAPES = {"narrow": NARROW, "deep": DEEP, "wide": WIDE}


def make_model(family: str, shape: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A random Hugging Face model of ``family`` in ``folder``; its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    more = EXPERTS if family == "qwen3_moe" else {}
    config = AutoConfig.for_model(
        "llama" if family == "tied" else family, **shape, **more, tie_word_embeddings=family == "tied"
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def make_tree(prompt: int, response: int, trace: int, group: int, vocabulary: int) -> TokenTree:
    """``x -> {tau_1..K, h -> tau_1..K}`` with every token of taus and h scored."""
    draw = random.Random(0)

    def segment(length: int, parent: int, scored: bool) -> Segment:
        return Segment([draw.randrange(vocabulary) for _ in range(length)], parent, [scored] * length)

    segments = [segment(prompt, -1, False)] + [segment(response, 0, True) for _ in range(group)]
    if trace:
        segments += [segment(trace, 0, True)] + [segment(response, group + 1, True) for _ in range(group)]
    tree = TokenTree(segments)
    tree.streams = {"weight": torch.full((tree.num_scored,), 1.0 / tree.num_scored)}
    return tree


def loss_fn(logprob: torch.Tensor, streams: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return (streams["weight"] * (logprob + streams["entropy"])).sum(), {}


def peak_bytes(policy: Any, trees: list[TokenTree]) -> int:
    """Largest sum of live bytes that were allocated during a forward and backward pass, from every allocation and
    release of torch's allocator.

    What stands before (weights, gradient buffers, optimizer state) is not in it."""
    from torch.profiler import ProfilerActivity, profile

    from pact_nemo.policy import microbatches

    policy.update(trees, loss_fn, entropy=True)  # optimizer state and megatron's lasting buffers come into being
    for chunk in policy.wrapped:
        chunk.zero_grad_buffer()
    policy.optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        batches, _ = microbatches.local_batches(
            trees, policy.config, device=policy.device, bf16=policy.bf16, entropy=True
        )
        microbatches.run_schedule(policy.wrapped, batches, loss_fn, forward_only=False)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def state_bytes(policy: Any) -> dict[str, int]:
    """Bytes of this rank's weights, gradient buffers and optimizer state (step counters, 4 bytes a parameter tensor,
    left out).
    """
    params = [p for chunk in policy.chunks for p in chunk.parameters()]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in params}
    state = 0
    for part in policy.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                values = part.optimizer.state[param]
                state += sum(value.nbytes for key, value in values.items() if key != "step")
                shared = param.untyped_storage().data_ptr() in storages
                state += 0 if shared else param.nbytes  # float32 main weights
    buffers = sum(
        buffer.grad_data.nbytes
        for chunk in policy.wrapped
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
    )
    return {"weights": sum(p.nbytes for p in params), "gradients": buffers, "optimizer": state, "tensors": len(params)}


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Build the policy of ``case`` (family, shape, tree, policy) and measure it; collective."""
    from pact_nemo.policy.policy import MegatronPolicy

    folder = Path(case["folder"]) if "folder" in case else Path(tempfile.mkdtemp())
    config = (
        json.loads((folder / "config.json").read_text())
        if "folder" in case
        else make_model(case["family"], SHAPES[case["shape"]], folder)
    )
    settings = PolicyConfig(
        **{"micro_batch_tokens": 1 << 20, "logprob_chunk": 128, "init_timeout_s": 120, **case["policy"]}
    )
    policy = MegatronPolicy(settings, OptimizerConfig(), folder, seed=1, total_steps=2)
    trees = [make_tree(*case["tree"], vocabulary=config["vocab_size"]) for _ in range(case.get("trees", 1))]
    return {"hf": config, "peak": peak_bytes(policy, trees), **state_bytes(policy)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = [run(case) for case in json.loads(sys.argv[1])]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, results)
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(everyone))
    dist.barrier()
    exit_rank(0)
