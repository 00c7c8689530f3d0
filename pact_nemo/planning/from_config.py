"""The plan of a run, from its config and the model's ``config.json`` alone: ``--dry-run``, ``tools/plan.py``, and what
the trainer compares itself with. Loads no weights; the formulas are in :mod:`pact_nemo.planning`."""

from __future__ import annotations

import os
from typing import Any

from pact_nemo.checkpoints.embedded import EMBEDDED_CONFIG
from pact_nemo.config.limits import evaluation_limits
from pact_nemo.config.lora import refit_kind
from pact_nemo.config.recipes import recipe
from pact_nemo.config.schema import Config, open_episodes, takes_turns
from pact_nemo.environments.registry import environment_spec
from pact_nemo.methods.registry import make_method
from pact_nemo.planning.generation import ServerPlan
from pact_nemo.planning.hardware import Hardware, gpu, this_cpu
from pact_nemo.planning.memory import GIB
from pact_nemo.planning.plan import Plan, make_plan
from pact_nemo.planning.shape import Layout, ModelShape, adapter_parameters
from pact_nemo.planning.workload import Lengths, StepWork
from pact_nemo.policy.architectures import check_architecture
from pact_nemo.policy.config import ADAPTER
from pact_nemo.policy.model_source import model_source
from pact_nemo.runtime.words import count_of
from pact_nemo.serving.config import ALL_ENGINES, share_beside
from pact_nemo.serving.placement import engines_per_node

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


def model_shape(config: Config) -> ModelShape:
    """Of the weights in ``model.path``; without one, of the recipe's model, or of the embedded one.

    Raises ConfigError when ``model.path`` holds no readable ``config.json``, or one that the policy does not compute.
    """
    if config.model.path is None and config.model.recipe is not None:
        return ModelShape.from_hf(recipe(config.model.recipe).shape)
    if config.model.path is None:
        return ModelShape.from_hf(EMBEDDED_CONFIG)
    described = model_source(config.model.path, config.model.hf_config).described
    return ModelShape.of(check_architecture(described, attention=config.policy.attention))


def expected_lengths(config: Config) -> Lengths:
    """Where nobody has said better: prompts of 0.6 of their limit, responses of half of theirs (an eighth of a limit
    above 4,096 tokens), traces as long as responses, and one response at its limit."""
    limit = config.rollout.sampling.max_response_tokens
    response = limit // 8 if limit > 4096 else limit // 2
    prompt = config.tasks.max_prompt_tokens or max(config.rollout.server.max_model_len - limit, 1)
    return Lengths(
        prompt=int(0.6 * prompt), response=response, trace=min(config.traces.max_tokens, response), longest=limit
    )


def step_work(config: Config, lengths: Lengths) -> StepWork:
    """What a step of this config computes (see ``training/loop.py``)."""
    objective, trainer = config.objective, config.trainer
    method = make_method(config)
    updates = trainer.batch_size // trainer.mini_batch_size
    corrected = config.rollout.importance == "tis"
    conditioned = 0.0
    if method.uses_traces:
        conditioned = 1.0 - objective.anchor_prob if method.conditions_on_trace else 1.0
    return StepWork(
        lengths=lengths,
        prompts=trainer.batch_size,
        group=objective.group_size,
        updates=updates,
        conditioned=conditioned * lengths.traced,
        trace_rl=method.trace_rl,
        score_old=1.0 if trainer.score_first_update else 1.0 - 1.0 / updates,
        score_prompt_only=1.0 / updates if corrected and not trainer.score_first_update else 0.0,
        reference=objective.kl_coef > 0,
        shared=config.policy.share_prefix,
        both_contexts=trainer.both_contexts
        or corrected
        or max(objective.kl_coef, objective.entropy_coef) > 0
        or objective.schedule.kind == "adaptive",
    )


def server_plan(config: Config, hardware: Hardware, shape: ModelShape, *, world: int | None = None) -> ServerPlan:
    """Of the rollout side: the engines that the job starts, the servers of ``rollout.server.url``, or engines that take
    turns with the trainer. On a CPU an engine takes its weights and the cache that it was given.

    Args:
        world: trainer ranks; None: :func:`planned_world`.
    """
    server = config.rollout.server
    world = world if world is not None else planned_world(config)
    count, width, share = engines_of(config, hardware, world), WIDTHS[server.dtype], share_beside(server)
    if not hardware.cuda:
        share = (width * shape.parameters + (server.cpu_kv_cache_gib or 0) * GIB) / hardware.memory
    sharing = takes_turns(config, cuda=hardware.cuda)
    kind = refit_kind(config, cuda=hardware.cuda)
    return ServerPlan(
        count,
        server.tensor_parallel_size,
        server.max_num_seqs,
        share,
        width,
        open_episodes(config, count),
        time_sharing=sharing,
        whole=sharing and hardware.cuda and server.gpu_memory_utilization is None,
        adapters=adapter_parameters(shape, config.policy.lora) if kind == ADAPTER else 0,
    )


