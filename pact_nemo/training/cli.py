"""The command line that every recipe shares."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from pact_nemo.errors import ConfigError, Interrupted, PactError
from pact_nemo.training.config import Config, load_config, to_yaml

INTERRUPTED = 75  # EX_TEMPFAIL: try again later
REPOSITORY = Path(__file__).resolve().parents[2]


def resolve(arguments: argparse.Namespace, preset: str) -> Config:
    """Config of a new run (preset or ``--config``) or of the run being resumed, with the overrides on top."""
    if arguments.resume is not None:
        saved = Path(arguments.resume) / "config.yaml"
        if not saved.is_file():
            raise ConfigError(f"--resume {arguments.resume}: no config.yaml there; give a run folder such as runs/latest")
        return load_config(saved, arguments.overrides)
    return load_config(arguments.config or REPOSITORY / preset, arguments.overrides)


def main(run: Callable[[Config, str | None], None], preset: str, description: str | None) -> None:
    """Parse, resolve, and run or explain. Exit codes: 0 done, 2 the configuration is wrong, 75 stopped by a signal and resumable, 1 anything else."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", action="append", metavar="YAML", help="default: the small model's preset; given again, later files go on top (conf/ablations)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, the plan and the memory needed; start nothing")
    parser.add_argument("--resume", nargs="?", const="runs/latest", metavar="RUN", help="continue a run folder (default runs/latest)")
    parser.add_argument("--verbose", action="store_true", help="log at INFO")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting of pact_nemo/training/config.py")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        config = resolve(arguments, preset)
        if arguments.dry_run:
            from pact_nemo.training.plan import describe_plan

            print(to_yaml(config))
            print(describe_plan(config))
            return
        run(config, arguments.resume)
    except ConfigError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Interrupted as interrupted:
        print(str(interrupted), file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except PactError as error:
        logging.getLogger(__name__).info("stopped", exc_info=True)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
