"""Fast products with packed experts on CPUs.

The kernels (`entangle.packed.cpu_products`, `entangle.packed.cpu_unpacking`) are compiled for the
processor at hand when they are first used, a tenth of a second each. Sums are float32, each row's
by one thread in one order: results do not depend on the number of threads, which is torch's.
"""

import ctypes
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import pad

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.kernels import native
from entangle.packed.activations import ACTIVATIONS
from entangle.packed.cpu_products import product
from entangle.packed.cpu_rows import Job, Kernel, Part
from entangle.packed.cpu_unpacking import unpacking
from entangle.packed.formats import BLOCK, VALUES, Layout, Packed

TOKENS = 32
"""Tokens up to which a product with the packed rows is faster than unpacking them."""
_FORMATS = "bitmap", "n16"
_SMALL = 1 << 15  # weights of a product that more threads would not make faster


def fits(
    x: Tensor,
    clusters: Tensor,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    bias: Tensor | None = None,
) -> bool:
    """Tell whether `linear` can take these, and is faster than unpacking; same arguments."""
    learns = torch.is_grad_enabled() and (x.requires_grad or _learns(bias))
    return (
        x.device.type == clusters.device.type == tensors["values"].device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.shape[0] <= TOKENS
        and layout.format in _FORMATS
        and x.shape[1] == layout.in_features
        and not (learns or torch.compiler.is_compiling())
        and bool(native.forms())
    )


