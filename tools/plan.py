#!/usr/bin/env python
"""Memory, time and layout of a run before there are GPUs to run it on.

    python tools/plan.py --recipe llama3p1_70b_64xh100_bf16                               # the recipe as it stands
    python tools/plan.py --recipe llama3p1_70b_64xh100_bf16 --gpus 128 --gpu H200 --search # the best layouts \\
        of other hardware
    python tools/plan.py --model /models/Qwen3-8B/config.json --gpus 8 policy.tensor_parallel=4 \\
        policy.sequence_parallel=true
    python tools/plan.py --recipe qwen3_4b_4xh100_bf16 --prompt-tokens 3000 --response-tokens 1500 \\
        --trace-tokens 2000 --json
    # your own agent: lengths are measured on its tasks and traces
    python tools/plan.py --recipe qwen3_4b_4xh100_bf16 model.path=/models/Qwen3-4B agent.tools=shop.py:Shop \\
        tasks.path=tasks.jsonl traces.path=traces.jsonl
    # rollout servers on nodes of their own
    python tools/plan.py --recipe llama3p1_70b_64xh100_bf16 --servers 2 --server-gpus 8

Lengths are means over a run's prompts. They are measured where the config names files of tasks or traces and a
tokenizer is at hand; elsewhere the limits of the config are scaled (``planning/from_config.py: expected_lengths``).
What the numbers rest on: docs/cluster/planner.md. Exit codes: 0, 2 when the asked-for layout is impossible or nothing
fits, 1 when it does not fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.config.load import load_config
from pact_nemo.config.recipes import RECIPES, recipe
from pact_nemo.config.schema import Config, open_episodes
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.planning.from_config import (
    describe,
    expected_lengths,
    hardware_of,
    model_shape,
    planned_world,
    server_plan,
    step_work,
)
from pact_nemo.planning.hardware import GPUS, Hardware, gpu, this_cpu
from pact_nemo.planning.memory import GIB
from pact_nemo.planning.plan import Plan, make_plan, search
from pact_nemo.planning.shape import Layout, ModelShape
from pact_nemo.planning.workload import Lengths
from pact_nemo.preflight.lengths import read_lengths
from pact_nemo.runtime.terminal import command
from pact_nemo.serving.config import ALL_ENGINES
from pact_nemo.serving.placement import engines_per_node
from recipes import pact_bfcl, pact_own

REPOSITORY = checkout.ROOT


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--recipe", metavar="NAME", help=f"one of {', '.join(RECIPES)}")
    source.add_argument("--config", metavar="YAML", help="a settings file, e.g. a run's config.yaml")
    source.add_argument("--model", metavar="FOLDER", help="HF folder or config.json, with the paper's settings")
    parser.add_argument("--gpus", type=int, help="trainer GPUs; default: the recipe's")
    parser.add_argument("--gpu", choices=[*GPUS, "cpu"], help="default: the recipe's, or what is here")
    parser.add_argument(
        "--disk", type=float, metavar="GB/S", help="bandwidth of a node to the file system of exports and checkpoints"
    )
    for name in ("prompt", "response", "trace", "longest"):
        parser.add_argument(
            f"--{name}-tokens",
            type=int,
            metavar="N",
            help="mean length" if name != "longest" else "longest response of a step",
        )
    parser.add_argument(
        "--servers",
        type=int,
        default=0,
        help="rollout servers on GPUs of their own; 0: on trainer GPUs, as rollout.server.engines says",
    )
    parser.add_argument("--server-gpus", type=int, help="GPUs that a server is split over")
    parser.add_argument("--search", action="store_true", help="layouts that fit, the fastest step first")
    parser.add_argument("--top", type=int, default=10, help="how many of them")
    parser.add_argument("--json", action="store_true", help="one JSON object last")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting of pact_nemo/config/schema.py")
    return parser.parse_intermixed_args()


def resolve(arguments: argparse.Namespace) -> tuple[Config, ModelShape]:
    """The config to plan and its model. Words ``agent.*`` mean an agent of the user's own, as in recipes/pact_own.py.

    Raises:
        ConfigError: nothing says what to plan, or the settings are wrong.
    """
    own = any(word == "environment=own" or word.startswith(("agent.", "agent=")) for word in arguments.overrides)
    full = REPOSITORY / (pact_own.FULL if own else pact_bfcl.FULL)
    if arguments.config:
        config = load_config(arguments.config, arguments.overrides)
    elif arguments.recipe:
        config = load_config([full, recipe(arguments.recipe)], arguments.overrides)
    elif arguments.model:
        folder = Path(arguments.model)
        words = [f"model.path={folder.parent if folder.name == 'config.json' else folder}", *arguments.overrides]
        config = load_config(full, words)
    elif own:
        config = load_config(REPOSITORY / pact_own.PRESET, arguments.overrides)
    else:
        raise ConfigError("say what to plan: --recipe NAME, --config YAML, --model FOLDER or agent.tools=FILE")
    return config, model_shape(config)


def lengths_for(arguments: argparse.Namespace, config: Config) -> Lengths:
    """Lengths that were said, over those that were measured or are assumed."""
    said = {name: getattr(arguments, f"{name}_tokens") for name in ("prompt", "response", "trace", "longest")}
    said = {name: value for name, value in said.items() if value is not None}
    if len(said) == 4:
        return dataclasses.replace(expected_lengths(config), **said, source="as said")
    found = read_lengths(config, lambda text: print(text, file=sys.stderr))
    source = f"{', '.join(said)} as said, the others {found.source}" if said else found.source
    return dataclasses.replace(found, **said, source=source)


def show_search(plans: list[Plan], top: int) -> None:
    table = Table(title=f"{len(plans)} layouts fit; the fastest of them")
    for column in (
        "layout",
        "recompute",
        "GiB of a GPU",
        "rollout",
        "scoring",
        "update",
        "refit",
        "step s",
        "bottleneck",
    ):
        table.add_column(column)
    for plan in plans[:top]:
        scoring = sum(value for name, value in plan.phases.items() if name.endswith("scoring"))
        table.add_row(
            plan.layout.describe(),
            plan.policy.recompute,
            f"{plan.memory.total / GIB:.1f}",
            *(
                f"{value:.1f}"
                for value in (plan.phases["rollout"], scoring, plan.phases["update"], plan.phases["refit"], plan.step)
            ),
            plan.bottleneck,
        )
    Console(width=150).print(table)


def check_engines(config: Config, hardware: Hardware, world: int | None) -> None:
    """Refuse engines that the nodes don't hold, as the start of a run would.

    Args:
        world: trainer GPUs, which carry the engines; None: these are on GPUs of their own.

    Raises:
        ConfigError: names the setting.
    """
    server = config.rollout.server
    if not hardware.cuda or server.url is not None:
        return
    if server.tensor_parallel_size > hardware.gpus_per_node:
        raise ConfigError(
            f"rollout.server.tensor_parallel_size={server.tensor_parallel_size}: an engine lies on one node, and a node"
            f" of {hardware.name} has {hardware.gpus_per_node} GPUs; take a smaller one"
        )
    if world is None or server.engines in ("1", ALL_ENGINES):
        return
    has = hardware.gpus_per_node
    each = engines_per_node(server, -(-world // has), has)
    if each * server.tensor_parallel_size > has:
        raise ConfigError(
            f"rollout.server.engines={server.engines} is {each} on each node, which need"
            f" {each * server.tensor_parallel_size} GPUs by rollout.server.tensor_parallel_size="
            f"{server.tensor_parallel_size}, and a node of {hardware.name} has {has}; lower one of them"
        )


def main() -> int:
    arguments = parse()
    try:
        config, shape = resolve(arguments)
        hardware = (
            this_cpu() if arguments.gpu == "cpu" else gpu(arguments.gpu) if arguments.gpu else hardware_of(config)
        )
        if arguments.disk:
            hardware = dataclasses.replace(hardware, disk_bandwidth=arguments.disk * 1e9)
        world = arguments.gpus or planned_world(config)
        if arguments.server_gpus:
            size = arguments.server_gpus
            config = dataclasses.replace(
                config,
                rollout=dataclasses.replace(
                    config.rollout, server=dataclasses.replace(config.rollout.server, tensor_parallel_size=size)
                ),
            )
        check_engines(config, hardware, None if arguments.servers else world)
        work = step_work(config, lengths_for(arguments, config))
        server = server_plan(config, hardware, shape, world=world)
        shares = not arguments.servers and config.rollout.server.url is None
        if arguments.servers:
            open_ = open_episodes(config, arguments.servers)
            server = dataclasses.replace(
                server, servers=arguments.servers, share=0.9, concurrency=open_, time_sharing=False, whole=False
            )
        if arguments.search:
            plans = search(shape, world, config.policy, hardware, work, server, shares_gpus=shares)
            show_search(plans, arguments.top)
            if arguments.json:
                print(json.dumps({"layouts": [plan.as_json() for plan in plans[: arguments.top]]}))
            return 0
        plan = make_plan(
            shape, Layout.of(config.policy, world), config.policy, hardware, work, server, shares_gpus=shares
        )
    except (ConfigError, DataError) as error:
        kind = "configuration error" if isinstance(error, ConfigError) else "data error"
        print(f"{kind}: {error}", file=sys.stderr)
        return 2
    print(
        f"{shape.parameters / 1e6:,.0f} M parameters on {world} x {hardware.name}: {plan.layout.describe()}, recompute"
        f" {plan.policy.recompute}"
    )
    print("\n".join(describe(plan)))
    print(
        f"  update at {plan.update_tflops:,.0f} model TFLOP/s a GPU; refit:"
        f" {', '.join(f'{k} {v:.1f} s' for k, v in plan.refit.items())}"
    )
    if arguments.json:
        print(json.dumps(plan.as_json()))
    return 0 if plan.fits else 1


if __name__ == "__main__":
    command(main)
