"""The command line that every recipe shares."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from omegaconf import OmegaConf

from pact_nemo.checkout import ROOT as REPOSITORY
from pact_nemo.config.load import load_config
from pact_nemo.config.objective_use import words_without_effect
from pact_nemo.config.recipes import RECIPES, recipe
from pact_nemo.config.schema import Config, TasksConfig, to_yaml
from pact_nemo.errors import ConfigError, Interrupted, PactError
from pact_nemo.runtime import machine, orphans, ranks
from pact_nemo.runtime.interrupt import EXIT_CODE as INTERRUPTED
from pact_nemo.runtime.terminal import command, expendable_output
from pact_nemo.tracking.run_folder import check_places, check_replay

log = logging.getLogger(__name__)

#: what a run keeps when it is resumed: which tasks it trains on, which are scored, and how these are played
KEPT = {
    "tasks": [field.name for field in fields(TasksConfig) if field.name not in ("path", "eval_path")],
    "evaluation": ["samples", "temperature", "max_turns_per_user_turn"],
}


def resolve(arguments: argparse.Namespace, preset: str | None, full: str) -> Config:
    """Config of a new run or of the run being resumed, with the overrides on top.

    A new run starts from ``--config``, else from ``preset``; with ``--recipe`` from the benchmark's ``full`` settings,
    the recipe, then ``--config``.
    """
    if arguments.resume is not None:
        saved = Path(arguments.resume) / "config.yaml"
        if not saved.is_file():
            raise ConfigError(
                f"--resume {arguments.resume}: no config.yaml there; give a run folder such as runs/latest"
            )
        config = load_config(saved, arguments.overrides)
        _check_same_tasks(saved, config)
        return config
    if arguments.recipe is None:
        assert preset is not None
        return load_config(arguments.config or REPOSITORY / preset, arguments.overrides)
    chosen = recipe(arguments.recipe)
    config = load_config([REPOSITORY / full, chosen, *(arguments.config or [])], arguments.overrides)
    if config.model.path is None and not arguments.dry_run:
        raise ConfigError(
            f"recipe {chosen.name}: say where the weights of {chosen.model} are,"
            f" model.path=/models/{chosen.model.partition('/')[2]}"
        )
    return config


def _check_same_tasks(saved: Path, now: Config) -> None:
    """Raises ConfigError where a run would go on with other tasks, or with scores that can't be compared with those
    that it has. Its files may have another place.
    """
    before = OmegaConf.load(saved)
    for section, keys in KEPT.items():
        for key in keys:
            old = OmegaConf.select(before, f"{section}.{key}", default=getattr(getattr(Config(), section), key))
            new = getattr(getattr(now, section), key)
            if old != new:
                raise ConfigError(
                    f"{saved}: {section}.{key} is {old} in this run and can't become {new}: tasks that it was trained"
                    " on might be scored, or two scores be of different tasks; leave it out, or start a new run"
                )


def main(
    run: Callable[[Config, str | None], None],
    preset: str | None,
    full: str,
    description: str | None,
    default_recipe: str | None = None,
) -> None:
    """Parse, resolve, and run or explain. Exit codes: 0 done, 2 the configuration is wrong, 75 stopped by a signal and
    resumable, 76 a rank hung, 128 and more a rank was killed, 1 anything else.

    Where a run needs several ranks and nobody has started them, they are started here (:mod:`pact_nemo.launcher`).
    A standard output that gets lost or full ends no run (:mod:`pact_nemo.runtime.terminal`)."""
    try:
        command(lambda: _main(run, preset, full, description, default_recipe))
    except SystemExit as end:
        if "torch.distributed" in sys.modules:
            from pact_nemo.policy.distributed import exit_rank

            exit_rank(end.code if isinstance(end.code, int) else 0)
        raise


def _arguments(description: str | None, default_recipe: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config",
        action="append",
        metavar="YAML",
        help="default: the small model's preset; given again, later files go on top (conf/ablations)",
    )
    parser.add_argument(
        "--recipe", metavar="NAME", default=default_recipe, help=f"a run at scale: {', '.join(RECIPES)}"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check model, tasks and traces; print config, plan and memory; start nothing",
    )
    parser.add_argument(  # of the job scripts
        "--check-nodes", nargs=3, type=int, metavar=("NODES", "SERVERS", "RANKS"), help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--resume", nargs="?", const="runs/latest", metavar="RUN", help="continue a run folder (default runs/latest)"
    )
    parser.add_argument("--verbose", action="store_true", help="log at INFO")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting of pact_nemo/config/schema.py")
    return parser.parse_intermixed_args()


def _explain(config: Config) -> None:
    """``--dry-run``: check everything, print settings, plan and what the data brings."""
    from pact_nemo.planning.from_config import describe_plan, planned_world
    from pact_nemo.planning.host_room import check_host_room
    from pact_nemo.policy.device import use_cuda
    from pact_nemo.preflight.checks import check_room, preflight
    from pact_nemo.preflight.dry_run import look_at_data
    from pact_nemo.preflight.lengths import lengths_of
    from pact_nemo.tracking.registry import check_trackers

    if config.model.recipe is None:  # a recipe is explained on machines that it is not for
        check_room(config)
        check_trackers(config.tracking.trackers)
        if use_cuda():
            world = config.run.ranks or planned_world(config)
            check_host_room(config, world=world, ranks_here=world)
    seen = look_at_data(config, preflight(config))
    lengths = None
    if seen.chat is not None and seen.dataset is not None:
        lengths = lengths_of(seen.config, seen.chat, seen.dataset)
    print(to_yaml(seen.config))
    print("\n".join([describe_plan(seen.config, lengths), "data", *(f"  {note}" for note in seen.notes)]))


def _launched(config: Config, resume: str | None) -> int | None:
    """Exit code of the ranks that this machine was started with here; None where this process is to run the job: it is
    a rank already, or the only one.
    """
    if ranks.started_by() is not None:
        if (parent := os.environ.pop(ranks.LAUNCHER_ENV, None)) is not None:
            orphans.stop_without(int(parent))
        return None
    from pact_nemo import launcher
    from pact_nemo.runtime.gpus import visible_gpus

    gpus = visible_gpus()
    world = launcher.ranks_here(config, gpus, sys.argv)
    for line in launcher.report(config, gpus, world):
        print(line, flush=True)
    if world == 1:
        return None
    ending = launcher.launch(config, resume, world)
    if text := ending.message():
        print(text, file=sys.stderr)
    return ending.code


def _main(
    run: Callable[[Config, str | None], None],
    preset: str | None,
    full: str,
    description: str | None,
    default_recipe: str | None,
) -> int:
    arguments = _arguments(description, default_recipe)
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING, format="%(asctime)s %(name)s: %(message)s"
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        machine.prepare()
        config = resolve(arguments, preset, full)
        if ranks.LAUNCHER_ENV not in os.environ and os.environ.get("RANK", "0") == "0":  # said once a run
            for word in words_without_effect(config, arguments.overrides):
                log.warning("%s changes nothing with method=%s and the other settings", word, config.method)
        if arguments.check_nodes is not None:
            from pact_nemo.launcher import check_nodes

            print(check_nodes(config, *arguments.check_nodes))
            return 0
        policy = config.policy
        machine.prepare_cuda(one_connection=policy.tensor_parallel * policy.context_parallel > 1)
        check_replay(config)
        check_places(config)
        if arguments.dry_run:
            _explain(config)
            return 0
        with expendable_output():
            if (ending := _launched(config, arguments.resume)) is not None:
                return ending
            run(config, arguments.resume)
        return 0
    except ConfigError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        print(str(interrupted), file=sys.stderr)
        return INTERRUPTED
    except PactError as error:
        logging.getLogger(__name__).info("stopped", exc_info=True)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
