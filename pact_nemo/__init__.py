"""PACT (Privileged Trace Co-Training, arXiv 2606.16215) for Megatron-scale tool-use agents."""

__version__ = "0.1.0"
