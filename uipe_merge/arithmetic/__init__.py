"""The arithmetic, on torch tensors and nothing else."""
