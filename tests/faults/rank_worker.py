"""The recipe as torchrun starts it on each rank, with fake_server.py in the place of vLLM:
``rank_worker.py SERVER_FOLDER recipe's words``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pact_nemo.cli import main
from pact_nemo.serving.server import RolloutServer
from recipes.pact_bfcl import FULL, PRESET, run

if __name__ == "__main__":
    RolloutServer.program = (sys.executable, str(Path(__file__).with_name("fake_server.py")), sys.argv.pop(1))
    main(run, PRESET, FULL, None)
