"""One rank of a job on GPUs, on a machine that has none: the project's own CUDA branch over fake tensors, which have
shapes, dtypes and devices but no numbers, behind a fake process group.
"""
