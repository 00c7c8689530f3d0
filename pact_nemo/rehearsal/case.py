"""What is rehearsed, and what comes of it. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from pact_nemo import checkout
from pact_nemo.config.load import load_config
from pact_nemo.config.recipes import recipe
from pact_nemo.config.schema import Config
from pact_nemo.errors import ConfigError
from pact_nemo.planning.from_config import expected_lengths, model_shape, step_work
from pact_nemo.planning.shape import Layout
from pact_nemo.planning.workload import Lengths, StepWork

SETTINGS = checkout.ROOT / "conf" / "pact_bfcl.yaml"


@dataclass(frozen=True)
class Case:
    """One rank of a recipe.

    Attributes:
        recipe: its name.
        stage: the pipeline stage that the rank is of.
        layers: of the model, in place of its own number; None = all.
        tokens: of a row, in place of ``policy.micro_batch_tokens``; None = that.
        transformer_engine: Transformer Engine's modules, by their stand-in; else the layers that run without it.
        words: further settings, ``key=value``.
    """

    recipe: str
    stage: int = 0
    layers: int | None = None
    tokens: int | None = None
    transformer_engine: bool = False
    words: tuple[str, ...] = ()

    def config(self) -> Config:
        """The recipe's settings, as a run would have them.

        Raises:
            ConfigError: no such recipe or setting; the stage is none of the recipe's, or the layers can't be cut.
        """
        words = [f"policy.micro_batch_tokens={self.tokens}"] if self.tokens is not None else []
        config = load_config([SETTINGS, recipe(self.recipe)], [*words, *self.words])
        stages = config.policy.pipeline_parallel
        if not 0 <= self.stage < stages:
            raise ConfigError(f"recipe {self.recipe} has pipeline stages 0 to {stages - 1}, not {self.stage}")
        return config

    def hf_config(self) -> dict[str, object]:
        """The model's ``config.json``."""
        shape = dict(recipe(self.recipe).shape)
        if self.layers is not None:
            shape["num_hidden_layers"] = self.layers
        return shape


@dataclass(frozen=True)
class Phase:
    """One part of a step.

    Attributes:
        name: ``built``, ``scoring``, ``reference scoring`` or ``update``.
        peak: bytes that lived on the GPU at most, the CUDA context and NCCL's buffers left out.
        planned: the planner's number for the same; None = it has none.
        operations: that torch dispatched.
        seconds: that the rehearsal took.
        in_fp8: share of the decoder's products that ran in FP8; 0 without Transformer Engine.
    """

    name: str
    peak: float
    planned: float | None
    operations: int
    seconds: float
    in_fp8: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a rank's rehearsal found.

    Attributes:
        case: as it was asked for.
        parameters: of the rank.
        modules: classes that the model consists of.
        row_tokens: of a micro-batch, this rank's part.
        rows: micro-batches of the update.
        phases: in order.
        reads: lines that read a number back from the GPU in an update -> how often.
        fault: what raised, with its traceback; empty where nothing did.
    """

    case: Case
    parameters: int = 0
    modules: tuple[str, ...] = ()
    row_tokens: int = 0
    rows: int = 0
    phases: tuple[Phase, ...] = ()
    reads: dict[str, int] = field(default_factory=dict)
    fault: str = ""

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


def layout_of(config: Config, name: str) -> Layout:
    return Layout.of(config.policy, recipe(name).world_size)


def rank_of(layout: Layout, stage: int) -> int:
    """The first rank of a pipeline stage, in megatron's order of ranks."""
    return stage * layout.world // layout.pipeline


def rows_of(layout: Layout) -> int:
    """Micro-batches that fill the pipeline as long as it takes for the largest number of them to be in flight."""
    return max(2, layout.pipeline * (2 if layout.virtual > 1 else 1))


def rehearsed_work(config: Config, layout: Layout) -> StepWork:
    """The step of a config, with as many prompts as :func:`rows_of` needs and lengths at which a prompt's whole tree is
    one row: lengths scale, so that the plan of such a row is the plan of the step's rows.
    """
    work = step_work(config, expected_lengths(config))
    whole = work.full_tree if work.conditioned > 0 else work.anchored_tree
    part = config.policy.micro_batch_tokens / whole.tokens
    old = work.lengths
    lengths = Lengths(
        prompt=max(1, int(old.prompt * part)),
        response=max(2, int(old.response * part)),
        trace=max(1, int(old.trace * part)) if old.trace else 0,
        policy_share=old.policy_share,
        boundary=max(1, int(old.boundary * part)),
    )
    prompts = rows_of(layout) * layout.data
    return StepWork(
        lengths,
        prompts=prompts,
        group=work.group,
        updates=1,
        conditioned=1.0 if work.conditioned > 0 else 0.0,
        trace_rl=work.trace_rl,
        score_old=1.0,
        reference=work.reference,
        shared=work.shared,
    )


def check(case: Case) -> Layout:
    """The layout of a case.

    Raises:
        ConfigError: the recipe, a setting or the layout can't be had.
    """
    config = case.config()
    shape = model_shape(config)
    layout = layout_of(config, case.recipe)
    if found := layout.problems(shape):
        raise ConfigError("; ".join(found))
    if config.policy.attention == "te":
        raise ConfigError("policy.attention=te can't be rehearsed: its kernels are Transformer Engine's own")
    chunks = layout.pipeline * layout.virtual
    if case.layers is not None and case.layers % chunks:
        raise ConfigError(f"{case.layers} layers can't be cut into {chunks} chunks; take a multiple of {chunks}")
    return layout
