"""Several processes that share one job: which one this is, and what they tell one another.

``torchrun --nproc-per-node 8 -m entangle score …``, or ``srun -n 8 python -m entangle score …``,
starts as many processes, the ranks. Everything that is shared out goes to the ranks in contiguous
parts (`Ranks.part`), and what they find is put together in the order of the ranks, so that a
result does not depend on how many there were. Words and small tables go through gloo, tensors of a
GPU through NCCL. One process alone is `ALONE`, for which all of this is free; nothing imports torch
here before ranks are started.

A rank that fails notes why, so that one line is printed for all of them; of one that is gone
without a note the others hear as soon as they wait for it, and one of them names it.
"""

import hashlib
import json
import os
import platform
import re
import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from entangle.errors import EntangleError, InvalidInput, Unavailable, visible

if TYPE_CHECKING:
    from torch import Tensor

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")

_JOINING = timedelta(minutes=10)
_WAITING = timedelta(hours=24)
"""What ranks wait for one another at most, as for the arm of a comparison that takes longest."""
_NOTES = 3.0
"""Seconds in which ranks that live say that they end."""
_SAME_NOTES = 0.5
_SMALL, _PIECE = 2**16, 2**28  # bytes
_FIRST_PORT, _PORTS = 20_000, 20_000


class RankLost(EntangleError):
    """Another rank has ended, so that the job cannot go on (exit status 1)."""


@dataclass(frozen=True)
class Place:
    """Where one process stands among those that were started together."""

    rank: int
    """Its number."""
    size: int
    """How many there are."""
    local: int
    """Its number on its machine, which is that of its GPU."""
    host: str
    """Machine of rank 0, where they meet."""
    port: int
    """And its port."""
    hosted: bool = False
    """Whether torchrun keeps the meeting point, and not rank 0."""
    attempt: str = "0"
    """How often torchrun has started them anew."""


