"""Triton kernels of the EFE loss."""
