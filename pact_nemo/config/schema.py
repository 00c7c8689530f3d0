"""The one schema and the one home of every default. :mod:`pact_nemo.config.load` reads files and command lines by it,
:mod:`pact_nemo.config.checks` says what types can't express.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from pact_nemo.environments.registry import environment_spec
from pact_nemo.errors import ConfigError
from pact_nemo.policy.config import OptimizerConfig, PolicyConfig
from pact_nemo.serving.config import RolloutServerConfig

BRIDGE = "megatron_bridge"  #: in ``export.formats``
EXPORT_FORMATS = ("hf", BRIDGE)
EPISODES_A_SEQUENCE = 1.25  #: that are open, for each sequence that a server decodes


@dataclass
class RunConfig:
    """Where a run lives and what makes it reproducible."""

    name: str = "pact_bfcl"  #: prefix of the run folder
    label: str | None = None  #: the method's name in folder names and comparisons; None = method
    root: str = "runs"  #: run folders are made below it; ``<root>/latest`` points to the newest
    seed: int = 1234  #: every random choice derives from it: split, prompt order, gate, sampling, initialisation
    #: trainer processes that a plain ``python`` starts on this machine; null = the recipe's, or what the layout needs;
    #: torchrun and srun say it themselves
    ranks: int | None = None
    cache_dir: str = ".cache/pact_nemo"  #: converted models; safe to delete
    #: a task or trace row that can't be used: "quarantine": kept in quarantine.jsonl, counted; "strict": stops the run
    bad_rows: str = "quarantine"


@dataclass
class ModelConfig:
    """The policy to train."""

    #: HF folder, or Megatron-Bridge checkpoint; None = the small instruct model that an installed package embeds
    path: str | None = None
    #: of a Megatron-Bridge checkpoint in ``path``: HF folder of the same model; its weights are not read
    hf_config: str | None = None
    recipe: str | None = None  #: set by ``--recipe``: a name in ``pact_nemo.config.recipes.RECIPES``
    tool_format: str = "pythonic"  #: how calls are written: a name in ``pact_nemo.chat.tool_formats.TOOL_FORMATS``
    #: of earlier messages: "keep" them in the context, or as the chat "template" does; None = "template"
    earlier_thoughts: str | None = None
    template_kwargs: dict[str, Any] = field(
        default_factory=dict
    )  #: the chat template's own switches: {enable_thinking: false}, {date_string: …}


@dataclass
class TasksConfig:
    """What every environment has: where its tasks are, how they are split and limited."""

    #: a file of training tasks, for environments that read one; ftrl: parquet, jsonl or json; toolhop: json or jsonl
    path: str | None = None
    eval_path: str | None = None  #: a file of held-out tasks, likewise; None = ``held_out`` groups of ``path``
    #: longer observations are cut for the policy (the checker sees them whole)
    max_observation_chars: int | None = None
    max_prompt_tokens: int = 7000  #: what becomes of longer prompts says ``overlong``
    #: prompts beyond ``max_prompt_tokens``: "drop": the task is left out, counted; "stop": the run ends
    overlong: str = "drop"
    #: scenario groups kept for evaluation only, chosen by ``split_seed``; none of their tasks is ever trained on
    held_out: int = 50
    #: scenario groups for tuning, the next ones in that order; with > 0 they are neither trained on nor held out, the
    #: scores are theirs, and no held-out task is played
    validation: int = 0
    split_seed: int = 7  #: apart from ``run.seed`` on purpose, so that runs with different seeds share one held-out set
    max_train: int | None = None  #: use at most this many training tasks
    max_eval: int | None = None  #: use at most this many held-out, or validation, tasks

    @property
    def scored(self) -> str:
        """Which tasks the scores are of."""
        return "validation" if self.validation else "held-out"


@dataclass
class SandboxConfig:
    """Where tools that are given as source run, those of FTRL and ToolHop; limits are per call."""

    workers: int = 2  #: confined processes that run tools
    seconds: float = 10.0  #: wall time of a call
    memory_mb: int = 1024  #: memory of a call
    processes: int = 16  #: processes that a call may start
    #: run untrusted tools without namespaces; for machines that can't confine, and only on purpose
    unconfined: bool = False


@dataclass
class TracesConfig:
    """Expert traces h*."""

    #: JSONL of traces, or conversations in OpenAI format (JSONL, JSON, parquet); None = what the environment has:
    #: reference calls that are executed and annotated (bfcl, own), or recorded sub-answers whose calls are found (ftrl,
    #: toolhop)
    path: str | None = None
    #: of conversations: our name of a field (messages, tools, task_id, reward, info) -> theirs
    fields: dict[str, str] = field(default_factory=dict)
    #: which conversations are expert traces: "replay": their calls, executed anew, bring no new error and score
    #: ``min_score``; "reward": the row's own reward is at least ``min_score``; "none": all
    verify: str = "replay"
    min_score: float = 1.0  #: see ``verify``
    style: str = "full"  #: annotator's wording: "full" or "compact"
    #: "one": each call in an assistant turn of its own, as its observation comes; "all": a user turn's calls together
    calls_per_turn: str = "one"
    teach_end_of_turn: bool = False  #: supervise the end-of-turn token after a call as part of the call span
    #: supervise what stands between reasoning and call, as part of the call span; False: the paper's literal rule
    teach_switch: bool = True
    #: supervise the message that closes a user turn, as part of the call span: the trace's own, and this text where it
    #: tells none; null: none of them, as in the paper
    closing: str | None = None
    #: largest share of training tasks that may have no trace; null = any share but all of ``path``'s
    max_missing: float | None = None
    #: largest share of training tasks that may have no reference calls; null = any share
    max_unreferenced: float | None = None
    #: use the traces of at most so many training tasks; the others are trained on by RL alone, and where they have no
    #: reference calls of their own, their calls are still rewarded by their trace's
    max_tasks: int | None = None
    #: share of RL's prompts that are of tasks with a trace, where not all have one, whether the method reads it or not;
    #: what a step can't have whole is carried over to the next; null = as the tasks come
    share: float | None = None
    components: list[str] = field(
        default_factory=lambda: ["reasoning", "calls", "observations"]
    )  #: what of a trace is used (paper, table 3)
    #: experiment: what RL is conditioned on in place of h*: "other_task" (another task's) or "none"; SFT keeps h*
    control: str | None = None
    max_tokens: int = 4096  #: what becomes of a longer trace says ``overlong``
    #: a trace beyond its room, counted: "turn": cut after a whole turn; "segment": after a whole reasoning segment;
    #: "drop"
    overlong: str = "turn"
    augment: list[str] = field(
        default_factory=list
    )  #: verified variants of each trace: "argument_order", "call_order" (beyond the paper)
    variants: int = 3  #: at most this many of them a task; a step takes one of a task's traces by (seed, step, task)
    #: replay every trace first, and let one that rollouts keep beating lose weight (beyond the paper)
    quality: bool = False
    quality_smoothing: float = 0.5  #: weight of the past in how often a trace was beaten, in [0, 1)


@dataclass
class SamplingConfig:
    """Generation of training rollouts. Limits hold per episode; an episode that hits one is marked truncated."""

    #: > 0; the policy that is trained is the one that samples: log-probs of logits / temperature everywhere but in SFT
    temperature: float = 1.0
    top_p: float = 1.0  #: nothing else: a truncated distribution is not the policy that is trained
    max_turns_per_user_turn: int = 10  #: assistant turns that may follow one user turn
    max_turns: int = 100  #: assistant turns of the episode
    #: policy tokens per assistant turn, its thought included: one may take the whole response
    max_turn_tokens: int = 23000
    max_response_tokens: int = 23000  #: tokens after x that the server sees at one time, observations included
    #: episodes in flight; None = 1.25 for each sequence that the servers decode together (``max_num_seqs``)
    concurrency: int | None = None


@dataclass
class RolloutConfig:
    """Rollouts: the server that makes them and how they are sampled."""

    server: RolloutServerConfig = field(default_factory=RolloutServerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    importance: str = "tis"  #: correction of sampler-trainer mismatch: "tis" (truncated importance sampling) or "off"
    importance_cap: float = 2.0  #: tis: largest importance weight
    #: what a refit brings where policy.lora trains adapters: "adapter": they alone, loaded beside the base; "merged":
    #: the whole model with them in it; null = adapter for servers on GPUs, merged on a CPU (docs/reference/lora.md)
    lora_refit: str | None = None
    #: of the weights that the server reloads: bfloat16 | float16 | float32 | fp8_block (docs/cluster/refit.md)
    export_dtype: str = "bfloat16"
    #: disk for refit exports, an absolute path that servers see too (local NVMe, shared); None = the run folder
    exports_dir: str | None = None
    keep_exports: int = 2  #: newest refit exports kept on disk


@dataclass
class ScheduleConfig:
    """Annealing of the SFT term (paper, tables 4 and 6)."""

    reasoning: str = "segment"  #: none | fixed | token | segment | whole_trace_token
    call: str = "scale"  #: none | fixed | token | scale
    reasoning_scale: float = 1.0  #: weight of a reasoning token that is taught
    fixed_level: int = 4  #: prefix level of reasoning=fixed
    call_start: float = 0.8  #: lambda_start of eq. 11
    call_end: float = 0.2  #: lambda_end of eq. 11
    horizon: int | None = None  #: S; None = the run's steps
    #: "fixed": a function of the step; "adaptive": of the policy's progress (``objective/adaptive.py``)
    kind: str = "fixed"
    #: adaptive: success rate that brings its half of the progress; the gap's closing brings the rest
    success_target: float = 0.6
    smoothing: float = 0.7  #: adaptive: weight of the past in the means it goes by
    #: adaptive: anchoring probability at full progress; None = ``anchor_prob`` throughout
    anchor_end: float | None = None


@dataclass
class ObjectiveConfig:
    """What methods have in common; see ``docs/design/objective.md`` for each symbol. A method may have other defaults
    for some of them (its ``defaults``); what is its own alone is in ``method_config``.
    """

    group_size: int = 8  #: K
    clip: bool = True  #: False: the surrogate without a range of ratios
    clip_low: float = 0.2  #: ratios below 1 minus this are clipped
    clip_high: float = 0.2  #: ratios above 1 plus this are clipped
    dual_clip: float | None = None  #: c: a token of negative advantage loses at most c |A| (verl: 3.0); null = off
    gamma: float = 0.9  #: discount of the turn-level return
    advantage_eps: float = 1e-6  #: added to the standard deviation
    #: divide by the group's standard deviation; False: the mean is taken off, and that is all
    advantage_std: bool = True
    #: a smaller standard deviation is taken as this much, in units of the reward; 0 = no floor
    advantage_std_floor: float = 0.0
    turn_level: bool = True  #: False: trajectory advantage only
    combine: str = "sum"  #: A^g + A^l: "sum" (eq. 32) or "mean"
    matching: str = "hungarian"  #: of calls in the rewards: "hungarian" (the largest sum) or "greedy"
    call_penalty: float = 0.0  #: lambda_pen of an unmatched call
    #: final turn's reward: "checker" (its score) or "answer_f1" (words of the answer, where there is a reference)
    outcome: str = "checker"
    outcome_weight: float = 1.0  #: weight of the outcome in the final turn's reward
    trace_rl: bool = True  #: trace-conditioned surrogate; False evaluates the ratio under x for every prompt (ablation)
    sft_coef: float = 0.1  #: beta_SFT
    anchor_prob: float = 0.4  #: q
    kl_coef: float = 0.001  #: weight of the KL term; 0 = off
    #: bonus on the entropy of each policy token's distribution under x (public scripts: 0.001); 0 = off
    entropy_coef: float = 0.0
    aggregation: str = "rollout-mean"  #: rollout-mean | token-mean | constant-length
    sft_aggregation: str = "trace-mean"  #: of the SFT term: trace-mean (eq. 9) | token-mean
    #: denominator of aggregation=constant-length; null = ``rollout.sampling.max_response_tokens``
    constant_length: int | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class WarmupConfig:
    """A named, separately reported stage before RL: plain SFT on traces, the same for every method. ``steps=0`` leaves
    it out.
    """

    steps: int = 0  #: optimizer steps; 0 = none
    batch_size: int = 8  #: traces per optimizer step
    lr: float = 2e-5  #: learning rate; the schedule of ``optimizer`` begins after the stage
    max_tasks: int | None = None  #: training tasks whose traces the stage sees; None = all
    #: of the order of the stage's traces; None = ``run.seed``. Runs of other seeds then share one warm-up
    seed: int | None = None
    reasoning_weight: float = 1.0  #: weight of a reasoning token
    call_weight: float = 1.0  #: weight of a call token
    #: a message without calls that ends the turn, taught in this stage only (traces hold no final answer)
    closing: str | None = None


@dataclass
class TrainerConfig:
    """The loop. Its length is said by one of ``steps`` and ``epochs``; the other one is null."""

    steps: int | None = 24  #: RL steps; ``epochs`` given and no ``steps`` anywhere: null
    #: passes over the training tasks, of floor(tasks / batch_size) steps each: what fills no batch waits for the
    #: next one
    epochs: int | None = None
    batch_size: int = 256  #: prompts per step
    mini_batch_size: int = 32  #: prompts per optimizer update
    checkpoint_every: int = 5  #: steps; the last step is always saved; 0 = only the last
    keep_checkpoints: int = 2  #: newest checkpoints kept on disk
    #: write checkpoints beside the next steps (a child process a rank); the last one is waited for
    async_checkpoint: bool = False
    #: kl_coef=0: run conditioned rollouts under x, too, for privilege gap and mismatch only (needed by tis, adaptive)
    both_contexts: bool = True
    #: score pi_old for a step's first update, too, instead of taking its own log-probs, which are the same
    score_first_update: bool = False
    #: one-step-off: sample the next step's rollouts, from the weights of before, while this step's update runs; needs
    #: tis
    overlap: bool = False
    #: no pass under c_h for rollouts whose advantages are all 0 (surrogate: 0); not with adaptive annealing
    skip_zero_advantage: bool = True
    dump_rollouts: bool = True  #: every rollout of a step in rollouts/ of the run folder: what report and replay read
    keep_rollouts: int = 1000  #: newest steps whose rollouts stay there; 0 = all
    #: run folder whose dumped rollouts are trained on instead of sampling (no server is started)
    replay: str | None = None


@dataclass
class EvaluationConfig:
    """Held-out evaluation with the benchmark's own checker."""

    before: bool = True  #: evaluate the model as published, and after the warm-up
    after: bool = True  #: evaluate the trained policy
    #: steps, of warm-up and of RL, from one evaluation between steps to the next; 0 = none. Each plays all held-out
    #: tasks; in the warm-up it refits the server for it
    every: int = 0
    #: assistant turns that may follow one user turn; None = as in the benchmark's own evaluation, or in training where
    #: it has none
    max_turns_per_user_turn: int | None = None
    temperature: float = 0.0  #: of its sampling; 0 = greedy
    samples: int = 1  #: episodes per task; with more than one the score is their mean
    episodes_in_report: int = 12  #: held-out episodes that the report shows