def place_of(environment: Mapping[str, str]) -> Place | None:
    """Read what torchrun or SLURM says of this process; None where it was started alone.

    SLURM's variables count in a step (``srun``), not in the shell of a job.

    Parameters
    ----------
    environment
        As `os.environ`.

    Raises
    ------
    InvalidInput
        If a variable is missing, or is no number that fits.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in environment and not _in_shell(environment):
        step = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        names = ("SLURM_PROCID", step, "SLURM_LOCALID")
    else:
        return None
    size = _number(environment, names[1], least=1)
    if size == 1:
        return None
    rank = _number(environment, names[0], least=0, below=size)
    local = _number(environment, names[2], least=0) if names[2] in environment else rank
    host = environment.get("MASTER_ADDR") or _first_host(environment)
    job = _number(environment, "SLURM_JOB_ID", least=0) if "SLURM_JOB_ID" in environment else 0
    port = _FIRST_PORT + job % _PORTS
    if "MASTER_PORT" in environment:
        port = _number(environment, "MASTER_PORT", least=1, below=2**16)
    hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Place(rank, size, local, host, port, hosted, attempt)


def _in_shell(environment: Mapping[str, str]) -> bool:
    """Tell whether a process runs in the shell of a SLURM job, which is one of no tasks."""
    step = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS")
    return "SLURM_JOB_ID" in environment and not any(name in environment for name in step)


def _number(environment: Mapping[str, str], name: str, *, least: int, below: int = 2**63) -> int:
    text = environment.get(name, "")
    if not text.isdecimal() or not least <= int(text) < below:
        limit = f" and below {below}" if below < 2**63 else ""
        raise InvalidInput(
            f"the environment variable {name} must be a whole number from {least}{limit}; got "
            f"{text!r}: start ranks with torchrun or srun, which set it."
        )
    return int(text)


def _first_host(environment: Mapping[str, str]) -> str:
    """Return the first host of a list such as ``gpu[003-007,12],login1``."""
    names = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    listed = next((environment[name] for name in names if environment.get(name)), "")
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", listed)
    if first is None:
        raise InvalidInput(
            "ranks must know where to meet: set MASTER_ADDR to the machine of rank 0; neither it "
            "nor SLURM_NODELIST is set."
        )
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _hearing(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """Turn what a library says when another rank is gone into `RankLost`."""

    @wraps(function)
    def heard(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        try:
            return function(*args, **kwargs)
        except EntangleError:
            raise
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise
            raise RankLost(f"another rank has ended ({str(error).splitlines()[0]})") from error

    return heard


class Ranks:
    """The ranks of a job, seen from one of them; here one process that is alone.

    Every method but `part` and `tally` must be called by all ranks, in the same order.
    """

    rank = 0
    """Number of this process."""
    size = 1
    """How many there are."""

    def __init__(self, *, leads: bool = True, beside: int = 1) -> None:
        self.leads = leads
        """Whether this process writes, prints and shows progress."""
        self.beside = beside
        """How many ranks share its machine, itself among them."""

    def part(self, count: int, *, rank: int | None = None) -> range:
        """Return which of so many things are this rank's (or another's): a run of them."""
        own = self.rank if rank is None else rank
        return range(own * count // self.size, (own + 1) * count // self.size)

    def gather(self, content: bytes) -> list[bytes]:
        """Return what every rank gives, in the order of the ranks."""
        return [content]

    def exchange(self, value: Any) -> list[Any]:
        """Return the value of every rank, in their order, as JSON gives it back."""
        return [json.loads(one) for one in self.gather(json.dumps(value).encode())]

    def joined(self, values: "Tensor") -> "Tensor":
        """Return the numbers of all ranks, one tensor of one dimension, on the CPU."""
        return values

    def told(self, content: bytes | None, *, by: int = 0) -> bytes:  # noqa: ARG002
        """Return what rank ``by`` gives; what others give does not matter."""
        assert content is not None  # noqa: S101
        return content

    def broadcast(self, tensor: "Tensor", *, by: int, met: bool = False) -> None:
        """Overwrite a tensor, which is contiguous, by that of rank ``by``.

        Ranks that have just ``met``, in another call, do not wait for one another again.
        """

    def fill(self, tensor: "Tensor", shares: Sequence[range], *, to: int | None = None) -> None:
        """Fill a tensor, of which every rank has its share of the first dimension.

        On all ranks, or on rank ``to``, which then sends nothing.
        """
        sent = [(rank, own) for rank, own in enumerate(shares) if len(own) and rank != to]
        for number, (rank, own) in enumerate(sent):
            self.broadcast(tensor[own.start : own.stop], by=rank, met=number > 0)

    def reduce(self, tensor: "Tensor", *, to: int, by: str = "sum") -> None:
        """Put the sum (or ``min``, ``max``) of all ranks' tensors into that of rank ``to``.

        The others' hold nothing of use afterwards.
        """

    def tally(self, name: str, count: int, done: int) -> int:  # noqa: ARG002
        """Count ``count`` more pieces of work of one name; return those of all ranks."""
        return done + count

    def post(self, name: str, content: bytes) -> None:
        """Leave something for the others, who need not wait for it (`posted`)."""

    def posted(self, name: str) -> bytes | None:  # noqa: ARG002
        """Return what was left under a name, None if nothing was."""
        return None

    def agree(self, parts: Mapping[str, object]) -> None:
        """Check that all ranks have the same, by digest.

        Parameters
        ----------
        parts
            What must be equal, as JSON takes it, by the words that name it.

        Raises
        ------
        InvalidInput
            On every rank, naming the first part and rank that differ from rank 0.
        """


ALONE = Ranks()
"""One process that was started by itself."""


class _Joined(Ranks):
    """Ranks that have met."""

    def __init__(self, place: Place, store: Any) -> None:
        super().__init__(leads=place.rank == 0)
        self.rank, self.size, self.place, self._store = place.rank, place.size, place, store
        self._on_gpu = False
        self.names: list[str] = [""] * place.size
        """How messages call each rank."""
        self.traffic: dict[str, float] = defaultdict(float)
        """Bytes broadcast and reduced, and seconds waited for other ranks, so far."""

    @cached_property
    def _dist(self) -> Any:
        import torch.distributed

        return torch.distributed

    def open(self) -> None:
        """Join the group, with NCCL where there is a GPU for this rank."""
        import torch

        if torch.cuda.is_available() and self._dist.is_nccl_available():
            torch.cuda.set_device(self.place.local % torch.cuda.device_count())
            self._on_gpu = True
        self._dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self._on_gpu else "gloo",
            store=self._dist.PrefixStore("group", self._store),
            rank=self.rank, world_size=self.size, timeout=_WAITING,
        )  # fmt: skip
        host = platform.node()
        names = self.exchange([host, os.getpid(), self._gpu()])
        self.names = [
            f"rank {rank} of {self.size} (process {pid} on {name!r})"
            for rank, (name, pid, _) in enumerate(names)
        ]
        self.beside = sum(name == host for name, _, _ in names)
        gpus = [gpu for _, _, gpu in names]
        for rank, gpu in enumerate(gpus):
            if gpu is not None and gpus.index(gpu) != rank:
                raise InvalidInput(
                    f"every rank must have a GPU of its own; {self.names[rank]} has that of rank "
                    f"{gpus.index(gpu)}: start as many ranks a machine as it has GPUs."
                )
        if self._on_gpu != (None not in gpus):
            raise InvalidInput("all ranks must have a GPU, or none; start them on like machines.")
        self.agree({"versions of Python and packages": _versions(), "files of entangle": _code()})

    def _gpu(self) -> str | None:
        if not self._on_gpu:
            return None
        import torch

        return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)

    @_hearing
    def gather(self, content: bytes) -> list[bytes]:
        import torch

        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        begin = time.perf_counter()
        self._dist.all_gather(sizes, torch.tensor([len(content)]))
        self.traffic["waited"] += time.perf_counter() - begin
        lengths = [int(one) for one in sizes]
        longest = max(1, *lengths)
        if longest > _SMALL:
            return [self._carried(content, by, length) for by, length in enumerate(lengths)]
        own = torch.frombuffer(bytearray(content.ljust(longest, b"\0")), dtype=torch.uint8)
        every = [torch.empty_like(own) for _ in range(self.size)]
        self._dist.all_gather(every, own)
        return [one.numpy().tobytes()[:n] for one, n in zip(every, lengths, strict=True)]

    @_hearing
    def told(self, content: bytes | None, *, by: int = 0) -> bytes:
        import torch

        own = content if content is not None and by == self.rank else b""
        length = torch.tensor([len(own)])
        self._dist.broadcast(length, by)
        return self._carried(own, by, int(length))

    def joined(self, values: "Tensor") -> "Tensor":
        import torch

        parts = self.gather(values.detach().cpu().contiguous().numpy().tobytes())
        return torch.frombuffer(bytearray(b"".join(parts)), dtype=values.dtype)

    def _carried(self, content: bytes, by: int, length: int) -> bytes:
        import torch

        mine = by == self.rank
        if not length:
            return b""
        buffer = bytearray(content) if mine else bytearray(length)
        tensor = torch.frombuffer(buffer, dtype=torch.uint8)
        if self._on_gpu and length > _SMALL:
            there = tensor.cuda()
            self._send(there, by)
            return content if mine else there.cpu().numpy().tobytes()
        self._send(tensor, by)
        return content if mine else bytes(buffer)

    def _send(self, flat: "Tensor", by: int) -> None:
        self.traffic["broadcast"] += flat.numel()
        for piece in flat.split(_PIECE):
            self._dist.broadcast(piece, by)

    @_hearing
    def broadcast(self, tensor: "Tensor", *, by: int, met: bool = False) -> None:
        import torch

        if tensor.is_cuda and not met:
            self._meet()
        if not tensor.numel():
            return
        flat = tensor.view(-1).view(torch.uint8)
        if tensor.is_cuda or not self._on_gpu or flat.numel() <= _SMALL:
            self._send(flat, by)
            return
        there = flat.cuda() if by == self.rank else torch.empty_like(flat, device="cuda")
        if not met:
            self._meet()
        self._send(there, by)
        if by != self.rank:
            flat.copy_(there)

    @_hearing
    def reduce(self, tensor: "Tensor", *, to: int, by: str = "sum") -> None:
        self.traffic["reduced"] += tensor.numel() * tensor.element_size()
        if tensor.numel():
            self._dist.reduce(tensor, to, op=getattr(self._dist.ReduceOp, by.upper()))

    def _meet(self) -> None:
        """Wait for all ranks where it is heard if one is gone, which NCCL does not tell."""
        import torch

        begin = time.perf_counter()
        self._dist.all_reduce(torch.zeros(1))
        self.traffic["waited"] += time.perf_counter() - begin

    @_hearing
    def tally(self, name: str, count: int, done: int) -> int:  # noqa: ARG002
        return int(self._store.add(f"tally/{name}", count))

    @_hearing
    def post(self, name: str, content: bytes) -> None:
        self._store.set(f"post/{name}", content)

    @_hearing
    def posted(self, name: str) -> bytes | None:
        key = f"post/{name}"
        return bytes(self._store.get(key)) if self._store.check([key]) else None

    def agree(self, parts: Mapping[str, object]) -> None:
        digests = {what: _digest(value) for what, value in parts.items()}
        found = self.exchange(digests)
        for what, own in found[0].items():
            for rank, others in enumerate(found):
                if others.get(what) != own:
                    raise InvalidInput(
                        f"all ranks must have the same {what}; {self.names[rank]} has another one "
                        "than rank 0: give them the same files and settings."
                    )

    def ended(self, reason: str) -> tuple[bool, list[int], bool]:
        """Note why this rank ends; return if it speaks, who left no note, if all say the same."""
        own = f"ended/{self.rank}"
        try:
            self._store.set(own, reason)
            if int(self._store.add("ends", 1)) > 1:
                return False, [], False
            others = [f"ended/{rank}" for rank in range(self.size) if rank != self.rank]
            missing = self._unnoted(others, _SAME_NOTES if reason else _NOTES)
            same = not missing and all(self._store.get(one).decode() == reason for one in others)
            return True, [int(one.partition("/")[2]) for one in missing], same
        except RuntimeError:  # with rank 0, where it kept the notes
            return self.rank == 1, [0], False

    def _unnoted(self, keys: Sequence[str], seconds: float) -> list[str]:
        end = time.monotonic() + seconds
        while (missing := [key for key in keys if not self._store.check([key])]) and (
            time.monotonic() < end
        ):
            time.sleep(0.05)
        return missing

    def close(self, *, failed: bool) -> None:
        """Leave the group; who keeps the notes of ranks that failed waits for them."""
        with suppress(RuntimeError):
            if not failed:
                self._meet()
        closing = threading.Thread(target=self._dist.destroy_process_group, daemon=True)
        closing.start()
        closing.join(_NOTES)
        if failed and self.rank == 0 and not self.place.hosted:
            with suppress(RuntimeError):
                self._unnoted([f"ended/{rank}" for rank in range(1, self.size)], _NOTES)


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("entangle", "torch", "transformers", "numpy", "safetensors", "scipy"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _code() -> str:
    """Return the digest of all files of the package that Python or a GPU runs."""
    home, found = Path(__file__).parent, hashlib.sha256()
    for path in sorted(home.rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh"):
            found.update(path.relative_to(home).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


_HERE: list[Ranks] = [ALONE]


def current() -> Ranks:
    """Return the ranks that share what runs now."""
    return _HERE[-1]


@contextmanager
def apart() -> Iterator[None]:
    """Let this rank work by itself while the block runs, as on an arm of its own.

    It still writes and prints only if it is rank 0.
    """
    _HERE.append(Ranks(leads=current().leads, beside=current().beside))
    try:
        yield
    finally:
        _HERE.pop()


@contextmanager
def started(place: Place | None) -> Iterator[Ranks]:
    """Meet the other ranks, and part when the block ends; without a place nothing happens.

    One rank speaks for all that fail: it raises what it met, or `RankLost` naming those that are
    gone; the others exit quietly, with the same status.

    Parameters
    ----------
    place
        From `place_of`.

    Raises
    ------
    InvalidInput
        If ranks have different versions, or share a GPU.
    Unavailable
        If they do not meet.
    """
    if place is None:
        yield ALONE
        return
    here = _Joined(place, _meeting_point(place))
    failed = True
    try:
        here.open()
        _HERE.append(here)
        yield here
        failed = False
    except BaseException as error:
        _quietly()
        raise _spoken(here, error) from error
    finally:
        if _HERE[-1] is here:
            _HERE.pop()
        here.close(failed=failed)


def _quietly() -> None:
    """Leave signals alone while the ranks find out who ends why: torchrun sends one to each."""
    if threading.current_thread() is not threading.main_thread():
        return
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except KeyboardInterrupt:  # one that came before is let through here
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _spoken(here: _Joined, error: BaseException) -> BaseException:
    """Return what this rank raises: the error where it speaks for all, else a quiet exit."""
    lost = isinstance(error, RankLost | KeyboardInterrupt)
    speaks, gone, same = here.ended("" if lost else visible(f"{type(error).__name__}: {error}"))
    status = getattr(error, "exit_code", None)
    if status is None:
        number = getattr(error, "signal", None)
        status = 1 if number is None else 128 + int(number)
    if not isinstance(error, EntangleError | KeyboardInterrupt):
        return error  # a fault of the program, or of a stream, is told by each that meets it
    if not speaks:
        return SystemExit(status)
    if lost and gone:
        named = " and ".join(here.names[rank] or f"rank {rank}" for rank in gone)
        return RankLost(
            f"{named} ended without a word (killed, or out of memory), so all ranks stop; start "
            "again, with --resume where the command has it: any number of ranks goes on."
        )
    if same or lost or here.leads:
        return error
    assert isinstance(error, EntangleError)  # noqa: S101
    return type(error)(f"{here.names[here.rank]}: {error}")


def _meeting_point(place: Place) -> Any:
    """Connect to where the ranks meet."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a group whose members end
    _choose_interface(place.host)
    import torch.distributed

    dist: Any = torch.distributed
    try:
        store = dist.TCPStore(
            place.host, place.port, is_master=place.rank == 0 and not place.hosted,
            timeout=_JOINING, wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
        met = dist.PrefixStore(f"entangle/{place.attempt}", store)
        met.set(f"came/{place.rank}", "")
        met.wait([f"came/{rank}" for rank in range(place.size)], _JOINING)
    except RuntimeError as error:
        raise Unavailable(
            f"rank {place.rank} of {place.size} did not meet the others at {place.host}:"
            f"{place.port} ({str(error).splitlines()[0]}); start all ranks, with one MASTER_ADDR "
            "and MASTER_PORT."
        ) from error
    return met


def _choose_interface(host: str) -> None:
    """Let gloo and NCCL use the network that leads to rank 0, unless they are told another."""
    import psutil

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(one.address == own for one in addresses):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
