"""CUDA kernels for the steps that torch would spread over many small ones, and the door to them.

Each has a plain torch version, which runs on every other device and is what the kernel is tested
against; `entangle.kernels.dispatch` chooses. Nothing here is compiled before it is first used.
"""