def _learns(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def fits_gated(x: Tensor, clusters: Tensor, gate: Packed, up: Packed, activation: str) -> bool:
    """Tell whether `gated` can take these, and is faster than unpacking; same arguments."""
    known = activation in ACTIVATIONS
    return known and fits(x, clusters, *gate) and fits(x, clusters, *up)


def linear(
    x: Float[Tensor, "tokens in_features"],
    clusters: Int64[Tensor, " tokens"],
    tensors: Mapping[str, Tensor],
    layout: Layout,
    bias: Float[Tensor, " out_features"] | None = None,
) -> Float[Tensor, "tokens out_features"]:
    """Return every token's product with its expert; sums in float32.

    Parameters
    ----------
    x
        In any float dtype, in which the result is returned.
    clusters
        Each token's expert.
    tensors, layout
        From `entangle.packed.formats.pack`.
    bias
        Added to every row's sum.

    Raises
    ------
    InvalidInput
        If a token's expert is none of the layer's, or a tensor is not the layout's.
    """
    (found,) = _products(x, clusters, [Packed(tensors, layout, bias)])
    return found.to(x.dtype)


def gated(
    x: Float[Tensor, "tokens in_features"],
    clusters: Int64[Tensor, " tokens"],
    gate: Packed,
    up: Packed,
    activation: str,
) -> Float[Tensor, "tokens out_features"]:
    """Return ``activation(gate(x)) · up(x)``, both products in one pass; see `linear`.

    Parameters
    ----------
    activation
        silu, gelu, gelu_tanh, relu or relu2; applied in float32.
    """
    act = ACTIVATIONS[choice("activation", activation, tuple(ACTIVATIONS))]
    one, two = _products(x, clusters, [gate, up])
    return (act(one) * two).to(x.dtype)


def unpacks(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    _expert: int,
    _rows: slice = slice(None),
    dtype: torch.dtype | None = None,
) -> bool:
    """Tell whether `unpack` can do it; same arguments."""
    here = tensors["values"].device.type == "cpu" and layout.format in _FORMATS
    return here and dtype is not torch.float64 and bool(native.forms())


def unpack(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    expert: int,
    rows: slice = slice(None),
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "rows cols"]:
    """Return what `entangle.packed.formats.unpack` does, many times faster; CPU tensors only."""
    first, stop, _ = rows.indices(layout.out_features)
    stop = max(first, stop)
    own = torch.float32 if layout.coded else VALUES[layout.values]
    wanted, form = own if dtype is None else dtype, native.forms()[0]
    narrow = wanted is torch.bfloat16 or (wanted is torch.float16 and form != "scalar")
    tile = wanted if narrow else torch.float32
    found = torch.empty(stop - first, layout.in_features, dtype=tile)
    plan, kernel = _plan(layout), (form, 0, str(tile).removeprefix("torch."))
    plan.check([expert])
    part = [*plan.addresses(tensors), found.data_ptr()]
    plan.work(kernel, [part], [expert], (first, stop), found.shape[1] * found.element_size())
    return found.to(wanted)


def _products(x: Tensor, clusters: Tensor, parts: Sequence[Packed]) -> list[Tensor]:
    """Return the products of the same tokens with some layers, in float32."""
    plans = [_plan(part.layout) for part in parts]
    plan = plans[0]
    if any(other.alike != plan.alike for other in plans):
        return [found for part in parts for found in _products(x, clusters, [part])]
    if x.shape[0] == 1:
        return _one(x, int(clusters), parts, plans)
    wide, rows = plan.padded(x), plan.layout.out_features
    outs = [torch.empty(x.shape[0], rows) for _ in parts]
    experts = clusters.tolist()
    addresses = []
    for own, part, out in zip(plans, parts, outs, strict=True):
        own.check(experts)
        addresses.append([*own.addresses(part.tensors), out.data_ptr()])
    form = native.forms()[0]
    for tokens, groups in _groups(experts).items():
        plan.work((form, tokens, ""), addresses, groups, (0, rows), 4 * rows, wide.data_ptr())
    return [
        out if part.bias is None else out.add_(part.bias.detach())
        for part, out in zip(parts, outs, strict=True)
    ]


def _one(x: Tensor, expert: int, parts: Sequence[Packed], plans: Sequence["_Plan"]) -> list[Tensor]:
    """Return the products of one token: the same as of many, by calls that are kept prepared."""
    plan, threads, form = plans[0], torch.get_num_threads(), native.forms()[0]
    plan.check([expert])
    key = (
        form, threads, *[id(own) for own in plans],
        *[(t.data_ptr(), t.numel()) for part in parts for t in part.tensors.values()],
    )  # fmt: skip
    call = _CALLS.get(key)
    if call is None:
        addresses = [own.addresses(part.tensors) for own, part in zip(plans, parts, strict=True)]
        if len(_CALLS) >= _KEPT:
            _CALLS.clear()
        call = _CALLS[key] = plan.prepared((form, 1, ""), addresses, threads)
    outs = [torch.empty(1, plan.layout.out_features) for _ in parts]
    call(plan.padded(x), expert, outs)
    return [
        out if part.bias is None else out.add_(part.bias.detach())
        for part, out in zip(parts, outs, strict=True)
    ]


_CALLS: dict[tuple[object, ...], Callable[[Tensor, int, Sequence[Tensor]], None]] = {}
_KEPT = 4096  # calls: a few hundred bytes each


def _groups(experts: Sequence[int]) -> dict[int, list[int]]:
    """Return, by the tokens that a kernel takes at once, every group's expert and tokens.

    Tokens of one expert share the reading of its weights; where they are fewer than the kernel
    takes, the last stands there again.
    """
    if len(experts) == 1:
        return {1: [experts[0], 0]}
    of: dict[int, list[int]] = defaultdict(list)
    for token, expert in enumerate(experts):
        of[expert].append(token)
    found: dict[int, list[int]] = defaultdict(list)
    for expert, tokens in of.items():
        for start in range(0, len(tokens), 8):
            mine = tokens[start : start + 8]
            size = 1 << (len(mine) - 1).bit_length()
            found[size] += [expert, *mine, *[mine[-1]] * (size - len(mine))]
    return found


@cache
def _plan(layout: Layout) -> "_Plan":
    return _Plan(layout)


class _Plan:
    """What the calls of one layout share."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        cols = layout.in_features if layout.format == "n16" else 1
        self.shape = replace(layout, experts=1, out_features=1, in_features=cols, stored=0)
        """What of the layout a kernel depends on."""
        self.alike = self.shape, layout.out_features, layout.in_features
        sizes = {name: torch.Size(shape).numel() for name, (shape, _) in layout.tensors().items()}
        first = "bitmap" if layout.format == "bitmap" else "index"
        names = (first, "starts", "values", "scale", "zero", "steps")
        self.sizes = [(name, sizes.get(name, 0)) for name in names]
        self.table = _columns(layout) if layout.format == "n16" else torch.empty(0)
        self.width = layout.in_features + -layout.in_features % 64
        if layout.format == "n16":
            self.width = layout.lanes.blocks * BLOCK
        self.buffer = 4 * (max(self.table.numel(), self.width) + 48)

    def check(self, experts: Sequence[int]) -> None:
        """Raise `InvalidInput` if an expert is none of the layer's."""
        for expert in experts:
            if not 0 <= expert < self.layout.experts:
                raise InvalidInput(
                    f"the layer has {self.layout.experts} experts; got number {expert}."
                )

    def padded(self, x: Tensor) -> Tensor:
        """Return x in float32, its rows filled up to whole words or blocks by zeros."""
        cols = self.layout.in_features
        if x.shape[1] != cols:
            raise InvalidInput(f"`x` must have the layer's {cols} features; got {x.shape[1]}.")
        wide = x.detach().float()
        return wide.contiguous() if cols == self.width else pad(wide, (0, self.width - cols))

    def addresses(self, tensors: Mapping[str, Tensor]) -> list[int]:
        """Return where a layer's tensors stand, in the order of `Part`; 0 for those it has not."""
        found = []
        for name, size in self.sizes:
            tensor = tensors[name] if size or name == "values" else None
            if tensor is not None and (tensor.numel() != size or not tensor.is_contiguous()):
                raise InvalidInput(
                    f"the packed `{name}` must be contiguous and hold {size} numbers; got "
                    f"{tuple(tensor.shape)}."
                )
            found.append(0 if tensor is None else tensor.data_ptr())
        return found

    def work(
        self,
        kernel: tuple[str, int, str],
        parts: Sequence[Sequence[int]],
        groups: Sequence[int],
        rows: tuple[int, int],
        line: int,
        x: int = 0,
    ) -> None:
        """Let torch's threads work on some rows of layers of this layout.

        Parameters
        ----------
        kernel
            Its form, tokens at once (0: it unpacks) and the dtype of unpacked rows.
        parts
            For each layer the addresses of its tensors and of the result.
        groups
            From `_groups`; to unpack, the expert.
        rows
            The first and that behind the last.
        line
            Bytes of a row of the result.
        x
            Its address.
        """
        function, at_once = _compiled(self.shape, *kernel)
        count = rows[1] - rows[0]
        threads = 1 if count * self.layout.in_features < _SMALL else torch.get_num_threads()
        listed = (ctypes.c_int64 * len(groups))(*groups)
        scratch = self.scratch(at_once, kernel[1])
        room = torch.empty(threads * scratch, dtype=torch.uint8)
        job = self.job(parts, rows, line, len(groups) // (kernel[1] + 1), threads, scratch)
        job[Job.X], job[Job.GROUP], job[Job.SCRATCH] = x, ctypes.addressof(listed), room.data_ptr()
        native.run(function, job, threads)

    def scratch(self, at_once: int, tokens: int) -> int:
        """Return the bytes that a thread needs beside the layers."""
        return (at_once + tokens + 1) * (self.buffer + 4 * self.width)

    def job(
        self,
        parts: Sequence[Sequence[int]],
        rows: tuple[int, int],
        line: int,
        groups: int,
        threads: int,
        scratch: int,
    ) -> list[int]:
        """Return a job without the addresses of x, the groups and the threads' scratch."""
        count = rows[1] - rows[0]
        chunk = max(4, count * len(parts) // (8 * threads) & ~3)
        chunks = -(-count // chunk)
        return [
            0, 0, chunks * len(parts), chunks, chunk, *rows, self.layout.out_features,
            self.layout.in_features, self.table.numel(), 0, 4 * self.width, line, groups, 0, 0,
            scratch, self.buffer, self.table.data_ptr(), *[one for part in parts for one in part],
        ]  # fmt: skip

    def prepared(
        self, kernel: tuple[str, int, str], parts: Sequence[Sequence[int]], threads: int
    ) -> Callable[[Tensor, int, Sequence[Tensor]], None]:
        """Return a call for one token, of its x, its expert and where the results go."""
        function, at_once = _compiled(self.shape, *kernel)
        rows = self.layout.out_features
        threads = 1 if rows * self.layout.in_features < _SMALL else threads
        scratch = self.scratch(at_once, 1)
        empty = [[*part, 0] for part in parts]
        job = self.job(empty, (0, rows), 4 * rows, 1, threads, scratch)
        memory = ctypes.c_int64 * len(job)
        whole = bytes(memory(*job))
        places = [Job.PARTS + Part.SIZE * (n + 1) - 1 for n in range(len(parts))]
        pair = ctypes.c_int64 * 2

        def call(x: Tensor, expert: int, outs: Sequence[Tensor]) -> None:
            own, group = memory.from_buffer_copy(whole), pair(expert, 0)
            room = torch.empty(threads * scratch, dtype=torch.uint8)
            own[Job.X], own[Job.GROUP] = x.data_ptr(), ctypes.addressof(group)
            own[Job.SCRATCH] = room.data_ptr()
            for place, out in zip(places, outs, strict=True):
                own[place] = out.data_ptr()
            native.run(function, own, threads)

        return call


@cache
def _compiled(
    shape: Layout, form: str, tokens: int, tile: str
) -> tuple[Callable[[int], None], int]:
    """Return a kernel and how many rows it works on at once."""
    kernel = Kernel(form, shape, tokens, tile)
    text = product(kernel) if tokens else unpacking(kernel)
    return native.compiled(text, "work", form), kernel.rows


def _columns(layout: Layout) -> Tensor:
    """Return the first column of every stored value's block in a row of ``n16``, int32."""
    at = layout.lanes
    step, lane, rest = torch.meshgrid(
        *(torch.arange(n) for n in (at.steps, at.lanes, at.chunk)), indexing="ij"
    )
    turn = (step * at.chunk + rest) // layout.kept
    block = torch.where(turn < at.rounds, lane + at.lanes * turn, 0)
    return (BLOCK * block).flatten().int()
