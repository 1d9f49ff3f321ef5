import subprocess
import sys
from importlib import resources

import torch

from entangle.kernels.compiled import usable

SOURCES = ("binned", "distance", "exact", "lloyd", "sketch", "solver")


def test_a_tensor_on_the_cpu_goes_the_plain_way() -> None:
    assert not usable(torch.ones(2))


def test_every_source_comes_with_the_package() -> None:
    folder = resources.files("entangle.kernels")
    found = {file.name for file in folder.iterdir() if file.name.endswith(".cu")}
    assert found == {f"{name}.cu" for name in SOURCES}
    assert all('extern "C"' in folder.joinpath(name).read_text("utf-8") for name in found)


def test_importing_asks_for_neither_a_gpu_nor_a_compiler() -> None:
    modules = ", ".join(f"entangle.kernels.{name}" for name in ("compiled", *SOURCES))
    check = "assert not torch.cuda.is_initialized() and 'triton' not in sys.modules"
    code = f"import sys, torch, {modules}; {check}"
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0
