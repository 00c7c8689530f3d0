"""A plain ``python recipes/...`` on a machine with GPUs: which ranks it starts there, and what it refuses.

Under torchrun or srun the ranks are there already, and nothing here is used. The processes are those of
:mod:`pact_nemo.runtime.ranks`."""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
import shlex
import shutil
import sys
from pathlib import Path

from pact_nemo.checkout import ROOT
from pact_nemo.config.load import load_config
from pact_nemo.config.recipes import RECIPES, Recipe, recipe
from pact_nemo.config.schema import Config
from pact_nemo.errors import ConfigError
from pact_nemo.planning.findings import version_of
from pact_nemo.planning.from_config import planned_world, run_plan
from pact_nemo.planning.hardware import gpu as planned_gpu
from pact_nemo.planning.host_room import check_host_room, holds
from pact_nemo.planning.memory import GIB
from pact_nemo.planning.plan import Plan
from pact_nemo.runtime.gpus import Gpu, named
from pact_nemo.runtime.ranks import Ending, RankProcesses
from pact_nemo.serving.placement import engines_per_node


def _plan(config: Config, world: int, gpus: list[Gpu]) -> Plan:
    """Of the first ``world`` GPUs, by the memory of the smallest; their speed is not asked for."""
    least = min(gpus[:world], key=lambda found: found.memory)
    hardware = dataclasses.replace(planned_gpu("H100"), name=least.name, memory=float(least.memory))
    return run_plan(config, world=world, hardware=hardware)


def fitting(gpus: list[Gpu]) -> list[str]:
    """Names of the recipes that these GPUs, and the memory beside them, hold by the plan. (The lengths that it goes by
    are those of all benchmarks.)
    """
    found = []
    for name in RECIPES:
        chosen = recipe(name)
        if chosen.nodes == 1 and chosen.world_size <= len(gpus):
            config = load_config([ROOT / "conf" / "pact_bfcl.yaml", chosen])
            try:
                plan = _plan(config, chosen.world_size, gpus)
            except ConfigError:  # an engine has no room there
                continue
            if plan.fits and holds(plan):
                found.append(name)
    return found


def _others(gpus: list[Gpu]) -> str:
    names = fitting(gpus)
    return f"recipes that fit here: {', '.join(names)}" if names else "no recipe fits here"


def ranks_here(config: Config, gpus: list[Gpu], words: list[str]) -> int:
    """How many ranks to start on this machine.

    Args:
        gpus: those of this machine.
        words: of the command line, script first, to say them again to a scheduler.

    Raises:
        ConfigError: the machine can't hold them; the message says which recipes it can.
    """
    chosen = recipe(config.model.recipe) if config.model.recipe is not None else None
    said = config.run.ranks
    world = said or planned_world(config)
    who = f"recipe {chosen.name}" if chosen is not None and said is None else f"run.ranks={said}"
    if chosen is not None and said is None:
        if chosen.nodes > 1:
            raise ConfigError(
                f"{who} is for {chosen.nodes} nodes of {chosen.gpus_per_node} GPUs, and this is one node with"
                f" {named(gpus)}; {_others(gpus)}. On a cluster: {_sbatch(chosen, words)}"
            )
        if not gpus:
            raise ConfigError(
                f"{who} is for {world} GPU(s), and torch sees none here (python tools/doctor.py --for gpu says why);"
                f" run.ranks={world} starts its ranks on the CPU"
            )
    if not gpus:
        return world
    if world > len(gpus):
        layout = f"the layout (policy.*_parallel) needs {world} ranks" if chosen is None and said is None else who
        raise ConfigError(f"{layout}: {world} rank(s), one a GPU, and this node has {named(gpus)}; {_others(gpus)}")
    if chosen is not None:
        _check_memory(config, who, gpus, world)
    return world


def _check_memory(config: Config, who: str, gpus: list[Gpu], world: int) -> None:
    try:
        plan = _plan(config, world, gpus)
    except ConfigError as error:
        raise ConfigError(f"{who}: {error}; {_others(gpus)}") from error
    need, used = plan.memory.total, gpus[:world]
    if not plan.fits:
        raise ConfigError(
            f"{who} needs {need / GIB:.1f} GiB of each GPU by the plan, and {plan.usable / GIB:.1f} are usable of"
            f" {named(used)}; {_others(gpus)}"
        )
    for index, found in enumerate(used):
        if found.free < need:
            raise ConfigError(
                f"{who} needs {need / GIB:.1f} GiB of each GPU by the plan, and {found.free / GIB:.1f} are free of GPU"
                f" {index} ({found.name}): another process holds the rest (nvidia-smi); end it, or choose GPUs with"
                " CUDA_VISIBLE_DEVICES"
            )
    check_host_room(config, world=world, ranks_here=world)


