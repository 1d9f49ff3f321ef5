"""Nothing is ever unpickled: pickles are planted wherever a reader might take one."""

import bz2
import gzip
import io
import json
import pickle
import tarfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from entangle.allocation.by_row import read_alphapruning
from entangle.errors import EntangleError, InvalidInput
from entangle.models.loading import load_model
from entangle.results.allocation import read_zeros
from entangle.runs.reading import no_pickles
from entangle.texts.calibration import load_calibration
from entangle.texts.documents import load_texts
from tests.planted import planted_pickle, planted_weights
from tests.tiny_models import save_tiny

MAKERS = {"plain": planted_pickle, "torch": planted_weights}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What a planted pickle would make."""
    return tmp_path / "trace"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "tiny")


def _array(trace: Path) -> bytes:
    """Return an array of objects, whose values are a pickle, as NumPy writes it."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([0, None], dtype=object), allow_pickle=True)
    head = buffer.getvalue().partition(b"\n")[0] + b"\n"
    return head + planted_pickle(trace)


# The lock itself

READERS: dict[str, tuple[Callable[[Path], bytes], Callable[[Path], object]]] = {
    "torch": (planted_weights, lambda file: torch.load(file, weights_only=False)),
    "pickle": (planted_pickle, lambda file: pickle.loads(file.read_bytes())),
    "numpy": (_array, lambda file: np.load(file, allow_pickle=True)),
    "pandas": (planted_pickle, pd.read_pickle),
    "pandas, gzip": (
        lambda trace: gzip.compress(planted_pickle(trace)),
        lambda file: pd.read_pickle(file, compression="gzip"),
    ),
    "pandas, bz2": (
        lambda trace: bz2.compress(planted_pickle(trace)),
        lambda file: pd.read_pickle(file, compression="bz2"),
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_would_leave_a_trace_is_refused_in_the_block(
    reader: str, trace: Path, tmp_path: Path
) -> None:
    make, read = READERS[reader]
    (tmp_path / "x").write_bytes(make(trace))
    with pytest.raises(InvalidInput, match="the set holds a pickle"), no_pickles("the set"):
        read(tmp_path / "x")
    assert not trace.exists()
    read(tmp_path / "x")
    assert trace.exists()


@pytest.mark.parametrize("safely", [True, False])
def test_weights_are_refused_by_name_even_where_they_are_harmless(
    safely: bool, tmp_path: Path
) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "x.bin")
    with pytest.raises(InvalidInput, match=r"x\.bin"), no_pickles("the model"):
        torch.load(tmp_path / "x.bin", weights_only=safely)


def test_blocks_in_blocks_and_in_threads_leave_everything_as_it_was() -> None:
    before = torch.load, pickle.load, pickle.loads
    content = pickle.dumps(3)
    entered, finish = threading.Barrier(2, timeout=10), threading.Event()

    def other() -> None:
        with no_pickles("another"):
            entered.wait()
            finish.wait(10)

    thread = threading.Thread(target=other)
    with no_pickles("one"):
        thread.start()
        entered.wait()
        with no_pickles("two"), pytest.raises(InvalidInput, match="two holds"):
            pickle.loads(content)
        with pytest.raises(InvalidInput, match="one holds"):
            pickle.loads(content)
    assert pickle.loads(content) == 3  # only the other thread may not
    finish.set()
    thread.join()
    assert (torch.load, pickle.load, pickle.loads) == before


# Model folders


def _index(name: str) -> Callable[[Path, bytes], None]:
    def plant(folder: Path, content: bytes) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)
        index = {"metadata": {}, "weight_map": {"weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return plant


def _alone(name: str) -> Callable[[Path, bytes], None]:
    def plant(folder: Path, content: bytes) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return plant


def _instead(name: str) -> Callable[[Path, bytes], None]:
    def plant(folder: Path, content: bytes) -> None:
        (folder / name).write_bytes(content)

    return plant


def _named(folder: Path, content: bytes) -> None:
    (folder / "adapter_model.bin").write_bytes(content)
    settings = json.loads((folder / "config.json").read_text())
    settings["transformers_weights"] = "adapter_model.bin"
    (folder / "config.json").write_text(json.dumps(settings))


def _adapter(name: str) -> Callable[[Path, bytes], None]:
    def plant(folder: Path, content: bytes) -> None:
        for file in folder.iterdir():
            file.unlink()
        settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        (folder / "adapter_model.safetensors").symlink_to("missing")
        (folder / name).write_bytes(content)

    return plant


PLACES: dict[str, Callable[[Path, bytes], None]] = {
    **{
        f"{name} of an index": _index(name)
        for name in ("pytorch_model.bin", "x.pt", "x.ckpt", "x.safetensors")
    },
    **{
        f"{name} alone": _alone(name)
        for name in (
            "pytorch_model.bin", "model.pt", "x.pth", "x.ckpt", "x.pkl", "model.safetensors",
        )
    },
    "named by the config": _named,
    "beside a link to nothing": _adapter("adapter_model.bin"),
    **{
        name: _instead(name)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
    },
}  # fmt: skip


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_in_a_model_folder_is_refused(
    place: str, maker: str, folder: Path, trace: Path
) -> None:
    PLACES[place](folder, MAKERS[maker](trace))
    with pytest.raises(EntangleError) as caught:
        load_model(folder, device="cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


BESIDE = (
    "pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt",
    "rng_state.pth", "spk_dict.pt", "vocab.bin", "vocab.pkl", "vocab.txt", "vocab.json",
    "tokenizer.pkl", "tokenizer.model", "spiece.model", "merges.txt", "tekken.json",
    "generation_config.json", "chat_template.jinja", "chat_template.json", ".metadata",
    "__0_0.distcp", "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", BESIDE)
def test_a_pickle_beside_the_weights_is_not_unpickled(
    name: str, maker: str, folder: Path, trace: Path
) -> None:
    (folder / name).write_bytes(MAKERS[maker](trace))
    with suppress(EntangleError):
        load_model(folder, device="cpu")
    assert not trace.exists()


TOKENIZERS = ("GPT2Tokenizer", "LlamaTokenizer", "BertTokenizer", "T5Tokenizer", "XLMTokenizer",
    "TransfoXLTokenizer", "RagTokenizer", "XLNetTokenizer", "BertJapaneseTokenizer")  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_tokenizer_unpickles_its_vocabulary(kind: str, folder: Path, trace: Path) -> None:
    (folder / "tokenizer.json").unlink()
    for name in BESIDE:
        if "vocab" in name or name.endswith(("model", "pkl", "txt")):
            (folder / name).write_bytes(planted_pickle(trace))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with suppress(EntangleError):
        load_model(folder, device="cpu")
    assert not trace.exists()


def test_a_reader_that_nobody_thought_of_is_refused(
    folder: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a later version of transformers could bring one."""
    from transformers import LlamaConfig

    (folder / "x.bin").write_bytes(planted_weights(trace))
    monkeypatch.setattr(
        LlamaConfig, "__post_init__", lambda *_, **__: torch.load(folder / "x.bin"), raising=False
    )
    with pytest.raises(InvalidInput, match=r"x\.bin.*pickle|pickle.*x\.bin"):
        load_model(folder, device="cpu")
    assert not trace.exists()


@pytest.mark.parametrize("maker", MAKERS)
def test_a_gguf_file_that_is_a_pickle(maker: str, trace: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(MAKERS[maker](trace))
    with pytest.raises(InvalidInput, match=r"x\.gguf"):
        load_model(tmp_path / "x.gguf", device="cpu")
    assert not trace.exists()


# Texts


def _archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def no_kept_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "data sets")


@pytest.mark.parametrize("ending", ["pth", "pt", "pkl", "pickle", "pyd", "npy", "npz", "pth.gz"])
@pytest.mark.usefixtures("no_kept_data_sets")
def test_a_member_of_an_archive(ending: str, trace: Path, tmp_path: Path) -> None:
    content = planted_weights(trace) if "pt" in ending else _array(trace)
    content = gzip.compress(content) if ending.endswith("gz") else content
    (tmp_path / "set").mkdir()
    members = {f"{i}.{key}": one for i in (1, 2) for key, one in (("txt", b"a"), (ending, content))}
    _archive(tmp_path / "set" / "x.tar", members)
    decoded = ending.startswith("pth")  # by the library; of the others it gives the bytes
    with pytest.raises(InvalidInput, match="pickle") if decoded else suppress(EntangleError):
        list(load_texts(tmp_path / "set", split="train", column="txt"))
    assert not trace.exists()


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    "name", ["x.pkl", "x.pickle", "x.pt", "x.bin", "x.npy", "x.npz", "x.safetensors", "x.parquet",
             "x.arrow", "x.jsonl", "x.txt", "x.csv", "x.h5", "x.pkl.gz"],
)  # fmt: skip
@pytest.mark.parametrize("how", ["file", "folder", "split", "readme"])
@pytest.mark.usefixtures("no_kept_data_sets")
def test_a_pickle_as_a_text(
    how: str, name: str, maker: str, trace: Path, tmp_path: Path, tiny: Callable[[str], Any]
) -> None:
    content = MAKERS[maker](trace)
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / name
    file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    if how == "readme":
        text = f"---\nconfigs:\n- config_name: default\n  data_files: {name}\n---\n"
        (tmp_path / "set" / "README.md").write_text(text)
    split = "train" if how == "split" else None
    with pytest.raises(EntangleError) as caught:
        load_calibration(
            str(file if how == "file" else file.parent), tiny("llama").tokenizer, split=split,
            n_seq=1, seq_len=4,
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["pandas", "pickle"])
def test_the_name_of_a_format_is_no_data_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError(name)

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InvalidInput, match=name):
        list(load_texts(name))


def test_types_that_arrow_once_unpickled(trace: Path, tmp_path: Path) -> None:
    """Extension types of Python were rebuilt from a pickle in a column's metadata."""
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": planted_pickle(trace),
    }
    field = pa.field("text", pa.string(), metadata=metadata)
    table = pa.table([pa.array(["a b c", "d"])], schema=pa.schema([field]))
    pq.write_table(table, tmp_path / "x.parquet")
    with suppress(EntangleError):
        list(load_texts(tmp_path / "x.parquet"))
    assert not trace.exists()


# Our own files


def test_our_own_files(trace: Path, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(_array(trace))
    with pytest.raises(InvalidInput, match=r"x\.npy"):
        read_alphapruning(tmp_path / "x.npy", [("a", 2), ("b", 2)])
    for make in MAKERS.values():
        (tmp_path / "x.safetensors").write_bytes(make(trace))
        with pytest.raises(InvalidInput, match=r"x\.safetensors"):
            read_zeros(tmp_path / "x.safetensors")
    assert not trace.exists()
