"""The one schema and the one home of every default. YAML files and command-line overrides are checked against it by
OmegaConf.

Order of precedence, weakest first: these defaults, the files a YAML names under ``defaults:`` (in order), the YAML
itself, ``key=value`` words.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pact_nemo.chat.contexts import EARLIER_THOUGHTS
from pact_nemo.config.environment import SECTION, begin_anew, check_section, named_environment, schema_for
from pact_nemo.config.own import own_config, refuse_moved
from pact_nemo.config.recipes import Recipe
from pact_nemo.config.text import load_word, load_yaml
from pact_nemo.environments.registry import environment_spec
from pact_nemo.errors import ConfigError
from pact_nemo.methods.registry import METHODS, make_method, method_class
from pact_nemo.objective.weights import AGGREGATIONS, SFT_AGGREGATIONS
from pact_nemo.policy.config import OptimizerConfig, PolicyConfig
from pact_nemo.runtime.quarantine import POLICIES
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.traces.augment import KINDS
from pact_nemo.traces.controls import CONTROLS
from pact_nemo.traces.spans import OVERLONG
from pact_nemo.tracking.registry import check_settings


@dataclass
class RunConfig:
    """Where a run lives and what makes it reproducible."""

    name: str = "pact_bfcl"  #: prefix of the run folder
    label: str | None = None  #: the method's name in folder names and comparisons; None = method
    root: str = "runs"  #: run folders are made below it; ``<root>/latest`` points to the newest
    seed: int = 1234  #: every random choice derives from it: split, prompt order, gate, sampling, initialisation
    cache_dir: str = ".cache/pact_nemo"  #: converted models; safe to delete
    #: a task or trace row that can't be used: "quarantine": kept in quarantine.jsonl, counted; "strict": stops the run
    bad_rows: str = "quarantine"


@dataclass
class ModelConfig:
    """The policy to train."""

    path: str | None = None  #: HF folder; None = the small instruct model that an installed package embeds
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
    split_seed: int = 7  #: apart from ``run.seed`` on purpose, so that runs with different seeds share one held-out set
    max_train: int | None = None  #: use at most this many training tasks
    max_eval: int | None = None  #: use at most this many held-out tasks


@dataclass
class SandboxConfig:
    """Where tools that are given as source run, those of FTRL and ToolHop; limits are per call."""

    workers: int = 2
    seconds: float = 10.0
    memory_mb: int = 1024
    processes: int = 16
    #: run untrusted tools without namespaces; for machines that can't confine, and only on purpose
    unconfined: bool = False


@dataclass
class TracesConfig:
    """Expert traces h*."""

    #: JSONL of traces; None = what the environment has: reference calls that are executed and annotated (bfcl), or
    #: recorded sub-answers whose calls are found (ftrl, toolhop)
    path: str | None = None
    style: str = "full"  #: annotator's wording: "full" or "compact"
    #: "one": each call in an assistant turn of its own, as its observation comes; "all": a user turn's calls together
    calls_per_turn: str = "one"
    teach_end_of_turn: bool = False  #: supervise the end-of-turn token after a call as part of the call span
    #: supervise what stands between reasoning and call, as part of the call span; False: the paper's literal rule
    teach_switch: bool = True
    #: largest share of training tasks that may have no trace; null = any share but all of ``path``'s
    max_missing: float | None = None
    #: largest share of training tasks that may have no reference calls; null = any share
    max_unreferenced: float | None = None
    #: use the traces of at most so many training tasks; the others are trained on by RL alone
    max_tasks: int | None = None
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
    concurrency: int = 64  #: episodes in flight


@dataclass
class RolloutConfig:
    """Rollouts: the server that makes them and how they are sampled."""

    server: RolloutServerConfig = field(default_factory=RolloutServerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    importance: str = "tis"  #: correction of sampler-trainer mismatch: "tis" (truncated importance sampling) or "off"
    importance_cap: float = 2.0
    #: of the weights that the server reloads: bfloat16 | float16 | float32 | fp8_block (docs/refit.md)
    export_dtype: str = "bfloat16"
    #: disk for refit exports, an absolute path that servers see too (local NVMe, shared); None = the run folder
    exports_dir: str | None = None
    keep_exports: int = 2  #: newest refit exports kept on disk


@dataclass
class ScheduleConfig:
    """Annealing of the SFT term (paper, tables 4 and 6)."""

    reasoning: str = "segment"  #: none | fixed | token | segment | whole_trace_token
    call: str = "scale"  #: none | fixed | token | scale
    reasoning_scale: float = 1.0
    fixed_level: int = 4  #: prefix level of reasoning=fixed
    call_start: float = 0.8  #: lambda_start of eq. 11
    call_end: float = 0.2  #: lambda_end of eq. 11
    horizon: int | None = None  #: S; None = the run's steps
    #: "fixed": a function of the step; "adaptive": of the policy's progress (``objective/adaptive.py``)
    kind: str = "fixed"
    success_target: float = 0.6  #: adaptive: success rate of rollouts at which annealing is through
    smoothing: float = 0.7  #: adaptive: weight of the past in the means it goes by
    #: adaptive: anchoring probability at full progress; None = ``anchor_prob`` throughout
    anchor_end: float | None = None


@dataclass
class ObjectiveConfig:
    """What methods have in common; see ``docs/objective.md`` for each symbol. A method may have other defaults for some
    of them (its ``defaults``); what is its own alone is in ``method_config``.
    """

    group_size: int = 8  #: K
    clip: bool = True  #: False: the surrogate without a range of ratios
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  #: c: a token of negative advantage loses at most c |A| (verl: 3.0); null = off
    gamma: float = 0.9  #: discount of the turn-level return
    advantage_eps: float = 1e-6
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
    kl_coef: float = 0.001
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

    steps: int = 0
    batch_size: int = 8  #: traces per optimizer step
    lr: float = 2e-5
    max_tasks: int | None = None  #: training tasks whose traces the stage sees; None = all
    reasoning_weight: float = 1.0
    call_weight: float = 1.0
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
    keep_checkpoints: int = 2
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

    before: bool = True
    after: bool = True
    #: assistant turns that may follow one user turn; None = as in the benchmark's own evaluation, or in training where
    #: it has none
    max_turns_per_user_turn: int | None = None
    temperature: float = 0.0
    samples: int = 1  #: episodes per task; with more than one the score is their mean
    episodes_in_report: int = 12


@dataclass
class DiagnosticsConfig:
    """What is measured beside the training, at a cost; nothing of it changes the training."""

    #: steps from one comparison of the gradients of two halves of a mini-batch to the next (two updates' time); 0 =
    #: none
    gradient_every: int = 0
    #: steps, of warm-up and of RL, from one measurement of held-out traces' likelihood to the next; 0 = none
    trace_every: int = 0
    trace_tasks: int = 24  #: the first so many held-out tasks that have a trace


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
    environment: str = "bfcl"  #: "bfcl", "ftrl", "toolhop", or ``module:factory``, ``path/to/file.py:factory``
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
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def _read_yaml(path: Path, environment: str, seen: tuple[Path, ...] = ()) -> DictConfig:
    """A YAML file with its ``defaults:`` parents merged below it.

    Args:
        environment: the one that the settings below this file name.
    """
    if path in seen:
        raise ConfigError(f"{path}: 'defaults' go in a circle: {' -> '.join(map(str, (*seen, path)))}")
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; the shipped ones are under conf/")
    try:
        loaded = load_yaml(path, Config)
    except ConfigError:
        raise
    except Exception as error:  # yaml and OmegaConf raise unrelated families; all mean "not a config file"
        raise ConfigError(f"{path}: not valid YAML: {error}; put a text with such characters into quotes") from error
    if isinstance(loaded, ListConfig):
        raise ConfigError(f"{path}: expected a mapping at the top level, found a list")
    try:
        parents = loaded.pop("defaults", [])
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{path}: 'defaults' can't be read: {str(error).splitlines()[0]}; give a list of file names"
        ) from error
    if not isinstance(parents, ListConfig | list) or not all(
        isinstance(name, str) and name.isprintable() for name in _plain(parents, str(path))
    ):
        raise ConfigError(f"{path}: 'defaults' must be a list of file names")
    merged = OmegaConf.create({})
    for parent in parents:
        below = _read_yaml((path.parent / str(parent)).resolve(), environment, (*seen, path))
        named = named_environment(str(path), below)
        begin_anew(merged, environment, named)
        environment = named or environment
        merged = OmegaConf.merge(merged, below)  # type: ignore[assignment]
    named = named_environment(str(path), loaded)
    begin_anew(merged, environment, named)
    loaded = _with_own_section(path, loaded, named or environment)
    try:
        return OmegaConf.merge(merged, loaded)  # type: ignore[return-value]
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}: it doesn't fit the files it names under 'defaults': {str(error).splitlines()[0]}; repair one of"
            " them"
        ) from error


def _with_own_section(path: Path, loaded: DictConfig, environment: str) -> DictConfig:
    """A file's settings with the section of its environment read by that environment's types, and checked."""
    if SECTION not in loaded:
        return loaded
    typed = load_yaml(path, schema_for(environment, Config))
    assert isinstance(typed, DictConfig)  # it was one before
    typed.pop("defaults", None)
    check_section(str(path), typed, environment)
    return typed


def _plain(source: Any, name: str) -> Any:
    """Lists and dicts, interpolations unresolved."""
    if not isinstance(source, DictConfig | ListConfig):
        return source
    try:
        return OmegaConf.to_container(source, resolve=False)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{name}: can't be read: {str(error).splitlines()[0]}; give plain settings") from error


def _refuse_resolvers(name: str, source: Any) -> None:
    """Raises ConfigError for ``${oc.env:HF_TOKEN}`` and its kind: what they bring in would be written into the run's
    config.yaml and report.
    """
    todo = [_plain(source, name)]
    while todo:
        value = todo.pop()
        if isinstance(value, dict | list):
            todo += [*value, *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, str) and _RESOLVER.search(value):
            raise ConfigError(f"{name}: {value!r}: settings don't read the environment; give the value itself")


_RESOLVER = re.compile(r"\$\{[^}]*:")


def load_config(
    path: str | Path | Sequence[str | Path | Recipe] | None = None, overrides: list[str] | None = None
) -> Config:
    """Resolve defaults, YAML files and recipes (later ones on top) and ``key=value`` overrides into a validated
    :class:`Config`.

    Raises:
        ConfigError: unknown key, wrong type, or settings that contradict each other; the message names the key and the
            source.
    """
    sources, environment = _sources(path, overrides)
    merged: Any = OmegaConf.structured(schema_for(environment, Config))
    for name, source in _method_first(sources):
        try:
            _refuse_resolvers(name, source)
            refuse_moved(name, source)
            merged = OmegaConf.merge(_with_method(merged, source), source)
        except (OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError) as error:
            key = getattr(error, "full_key", None) or ""
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{name}: {first_line} (key '{key}'); the schema is pact_nemo/config/schema.py"
            ) from error
    try:
        config = OmegaConf.to_object(merged)
    except (
        OmegaConfBaseException,
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # an interpolation that leads nowhere, or in a circle
        names = ", ".join(name for name, _ in sources)
        raise ConfigError(
            f"{names}: {str(error).splitlines()[0]} (key '{getattr(error, 'full_key', None) or ''}'); give the value"
            " itself"
        ) from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"{', '.join(name for name, _ in sources)}: no configuration, but a {type(config).__name__}; give settings"
            " by section"
        )
    own = method_class(config.method).Config
    config.method_config = own_config("method_config", config.method_config, own, f"method={config.method}")
    if config.trainer.epochs is not None and not any(
        _says(_plain(source, name), "trainer", "steps") for name, source in sources
    ):
        config.trainer.steps = None  # nobody has said a number of steps: the default isn't one to contradict
    if config.objective.constant_length is None:
        config.objective.constant_length = config.rollout.sampling.max_response_tokens
    config = Config(**{entry.name: getattr(config, entry.name) for entry in dataclasses.fields(Config)})
    validate(config)
    make_method(config)  # so that what the method itself refuses is refused here
    return config


def _sources(
    path: str | Path | Sequence[str | Path | Recipe] | None, overrides: list[str] | None
) -> tuple[list[tuple[str, Any]], str]:
    """Files, recipes and words as named sources of settings, and the environment that they name."""
    environment = Config.environment
    sources: list[tuple[str, Any]] = []
    for file in [] if path is None else [path] if isinstance(path, str | Path) else path:
        if isinstance(file, Recipe):
            sources.append(
                (
                    f"recipe {file.name}",
                    OmegaConf.create({**file.settings(), "model": {**file.settings()["model"], "recipe": file.name}}),
                )
            )
            continue
        sources.append((str(file), _read_yaml(Path(file).resolve(), environment)))
        environment = _environment_after(sources, environment)
    for word in sorted(overrides or [], key=lambda word: word.partition("=")[0] != "environment"):  # whatever the order
        sources.append(_word(word, environment))
        environment = _environment_after(sources, environment)
    return sources, environment


def _word(word: str, environment: str) -> tuple[str, DictConfig]:
    """A ``key=value`` word of the command line as a named source of settings.

    Raises:
        ConfigError: it is none.
    """
    key, separator, _ = word.partition("=")
    if not separator or key.startswith("-"):
        raise ConfigError(f"command line: {word!r} is not a key=value override, e.g. trainer.steps=50")
    name = f"command line '{word}'"
    try:
        source = load_word(word, schema_for(environment, Config) if key.startswith(SECTION) else Config)
    except ConfigError:
        raise
    except Exception as error:  # yaml and OmegaConf raise unrelated families; all mean "not a setting"
        raise ConfigError(
            f"command line {word!r}: the value can't be read: {error}; give it as YAML, e.g. trainer.steps=50"
        ) from error
    check_section(name, source, environment)
    return name, source


def _environment_after(sources: list[tuple[str, Any]], environment: str) -> str:
    """The environment after the last source; where that names another one, the sections before it are taken out."""
    named = named_environment(*sources[-1])
    for _, source in sources[:-1]:
        begin_anew(source, environment, named)
    return named or environment


def _says(source: dict[str, Any], section: str, key: str) -> bool:
    """Whether a source of settings has a key, null included."""
    found = source.get(section)
    return isinstance(found, str) or (
        isinstance(found, dict) and key in found
    )  # a text: an interpolation of the whole section


def steps_of(config: Config, training_tasks: int) -> int:
    """RL steps of a run: ``trainer.steps``, or ``trainer.epochs`` times the batches that an epoch fills.

    Args:
        training_tasks: tasks that are trained on, as :func:`pact_nemo.training.dataset.build_dataset` counts them.

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