def engines_of(config: Config, hardware: Hardware, world: int) -> int:
    """Rollout engines of the whole job."""
    server = config.rollout.server
    if server.url is not None:
        return len(server.url.split(","))
    if server.engines != ALL_ENGINES:
        return int(server.engines)
    per_node = _gpus_per_node(config, hardware) if hardware.cuda else world
    nodes = -(-world // per_node)
    return nodes * engines_per_node(server, nodes, min(world, per_node) if hardware.cuda else None)


def _gpus_per_node(config: Config, hardware: Hardware) -> int:
    if config.model.recipe is None:
        return hardware.gpus_per_node
    return min(hardware.gpus_per_node, recipe(config.model.recipe).gpus_per_node)


def hardware_of(config: Config) -> Hardware:
    """The recipe's GPUs; without a recipe, what is here."""
    if config.model.recipe is not None:
        return gpu("H100")
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return next((gpu(known) for known in ("H200", "H100", "B200", "A100") if known in name), gpu("H100"))
    return this_cpu()


def run_plan(
    config: Config, *, world: int | None = None, hardware: Hardware | None = None, lengths: Lengths | None = None
) -> Plan:
    """Plan a step of ``config``; what is not given is the recipe's, this machine's, or :func:`expected_lengths`.

    Raises:
        ConfigError: the model can't be laid out this way.
    """
    shape, hardware = model_shape(config), hardware if hardware is not None else hardware_of(config)
    return make_plan(
        shape,
        Layout.of(config.policy, world if world is not None else planned_world(config)),
        config.policy,
        hardware,
        step_work(config, lengths if lengths is not None else expected_lengths(config)),
        server_plan(config, hardware, shape, world=world),
        shares_gpus=config.rollout.server.url is None,
    )


def planned_world(config: Config) -> int:
    """Trainer ranks: those of this job, else the recipe's, else what the layout needs."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if config.model.recipe is not None:
        return recipe(config.model.recipe).world_size
    policy = config.policy
    return policy.pipeline_parallel * max(policy.tensor_parallel * policy.context_parallel, policy.expert_parallel)


def engine_share(config: Config, world: int) -> float:
    """Share of a GPU's memory that each engine of a run is given: ``rollout.server.gpu_memory_utilization``, or what
    the plan leaves it.

    Args:
        world: trainer ranks.
    """
    return run_plan(config, world=world).server.share


def describe(plan: Plan) -> list[str]:
    """Memory and time of a plan as lines of text."""
    lengths, memory = plan.work.lengths, plan.memory
    where = f"of pipeline stage {memory.stage}, the fullest" if plan.layout.pipeline > 1 else ""
    lines = [f"memory per {'GPU' if plan.hardware.cuda else 'trainer process'} ({plan.hardware.name}) {where}".rstrip()]
    lines += [f"  {name:<32}{value / GIB:8.2f} GiB" for name, value in memory.parts.items()]
    lines.append(f"  {'sum':<32}{memory.trainer / GIB:8.2f} GiB, for a micro-batch of {memory.row_tokens:,.0f} tokens")
    if memory.server:
        beside = "engine asleep beside it" if plan.server.time_sharing else "rollout server beside it"
        lines.append(f"  {beside:<32}{memory.server / GIB:8.2f} GiB")
    if plan.server.time_sharing:
        lines.append(
            f"  in its turn an engine has {plan.server.share:.2f} of a GPU; {plan.server.servers} engines over"
            f" {plan.server.gpus} GPU(s) each"
        )
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines.append(f"  {verdict}: {memory.total / GIB:.1f} of {plan.usable / GIB:.1f} usable GiB")
    if plan.host is None:
        lines.append("host memory per process")
        lines += [f"  {name:<32}{value / GIB:8.2f} GiB" for name, value in memory.host.items() if value]
    else:
        host = plan.host
        lines.append(f"host memory of a node with {host.ranks} rank(s) and {host.engines} engine(s), the fullest")
        lines += [f"  {name:<36}{value / GIB:10.2f} GiB" for name, value in host.parts.items() if value]
        lines.append(f"  {'sum':<36}{host.total / GIB:10.2f} GiB; a node has to have {host.needed / GIB:,.0f} GiB")
    lines.append(
        f"time of a step: mean prompt {lengths.prompt:,}, response {lengths.response:,} (longest {lengths.longest:,}),"
        f" trace {lengths.trace:,} tokens; {lengths.source}"
    )
    lines += [
        f"  {name:<32}{value:8.1f} s{'   <- bottleneck' if name == plan.bottleneck else ''}"
        for name, value in plan.phases.items()
    ]
    lines.append(f"  {'step':<32}{plan.step:8.1f} s; a checkpoint takes {plan.checkpoint:.1f} s more")
    prompts, engines = plan.work.prompts, plan.server.servers
    if engines > prompts:
        lines.append(
            f"  note: {prompts} prompts a step reach {prompts} of {engines} engines, for all rollouts of a prompt go to"
            " one; take a larger trainer.batch_size, or fewer rollout.server.engines"
        )
    return lines


def plan_in_one_line(plan: Plan) -> str:
    """A plan in one line."""
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in plan.phases.items())
    return (
        f"plan ({plan.hardware.name}): {plan.memory.trainer / GIB:.1f} GiB for the trainer; a step {plan.step:.0f} s:"
        f" {seconds}"
    )


def compare_with(plan: dict[str, Any], seconds: dict[str, float], steps: int, peak_bytes: dict[str, int]) -> list[str]:
    """Planned beside measured, a line each.

    Args:
        plan: :meth:`Plan.as_json` of the start.
        seconds: measured, summed over the run, by phase of the loop: ``rollout``, ``score``, ``update``, ``refit``.
        steps: of the run.
        peak_bytes: measured, of ``trainer`` and ``server``.
    """
    planned = dict(plan["seconds"])
    seconds = seconds | {
        "taking turns": sum(seconds.get(move, 0.0) for move in ("release", "restore", "sleep", "wake"))
    }
    planned["score"] = sum(planned.pop(name, 0.0) for name in ("old-policy scoring", "reference scoring"))
    lines = [
        f"{name}: {seconds[name] / steps:.1f} s a step, planned {planned[name]:.1f} s"
        for name in ("rollout", "score", "update", "refit", "taking turns")
        if steps and seconds.get(name) and name in planned
    ]
    if peak_bytes.get("trainer"):
        total = (
            plan["total_gib"]
            - plan["server_gib"]
            + sum(plan["memory_host_gib"].values()) * (plan["hardware"] == "this CPU")
        )
        lines.append(f"trainer memory: {peak_bytes['trainer'] / GIB:.1f} GiB, planned {total:.1f} GiB")
    return lines


def _tasks(config: Config) -> str:
    """Environment, its own settings and the split, in one line."""
    tasks, own = config.tasks, environment_spec(config.environment).describe(config.environment_config)
    source = f" of {tasks.path}" if tasks.path is not None else ""
    held_out = tasks.eval_path or f"{tasks.held_out} groups of tasks"
    validation = f"; scores are of {count_of(tasks.validation, 'group')} for tuning" if tasks.validation else ""
    return f"{config.environment}{source}; {f'{own}; ' if own else ''}held out: {held_out}{validation}"


def _turns_from(config: Config) -> str:
    """Where the limit of evaluation comes from that the settings don't say."""
    own = environment_spec(config.environment).official_turns()
    return "as in training" if own is None else "the benchmark's own limit"


def _length(config: Config) -> str:
    """Steps, episodes and updates of the run, or of one step where only the tasks would tell how many there are."""
    trainer = config.trainer
    episodes, updates = trainer.batch_size * config.objective.group_size, trainer.batch_size // trainer.mini_batch_size
    step = f"{trainer.batch_size} prompts x {config.objective.group_size} rollouts"
    if trainer.steps is None:
        return (
            f"{trainer.epochs} epochs of floor(training tasks / {trainer.batch_size}) steps, known once the tasks are"
            f" read; a step: {step} = {episodes:,} episodes, {updates} optimizer updates"
        )
    return (
        f"{trainer.steps} steps x {step} = {trainer.steps * episodes:,} episodes, {trainer.steps * updates} optimizer"
        " updates"
    )


def describe_plan(config: Config, lengths: Lengths | None = None) -> str:
    """The plan as text. ``lengths``: that were measured; None: :func:`expected_lengths`."""
    shape = model_shape(config)
    policy = config.policy
    scale = recipe(config.model.recipe) if config.model.recipe is not None else None
    world = planned_world(config)
    split = policy.tensor_parallel * policy.pipeline_parallel * policy.context_parallel
    name = config.model.path or (scale.model if scale is not None else "embedded SmolLM2-135M-Instruct")
    lines = [
        "plan",
        f"  model      {name}: {shape.parameters / 1e6:,.0f} M parameters, vocabulary {shape.vocab:,}",
        (
            f"  layout     {world} process(es): TP {policy.tensor_parallel} x PP {policy.pipeline_parallel} x CP"
            f" {policy.context_parallel} x DP {world // split if world % split == 0 else '?'}, precision"
            f" {policy.precision}"
        ),
        f"  tasks      {_tasks(config)}",
    ]
    if config.warmup.steps:
        lines.append(f"  warm-up    {config.warmup.steps} SFT steps of {config.warmup.batch_size} traces")
    lines += [
        f"  training   method {config.method}: {_length(config)}",
        "  evaluation "
        + ", ".join(
            name for name, on in (("before", config.evaluation.before), ("after", config.evaluation.after)) if on
        )
        + (f", every {config.evaluation.every} steps" if config.evaluation.every else "")
        + f"; at most {evaluation_limits(config).max_turns_per_user_turn} assistant turns after a user turn"
        + (f" ({_turns_from(config)})" if config.evaluation.max_turns_per_user_turn is None else ""),
    ]
    if world % split:
        return "\n".join(
            [*lines, f"note: {world} process(es) can't hold TP x PP x CP = {split}; start a multiple of {split}"]
        )
    if scale is not None:
        lines.append(f"  hardware   {scale.nodes} node(s) x {scale.gpus_per_node} GPU(s) of {scale.gpu_gib} GB")
    lines += describe(run_plan(config, world=world, lengths=lengths))
    return "\n".join(lines)
