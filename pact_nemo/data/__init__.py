"""Which tasks and traces a run trains on."""
