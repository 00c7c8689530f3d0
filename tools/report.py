#!/usr/bin/env python
"""Write (again) the report of a run, alone or beside other runs: the first one's report, compared with the others.

    python tools/report.py runs/latest
    python tools/report.py runs/pact_bfcl-pact-seed1-1 runs/pact_bfcl-grpo-seed1-1 runs/pact_bfcl-pact-seed2-1
    python tools/report.py runs/latest --png report.png --width 390 --dark

Without --png it needs no browser.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.errors import PactError
from pact_nemo.report import write_report
from pact_nemo.runtime.terminal import command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run folder that report.html is written into, and others to compare with",
    )
    parser.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="RUN", help="more run folders to compare with"
    )
    parser.add_argument("--png", type=Path, metavar="OUT", help="also draw the page, by a headless Chromium")
    parser.add_argument(
        "--width", type=int, default=1280, help="of the picture in CSS pixels (default 1280; a phone has about 390)"
    )
    parser.add_argument("--dark", action="store_true", help="draw the dark version")
    options = parser.parse_args(arguments)
    try:
        page = write_report(options.runs[0], [*options.runs[1:], *options.compare])
        print(f"report: {page}")
        if options.png is not None:
            from pact_nemo.report.browser import write_png

            print(f"picture: {write_png(page, options.png, width=options.width, dark=options.dark)}")
    except PactError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    command(main)
