"""CUDA kernels for the steps that torch would spread over many small ones.

Each has a plain torch version where it is called: that one runs on every other device and is what
the kernel is tested against. Nothing here is imported or compiled before it is first used.
"""
