"""Where a run is written down: metrics, terminal, run folder."""
