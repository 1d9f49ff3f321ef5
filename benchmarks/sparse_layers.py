"""Random packed layers for `benchmarks.sparse`, what they must answer, and a dense loop."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from entangle.kernels import native
from entangle.packed.formats import GROUP, Codes, Layout, pack


def packed_layer(
    form: str, values: str, rows: int, cols: int, level: float
) -> tuple[Layout, dict[str, Tensor]]:
    """Pack one expert: a share of zeros (bitmap) or n of 16; codes have steps a group of 128."""
    rng = torch.Generator().manual_seed(rows)
    if form == "bitmap":
        mask = torch.rand(1, rows, cols, generator=rng) >= level
    else:
        order = torch.rand(1, rows, -(-cols // 16), 16, generator=rng).argsort(-1).argsort(-1)
        mask = (order < level).flatten(2)[..., :cols]
    if not values.startswith("int"):
        return pack(torch.randn(1, rows, cols, generator=rng) * mask, form, values=values)
    bits = int(values[3:])
    steps = torch.randint(1, 256, (1, rows, -(-cols // GROUP)), dtype=torch.uint8, generator=rng)
    zero = torch.full((1, rows), 2.0 ** (bits - 1))
    grid = Codes(bits, torch.full((1, rows), 0.01), zero, steps)
    code = torch.randint(0, 2**bits, (1, rows, cols), generator=rng)
    return pack(torch.where(mask, (code - zero[..., None]) * grid.unit(cols), 0), form, codes=grid)


def answer_is_right(found: Tensor, weight: Tensor, x: Tensor) -> None:
    """Raise AssertionError unless all outputs are within 1e-6 of Σ|w||x| of the float64 ones."""
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    worst = float(((found.double() - exact).abs() / size.clamp_min(1e-300)).max())
    assert worst <= 1e-6, f"an output is {worst:.1e} of Σ|w||x| away from the float64 product"


def dense_bfloat16(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """Return a call of the plain loop over dense bfloat16 rows, compiled as the kernels are."""
    rows, cols = weight.shape
    out = torch.empty(1, rows)
    function = _loop(cols)

    def call() -> Tensor:
        job = [0, rows, weight.data_ptr(), x.data_ptr(), out.data_ptr()]
        native.run(function, job, torch.get_num_threads())
        return out

    answer_is_right(call(), weight, x)
    return call


@cache
def _loop(cols: int) -> Callable[[int], None]:
    code = native.Code("dense")
    job = code.at.ptrtoint(code.function.args[0], code.i64)
    rows, weight, x, out = (code.load(code.i64, code.sum(job, 8 * n)) for n in range(1, 5))

    def take() -> object:
        """Take the next 8 rows."""
        return code.at.atomic_rmw("add", code.pointer(job), code.whole(8), "monotonic")

    row = code.variable(take())
    with code.whilst(lambda: code.at.icmp_signed("<", code.get(row), rows)):
        first = code.get(row)
        for number in range(0, 8, 4):
            _rows(code, [code.sum(first, number + n) for n in range(4)], cols, weight, x, out)
        code.set(row, take())
    return native.compiled(code.text(), "dense", native.forms()[0])


def _rows(
    code: native.Code, rows: list[object], cols: int, weight: object, x: object, out: object
) -> None:
    """Write the product of 4 rows; widths are multiples of 16, numbers of rows of 8."""
    floats, short = code.vector(code.f32, 16), code.vector(code.i16, 16)
    wide = code.vector(code.i32, 16)
    sums = [code.variable(code.constant(floats, 0.0)) for _ in rows]
    with code.loop(0, cols, 16) as column:
        here = code.load(floats, code.sum(x, code.times(column, 4)))
        for row, total in zip(rows, sums, strict=True):
            place = code.times(code.sum(code.times(row, cols), column), 2)
            found = code.at.zext(code.load(short, code.sum(weight, place)), wide)
            found = code.at.bitcast(code.at.shl(found, code.constant(wide, 16)), floats)
            code.set(total, code.fma(found, here, code.get(total)))
    for row, total in zip(rows, sums, strict=True):
        vector = code.get(total)
        found = code.call(
            "llvm.vector.reduce.fadd.v16f32", code.f32, code.constant(code.f32, 0.0), vector
        )
        code.store(found, code.sum(out, code.times(row, 4)))
