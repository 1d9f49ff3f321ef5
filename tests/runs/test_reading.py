"""Reading: damage is one line, a bug stays a bug, and what never ends is not opened."""

import contextlib
import json
import lzma
import os
import random
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from benchmarks.damage import damage
from entangle.errors import EntangleError, InvalidInput, Unavailable, UnknownName
from entangle.evaluation import load_minimal_pairs
from entangle.experiments.selection import read_selection
from entangle.models.loading import load_adapter, load_model
from entangle.runs.reading import decoding, read_json, read_object, regular_file, regular_files
from entangle.texts.calibration import load_calibration
from entangle.texts.documents import load_texts
from entangle.texts.token_files import read_token_file

DAMAGE = (
    ValueError("x"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
    KeyError("x"),
    TypeError("x"),
    OverflowError("x"),
    RecursionError("x"),
    MemoryError(),
    EOFError("x"),
    struct.error("x"),
    zlib.error("x"),
    lzma.LZMAError("x"),
    zipfile.BadZipFile("x"),
    SafetensorError("x"),
    pa.ArrowException("x"),
    pa.ArrowCapacityError("x"),
    OSError("Unexpected end of stream"),
    OSError(22, "Invalid argument"),
)


@pytest.mark.parametrize("error", DAMAGE, ids=lambda error: type(error).__name__)
def test_damage_is_one_line_with_path_reason_and_remedy(error: Exception) -> None:
    message = r"'a/b\.json'.*make it anew"
    with (
        pytest.raises(InvalidInput, match=message) as caught,
        decoding("a/b.json", remedy="make it anew"),
    ):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_what_the_system_refuses_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"none.*No such file"), decoding("none", remedy="x"):
        (tmp_path / "none").read_bytes()


@pytest.mark.parametrize("error", [AssertionError("x"), KeyboardInterrupt(), StopIteration(1)])
def test_a_bug_and_an_interruption_stay_themselves(error: BaseException) -> None:
    with pytest.raises(type(error)), decoding("a", remedy="x"):
        raise error


def test_errors_of_ours_stay_themselves() -> None:
    with pytest.raises(UnknownName, match=r"^as it was$"), decoding("a", remedy="x"):
        raise UnknownName("as it was")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe{\0}\0", b"[" * 100_000, b"1" * 5000, b'{"a": }', b"\0\0"],
    ids=["empty", "open", "UTF-16", "deep", "many digits", "no value", "NUL"],
)
def test_json_that_cannot_be_read(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"a\.json.*save it again"):
        read_json(path, remedy="save it again")


def test_json_of_any_type_and_objects_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[1, "é"]', "utf-8")
    assert read_json(path, remedy="x") == [1, "é"]
    with pytest.raises(InvalidInput, match=r"object.*list.*mend it"):
        read_object(path, remedy="mend it")
    path.write_text('{"a": 1}')
    assert read_object(path, remedy="x") == {"a": 1}


def test_only_what_ends_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe.txt", "pipe"), ("zero.jsonl", "device"), ("folder", "folder")):
        with pytest.raises(InvalidInput, match=rf"{name}.*{kind}"):
            regular_file(tmp_path / name)
    for name in ("pipe.txt", "zero.jsonl"):
        with pytest.raises(InvalidInput, match=name):
            list(load_texts(tmp_path / name))
    with pytest.raises(InvalidInput, match="pipe"):
        regular_files(tmp_path)
    with pytest.raises(Unavailable, match="none"):
        regular_file(tmp_path / "none")
    regular_files(tmp_path / "folder")


def test_a_text_nested_to_any_depth_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "b", "deep": ' + "[" * 900 + '"x"' + "]" * 900 + "}\n")
    with pytest.raises(InvalidInput, match="body"):
        list(load_texts(path))


# A sample of what `python -m benchmarks.damage` does with commands

Reader = Callable[[Path], object]
SCORES = pd.DataFrame({"layer": ["l"] * 9, "block": [0] * 9, "neuron": range(9), "flag": [""] * 9})


def _lines(folder: Path) -> Path:
    rows = [{"text": f"text {i}", "sentence_good": f"{i} is", "sentence_bad": f"{i} are"}
            for i in range(9)]  # fmt: skip
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "a.jsonl"


def _table(folder: Path) -> Path:
    table = pd.DataFrame({"text": ["a", "b"], "layer": ["l", "l"], "neuron": [1, 2]})
    table.to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def _ids(folder: Path) -> Path:
    save_file({"ids": torch.arange(64).reshape(4, 16)}, folder / "a.safetensors")
    return folder / "a.safetensors"


SAMPLE: dict[str, tuple[Callable[[Path], Path], Reader]] = {
    "texts in lines": (_lines, lambda path: list(load_texts(path))),
    "pairs": (_lines, load_minimal_pairs),
    "texts in a table": (_table, lambda path: list(load_texts(path))),
    "neurons in a table": (_table, lambda path: read_selection(path, SCORES)),
    "token ids": (_ids, read_token_file),
}


@pytest.mark.parametrize("kind", SAMPLE)
def test_damaged_files_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    make, read = SAMPLE[kind]
    refused = []
    for seed in range(60):
        folder = tmp_path / str(seed)
        folder.mkdir()
        path = make(folder)
        told = damage(random.Random(seed), path)
        with contextlib.suppress(EntangleError):
            read(path)
            continue
        refused.append(told)
    assert 20 <= len(refused) < 60


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_damaged_models_are_loaded_or_refused(
    name: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    refused = []
    for seed in range(16):
        folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / str(seed)))
        told = damage(random.Random(seed), folder / name)
        with contextlib.suppress(EntangleError):
            load_model(folder)
            continue
        refused.append(told)
    assert len(refused) > 4


IMPOSSIBLE = {
    "num_hidden_layers": 10**9,
    "vocab_size": 10**12,
    "intermediate_size": 2**62,
    "hidden_size": -32,
    "num_attention_heads": 0,
    "num_key_value_heads": 3,
    "rms_norm_eps": "abc",
    "head_dim": 10**400,
    "rope_parameters": [[[]]],
    "dtype": "float99",
    "pad_token_id": 10**6,
}


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_impossible_values_of_a_config(
    key: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: IMPOSSIBLE[key]}))
    with pytest.raises(InvalidInput, match=r"model'") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_tokenise_the_text(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))
    written = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {one: i for one, i in written["model"]["vocab"].items() if one != "<unk>"}
    written["model"] |= {"type": "WordPiece", "vocab": vocabulary, "unk_token": "[UNK]"}
    written["model"] |= {"continuing_subword_prefix": "", "max_input_chars_per_word": 9}
    (folder / "tokenizer.json").write_text(json.dumps(written))
    model = load_model(folder)
    with pytest.raises(InvalidInput, match=r"model'.*UNK"):
        load_calibration(["é" * 99], model.tokenizer, n_seq=1, seq_len=4)


@pytest.mark.parametrize(
    "content",
    [
        "[1]", "{", "[" * 100_000, '{"base_model_name_or_path": 7}',
        '{"base_model_name_or_path": "b", "revision": [1]}',
        *(
            json.dumps({"base_model_name_or_path": base})
            for base in ("x" * 9000, "\0", "\ud800", "/")
        ),
    ],
    ids=range(9),
)  # fmt: skip
def test_settings_of_an_adapter_that_cannot_be(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises((InvalidInput, Unavailable), match=re.escape(str(tmp_path))) as caught:
        load_adapter(tmp_path, dtype=None)
    assert "\n" not in str(caught.value)
