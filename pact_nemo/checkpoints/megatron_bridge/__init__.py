"""Checkpoints as Megatron-Bridge writes and reads them, without its training package."""
