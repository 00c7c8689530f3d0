"""BFCL multi-turn."""
