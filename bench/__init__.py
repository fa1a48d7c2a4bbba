"""Benchmarks of efe_kernels and the report on its ahead-of-time compiled kernels."""
