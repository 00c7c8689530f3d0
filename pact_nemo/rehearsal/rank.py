"""The process of a rehearsal: ``python -m pact_nemo.rehearsal.rank GUARD [--transformer-engine]`` reads cases as a
JSON list from standard input and prints a line of JSON for each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import traceback
from pathlib import Path

from pact_nemo.rehearsal import guard


def main() -> int:
    library, *options = sys.argv[1:]
    held = guard.preload(Path(library))
    import torch

    guard.install(held)
    torch.set_num_threads(1)
    from pact_nemo.rehearsal import cuda, observed, ranks

    cuda.pretend_cuda(local_rank=0)
    ranks.install()
    observed.read_lists()
    if "--transformer-engine" in options:
        from pact_nemo.rehearsal import engine_stand_in

        engine_stand_in.install()
    from pact_nemo.rehearsal.case import Case, Outcome
    from pact_nemo.rehearsal.play import play

    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for words in json.load(sys.stdin):
            case = Case(**{**words, "words": tuple(words["words"])})
            try:
                outcome = play(case)
            except Exception:  # whatever it is, it is what the rehearsal found
                outcome = Outcome(case, fault=traceback.format_exc())
            print(json.dumps(dataclasses.asdict(outcome)), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
