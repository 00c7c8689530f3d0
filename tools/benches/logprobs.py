"""Log-probs of given tokens over a large vocabulary, forward and backward: ``policy/heads.py`` against the whole matrix
of logits at once.

Memory: the peak of the loss's forward and backward pass over what the weight and its gradient take (they are the
model's), hidden states included, divided by the hidden states plus one chunk of logits; at ``--tokens`` scored tokens.
Each measurement is a process of its own that has run a small one before; resident set, sampled every millisecond (on a
GPU the allocator's own peak). Time: against ``F.linear``, ``log_softmax``, ``gather`` and autograd on
``--unchunked-tokens`` tokens, as many as fit at once; interleaved. ``ratio`` is the largest memory ratio over the
vocabularies, ``time_ratio`` the largest time ratio.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from pact_nemo.policy.config import PolicyConfig
from pact_nemo.policy.heads import vocab_parallel_logprobs
from tools.benches.kit import PeakMemory, interleaved, median_ratio, report, seconds

MEMORY_GOAL, TIME_GOAL = 1.2, 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--unchunked-tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=PolicyConfig().logprob_chunk, help="policy.logprob_chunk")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--rounds", type=int, default=5)


class Head:
    """Weight, its main gradient and targets of one size, and the two ways to a gradient."""

    def __init__(self, tokens: int, hidden: int, vocabulary: int, chunk: int, dtype: str):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        generator = torch.Generator().manual_seed(0)
        self.shape, self.dtype, self.chunk, self.vocabulary = (tokens, hidden), getattr(torch, dtype), chunk, vocabulary
        weight = torch.randn(vocabulary, hidden, generator=generator).mul_(hidden**-0.5)
        self.weight = weight.to(self.device, self.dtype).requires_grad_()
        self.main_grad = torch.zeros(vocabulary, hidden, device=self.device)
        self.target = torch.randint(0, vocabulary, (tokens,), generator=generator).to(self.device)

    def hidden_states(self) -> torch.Tensor:
        """A tensor in the middle of a graph, as the policy's are; the gradient goes on to its one row."""
        row = torch.ones(1, self.shape[1], dtype=self.dtype, device=self.device).requires_grad_()
        return row.expand(self.shape).contiguous()

    def chunked(self, hidden: torch.Tensor) -> torch.Tensor:
        """As the policy calls it: gradients in place and in the main gradient."""
        values = vocab_parallel_logprobs(
            hidden,
            self.weight,
            self.target,
            vocab_size=self.vocabulary,
            chunk=self.chunk,
            overwrite_hidden=True,
            main_grad=self.main_grad,
        )
        values.sum().backward()
        return values

    def whole(self, hidden: torch.Tensor) -> torch.Tensor:
        """All logits at once; the weight's gradient goes to the main gradient, as megatron's hook adds it."""
        logits = F.linear(hidden, self.weight).float()
        values = logits.log_softmax(-1).gather(1, self.target[:, None])[:, 0]
        del logits
        values.sum().backward()
        assert self.weight.grad is not None
        self.main_grad += self.weight.grad
        self.weight.grad = None
        return values

    def timed(self, way: Callable[[torch.Tensor], torch.Tensor]) -> float:
        hidden = self.hidden_states()
        return seconds(lambda: way(hidden))


def peak_bytes(tokens: int, hidden: int, vocabulary: int, chunk: int, dtype: str) -> int:
    """Peak of one forward and backward pass over the weight and its gradient; in a process of its own."""
    small = Head(2 * chunk, hidden, 1024, chunk, dtype)
    small.chunked(small.hidden_states())
    head = Head(tokens, hidden, vocabulary, chunk, dtype)
    if head.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        head.chunked(head.hidden_states())
        return torch.cuda.max_memory_allocated() - before
    head.main_grad += 0.0  # pages that the system hands out only when they are written
    with PeakMemory() as memory:
        head.chunked(head.hidden_states())
    return memory.bytes


def run(options: argparse.Namespace) -> int:
    rows = []
    width = getattr(torch, options.dtype).itemsize
    logit = 4 if width == 4 else 4 + width
    for vocabulary in options.vocabularies:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(peak_bytes, (options.tokens, options.hidden, vocabulary, options.chunk, options.dtype))
        floor = options.tokens * options.hidden * width + options.chunk * vocabulary * logit
        head = Head(options.unchunked_tokens, options.hidden, vocabulary, options.chunk, options.dtype)
        times = interleaved(
            options.rounds, {"chunked": partial(head.timed, head.chunked), "whole": partial(head.timed, head.whole)}
        )
        ratio, spread = median_ratio(times["chunked"], times["whole"])
        rows.append(
            {
                "vocabulary": vocabulary,
                "peak_mb": peak / 1e6,
                "hidden_and_chunk_mb": floor / 1e6,
                "memory_ratio": peak / floor,
                "all_logits_mb": options.tokens * vocabulary * 4 / 1e6,
                "chunked_s": statistics.median(times["chunked"]),
                "whole_s": statistics.median(times["whole"]),
                "time_ratio": ratio,
                "time_from": spread[0],
                "time_to": spread[1],
            }
        )
    result: dict[str, Any] = {
        "time_ratio": max(row["time_ratio"] for row in rows),
        "time_goal": f"<= {TIME_GOAL}",
        "chunk": options.chunk,
        "dtype": options.dtype,
        "ratio": max(row["memory_ratio"] for row in rows),
        "goal": f"<= {MEMORY_GOAL}",
    }
    report(
        options,
        f"{options.tokens} tokens for memory, {options.unchunked_tokens} for time, hidden {options.hidden}",
        rows,
        result,
    )
    return 0