@dataclass
class DiagnosticsConfig:
    """What is measured beside the training, at a cost; nothing of it changes the training."""

    #: steps from one comparison of the gradients of two halves of a mini-batch to the next (two updates' time); 0 =
    #: none
    gradient_every: int = 0
    #: steps, of warm-up and of RL, from one measurement of held-out traces' likelihood to the next; 0 = none
    trace_every: int = 0
    trace_tasks: int = 24  #: of the first so many held-out tasks those that have a trace


@dataclass
class AlarmsConfig:
    """Limits of a step's numbers. Above the first four the run says so and goes on (null: never); above the last it
    ends.
    """

    mismatch: float | None = 0.1  #: mean |trainer - sampler| log-prob, nats a token
    kl: float | None = 0.5  #: estimated KL to the reference, nats a token
    clip_fraction: float | None = 0.5  #: share of a surrogate's tokens that are clipped
    privilege_gap: float | None = 5.0  #: mean |log-prob under the trace - under x|, nats a token
    #: share of a step's rollouts that failed through no fault of the policy; above it: checkpoint and stop
    failed_share: float = 0.5


@dataclass
class ExportConfig:
    """What a finished run leaves beside its records."""

    #: of the trained weights: "hf" (``hf/``, always), "megatron_bridge" (``megatron_bridge/``)
    formats: list[str] = field(default_factory=lambda: ["hf"])


