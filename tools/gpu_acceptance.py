"""What a machine with a GPU has to show: the trainer, FP8, the rollout server. Three steps, a few minutes each.

    python tools/gpu_acceptance.py trainer --out trainer.json
    python tools/gpu_acceptance.py fp8 --out fp8.json          # with Transformer Engine
    python tools/gpu_acceptance.py serving --out serving.json  # with vLLM

Where this checkout is not installed, PYTHONPATH names it.

Each prints one JSON: per check its figures, or the error. Nothing needs a network; models are random or embedded.
``--small`` rehearses the scripts on any machine. Exit code 0: every check ended without an error.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

from pact_nemo import checkout

checkout.enter(__file__)

from tools.acceptance.kit import Settings, run_group, run_step

STEPS = {"trainer": 480.0, "fp8": 480.0, "serving": 480.0}  #: seconds each may take


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--small", action="store_true", help="sizes for a machine without a GPU")
    parser.add_argument("--out", type=Path, default=Path("gpu_acceptance.json"))
    parser.add_argument("--folder", type=Path, help="scratch folder (default: a temporary one)")
    parser.add_argument("--seconds", type=float, help="limit of the whole step")
    parser.add_argument("--only", nargs="+", default=[], help="these groups")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    groups = importlib.import_module(f"tools.acceptance.{options.step}").GROUPS
    if options.group is not None:
        group = next(group for group in groups if group.name == options.group)
        run_group(group, Settings(options.small, options.folder), options.lines)
        return 0
    chosen = [group for group in groups if not options.only or group.name in options.only]
    with tempfile.TemporaryDirectory(prefix="gpu-acceptance-") as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(Path(__file__).resolve()), options.step, "--folder", str(folder)]
        command += ["--small"] if options.small else []
        return run_step(options.step, chosen, command, options.out, limit_s=options.seconds or STEPS[options.step])


if __name__ == "__main__":
    raise SystemExit(main())
