"""Several layers under way at the same time."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from entangle.models.layers import Layer

ON_GPU = 3
"""Layers under way at the same time on a GPU, so that it need not wait for Python."""

Found = TypeVar("Found")


def how_many(layers: Sequence[Layer]) -> int:
    """Return how many layers to have under way: several if all are on GPUs, else one."""
    return ON_GPU if layers and all(layer.device.type == "cuda" for layer in layers) else 1


def mapped(
    work: Callable[[Layer], Found], layers: Sequence[Layer], *, at_once: int
) -> Iterator[Found]:
    """Yield the result of every layer in order; on GPUs each on the caller's current stream."""
    if at_once == 1:
        yield from map(work, layers)
        return
    devices = {layer.device for layer in layers if layer.device.type == "cuda"}
    streams = {device: torch.cuda.current_stream(device) for device in devices}

    def on_stream(layer: Layer) -> Found:
        stream = streams.get(layer.device)
        with torch.no_grad(), torch.cuda.stream(stream):
            if stream is not None:
                stream.query()  # gives a thread the CUDA context that cuBLAS asks for
            return work(layer)

    with ThreadPoolExecutor(at_once) as pool:
        tasks = [pool.submit(on_stream, layer) for layer in layers]
        try:
            yield from (task.result() for task in tasks)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
