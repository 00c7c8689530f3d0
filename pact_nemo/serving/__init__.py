"""The rollout server: how it is configured, started, watched, asked and given new weights."""
