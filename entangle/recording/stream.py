"""Rows of tokens kept within a byte budget: where they come, then in RAM, then in a file."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import IO, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from numpy.typing import NDArray
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.memory import SPARE_RAM
from entangle.runs.progress import tell
from entangle.runs.provenance import disk_errors

_SLAB_BYTES = 2**25
"""Of the pieces of RAM that rows are put into, of which as much is taken as is written to.

The C library maps pieces so large, so that nothing of them remains when they are freed, and so that
they do not lie between what is soon freed and cut it into pieces too small to be used again.
"""

_TOLD_BYTES = 2**26
"""In files, from which on it is told."""

Read = TypeVar("Read")


def ahead(reads: Iterable[Callable[[], Read]]) -> Iterator[Read]:
    """Yield what each call gives, in order; the next one runs while the last one's is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[Read] | None = None
        for read in reads:
            following = pool.submit(read)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


class ByteBudget:
    """Bytes that several stores may hold in memory together."""

    def __init__(self, n_bytes: int) -> None:
        if n_bytes < 0:
            raise InvalidInput(f"a byte budget must be at least 0; got {n_bytes}.")
        self.left = self.whole = n_bytes
        self.spilled = 0
        """Bytes that went to files."""
        self._next_told = _TOLD_BYTES

    def spill(self, n_bytes: int, folder: Path) -> None:
        """Count what goes to a file, and say where and how much: at first, and at 4 × as much."""
        self.spilled += n_bytes
        if self.spilled >= self._next_told:
            self._next_told = 4 * self.spilled
            free = shutil.disk_usage(folder).free
            tell(
                f"beyond {self.whole / 2**30:.2f} GiB of memory, {self.spilled / 2**30:.2f} GiB of "
                f"hidden states and records have gone to temporary files in {str(folder)!r} so far "
                f"({free / 2**30:.1f} GiB free there)."
            )

    def take(self, n_bytes: int) -> bool:
        """Reserve memory; False, and nothing reserved, if there is not enough left."""
        if n_bytes > self.left:
            return False
        self.left -= n_bytes
        return True


def as_budget(memory: int | ByteBudget) -> ByteBudget:
    """Return a budget of so many bytes, or the one that is given."""
    return memory if isinstance(memory, ByteBudget) else ByteBudget(memory)


def _gains(rows: Tensor) -> bool:
    """Tell whether memory in one piece is worth asking for where these rows are."""
    return rows.is_cuda


def _is_far(rows: Tensor) -> bool:
    """Tell whether RAM is not the memory that rows are in."""
    return rows.is_cuda


def _together(parts: Sequence[Tensor]) -> Tensor:
    """Return neighbouring rows as one tensor, where the first of them are."""
    first = parts[0]
    return first if len(parts) == 1 else torch.cat([part.to(first.device) for part in parts])


