"""`entangle evaluate`: what it prints, writes and refuses, called in this process."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from entangle.calibration import interpret_escapes
from entangle.cli.main import main
from entangle.evaluation import load_evaluation, perplexity
from entangle.models.loading import load_model
from entangle.provenance import read_manifest
from tests.tiny_models import TINY, tiny_tokenizer

Folder = Callable[[str], Path]


def _command(folder: Path, text: Path, *more: str) -> list[str]:
    return ["evaluate", str(folder), "--data", str(text), "--device", "cpu", "--quiet", *more]


@pytest.fixture
def output(
    tiny_folder: Folder, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that evaluates the tiny Llama and gives what was printed."""

    def run(*more: str) -> str:
        folder = tiny_folder("llama")
        capsys.readouterr()
        assert main(_command(folder, text_file, *more)) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def test_table(output: Callable[..., str], tiny_folder: Folder, text_file: Path) -> None:
    printed = output("--seq-len", "64")
    model = load_model(str(tiny_folder("llama")), device="cpu")
    expected = perplexity(model, load_evaluation(text_file, model.tokenizer, seq_len=64))
    row = next(line.split() for line in printed.splitlines() if " dense " in line)
    words = format(expected.word_perplexity, ",.5g")
    assert row[:3] == ["dense", format(expected.value, ",.5g"), words]
    assert "windows of 64 tokens" in printed
    assert "× dense" not in printed  # the only model is its own baseline


def test_json_has_the_protocol_and_the_figures(output: Callable[..., str]) -> None:
    options = ("--seq-len", "32", "--n-windows", "5", "--join", "\\n", "--batch-size", "2")
    content = json.loads(output(*options, "--special-tokens", "--json"))
    assert content["out"] is None
    row, protocol = content["results"][0], content["manifest"]["evaluation"]
    assert (row["model"], row["windows"], row["tokens"]) == ("dense", 5, 5 * 31)
    assert (protocol["seq_len"], protocol["stride"], protocol["n_windows"]) == (32, 32, 5)
    assert protocol["settings"]["join"] == interpret_escapes("\\n")
    assert protocol["settings"]["special_tokens"] == [1]
    assert content["manifest"]["settings"] == {"batch_size": 2, "seed": 0}
    assert content["manifest"]["models"]["dense"]["class"] == "LlamaForCausalLM"


def test_default_length_is_the_context(output: Callable[..., str]) -> None:
    content = json.loads(output("--n-windows", "2", "--json"))
    assert content["manifest"]["evaluation"]["seq_len"] == 128


def test_result_folder(output: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = output("--seq-len", "64", "--n-windows", "3", "--out", str(out))
    assert printed.endswith(f"Saved to {out}.\n")
    assert {path.name for path in out.iterdir()} == {
        "manifest.json", "perplexity.parquet", "windows.parquet",
    }  # fmt: skip
    manifest: Any = read_manifest(out, "evaluation")
    table, windows = (pd.read_parquet(out / f"{n}.parquet") for n in ("perplexity", "windows"))
    assert windows.columns.tolist() == ["window", "model", "loss"]
    assert windows["window"].tolist() == [0, 1, 2]
    value = math.exp(windows["loss"].sum() / manifest["evaluation"]["n_tokens"])
    assert table["perplexity"][0] == pytest.approx(value)
    assert manifest["seconds"] > 0


def test_an_existing_result_needs_force(
    output: Callable[..., str],
    tiny_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--seq-len", "64", "--n-windows", "2", "--out", str(tmp_path / "out"))
    output(*options)
    assert main(_command(tiny_folder("llama"), text_file, *options)) == 2
    assert "exists; name another one or use --force" in capsys.readouterr().err
    output(*options, "--force")


def test_a_nan_perplexity_is_said_and_saved(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module: Any = TINY["llama"]()
    module.model.norm.weight.fill_(math.nan)
    module.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options = ("--seq-len", "64", "--n-windows", "4", "--out", str(tmp_path / "out"))
    assert main(_command(tmp_path / "model", text_file, *options)) == 0
    said = "The perplexity of dense is nan: 4 of 4 windows have no finite loss."
    assert said in capsys.readouterr().out
    assert main(_command(tmp_path / "model", text_file, *options, "--force", "--json")) == 0
    row = json.loads(capsys.readouterr().out)["results"][0]
    assert (row["perplexity"], row["flag"]) == (None, "nan")
    assert pd.read_parquet(tmp_path / "out" / "perplexity.parquet")["perplexity"].isna().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-len", "129"], "`seq_len` must be at most the model's context, 128; got 129."),
        (["--seq-len", "1"], "`seq_len` must be an integer of at least 2; got 1."),
        (["--n-windows", "9999"], "`n_windows` must be at most"),
        (["--seq-len", "64", "--batch-size", "0"], "`batch_size` must be an integer of at least 1"),
        (["--seed", "-1"], "`seed` must be an integer in [0, 2**63)"),
        (["--split", "test"], "`split` 'test' was given, but has no meaning"),
        (["--join", "\\q"], "a backslash must be followed by"),
        (["--data", "/no/such/text.txt"], "'/no/such/text.txt' does not exist"),
        (["--out", "/no-such-root/x"], "cannot be written"),
    ],
)
def test_mistakes_end_in_one_line(
    options: list[str],
    message: str,
    tiny_folder: Folder,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tiny_folder("llama")
    capsys.readouterr()
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != "/")
    assert main(_command(folder, text_file, *options)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_models_without_a_head_or_a_tokenizer(
    tiny_folder: Folder, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_folder("bert")
    capsys.readouterr()
    assert main(_command(folder, text_file, "--seq-len", "64")) == 2
    assert "is an encoder: give a causal language model" in capsys.readouterr().err
    module: Any = TINY["llama"]()
    module.save_pretrained(tmp_path / "model")
    assert main(_command(tmp_path / "model", text_file)) == 2
    assert "is text, so it needs a tokenizer" in capsys.readouterr().err
