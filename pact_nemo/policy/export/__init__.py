"""Weights written for others: layout, writer, HF folder, FP8 blocks."""
