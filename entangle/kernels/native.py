"""Machine code made while the program runs, and torch's own threads to run it.

LLVM, which the package ``llvmlite`` brings along, compiles for the processor at hand, so that no
compiler need be installed; a function takes some hundredths of a second. `Code` writes one in
LLVM's language, `compiled` makes it callable, `run` lets all threads work off one job.
"""

import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

try:
    from llvmlite import binding, ir
except ImportError:  # a platform without it: `forms` is empty
    binding = ir = None

_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c", "popcnt")
FORMS = {
    "vbmi2": (*_AVX512, "avx512vbmi2", "bmi2"),
    "avx512": _AVX512,
    "avx2": ("avx2", "fma", "f16c", "popcnt"),
    "scalar": (),
}
"""Features that a form needs, the fastest form first."""
_ENGINES: list[Any] = []  # own the machine code, which lives as long as the process
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def forms() -> tuple[str, ...]:
    """Return the forms that this machine runs, the fastest first; none without LLVM."""
    if binding is None:
        logging.getLogger(__name__).warning(
            "the CPU works without kernels, slowly: llvmlite is not installed."
        )
        return ()
    try:
        has = dict(binding.get_host_cpu_features())
    except RuntimeError:  # a processor that LLVM cannot ask
        has = {}
    return tuple(form for form, needs in FORMS.items() if all(has.get(one) for one in needs))


def reads(dtype: torch.dtype) -> bool:
    """Tell whether `Code.as_floats` loads numbers of a dtype in the fastest form."""
    if dtype == torch.float16:  # else LLVM calls a function that is not there
        return forms()[:1] != ("scalar",)
    return dtype in (torch.float32, torch.bfloat16)


class Code:
    """One function, ``void (char *job)``, being written."""

    def __init__(self, name: str) -> None:
        self.module = ir.Module(name)
        self.module.triple = binding.get_default_triple()
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType()])
        self.function = ir.Function(self.module, kind, name)
        self.at = ir.IRBuilder(self.function.append_basic_block())
        self.i8, self.i16, self.i32, self.i64 = (ir.IntType(n) for n in (8, 16, 32, 64))
        self.f32, self.f16, self.void = ir.FloatType(), ir.HalfType(), ir.VoidType()
        self.f64 = ir.DoubleType()

    def text(self) -> str:
        """Return what was written, closed."""
        self.at.ret_void()
        return str(self.module)

    @staticmethod
    def vector(kind: Any, lanes: int) -> Any:
        """Return the type of some numbers side by side."""
        return ir.VectorType(kind, lanes)

    @staticmethod
    def constant(kind: Any, value: Any) -> Any:
        """Return a number, or a number for every lane of a vector (one for all, or a list)."""
        if isinstance(kind, ir.VectorType) and not isinstance(value, list):
            value = [value] * kind.count
        return ir.Constant(kind, value)

    def whole(self, value: Any) -> Any:
        """Return a whole number of 64 bits: what is one already stays."""
        return ir.Constant(self.i64, value) if isinstance(value, int) else value

    def sum(self, *terms: Any) -> Any:
        """Return a sum of whole numbers of 64 bits."""
        found, *rest = (self.whole(term) for term in terms)
        for term in rest:
            found = self.at.add(found, term)
        return found

    def times(self, one: Any, other: Any) -> Any:
        """Return a product of whole numbers of 64 bits."""
        return self.at.mul(self.whole(one), self.whole(other))

    def splat(self, value: Any, lanes: int) -> Any:
        """Return a vector that holds one number in all lanes."""
        kind = ir.VectorType(value.type, lanes)
        first = self.at.insert_element(ir.Constant(kind, ir.Undefined), value, self.i32(0))
        zeros = ir.Constant(ir.VectorType(self.i32, lanes), None)
        return self.at.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)

    def pointer(self, address: Any) -> Any:
        """Return an address, a number of 64 bits, as a pointer."""
        return self.at.inttoptr(address, ir.PointerType())

    def load(self, kind: Any, address: Any) -> Any:
        """Load from any address, aligned or not."""
        return self.at.load(self.pointer(address), typ=kind, align=1)

    def store(self, value: Any, address: Any) -> None:
        """Store to any address, aligned or not."""
        self.at.store(value, self.pointer(address), align=1)

    def variable(self, value: Any) -> Any:
        """Return a place whose number changes: `get`, `set`."""
        with self.at.goto_entry_block():
            place = self.at.alloca(value.type)
        self.at.store(value, place)
        return place

    def get(self, place: Any) -> Any:
        """Return the number that a variable holds."""
        return self.at.load(place, typ=place.allocated_type)

    def set(self, place: Any, value: Any) -> None:
        """Give a variable another number."""
        self.at.store(value, place)

    def add(self, place: Any, value: Any) -> None:
        """Add to a variable, a whole number of 64 bits."""
        self.set(place, self.sum(self.get(place), value))

    def call(self, name: str, kind: Any, *given: Any) -> Any:
        """Call one of LLVM's own functions."""
        known = self.module.globals.get(name)
        if known is None:
            types = ir.FunctionType(kind, [one.type for one in given])
            known = ir.Function(self.module, types, name)
        return self.at.call(known, given)

    def own(self, name: str, *given: Any) -> Any:
        """Call one of LLVM's functions of floats of one type, which returns that type."""
        kind = given[0].type
        lanes = f"v{kind.count}" if isinstance(kind, ir.VectorType) else ""
        number = kind.element if lanes else kind
        bits = "f64" if isinstance(number, ir.DoubleType) else "f32"
        return self.call(f"llvm.{name}.{lanes}{bits}", kind, *given)

    def fma(self, one: Any, other: Any, rest: Any) -> Any:
        """Return ``one · other + rest`` of floats, rounded once where the machine can."""
        return self.own("fmuladd", one, other, rest)

    def larger(self, one: Any, other: Any) -> Any:
        """Return the larger of two floats, the other one of NaN."""
        return self.own("maxnum", one, other)

    def smaller(self, one: Any, other: Any) -> Any:
        """Return the smaller of two floats, the other one of NaN."""
        return self.own("minnum", one, other)

    def as_floats(self, address: Any, dtype: torch.dtype, lanes: int) -> Any:
        """Load numbers of 16 or 32 bits as float32."""
        if dtype == torch.float32:
            return self.load(self.vector(self.f32, lanes), address)
        wide, single = self.vector(self.i32, lanes), self.vector(self.f32, lanes)
        if dtype == torch.float16:
            return self.at.fpext(self.load(self.vector(self.f16, lanes), address), single)
        bits = self.at.zext(self.load(self.vector(self.i16, lanes), address), wide)
        return self.at.bitcast(self.at.shl(bits, self.constant(wide, 16)), single)

    @contextmanager
    def shared(self, counter: Any, stop: Any, step: int) -> Iterator[Any]:
        """Write the body of a loop whose turns the threads share out; gives where one begins.

        ``counter`` is the address of a whole number, 0 at first, that is theirs in common.
        """

        def taken() -> Any:
            place = self.pointer(counter)
            return self.at.atomic_rmw("add", place, self.whole(step), "monotonic")

        now = self.variable(self.whole(0))
        self.set(now, taken())
        with self.whilst(lambda: self.at.icmp_signed("<", self.get(now), self.whole(stop))):
            yield self.get(now)
            self.set(now, taken())

    @contextmanager
    def loop(self, first: Any, stop: Any, step: int = 1) -> Iterator[Any]:
        """Write the body of a loop; gives its running number."""
        place = self.variable(self.whole(first))
        with self.whilst(lambda: self.at.icmp_signed("<", self.get(place), self.whole(stop))):
            yield self.get(place)
            self.add(place, step)

    @contextmanager
    def whilst(self, condition: Callable[[], Any]) -> Iterator[None]:
        """Write the body of a loop that runs as long as a condition holds."""
        head, body, after = (self.function.append_basic_block() for _ in range(3))
        self.at.branch(head)
        self.at.position_at_end(head)
        self.at.cbranch(condition(), body, after)
        self.at.position_at_end(body)
        yield
        self.at.branch(head)
        self.at.position_at_end(after)


