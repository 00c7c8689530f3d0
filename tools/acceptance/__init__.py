"""The checks behind ``tools/gpu_acceptance.py``."""
