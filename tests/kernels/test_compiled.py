import ctypes
import subprocess
import sys
from importlib import resources

import torch

from entangle.kernels.dispatch import (
    OPERATIONS,
    dispatch,
    on_cpu,
    on_gpu,
    packed,
    source_text,
    usable,
)

SOURCES = (
    "binned", "distance", "exact", "lloyd", "pairs", "route", "sketch", "solver", "sparse",
    "unpack",
)  # fmt: skip
MODULES = ("dispatch", "exact", "lloyd", "sketch", "solver")


def test_a_tensor_on_the_cpu_goes_the_plain_way() -> None:
    assert not usable(torch.ones(2))


def test_every_source_comes_with_the_package() -> None:
    folder = resources.files("entangle.kernels")
    found = {file.name for file in folder.iterdir() if file.name.endswith(".cu")}
    assert found == {f"{name}.cu" for name in SOURCES}
    assert all('extern "C"' in source_text(name) for name in SOURCES)


def test_headers_are_put_in_their_place() -> None:
    header = resources.files("entangle.kernels").joinpath("tile.cuh").read_text("utf-8")
    for name in ("sketch", "pairs"):
        assert source_text(name).startswith(header)
        assert "#include" not in source_text(name)


def test_importing_asks_for_neither_a_gpu_nor_a_compiler() -> None:
    modules = ", ".join(f"entangle.kernels.{name}" for name in MODULES)
    check = "assert not torch.cuda.is_initialized() and 'triton' not in sys.modules"
    code = f"import sys, torch, {modules}; {check}"
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0


def test_arguments_lie_where_their_pointers_say() -> None:
    tensor = torch.arange(3)
    held, pointers = packed([tensor, 7, -1, 2**31 - 1])
    places = [place for place in pointers if place is not None]
    assert ctypes.c_void_p.from_address(places[0]).value == tensor.data_ptr()
    assert [ctypes.c_int.from_address(place).value for place in places[1:]] == [7, -1, 2**31 - 1]
    assert len(held) == len(places) == 4


def test_the_first_version_whose_condition_holds_runs() -> None:
    @dispatch(lambda *_: "large", where=lambda tensor, **_: len(tensor) > 5)
    @dispatch(lambda *_, sign: "here" * sign, where=on_cpu)
    @dispatch(lambda *_: "there", where=on_gpu)
    def where(tensor: torch.Tensor, *, sign: int = 1) -> str:
        """Tell."""
        return f"anywhere {len(tensor)} {sign}"

    assert where(torch.ones(2), sign=2) == "herehere"
    assert where(torch.ones(2, device="meta")) == "anywhere 2 1"
    assert where(torch.ones(6, device="meta")) == "large"
    assert where.__doc__ == "Tell."
    (name,) = (name for name in OPERATIONS if "the_first_version" in name)
    assert len(OPERATIONS.pop(name)) == 4
