"""The value itself: digest, description, batches, and its file."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from entangle.errors import InvalidInput, Unavailable
from entangle.texts.calibration import load_calibration
from entangle.texts.calibration_set import CalibrationSet


@pytest.fixture
def small() -> CalibrationSet:
    ids = torch.tensor([[1, 2, 3], [4, 5, 2**40]])
    return CalibrationSet(ids, "here", {"seed": 3, "names": ("a", "b")})


def test_digest_by_hand(small: CalibrationSet) -> None:
    content = struct.pack("<8q", 2, 3, 1, 2, 3, 4, 5, 2**40)
    assert small.digest == hashlib.sha256(content).hexdigest()


def test_digest_depends_on_shape_and_ids_only(small: CalibrationSet) -> None:
    turned = CalibrationSet(small.ids.T.contiguous().T, "elsewhere", {})
    assert turned.digest == small.digest
    assert CalibrationSet(small.ids.reshape(3, 2), "here", {}).digest != small.digest
    assert CalibrationSet(small.ids + 1, "here", {}).digest != small.digest


def test_description(small: CalibrationSet) -> None:
    assert json.loads(json.dumps(small.describe())) == {
        "source": "here",
        "n_seq": 2,
        "seq_len": 3,
        "n_tokens": 6,
        "digest": small.digest,
        "settings": {"seed": 3, "names": ["a", "b"]},
    }


def test_settings_cannot_be_changed(small: CalibrationSet) -> None:
    with pytest.raises(TypeError):
        small.settings["seed"] = 4  # type: ignore[index]


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_batches(n: int) -> None:
    ids = torch.arange(12).reshape(6, 2)
    batches = list(CalibrationSet(ids, "", {}).batches(n))
    assert [start for start, _ in batches] == list(range(0, 6, n))
    assert torch.equal(torch.cat([batch for _, batch in batches]), ids)
    assert all(len(batch) == n for _, batch in batches[:-1])


def test_batches_of_nothing(small: CalibrationSet) -> None:
    for n in (0, -1, True):
        with pytest.raises(InvalidInput, match=r"`n`.*\b1\b"):
            small.batches(n)


def test_no_tokens() -> None:
    with pytest.raises(InvalidInput, match=r"`ids`.*token"):
        CalibrationSet(torch.zeros(0, 4, dtype=torch.int64), "", {})


def test_save_and_load(small: CalibrationSet, tmp_path: Path) -> None:
    path = small.save(tmp_path / "c.safetensors")
    loaded = CalibrationSet.load(path)
    assert torch.equal(loaded.ids, small.ids)
    assert loaded.describe() == small.describe()
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.safetensors"]
    again = load_calibration(path)
    assert again.digest == small.digest
    assert again.source == str(path)
    origin = {key: small.describe()[key] for key in ("source", "settings", "digest")}
    assert again.settings["origin"] == origin


def test_save_never_overwrites_unasked(small: CalibrationSet, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    small.save(path)
    other = CalibrationSet(small.ids + 1, "", {})
    with pytest.raises(InvalidInput, match=r"c\.safetensors'.*exists"):
        other.save(path)
    assert CalibrationSet.load(path).digest == small.digest
    other.save(path, force=True)
    assert CalibrationSet.load(path).digest == other.digest


def test_save_where_it_cannot(small: CalibrationSet, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"c\.pt'"):
        small.save(tmp_path / "c.pt")
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match=r"c\.safetensors'.*file'"):
        small.save(tmp_path / "file" / "c.safetensors")
    assert small.save(tmp_path / "new" / "c.safetensors").exists()


def test_failed_write_leaves_nothing(
    small: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as handle:
            handle.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(Unavailable, match=r"c\.safetensors'.*space"):
        small.save(tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


def test_load_what_save_did_not_write(small: CalibrationSet, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    safetensors.torch.save_file({"ids": small.ids}, path)
    with pytest.raises(InvalidInput, match=r"c\.safetensors'.*written"):
        CalibrationSet.load(path)
    with pytest.raises(Unavailable, match=r"no\.safetensors'.*read"):
        CalibrationSet.load(tmp_path / "no.safetensors")


def test_changed_ids_are_noticed(small: CalibrationSet, tmp_path: Path) -> None:
    path = small.save(tmp_path / "c.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"c\.safetensors'.*digest"):
        CalibrationSet.load(path)
