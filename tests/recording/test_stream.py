import errno
import io
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from entangle import memory
from entangle.errors import InvalidInput, Unavailable
from entangle.memory import SpareRam
from entangle.recording import stream
from entangle.recording.stream import ByteBudget, LowestRanks, TokenStore
from entangle.seeding import torch_rng

FEATURES = 3


def rows(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, FEATURES, generator=torch_rng(0, "rows", count)).to(dtype)


def filled(matrix: Tensor, sizes: list[int], budget: ByteBudget) -> TokenStore:
    store = TokenStore(budget)
    for chunk in matrix.split(sizes):
        store.append(chunk)
    return store


def joined(store: TokenStore, n_tokens: int) -> Tensor:
    """Join the blocks, checking that each begins where the one before ended."""
    parts, expected = [], 0
    for start, part in store.blocks(n_tokens):
        assert start == expected
        assert 0 < part.shape[0] <= n_tokens
        expected += part.shape[0]
        parts.append(part)
    return torch.cat(parts)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    rows_in_memory=st.integers(0, 60),
    block=st.integers(1, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    data=st.data(),
)
def test_what_is_stored_comes_back(
    sizes: list[int], rows_in_memory: int, block: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    matrix = rows(sum(sizes), dtype)
    budget = ByteBudget(rows_in_memory * FEATURES * dtype.itemsize)
    with filled(matrix, sizes, budget) as store:
        assert store.n_tokens == sum(sizes)
        assert (store._file is None) == (rows_in_memory >= sum(sizes))
        assert torch.equal(joined(store, block), matrix)
        index = data.draw(st.lists(st.integers(0, sum(sizes) - 1), max_size=20))
        taken = store.take(torch.tensor(index, dtype=torch.int64))
        assert taken.dtype == dtype
        assert torch.equal(taken, matrix[index])


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserve memory on the CPU too."""
    monkeypatch.setattr(stream, "_gains", lambda _rows: True)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    more=st.integers(-8, 20),
    rows_in_memory=st.integers(0, 60),
    block=st.integers(1, 30),
)
def test_reserved_memory_changes_no_row(
    everywhere: None, sizes: list[int], more: int, rows_in_memory: int, block: int
) -> None:
    matrix = rows(sum(sizes))
    budget = ByteBudget(rows_in_memory * FEATURES * 4)
    passes = [sizes[0], max(0, sum(sizes[1:]) + more)]
    with TokenStore(budget) as store:
        store.reserve(passes, matrix[: sizes[0]])
        granted = sum(passes) <= rows_in_memory
        assert budget.left == FEATURES * 4 * (rows_in_memory - sum(passes) * granted)
        for chunk in matrix.split(sizes):
            store.append(chunk)
        assert (store.n_tokens, store.n_bytes) == (len(matrix), 4 * FEATURES * len(matrix))
        assert torch.equal(joined(store, block), matrix)
        assert torch.equal(store.span(len(matrix) // 2, len(matrix)), matrix[len(matrix) // 2 :])
        assert torch.equal(store.take(torch.arange(len(matrix)).flip(0)), matrix.flip(0))
        if store.in_memory:
            assert torch.equal(store.joined(), matrix)
    assert budget.left == rows_in_memory * FEATURES * 4


def test_what_fits_into_reserved_memory_is_one_piece(everywhere: None) -> None:
    matrix, budget = rows(20), ByteBudget(2**20)
    with TokenStore(budget) as store:
        store.reserve([4, 11], matrix[:4])
        for chunk in matrix.split([4, 6, 5, 1, 4]):
            store.append(chunk)
        assert [len(part) for part in store.chunks()] == [
            15,
            5,
        ]  # rows beyond it lie behind each other
        store.reserve([20, 100], matrix)  # too late
        store.append(matrix)
        assert [len(part) for part in store.chunks()] == [15, 25]
        held = weakref.ref(next(store.chunks()).untyped_storage())
    assert budget.left == 2**20
    assert held() is None
    assert store._room is None


def test_rows_of_some_of_a_pass_tokens_tell_nothing(everywhere: None) -> None:
    """As of an expert among several, which sees as many as the router happens to give it."""
    budget = ByteBudget(2**20)
    with TokenStore(budget) as store:
        store.reserve([8, 8, 8], rows(3))
        store.reserve([], rows(3))
        assert budget.left == 2**20


def test_nothing_is_reserved_where_memory_is_given_at_once() -> None:
    budget = ByteBudget(2**20)
    with TokenStore(budget) as store:
        store.reserve([3, 3], rows(3))
        assert budget.left == 2**20


@pytest.mark.parametrize("other", [rows(3).double(), rows(5), torch.zeros(3, 1)])
def test_reserved_memory_is_given_back_where_other_rows_come(
    everywhere: None, other: Tensor
) -> None:
    budget = ByteBudget(4 * FEATURES * 4)
    with TokenStore(budget) as store:
        store.reserve([3, 1], rows(3))
        assert budget.left == 0
        store.append(other)
        assert store.n_bytes == other.numel() * other.element_size()
        assert torch.equal(joined(store, 100), other)
        assert store.in_memory == (other.numel() * other.element_size() <= 48)


def test_memory_that_the_device_does_not_have_is_not_reserved(everywhere: None) -> None:
    class Full(Tensor):
        def new_empty(self, *_size: int) -> Tensor:  # type: ignore[override]
            raise torch.OutOfMemoryError

    budget = ByteBudget(10**6)
    with TokenStore(budget) as store:
        store.reserve([3, 1000], rows(3).as_subclass(Full))
        assert budget.left == 10**6
        store.append(rows(3))
        assert torch.equal(store.joined(), rows(3))


def test_rows_of_a_long_store_are_found_in_every_block() -> None:
    matrix = rows(10_000)
    with filled(matrix, [3000, 6000, 1000], ByteBudget(40_000)) as store:
        index = torch.tensor([9999, 0, 4096, 4095, 8192, 0, 2999, 3000])
        assert torch.equal(store.take(index), matrix[index])


def test_the_stored_rows_are_copies() -> None:
    chunk = rows(4)
    before = chunk.clone()
    with TokenStore(ByteBudget(1000)) as store:
        store.append(chunk)
        chunk.zero_()
        assert torch.equal(joined(store, 10), before)


def test_a_strided_chunk_is_stored_row_by_row() -> None:
    wide = torch.arange(24.0).view(FEATURES, 8)
    for n_bytes in (0, 1000):
        with filled(wide.T, [5, 3], ByteBudget(n_bytes)) as store:
            assert torch.equal(joined(store, 3), wide.T)


def test_stores_share_a_budget_and_give_it_back() -> None:
    budget = ByteBudget(10 * FEATURES * 4)
    first, second = filled(rows(6), [6], budget), filled(rows(8), [4, 4], budget)
    assert (first._file, budget.left) == (None, 0)
    assert second._file is not None
    first.close()
    assert budget.left == 6 * FEATURES * 4
    second.close()
    second.close()
    assert budget.left == 10 * FEATURES * 4
    assert not budget.take(budget.left + 1)
    assert budget.left == 10 * FEATURES * 4


def test_an_error_gives_everything_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    budget = ByteBudget(2 * FEATURES * 4)

    def fail() -> None:
        with TokenStore(budget) as store:
            store.append(rows(2))
            store.append(rows(5))
            assert store._file is not None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert budget.left == 2 * FEATURES * 4
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_gone_after_close(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[IO[bytes]] = []
    make: Callable[..., IO[bytes]] = tempfile.TemporaryFile

    def noted(**options: str) -> IO[bytes]:
        opened.append(make(**options))
        return opened[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", noted)
    store = filled(rows(9), [3, 3, 3], ByteBudget(0))
    store.close()
    assert [file.closed for file in opened] == [True]


class FullDisk(io.RawIOBase):
    """A file that takes 100 bytes."""

    def __init__(self, code: int) -> None:
        self.code, self.size = code, 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.size

    def write(self, data: object) -> int:
        count = len(memoryview(data))  # type: ignore[arg-type]
        if self.size + count > 100:
            raise OSError(self.code, "the system's words")
        self.size += count
        return count


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "the disk is full; free some space or"),
        (errno.EROFS, "the disk is read-only;"),
    ],
)
def test_a_full_disk_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    disk = FullDisk(code)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_options: io.BufferedRandom(disk))
    remedy = r"set TMPDIR to another folder or raise --memory \(memory\)"

    def fill() -> None:
        with TokenStore(ByteBudget(0)) as store:
            for _ in range(10):
                store.append(rows(4))

    with pytest.raises(Unavailable, match=rf"{reason}.*{remedy}"):
        fill()
    assert disk.size > 0


def test_chunks_must_be_alike() -> None:
    with TokenStore(ByteBudget(1000)) as store:
        store.append(rows(2))
        with pytest.raises(InvalidInput, match=r"\b3\b.*torch\.float32.*\b5\b"):
            store.append(torch.zeros(1, 5))
        with pytest.raises(InvalidInput, match=r"\b3\b.*torch\.float64"):
            store.append(torch.zeros(1, 3, dtype=torch.float64))
        assert store.n_tokens == 2


def test_no_rows_at_all() -> None:
    with TokenStore(ByteBudget(100)) as store:
        store.append(torch.zeros(0, FEATURES))
        store.append(rows(2))
        assert torch.equal(torch.cat([part for _, part in store.blocks(1)]), rows(2))
        assert store.take(torch.tensor([], dtype=torch.int64)).shape == (0, FEATURES)


def test_a_budget_is_not_negative() -> None:
    with pytest.raises(InvalidInput, match=r"\b0\b.*-1\b"):
        ByteBudget(-1)


def test_threads_read_a_spilled_store_at_the_same_time() -> None:
    rows = torch.arange(40_000.0).view(4000, 10)
    with TokenStore(ByteBudget(4 * 10 * 500)) as store:
        for chunk in rows.split(250):
            store.append(chunk)
        spans = [(start, start + 700) for start in range(0, 3300, 11)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda span: store.span(*span), spans))
        assert all(torch.equal(part, rows[a:b]) for part, (a, b) in zip(found, spans, strict=True))


def test_all_rows_in_one_piece() -> None:
    rows = torch.randn(50, 3, generator=torch_rng(9, "stream"))
    with TokenStore(ByteBudget(10_000)) as store:
        for chunk in rows.split(20):
            store.append(chunk)
        assert (store.dtype, store.device, store.n_bytes) == (torch.float32, rows.device, 600)
        whole = store.joined()
        assert torch.equal(whole, rows)
        assert store.joined().data_ptr() == whole.data_ptr()
        store.append(rows)
        assert torch.equal(store.joined(), torch.cat([rows, rows]))
        assert [len(part) for _, part in store.blocks(60)] == [60, 40]


def test_rows_in_a_file_are_not_joined() -> None:
    with TokenStore(ByteBudget(0)) as store:
        store.append(torch.zeros(2, 3))
        assert not store.in_memory
        with pytest.raises(InvalidInput, match="RAM"):
            store.joined()


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> SpareRam:
    """Take the memory of rows for a GPU's, beside a RAM with room for 10 rows."""
    monkeypatch.setattr(stream, "_is_far", lambda _rows: True)
    spare = SpareRam()
    monkeypatch.setattr(memory, "free_ram", lambda: 2 * 10 * FEATURES * 4 - spare.held)
    monkeypatch.setattr(stream, "SPARE_RAM", spare)
    return spare


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    rows_in_memory=st.integers(0, 30),
    block=st.integers(1, 30),
    reserved=st.booleans(),
)
def test_rows_go_to_ram_before_they_go_to_a_file(
    far: SpareRam, sizes: list[int], rows_in_memory: int, block: int, reserved: bool
) -> None:
    matrix, row = rows(sum(sizes)), FEATURES * 4
    budget = ByteBudget(rows_in_memory * row)
    with TokenStore(budget) as store:
        if reserved:
            store._room = torch.empty(min(rows_in_memory, sum(sizes)), FEATURES)
            budget.take(store._room.numel() * 4)
            store._held = store._room.numel() * 4
        held, in_ram, in_file = 0, 0, 0
        for size in sizes:  # first fit, and never back
            if not in_ram and not in_file and held + size <= rows_in_memory:
                held += size
            elif not in_file and in_ram + size <= 10:
                in_ram += size
            else:
                in_file += size
        for chunk in matrix.split(sizes):
            store.append(chunk)
        if not reserved:
            assert far.held == in_ram * row
            assert store.in_file == bool(in_file)
            assert store.in_memory == (in_ram == in_file == 0)
        assert torch.equal(joined(store, block), matrix)
        assert torch.equal(store.span(len(matrix) // 3, len(matrix)), matrix[len(matrix) // 3 :])
        assert torch.equal(torch.cat(list(store.chunks())), matrix)
        assert torch.equal(store.take(torch.arange(len(matrix)).flip(0)), matrix.flip(0))
    assert (far.held, budget.left) == (0, rows_in_memory * row)


def test_blocks_are_the_same_wherever_the_rows_lie(far: SpareRam) -> None:
    """So that sums over blocks have the same last bits at every budget."""
    matrix = rows(40)
    found = []
    for rows_in_memory in (0, 7, 12, 100):
        with filled(matrix, [5, 9, 2, 14, 10], ByteBudget(rows_in_memory * FEATURES * 4)) as store:
            found.append([(start, len(part)) for start, part in store.blocks(8)])
    assert found == [[(0, 8), (8, 8), (16, 8), (24, 8), (32, 8)]] * 4


def test_rows_in_ram_are_not_joined(far: SpareRam) -> None:
    with filled(rows(4), [4], ByteBudget(0)) as store:
        assert (store.in_memory, store.in_file) == (False, False)
        with pytest.raises(InvalidInput, match="RAM"):
            store.joined()


def test_rows_in_ram_lie_behind_each_other() -> None:
    matrix, budget = rows(20), ByteBudget(2**20)
    with TokenStore(budget) as store:
        for chunk in matrix.split([4, 6, 5, 1, 4]):
            store.append(chunk)
        (whole,) = store.chunks()
        assert torch.equal(whole, matrix)
        assert budget.left == 2**20 - store.n_bytes


@pytest.mark.parametrize("most", [3, 40, 100])
def test_rows_of_lowest_rank_are_kept_in_whatever_parts_they_come(most: int) -> None:
    rng = np.random.default_rng(0)
    ranks, matrix = rng.permutation(100), rows(100)
    seen = np.sort(rng.choice(100, size=60, replace=False))
    with TokenStore(ByteBudget(10**6)) as store:
        lowest = LowestRanks(ranks, most)
        for at in np.split(seen, [1, 20, 23, 50]):
            lowest.add(at, matrix[at])
        kept = lowest.put(store)
        wanted = np.sort(seen[np.argsort(ranks[seen])[:most]])
        np.testing.assert_array_equal(kept, wanted)
        assert torch.equal(store.span(0, store.n_tokens), matrix[wanted])