def _sbatch(chosen: Recipe, words: list[str]) -> str:
    """The command that submits a recipe of several nodes with the same words."""
    script, rest = words[0], list(words[1:])
    kept = [word for at, word in enumerate(rest) if word != "--recipe" and (at == 0 or rest[at - 1] != "--recipe")]
    kept = [word for word in kept if not word.startswith("--recipe=")]
    name = Path(script).resolve()
    place = f"recipes/{name.name}" if name.parent.name == "recipes" else script
    return (
        f'RECIPE={shlex.quote(place)} SETTINGS="--recipe {chosen.name}" sbatch --nodes={chosen.nodes}'
        f" slurm/pact_70b.sh {shlex.join(kept)}".rstrip()
    )


def check_nodes(config: Config, nodes: int, server_nodes: int, ranks_per_node: int) -> str:
    """Whether the nodes of a cluster's job hold the layout, in words.

    Args:
        nodes: of the job.
        server_nodes: those of them that carry a rollout server each and no trainer.
        ranks_per_node: trainer processes of each other node.

    Raises:
        ConfigError: they don't; the message says how many nodes do. Or the rollout engines can't be shared by them.
    """
    policy, left = config.policy, nodes - server_nodes
    dense = policy.tensor_parallel * policy.pipeline_parallel * policy.context_parallel
    experts = policy.pipeline_parallel * policy.expert_parallel
    block = math.lcm(dense, experts)
    step = block // math.gcd(block, ranks_per_node)  # nodes that whole copies of the model fill
    ranks = left * ranks_per_node
    servers = f" and SERVER_NODES={server_nodes}" if server_nodes else ""
    if left > 0 and ranks % block == 0:
        engines = "" if server_nodes else f"; {_engines(config, left, ranks_per_node)}"
        return f"{ranks} ranks on {left} node(s): {ranks // dense} x (TP x PP x CP = {dense}){servers}{engines}"
    fewer, more = left // step * step + server_nodes, (max(left, 0) // step + 1) * step + server_nodes
    remedy = f"--nodes={more}" + (f" or --nodes={fewer}" if fewer > server_nodes else "")
    raise ConfigError(
        f"--nodes={nodes}{servers} leaves {max(ranks, 0)} trainer ranks, and the layout takes multiples of {block} (TP"
        f" x PP x CP = {dense}, PP x EP = {experts}); submit with {remedy}, or change policy.*_parallel"
    )


def _engines(config: Config, nodes: int, gpus: int) -> str:
    """Where rollouts come from, in words.

    Args:
        nodes, gpus: of the trainer; GPUs of one node.
    """
    server = config.rollout.server
    if server.url is not None:
        return f"rollouts from {server.url}"
    each = f"over {server.tensor_parallel_size} GPU(s)"
    if server.engines == "1":
        return f"a rollout engine {each}"
    count = engines_per_node(server, nodes, gpus)
    engines = f"{count} rollout engines {each} each" if count > 1 else f"a rollout engine {each}"
    return f"{engines} on every node" if nodes > 1 else engines


def report(config: Config, gpus: list[Gpu], world: int) -> list[str]:
    """What was found and what is started, in lines; nothing for one process on the CPU."""
    if not gpus:
        return [] if world == 1 else [f"starting {world} ranks on the CPU"]
    engine = version_of("vllm")
    fused = version_of("transformer-engine", "transformer-engine-torch")
    lines = [
        f"found {named(gpus)}; Transformer Engine {fused or 'not installed'}; vLLM {engine or 'not installed'}",
    ]
    where = _engines(config, 1, world)
    used = f"GPU{'s 0 to ' + str(world - 1) if world > 1 else ' 0'} of {len(gpus)}"
    if config.model.recipe is not None:
        more = f"; run.ranks={len(gpus)} takes all of them" if world < len(gpus) and config.run.ranks is None else ""
        return [*lines, f"recipe {config.model.recipe}: {world} rank(s) on {used}, {where}{more}"]
    names = fitting(gpus)
    beside = f"recipes that fit here: {', '.join(names)} (--recipe NAME model.path=FOLDER)" if names else ""
    return [*lines, f"no --recipe: {world} rank(s) on {used}, {where}; {beside or 'no recipe at scale fits here'}"]


def launch(config: Config, resume: str | None, world: int) -> Ending:
    """Start this very command as ``world`` ranks and wait for them. Their logs end up in the run folder."""
    root = Path(config.run.root) if resume is None else Path(resume).resolve().parent
    made = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    logs = root / f".ranks-{secrets.token_hex(4)}"
    logs.mkdir()
    try:
        return RankProcesses([sys.executable, *sys.orig_argv[1:]], world, logs.resolve()).run()
    finally:
        shutil.rmtree(logs, ignore_errors=True)  # there was no run folder to take it
        if made and not os.listdir(root):
            root.rmdir()
