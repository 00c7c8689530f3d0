#!/usr/bin/env python
"""Everything that can be wrong with your tools, tasks and conversations, before anything is trained.

    python tools/check.py agent.tools=shop.py:Shop tasks.path=tasks.jsonl traces.path=traces.jsonl
    python tools/check.py agent.tools=shop.py:Shop traces.path=talks.jsonl model.path=/models/Qwen3-1.7B
    python tools/check.py environment=bfcl

The words are those of ``recipes/pact_own.py``. Rows are read, tools are shown as the model sees them, traces are
replayed, and the verdict is asked about the expert, about doing nothing and about another task's expert.
Exit code 0: no error; 1: errors; 2: the settings themselves are wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys

from pact_nemo import checkout

checkout.enter(__file__)

from rich.console import Console
from rich.text import Text

from pact_nemo.checking.check import Checked, check
from pact_nemo.checking.data_checks import kind_of
from pact_nemo.checking.findings import listed
from pact_nemo.cli import resolve
from pact_nemo.errors import ConfigError, PactError
from pact_nemo.preflight.chat import chat_of
from pact_nemo.runtime import machine
from pact_nemo.runtime.terminal import command
from pact_nemo.runtime.words import count_of
from recipes.pact_own import FULL, PRESET


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", metavar="YAML", help="default: the small model's preset")
    parser.add_argument("--recipe", metavar="NAME", help="settings of a run at scale")
    parser.add_argument("--limit", type=int, default=64, help="play episodes of so many tasks (default 64)")
    parser.add_argument("--json", action="store_true", help="print findings and tools as one JSON object")
    parser.add_argument("--verbose", action="store_true", help="log at INFO")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="the words of recipes/pact_own.py")
    options = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO if options.verbose else logging.ERROR, format="%(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = Console(stderr=True)
    try:
        machine.prepare()
        options.resume, options.dry_run = None, True
        config = resolve(options, PRESET, FULL)
        found = check(config, chat_of(config), limit=options.limit, note=lambda text: console.print(Text(f"… {text}")))
    except ConfigError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    except PactError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({**dataclasses.asdict(found), "errors": found.count("error")}))
    else:
        print("\n".join(_text(found)))
    return 1 if found.count("error") else 0


def _text(found: Checked) -> list[str]:
    lines = ["tools as the model sees them"]
    for tool in found.tools:
        properties = tool["parameters"].get("properties", {})
        required = set(tool["parameters"].get("required", ()))
        words = [f"{name}{'' if name in required else '?'}: {kind_of(schema)}" for name, schema in properties.items()]
        lines.append(f"  {tool['name']}({', '.join(words)})  {(tool.get('description') or '')[:90]}")
    lines.append(f"{found.tasks} tasks, {found.traces} with a trace; episodes of {found.played} tasks were played")
    lines += listed(found.findings)
    counts = ", ".join(count_of(found.count(level), level) for level in ("error", "warning", "note"))
    return [*lines, counts]


if __name__ == "__main__":
    command(main)
