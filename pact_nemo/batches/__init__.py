"""What an update is given: prompt groups, token trees, per-token streams."""