@cache
def _machine(form: str) -> Any:
    """Return what compiles for a form: this processor, without what the form does not use."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    if form == "scalar":
        return target.create_target_machine(opt=3, jit=True)
    wanted = [f"+{one}" for one in (*FORMS[form], "bmi", "bmi2", "lzcnt") if _has(one)]
    features = ",".join([*wanted, "-prefer-256-bit"])
    return target.create_target_machine(cpu="x86-64-v3", features=features, opt=3, jit=True)


def _has(feature: str) -> bool:
    return bool(binding.get_host_cpu_features().get(feature))


def compiled(text: str, name: str, form: str) -> Callable[[int], None]:
    """Compile a function, which stays for the life of the process."""
    machine = _machine(form)
    module = binding.parse_assembly(text)
    module.verify()
    tuning = binding.create_pipeline_tuning_options(speed_level=2)
    tuning.loop_vectorization = tuning.slp_vectorization = False
    builder = binding.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(module, builder)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    function = _FUNCTION(engine.get_function_address(name))
    _ENGINES.append(engine)
    return function


@cache
def _fork() -> Callable[..., None] | None:
    """Return OpenMP's entry in the library that torch itself is linked with, where it has one."""
    folder = Path(torch.__file__).parent / "lib"
    for path in sorted(folder.glob("*torch_cpu.*")):
        try:
            fork = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        fork.restype = None
        fork.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        return fork
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "entangle")


def run(
    function: Callable[[int], None],
    job: "Sequence[int] | ctypes.Array[ctypes.c_int64]",
    threads: int,
) -> None:
    """Call a function in some threads at once, each with the address of the same job.

    Parameters
    ----------
    function
        From `compiled`.
    job
        Whole numbers; the threads may change the first ones to share the work.
    threads
        How many: torch's own where it uses OpenMP, else those of a pool.
    """
    memory = job if isinstance(job, ctypes.Array) else (ctypes.c_int64 * len(job))(*job)
    address = ctypes.addressof(memory)
    if threads == 1:
        function(address)
    elif (fork := _fork()) is not None:
        fork(function, address, threads, 0)
    else:
        list(_pool(threads).map(function, [address] * threads))