class TokenStore:
    """A (tokens, features) matrix that is appended to in chunks.

    Parameters
    ----------
    budget
        Memory shared with other stores. Chunks that do not fit go from a GPU to RAM, where that has
        room (`entangle.memory.SpareRam`), then to an unnamed temporary file (in the folder that
        ``TMPDIR`` names), which the operating system removes with the store.

    Notes
    -----
    Chunks stay on the device and in the dtype in which they come. Several threads may read at the
    same time. Memory taken by `reserve` counts as held whether rows are in it or not. Blocks are
    the same wherever the rows lie.
    """

    def __init__(self, budget: ByteBudget) -> None:
        self.n_tokens = 0
        self.at: Int[Tensor, " tokens"] | None = None
        """Which of the text's tokens the rows are of, where they are of some only."""
        self._budget, self._held = budget, 0
        self._chunks: list[Tensor] = []
        self._far: list[Tensor] = []
        self._far_bytes = 0
        self._room: Tensor | None = None
        self._slab: Tensor | None = None
        self._in_slab = 0
        self._file: IO[bytes] | None = None
        self._reading = Lock()
        self._features, self._dtype, self._in_memory = 0, torch.float32, 0
        self._device = torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows' numbers."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the rows came, and those in memory are."""
        return self._device

    @property
    def n_bytes(self) -> int:
        """Bytes of all rows."""
        return self.n_tokens * self._features * self._dtype.itemsize

    @property
    def in_memory(self) -> bool:
        """Whether all rows are where they came: none has gone to RAM or to a file."""
        return not self._far and self._file is None

    @property
    def in_file(self) -> bool:
        """Whether rows have gone to a file."""
        return self._file is not None

    def __enter__(self) -> "TokenStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back to the budget and remove the file; again does nothing."""
        self._chunks.clear()
        self._far.clear()
        self._room = self._slab = None
        self._budget.left += self._held
        SPARE_RAM.give(self._far_bytes)
        self._held = self._far_bytes = 0
        if self._file is not None:
            with suppress(OSError):  # a full disk refuses the rest of the buffer
                self._file.close()
            self._file = None

    def reserve(self, passes: Sequence[int], first: Float[Tensor, "tokens features"]) -> None:
        """Take memory for all rows in one piece, if they will come from all tokens of some passes.

        Only on a GPU, which takes longer to give memory for every chunk than to fill it, and where
        budget and device have it. Rows beyond it are kept as they would be without it.

        Parameters
        ----------
        passes
            Tokens of each pass of the model that is to come.
        first
            Rows that the first of them gives. If they are not all its tokens, as where a layer is
            one of several experts, nothing is known of the others, and nothing is taken.
        """
        if not (passes and first.shape[0] == passes[0] and _gains(first)) or self.n_tokens:
            return
        n_bytes = sum(passes) * first.shape[1] * first.element_size()
        if self._room is not None or not self._budget.take(n_bytes):
            return
        try:
            self._room = first.new_empty(sum(passes), first.shape[1])
            self._held += n_bytes
        except torch.OutOfMemoryError:
            self._budget.left += n_bytes

    def append(self, chunk: Float[Tensor, "tokens features"]) -> None:
        """Add rows of shape (tokens, features)."""
        if self.n_tokens and (chunk.shape[1] != self._features or chunk.dtype != self._dtype):
            raise InvalidInput(
                f"a chunk must have {self._features} features of {self._dtype}; "
                f"got {chunk.shape[1]} of {chunk.dtype}."
            )
        self._features, self._dtype, self._device = chunk.shape[1], chunk.dtype, chunk.device
        n_bytes = chunk.numel() * chunk.element_size()
        if self._fill(chunk):
            self._in_memory += chunk.shape[0]
        elif self.in_memory and self._budget.take(n_bytes):
            self._keep(chunk)
            self._held += n_bytes
            self._in_memory += chunk.shape[0]
        elif self._file is None and _is_far(chunk) and SPARE_RAM.take(n_bytes):
            self._far.append(torch.empty_like(chunk, device="cpu").copy_(chunk))
            self._far_bytes += n_bytes
            self._in_memory += chunk.shape[0]
        else:
            self._spill(chunk)
        self.n_tokens += chunk.shape[0]

    def chunks(self) -> Iterator[Float[Tensor, "tokens features"]]:
        """Yield all rows in order as they lie, those of a file 8,192 at a time."""
        yield from self._chunks
        yield from self._far
        if self._file is not None:
            starts = range(self._in_memory, self.n_tokens, 8192)
            last = self.n_tokens
            yield from ahead(partial(self._read, at, min(8192, last - at)) for at in starts)

    def blocks(self, n_tokens: int) -> Iterator[tuple[int, Float[Tensor, "tokens features"]]]:
        """Yield (index of the first row, rows) in order, ``n_tokens`` rows at a time.

        Only the last block may have fewer, wherever the rows lie; a block that lies in several
        chunks is put together.
        """
        start, parts, missing = 0, list[Tensor](), n_tokens
        for chunk in self.chunks():
            left = chunk
            while left.shape[0]:
                part, left = left[:missing], left[missing:]
                parts.append(part)
                missing -= part.shape[0]
                if missing == 0:
                    yield start, _together(parts)
                    start, parts, missing = start + n_tokens, [], n_tokens
        if parts:
            yield start, _together(parts)

    def __iter__(self) -> Iterator[Float[Tensor, "tokens features"]]:
        """Yield all rows in order, 8,192 at a time; may be repeated."""
        return (rows for _, rows in self.blocks(8192))

    def span(self, start: int, end: int) -> Float[Tensor, "tokens features"]:
        """Return the rows from ``start`` up to ``end``."""
        parts, first = [], 0
        for chunk in (*self._chunks, *self._far):
            low, high = max(start - first, 0), min(end - first, chunk.shape[0])
            if low < high:
                parts.append(chunk[low:high].to(self._device))
            first += chunk.shape[0]
        if end > max(start, first):
            stored = self._read(max(start, first), end - max(start, first))
            parts.append(stored.to(self._device))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def joined(self) -> Float[Tensor, "tokens features"]:
        """Return all rows, which are all where they came, and keep them in one piece."""
        if not self.in_memory:
            raise InvalidInput(
                "rows that are in RAM or in a file cannot be joined; read them in blocks."
            )
        with self._reading:
            if len(self._chunks) != 1:
                self._chunks = [torch.cat(self._chunks)]
            return self._chunks[0]

    def take(self, index: Int[Tensor, " rows"]) -> Float[Tensor, "rows features"]:
        """Return the rows of these indices, in their order."""
        wanted, order = index.cpu().sort()
        device = self._chunks[0].device if self._chunks else torch.device("cpu")
        found = torch.empty(len(wanted), self._features, dtype=self._dtype, device=device)
        for start, rows in self.blocks(4096):
            low, high = torch.searchsorted(
                wanted, torch.tensor([start, start + len(rows)])
            ).tolist()
            if high > low:
                found[order[low:high].to(device)] = rows[
                    (wanted[low:high] - start).to(rows.device)
                ].to(device)
        return found

    def _fill(self, chunk: Tensor) -> bool:
        """Put rows into the reserved memory; False, from then on, where they do not fit."""
        room, end = self._room, self.n_tokens + chunk.shape[0]
        if room is None:
            return False
        like = room.shape[1], room.dtype, room.device
        if end > len(room) or like != (chunk.shape[1], chunk.dtype, chunk.device):
            self._room = None
            if not self._chunks:
                self._budget.left += self._held
                self._held = 0
            return False
        room[self.n_tokens : end] = chunk
        self._chunks = [room[:end]]
        return True

    def _keep(self, chunk: Tensor) -> None:
        """Put rows where they are: on the CPU behind those before them."""
        count = chunk.shape[0]
        if chunk.device.type != "cpu" or not chunk.numel():
            self._chunks.append(chunk.clone())
            return
        slab, start = self._slab, self._in_slab
        if slab is None or start + count > len(slab):
            row = chunk.shape[1] * chunk.element_size()
            rows = max(count, _SLAB_BYTES // row)
            slab, start = chunk.new_empty(rows, chunk.shape[1]), 0
            self._slab = slab
            self._chunks.append(slab[:0])
        slab[start : start + count] = chunk
        self._in_slab = start + count
        self._chunks[-1] = slab[: self._in_slab]

    def _spill(self, chunk: Tensor) -> None:
        remedy = "set TMPDIR to another folder or raise --memory (memory)"
        folder = Path(tempfile.gettempdir())
        with disk_errors(folder, remedy=remedy):
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="entangle-")  # noqa: SIM115
            self._file.seek(0, 2)
            self._file.write(chunk.contiguous().cpu().view(torch.uint8).numpy().data)
            self._file.flush()
            self._budget.spill(chunk.numel() * chunk.element_size(), folder)

    def _read(self, start: int, count: int) -> Tensor:
        assert self._file is not None  # noqa: S101
        row = self._features * self._dtype.itemsize
        buffer = torch.empty(count, self._features, dtype=self._dtype)
        with self._reading:
            self._file.seek((start - self._in_memory) * row)
            self._file.readinto(buffer.view(torch.uint8).numpy())  # type: ignore[attr-defined]
        return buffer