@dataclass
class TrackingConfig:
    """Where a run's numbers are shown. ``metrics.jsonl`` and the terminal line are always there (docs/tracking.md)."""

    #: tracker: its settings ({}: the defaults; null: off). A module of ``pact_nemo.tracking``,
    #: or a class from outside: module:Class or path/to/file.py:Class
    trackers: dict[str, Any] = field(default_factory=lambda: {"tensorboard": {}})


@dataclass
class Config:
    """Everything a run can be told."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    environment: str = "bfcl"  #: "bfcl", "ftrl", "toolhop", "own", or ``module:factory``, ``path/to/file.py:factory``
    #: what only this environment reads; its keys: the ``config`` of its spec (``pact_nemo/environments/spec.py``)
    environment_config: Any = field(default_factory=lambda: environment_spec(Config.environment).config())
    tasks: TasksConfig = field(default_factory=TasksConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    traces: TracesConfig = field(default_factory=TracesConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    #: a name in ``pact_nemo.methods.registry.METHODS``, or a class from outside: module:Class or path/to/file.py:Class
    method: str = "pact"
    method_config: Any = field(default_factory=dict)  #: the method's own settings: the fields of its ``Config`` class
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def to_yaml(config: Config) -> str:
    """The resolved configuration, loadable again by :func:`load_config`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of every setting."""
    return dataclasses.asdict(config)


def open_episodes(config: Config, servers: int | None = None) -> int:
    """Episodes in flight: ``rollout.sampling.concurrency``, or a quarter more than the servers decode together, because
    some of them wait for their tools.

    Args:
        servers: how many there are; None = those of ``rollout.server.url``, or one.
    """
    said, server = config.rollout.sampling.concurrency, config.rollout.server
    count = servers if servers is not None else len(server.url.split(",")) if server.url is not None else 1
    return said if said is not None else math.ceil(EPISODES_A_SEQUENCE * count * server.max_num_seqs)


def takes_turns(config: Config, *, cuda: bool) -> bool:
    """Whether trainer and engines have the GPUs in turn (``rollout.server.time_sharing``). A replay has no engines.

    Args:
        cuda: the engines are on GPUs.
    """
    server, trainer = config.rollout.server, config.trainer
    if trainer.replay is not None:
        return False
    if server.time_sharing is not None:
        return server.time_sharing
    return cuda and server.url is None and not trainer.overlap


def steps_of(config: Config, training_tasks: int) -> int:
    """RL steps of a run: ``trainer.steps``, or ``trainer.epochs`` times the batches that an epoch fills.

    Args:
        training_tasks: tasks that are trained on, as :func:`pact_nemo.data.dataset.build_dataset` counts them.

    Raises:
        ConfigError: ``trainer.epochs``, and fewer tasks than a batch needs.
    """
    trainer = config.trainer
    if trainer.steps is not None:
        return trainer.steps
    assert trainer.epochs is not None  # validate() has seen to it
    batches = training_tasks // trainer.batch_size
    if batches < 1:
        raise ConfigError(
            f"trainer.epochs={trainer.epochs}: {training_tasks} training tasks fill no batch of"
            f" trainer.batch_size={trainer.batch_size}; lower it"
        )
    return trainer.epochs * batches


def settled(config: Config, training_tasks: int) -> Config:
    """``config`` with its length as a number of steps (:func:`steps_of`). Everything that runs reads this one."""
    if config.trainer.steps is not None:
        return config
    return dataclasses.replace(
        config, trainer=dataclasses.replace(config.trainer, steps=steps_of(config, training_tasks), epochs=None)
    )
