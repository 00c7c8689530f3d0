"""Parts of ``tools/compare.py``: running runs, plans of them, and the results that stay when their folders are gone."""