def _method_first(sources: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The command line's ``method`` before its other words, whose order so says nothing."""
    words = [source for source in sources if source[0].startswith("command line")]
    naming = [source for source in words if _method_of(source[1]) is not None]
    return (
        [source for source in sources if source not in words]
        + naming
        + [source for source in words if source not in naming]
    )


def _method_of(source: Any) -> str | None:
    value = OmegaConf.select(source, "method") if isinstance(source, DictConfig) else None
    return value if isinstance(value, str) else None


def _with_method(merged: Any, source: Any) -> Any:
    """``merged``, and where ``source`` changes the method: with this method's defaults in place of the other one's, and
    without the other one's own settings.

    A method's defaults so lie below the source that names it and above the sources before it."""
    method = _method_of(source)
    if method is None or method == merged.method:
        return merged
    plain, before, after = ObjectiveConfig(), method_class(merged.method).defaults, method_class(method).defaults
    names = sorted({name for known in METHODS for name in method_class(known).defaults} | {*before, *after})
    unknown = [name for name in after if not hasattr(plain, name)]
    _require(not unknown, f"method={method}: its defaults name {', '.join(unknown)}, which objective doesn't have")
    merged = OmegaConf.merge(merged, {"objective": {name: after.get(name, getattr(plain, name)) for name in names}})
    merged.method_config = {}
    return merged


def to_yaml(config: Config) -> str:
    """The resolved configuration, loadable again by :func:`load_config`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of every setting."""
    return dataclasses.asdict(config)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{key}={value!r}: must be one of {', '.join(allowed)}")


def _require_writable(value: Any, key: str = "") -> None:
    """Numbers are finite and texts can be written: into config.yaml, a folder's name or a command line."""
    if isinstance(value, dict):
        for name, item in value.items():
            _require_writable(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            _require(
                isinstance(item, str | int | float), f"{key}: {item!r:.40} in a list of plain values; take it out"
            )  # OmegaConf lets it pass
            _require_writable(item, key)
    elif isinstance(value, float):
        _require(math.isfinite(value), f"{key}={value}: must be a finite number")
    elif isinstance(value, int):
        _require(abs(value) < 2**63, f"{key}: must fit into 64 bits")
    elif isinstance(value, str):
        _require(
            not re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", value),
            f"{key}={value!r}: must be a text without control characters",
        )


def _validate_environment(config: Config) -> None:
    """What the environment needs and refuses of the settings."""
    name, tasks = config.environment, config.tasks
    spec = environment_spec(name)
    _require(
        isinstance(config.environment_config, spec.config),
        f"environment_config={config.environment_config!r:.80}: must be the settings of environment={name}",
    )
    config.environment_config.validate()
    _require(
        spec.tasks_file != "required" or tasks.path is not None,
        f"environment={name} needs tasks.path=FILE, the benchmark's published rows",
    )
    for key in ("path", "eval_path"):
        _require(
            spec.tasks_file != "none" or getattr(tasks, key) is None,
            f"tasks.{key}={getattr(tasks, key)}: environment={name} reads no file of tasks; leave it out",
        )
    most = tasks.max_observation_chars
    _require(most is None or most >= 1, f"tasks.max_observation_chars={most}: must be >= 1, or null for no limit")
    _require(
        config.objective.outcome == "checker" or spec.reference_answers,
        f"objective.outcome={config.objective.outcome}: environment={name} has no reference answers to compare with;"
        " set objective.outcome=checker",
    )


def validate(config: Config) -> None:
    """Checks that types can't express. Raises ConfigError with the key and the remedy."""
    _require_writable(to_dict(config))
    for key, name in (("run.name", config.run.name), ("run.label", config.run.label)):
        _require(
            name is None or (name.strip() == name != "" and "/" not in name and name not in (".", "..")),
            f"{key}={name!r}: must be a name that a folder can have, without a slash or spaces around it",
        )
    config.rollout.server.validate()
    config.policy.validate_values()
    config.optimizer.validate()
    objective, trainer, tasks = config.objective, config.trainer, config.tasks
    method = method_class(config.method)
    _one_of("objective.outcome", objective.outcome, ("checker", "answer_f1"))
    _one_of("objective.combine", objective.combine, ("sum", "mean"))
    _one_of("objective.matching", objective.matching, ("hungarian", "greedy"))
    _one_of("objective.aggregation", objective.aggregation, AGGREGATIONS)
    _one_of("objective.sft_aggregation", objective.sft_aggregation, SFT_AGGREGATIONS)
    _one_of(
        "objective.schedule.reasoning",
        objective.schedule.reasoning,
        ("none", "fixed", "token", "segment", "whole_trace_token"),
    )
    _one_of("objective.schedule.kind", objective.schedule.kind, ("fixed", "adaptive"))
    _require(
        objective.schedule.anchor_end is None
        or (objective.schedule.kind == "adaptive" and 0.0 <= objective.schedule.anchor_end <= 1.0),
        f"objective.schedule.anchor_end={objective.schedule.anchor_end}: a probability, and for"
        " objective.schedule.kind=adaptive only",
    )
    _require(0.0 < objective.schedule.success_target <= 1.0, "objective.schedule.success_target must be in (0, 1]")
    _require(0.0 <= objective.schedule.smoothing < 1.0, "objective.schedule.smoothing must be in [0, 1)")
    _one_of("objective.schedule.call", objective.schedule.call, ("none", "fixed", "token", "scale"))
    _one_of("rollout.importance", config.rollout.importance, ("tis", "off"))
    if config.model.earlier_thoughts is not None:
        _one_of("model.earlier_thoughts", config.model.earlier_thoughts, EARLIER_THOUGHTS)
    _validate_environment(config)
    _one_of("tasks.overlong", tasks.overlong, ("drop", "stop"))
    _one_of("run.bad_rows", config.run.bad_rows, POLICIES)
    _one_of("traces.overlong", config.traces.overlong, OVERLONG)
    _one_of("traces.style", config.traces.style, ("full", "compact"))
    _one_of("traces.calls_per_turn", config.traces.calls_per_turn, ("one", "all"))
    _one_of("rollout.export_dtype", config.rollout.export_dtype, ("bfloat16", "float16", "float32", "fp8_block"))
    _require(
        config.rollout.exports_dir is None or Path(config.rollout.exports_dir).is_absolute(),
        f"rollout.exports_dir={config.rollout.exports_dir}: must be an absolute path, the same for every rank and"
        " server",
    )
    _require(
        set(config.traces.components) <= {"reasoning", "calls", "observations"},
        f"traces.components={config.traces.components}: only reasoning, calls and observations exist",
    )
    _require(
        set(config.traces.augment) <= set(KINDS),
        f"traces.augment={config.traces.augment}: only {', '.join(KINDS)} exist",
    )
    if config.traces.control is not None:
        _one_of("traces.control", config.traces.control, CONTROLS)
        _require(
            objective.trace_rl and method.conditions_on_trace,
            f"traces.control={config.traces.control} replaces what RL is conditioned on, and"
            f" method={config.method} with objective.trace_rl={objective.trace_rl} conditions on nothing;"
            " leave it out",
        )
    for key in ("max_missing", "max_unreferenced"):
        share = getattr(config.traces, key)
        _require(share is None or 0.0 <= share <= 1.0, f"traces.{key}={share}: a share in [0, 1], or null for no limit")
    most = config.traces.max_tasks
    _require(most is None or most >= 1, f"traces.max_tasks={most}: must be >= 1, or null for all")
    _require(config.traces.variants >= 1, f"traces.variants={config.traces.variants}: must be >= 1")
    _require(
        0.0 <= config.traces.quality_smoothing < 1.0,
        f"traces.quality_smoothing={config.traces.quality_smoothing}: must be in [0, 1)",
    )
    _require(
        0.0 <= objective.anchor_prob <= 1.0, f"objective.anchor_prob={objective.anchor_prob}: a probability in [0, 1]"
    )
    _require(
        objective.group_size >= 2,
        f"objective.group_size={objective.group_size}: group-normalised advantages need K >= 2",
    )
    _require(0.0 < objective.clip_low < 1.0, f"objective.clip_low={objective.clip_low}: must be in (0, 1)")
    _require(objective.clip_high > 0.0, f"objective.clip_high={objective.clip_high}: must be > 0")
    top = objective.clip_high if objective.clip else 0.0
    _require(
        objective.dual_clip is None or objective.dual_clip > 1.0 + top,
        f"objective.dual_clip={objective.dual_clip}: must be above {1.0 + top:g}, where the clip range ends, or null",
    )
    _require(
        objective.advantage_std_floor >= 0.0,
        f"objective.advantage_std_floor={objective.advantage_std_floor}: must be >= 0",
    )
    _require(objective.advantage_eps >= 0.0, f"objective.advantage_eps={objective.advantage_eps}: must be >= 0")
    _require(
        objective.advantage_std or objective.advantage_std_floor == 0.0,
        f"objective.advantage_std_floor={objective.advantage_std_floor} needs objective.advantage_std=true: nothing is"
        " divided otherwise",
    )
    _require(objective.entropy_coef >= 0.0, f"objective.entropy_coef={objective.entropy_coef}: must be >= 0")
    _require(
        objective.constant_length is None or objective.constant_length >= 1,
        f"objective.constant_length={objective.constant_length}: must be >= 1, or null for"
        " rollout.sampling.max_response_tokens",
    )
    _require(objective.kl_coef >= 0.0, f"objective.kl_coef={objective.kl_coef}: must be >= 0")
    _require(objective.sft_coef >= 0.0, f"objective.sft_coef={objective.sft_coef}: must be >= 0")
    _require(
        (trainer.steps is None) != (trainer.epochs is None),
        (
            f"trainer.steps={trainer.steps} and trainer.epochs={trainer.epochs}: one of them says how long the run is;"
            " set the other one to null"
            if trainer.steps is not None
            else (
                "trainer.steps=null and trainer.epochs=null: one of them has to say how long the run is; set"
                " trainer.steps=24, or trainer.epochs=3"
            )
        ),
    )
    _require(trainer.epochs is None or trainer.epochs >= 1, f"trainer.epochs={trainer.epochs}: must be >= 1")
    _require(
        (
            (trainer.steps == 0 and config.warmup.steps > 0)
            if not method.trains_by_rl
            else trainer.steps is None or trainer.steps >= 1
        ),
        f"trainer.steps={trainer.steps}: must be >= 1, and 0 for method=sft, which has warmup.steps > 0 only",
    )
    _require(
        1 <= trainer.mini_batch_size <= trainer.batch_size and trainer.batch_size % trainer.mini_batch_size == 0,
        f"trainer.mini_batch_size={trainer.mini_batch_size} must divide trainer.batch_size={trainer.batch_size}",
    )
    _require(trainer.keep_checkpoints >= 1, f"trainer.keep_checkpoints={trainer.keep_checkpoints}: must be >= 1")
    _require(trainer.keep_rollouts >= 0, f"trainer.keep_rollouts={trainer.keep_rollouts}: steps to keep, or 0 for all")
    _require(
        0.0 <= config.alarms.failed_share <= 1.0, f"alarms.failed_share={config.alarms.failed_share}: a share in [0, 1]"
    )
    _require(config.rollout.keep_exports >= 1, f"rollout.keep_exports={config.rollout.keep_exports}: must be >= 1")
    for key in ("gradient_every", "trace_every"):
        every = getattr(config.diagnostics, key)
        _require(every >= 0, f"diagnostics.{key}={every}: steps from one measurement to the next, or 0 for none")
    _require(
        config.diagnostics.trace_tasks >= 1, f"diagnostics.trace_tasks={config.diagnostics.trace_tasks}: must be >= 1"
    )
    check_settings(config.tracking.trackers)
    turns = config.evaluation.max_turns_per_user_turn
    _require(
        turns is None or turns >= 1,
        f"evaluation.max_turns_per_user_turn={turns}: must be >= 1, or null for the benchmark's own limit",
    )
    _require(tasks.held_out >= 1, f"tasks.held_out={tasks.held_out}: at least one scenario group must be held out")
    _require(
        not trainer.overlap or config.rollout.importance == "tis",
        "trainer.overlap=true trains on rollouts of older weights: it needs rollout.importance=tis, which corrects for"
        " that",
    )
    sampling = config.rollout.sampling
    _require(
        sampling.temperature > 0.0,
        f"rollout.sampling.temperature={sampling.temperature}: must be > 0: K greedy rollouts of a prompt are all"
        " alike, and greedy choice is no distribution whose log-probs could be trained; evaluation.temperature may"
        " be 0",
    )
    _require(
        sampling.top_p == 1.0,
        f"rollout.sampling.top_p={sampling.top_p}: must be 1.0: the trainer's log-probs are those of the whole softmax,"
        " not of a truncated one, and the update would be off by what was cut; lower rollout.sampling.temperature"
        " instead",
    )
    if config.rollout.importance == "tis":
        _require(
            config.rollout.importance_cap >= 1.0,
            f"rollout.importance_cap={config.rollout.importance_cap}: must be >= 1",
        )
