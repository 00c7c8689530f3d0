"""Parts of ``tools/evaluate.py``: which tasks it plays, and which earlier episodes it takes for its own."""
