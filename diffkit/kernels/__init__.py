"""Triton kernels for CUDA, each beside a reference in torch that gives the same everywhere."""
