#!/usr/bin/env python
"""A rollout server by itself, for trainers on other nodes (or other processes) to attach to with
``rollout.server.url=...``.

    PACT_ROLLOUT_API_KEY=... python tools/serve.py --recipe qwen3_8b_8xh100_bf16 --host 0.0.0.0 --address \\
        $(hostname -i) --ready server-0.url \\
        model.path=/models/Qwen3-8B rollout.server.tensor_parallel_size=8 rollout.server.gpu_memory_utilization=0.9

Its settings are those of the trainer's recipe script with the same words: ``--script recipes/pact_own.py`` for an agent
of your own. It serves ``model.path`` as weight version 0 until it is told otherwise, with the very arguments that a
trainer starts its own server with. Where a refit brings adapters (``rollout.lora_refit``) it takes those of such a
trainer. When it answers, its address is written to ``--ready``. SIGTERM or Ctrl-C stops it and everything it started.
The key comes from the variable that ``rollout.server.api_key_env`` names, the same as the trainer's.
"""

from __future__ import annotations

import argparse
import os
import runpy
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.cli import resolve
from pact_nemo.config.lora import adapter_room
from pact_nemo.config.recipes import RECIPES
from pact_nemo.config.schema import Config
from pact_nemo.errors import ConfigError, PactError
from pact_nemo.nemo_run_task import RECIPE_SCRIPT
from pact_nemo.preflight.checks import preflight
from pact_nemo.runtime.files import write_text_atomic
from pact_nemo.runtime.terminal import command
from pact_nemo.serving.launch import on_cuda
from pact_nemo.serving.server import RolloutServer
from pact_nemo.training.served_weights import model_path, served_path


def settings_of(options: argparse.Namespace) -> Config:
    """The settings that the trainer's recipe script would take with the same words.

    Raises:
        ConfigError: it is no recipe script, or the settings are wrong.
    """
    script = options.script if options.script.is_absolute() else checkout.ROOT / options.script
    if not script.is_file():
        raise ConfigError(
            f"--script {options.script}: there is no such file; give a recipe script, e.g. {RECIPE_SCRIPT}"
        )
    found = runpy.run_path(str(script))
    if not isinstance(full := found.get("FULL"), str):
        raise ConfigError(f"--script {options.script}: it names no settings file, FULL, as {RECIPE_SCRIPT} does")
    preset = found.get("PRESET")
    if preset is None and options.recipe is None and not options.config:
        raise ConfigError(f"--script {options.script}: it has no small preset; say --recipe NAME or --config YAML")
    options.resume, options.dry_run = None, False
    return resolve(options, preset, full)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--config", action="append", metavar="YAML", help="settings files as for the recipes")
    parser.add_argument(
        "--script", type=Path, default=Path(RECIPE_SCRIPT), metavar="FILE", help="the trainer's recipe script"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--address", help="address that trainers reach it by (default: --host)")
    parser.add_argument("--ready", type=Path, metavar="FILE", help="the server's URL is written here once it answers")
    parser.add_argument("--log", type=Path, default=Path("server.log"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        config = settings_of(options)
        settings = replace(config.rollout.server, host=options.host, url=None)
        if not os.environ.get(settings.api_key_env):
            raise ConfigError(
                f"put a key for the server into the environment variable {settings.api_key_env}, the same as the"
                " trainers'"
            )
        preflight(config)
        source, adapters = served_path(config, model_path(config)), adapter_room(config, cuda=on_cuda(settings))
        with RolloutServer(settings, source, log_file=options.log, adapters=adapters) as server:
            parts = urlsplit(server.endpoint.url)
            url = f"http://{options.address or parts.hostname}:{parts.port}"
            print(
                f"serving {config.model.path or 'the embedded model'} at {url} after {server.start_seconds:.0f} s",
                flush=True,
            )
            if options.ready is not None:
                write_text_atomic(options.ready, url + "\n")
            while True:
                server.check_alive()
                time.sleep(1)
    except PactError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    command(main)
