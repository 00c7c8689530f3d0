"""One module for each subcommand of ``tools/bench.py``: ``add_arguments(parser)`` and ``run(options) -> exit code``."""