class LowestRanks:
    """Rows of the tokens of lowest rank among those that come, where nobody knows how many will.

    Parameters
    ----------
    ranks
        Of every token of the text, (tokens,), each another one.
    most
        Rows that are kept; at most twice as many are held, in RAM.
    """

    def __init__(self, ranks: Int64[np.ndarray, " text"], most: int) -> None:
        self._ranks, self._most, self._count = ranks, most, 0
        self._bound = len(ranks)
        self._at, self._rows = list[NDArray[np.int64]](), list[Tensor]()

    def add(self, at: Int64[np.ndarray, " tokens"], rows: Float[Tensor, "tokens features"]) -> None:
        """Take rows, and which of the text's tokens they are of: none that came before."""
        kept = np.flatnonzero(self._ranks[at] < self._bound)
        if not len(kept):
            return
        self._at.append(at[kept])
        self._rows.append(rows[torch.from_numpy(kept).to(rows.device)].cpu())
        self._count += len(kept)
        if self._count > 2 * self._most:
            self._cut()

    def _cut(self) -> None:
        at, rows = np.concatenate(self._at), torch.cat(self._rows)
        ranks = self._ranks[at]
        lowest = np.argsort(ranks)[: self._most]
        kept = lowest[np.argsort(at[lowest])]
        self._at, self._rows = [at[kept]], [rows[torch.from_numpy(kept)]]
        self._count, self._bound = len(kept), int(ranks[lowest[-1]])

    def put(self, store: TokenStore) -> Int64[np.ndarray, " kept"]:
        """Put the rows into a store in the text's order; return which tokens they are of."""
        if not self._count:
            return np.empty(0, dtype=np.int64)
        self._cut()
        store.append(self._rows.pop())
        return self._at.pop()
