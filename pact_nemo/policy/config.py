"""Settings of the policy: parallel layout, precision, memory and optimizer. Every default has its one home here."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass, field

from pact_nemo.config.ranges import check_ranges
from pact_nemo.errors import ConfigError

PRECISIONS = ("auto", "fp32", "bf16")
RECOMPUTE = ("none", "full", "selective")
ATTENTION = ("auto", "tree_sdpa", "te")
LR_SCHEDULES = ("constant", "linear", "cosine")
#: a matrix that may have an adapter, and what a Hugging Face model calls it or its parts
LORA_MATRICES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
LORA_TARGETS = tuple(LORA_MATRICES)
#: what is exported of a policy with adapters: they alone, or the whole model with them in it
ADAPTER, MERGED = "adapter", "merged"
FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
#: first compute capability with the recipe's kernels: Ada and Hopper have per-tensor scales, Hopper block scales,
#: Blackwell the MX formats. ``delayed`` is not among them: under Transformer Engine its scales move with every
#: micro-batch, and scoring and update then round differently
FIRST_CAPABILITY = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def transformer_engine_installed() -> bool:
    """Whether the package is there. (``megatron_import`` refuses one that can't be imported.)"""
    return importlib.util.find_spec("transformer_engine") is not None


@dataclass
class LoraConfig:
    """Low-rank adapters: ``W x + (alpha / rank) B A x`` with a frozen ``W``. B begins at 0, so the first step computes
    the base.

    Attributes:
        rank: rows of A and columns of B; 0 = off, every weight is trained.
        alpha: the adapters' product is scaled by ``alpha / rank``.
        dropout: of the adapters' input; only 0 is computed: log-probs of scoring and update have to agree.
        targets: matrices that get an adapter: ``linear_qkv`` (q_proj, k_proj and v_proj, which share one A),
            ``linear_proj`` (o_proj), ``linear_fc1`` (gate_proj and up_proj, which share one A), ``linear_fc2``
            (down_proj).
        experts: adapters on routed experts; not computed, so it has to stay False.
    """

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    experts: bool = False

    def validate(self) -> None:
        """Raises ConfigError on a value that is not computed; ranges are checked with the policy's."""
        if not self.rank:
            return
        if self.experts:
            raise ConfigError("policy.lora.experts=true is not computed; set it to false and adapt attention alone")
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ConfigError(f"policy.lora.targets is {list(self.targets)}; name at least one matrix, each once")
        for name in self.targets:
            if name in ("embedding", "word_embeddings", "output_layer", "embed_tokens", "lm_head"):
                raise ConfigError(
                    f"policy.lora.targets holds {name}; the embedding and the output matrix get no adapter: take it out"
                )
            if name not in LORA_TARGETS:
                raise ConfigError(f"policy.lora.targets holds {name!r}; choose among {', '.join(LORA_TARGETS)}")


@dataclass
class PolicyConfig:
    """How the policy is laid out and computed. The result of a step doesn't depend on any field but ``precision``,
    ``fp8`` and ``lora``.

    Attributes:
        tensor_parallel: ranks that share each weight matrix (TP).
        pipeline_parallel: ranks that share the stack of layers (PP), 1F1B schedule.
        context_parallel: ranks that share each packed row of tokens (CP), zig-zag chunks.
        expert_parallel: ranks that share the experts of a mixture-of-experts model (EP), out of all ranks of a pipeline
            stage. An expert is never cut itself (expert tensor parallelism of 1): fine-grained experts are too small
            for that.
        sequence_parallel: shard norms and residuals over the TP ranks; needs ``tensor_parallel`` > 1.
        virtual_pipeline: model chunks per pipeline rank (interleaved 1F1B); None = one.
        precision: ``fp32``, ``bf16`` (fp32 gradients and main weights) or ``auto``: bf16 on CUDA, fp32 otherwise.
        recompute: activations recomputed in the backward pass: ``none``, ``full`` (every layer) or ``selective``
            (attention only).
        micro_batch_tokens: token budget of a packed micro-batch; a larger tree is cut into pieces that repeat shared
            prefixes, and only a single sequence may exceed it.
        logprob_chunk: positions per chunk of the vocabulary head; at most chunk x vocab/TP logits exist at a time.
        fused_elementwise: norms, SwiGLU, rotation and embedding gradients as single functions where Transformer Engine
            isn't there to fuse them; False = composed of torch's operators, as megatron does it.
        keep_freed_memory: on the CPU, keep freed memory in the process for the next tensors
            (``device.keep_freed_memory``).
        share_prefix: compute shared prefixes of a token tree once; False = separate root-to-leaf sequences.
        attention: ``tree_sdpa`` (torch kernels on any device), ``te`` (Transformer Engine, needs share_prefix=False) or
            ``auto`` = tree_sdpa.
        fp8: Transformer Engine FP8 recipe of the update and of the scoring that its ratios are taken against (the
            reference pass, the vocabulary head and the loss stay as ``precision`` says): ``tensorwise``,
            ``blockwise``, ``mxfp8``, ``auto`` = the finest that the GPU has, None = off. Without Transformer Engine or
            an FP8 unit it is off, and said so. ``delayed`` is for ``fp8_emulate`` alone: its scales move with every
            micro-batch.
        fp8_bf16_layers: layers at each end of the stack that stay in bf16 under ``fp8``; ``delayed`` knows no
            exceptions and needs 0.
        fp8_emulate: where there is no Transformer Engine, round what enters and leaves the linear layers as the recipe
            would: shows on any machine what FP8 does to log-probs, ratios and clipping. Slower, not faster.
        lora: train low-rank adapters instead of the weights.
        deterministic: on GPUs, kernels that add in a fixed order, so that a resumed run repeats an uninterrupted one
            bit for bit; attention's backward pass is slower. On the CPU it is so anyway.
        distributed_optimizer: shard optimizer state over the data-parallel ranks.
        overlap_grad_reduce: reduce gradients over the data-parallel ranks while the backward pass still runs.
        export_writers: ranks that write an export, at most; None = all that see the folder.
        check_links: at the start of a job of several ranks, check that each is there once and on a device of its own,
            and measure how fast they reach each other; a few seconds.
        init_timeout_s: seconds in which at least one rank has to get on (a phase, an episode, a micro-batch); then the
            run is declared hung.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1
    expert_parallel: int = 1
    sequence_parallel: bool = False
    virtual_pipeline: int | None = None
    precision: str = "auto"
    recompute: str = "none"
    micro_batch_tokens: int = 1024
    logprob_chunk: int = 1024
    fused_elementwise: bool = True
    keep_freed_memory: bool = True
    share_prefix: bool = True
    attention: str = "auto"
    fp8: str | None = None
    fp8_bf16_layers: int = 1
    fp8_emulate: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)
    deterministic: bool = False
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    export_writers: int | None = None
    check_links: bool = True
    init_timeout_s: int = 1800

    def validate_values(self) -> None:
        """Check the fields alone, whatever the machine has.

        Raises:
            ConfigError: a value is out of range or contradicts another one; the message says what to set.
        """
        check_ranges(dataclasses.asdict(self), "policy")
        for name, known in (("precision", PRECISIONS), ("recompute", RECOMPUTE), ("attention", ATTENTION)):
            if getattr(self, name) not in known:
                raise ConfigError(f"policy.{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ConfigError(
                "policy.sequence_parallel needs policy.tensor_parallel > 1; unset it or raise tensor_parallel"
            )
        if self.virtual_pipeline is not None and self.pipeline_parallel < 2:
            raise ConfigError("policy.virtual_pipeline needs policy.pipeline_parallel > 1; set it to null otherwise")
        if self.attention == "te" and self.share_prefix:
            raise ConfigError("policy.attention=te has no tree mask; set policy.share_prefix=false with it")
        if self.attention == "te" and self.context_parallel > 1:
            raise ConfigError(
                "policy.attention=te cuts sequences differently over context-parallel ranks; use attention=tree_sdpa"
                " there"
            )
        self._validate_fp8_values()
        self.lora.validate()
        if self.lora.rank % self.tensor_parallel:
            raise ConfigError(
                f"policy.lora.rank={self.lora.rank} can't be split over tensor_parallel = {self.tensor_parallel}; take"
                " a multiple of it"
            )

    def validate(self, *, cuda: bool, world_size: int = 1) -> None:
        """Check the fields against each other and against the machine.

        Args:
            cuda: whether CUDA devices are available.
            world_size: number of ranks of the job.

        Raises:
            ConfigError: a value is out of range, contradicts another one, or needs something that is absent; the
                message says what to set.
        """
        self.validate_values()
        ranks = self.tensor_parallel * self.pipeline_parallel * self.context_parallel
        if world_size % ranks:
            raise ConfigError(
                f"{world_size} ranks can't be split into TP x PP x CP = {ranks}; start a multiple of {ranks} ranks"
            )
        experts = self.pipeline_parallel * self.expert_parallel
        if world_size % experts:
            raise ConfigError(
                f"{world_size} ranks can't be split into PP x EP = {experts}; start a multiple of {experts} ranks"
            )
        has_te = cuda and transformer_engine_installed()
        if self.attention == "te" and not has_te:
            raise ConfigError(
                "policy.attention=te needs CUDA and the transformer-engine package; install it or set"
                " attention=tree_sdpa"
            )
        if self.fp8_emulate and has_te:
            raise ConfigError(
                "policy.fp8_emulate is for machines without Transformer Engine; unset it: policy.fp8 runs for real here"
            )
        if self.fp8 is not None and has_te and self.resolved_precision(cuda=cuda) != "bf16":
            raise ConfigError("policy.fp8 needs policy.precision=bf16 (or auto on CUDA)")

    def _validate_fp8_values(self) -> None:
        if self.fp8 is None:
            return
        if self.fp8 not in ("auto", *FP8_RECIPES):
            raise ConfigError(f"policy.fp8 is {self.fp8!r}; choose one of auto, {', '.join(FP8_RECIPES)} or null")
        if self.fp8 == "delayed" and self.fp8_bf16_layers:
            raise ConfigError(
                "policy.fp8=delayed can't leave layers in bf16: set policy.fp8_bf16_layers=0 with it, or take"
                " fp8=tensorwise"
            )
        if self.fp8_emulate and self.recompute == "full":
            raise ConfigError("policy.fp8_emulate can't recompute whole layers: set policy.recompute=none or selective")

    def resolved_fp8(self, *, capability: tuple[int, int] | None, has_te: bool) -> str | None:
        """The recipe that runs; None = no FP8.

        Args:
            capability: compute capability of the GPU; None without one.
            has_te: whether Transformer Engine is installed.

        Raises:
            ConfigError: the GPU has an FP8 unit, but no kernels for the recipe that was asked for by name; or
                ``delayed``, whose scales Transformer Engine moves with every micro-batch.
        """
        if self.fp8 is None:
            return None
        if self.fp8_emulate:
            return "tensorwise" if self.fp8 == "auto" else self.fp8
        possible = (
            [name for name, first in FIRST_CAPABILITY.items() if capability is not None and capability >= first]
            if has_te
            else []
        )
        if possible and self.fp8 == "delayed":
            raise ConfigError(
                "policy.fp8=delayed scales by what earlier micro-batches held, so an update's log-probs are not those"
                " that its ratios are taken against; take policy.fp8=auto"
            )
        if not possible or self.fp8 in possible:
            return self.fp8 if possible else None
        if self.fp8 != "auto":
            raise ConfigError(
                f"policy.fp8={self.fp8} has no kernels on compute capability {capability}; it has {', '.join(possible)}"
            )
        # those without memory of earlier passes, finest scales first: scoring and update then round alike
        return possible[-1]

    def resolved_precision(self, *, cuda: bool) -> str:
        """``fp32`` or ``bf16``, with ``auto`` decided by the device."""
        if self.precision == "auto":
            return "bf16" if cuda else "fp32"
        return self.precision


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule; steps are optimizer steps of RL. The SFT warm-up has ``warmup.lr``.

    Attributes:
        lr: peak learning rate.
        min_lr: learning rate at the end of a decaying schedule.
        lr_schedule: ``constant``, ``linear`` or ``cosine`` decay from ``lr`` to ``min_lr`` after the warm-up.
        warmup_steps: steps of linear warm-up from 0; step 1 uses ``lr / warmup_steps``.
        weight_decay: decoupled weight decay on matrices (never on biases and norms).
        betas: Adam's two decay rates.
        eps: Adam's epsilon.
        clip_grad: largest global gradient norm; 0 = no clipping.
    """

    lr: float = 1e-6
    min_lr: float = 0.0
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    clip_grad: float = 1.0

    def validate(self) -> None:
        """Raises ConfigError on a value out of range."""
        check_ranges(dataclasses.asdict(self), "optimizer")
        if self.lr_schedule not in LR_SCHEDULES:
            raise ConfigError(f"optimizer.lr_schedule is {self.lr_schedule!r}; choose one of {', '.join(LR_SCHEDULES)}")
        if len(self.betas) != 2:
            raise ConfigError(f"optimizer.betas is {list(self.betas)}; two numbers in [0, 1) are needed")
        if self.min_lr > self.lr:
            raise ConfigError(f"optimizer.min_lr {self.min_lr} is above optimizer.lr {self.lr}")
