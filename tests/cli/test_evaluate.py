"""`entangle evaluate`: what it prints, writes and refuses, called in this process."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from entangle.cli.main import main
from entangle.evaluation import load_evaluation, perplexity, perplexity_ratio
from entangle.experts.checkpoint import load_expanded
from entangle.experts.expand import expand
from entangle.models.loading import load_model
from entangle.runs.provenance import read_manifest
from entangle.runs.sealing import sealed
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.documents import interpret_escapes
from tests.cli.runs import Run, holds
from tests.tiny_models import TINY, save_tiny, tiny_tokenizer

Folder = Callable[[str], Path]


def _command(folder: Path, text: Path, *more: str) -> list[str]:
    return ["evaluate", str(folder), "--evaluation", str(text), "--device", "cpu", "--quiet", *more]


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
    printed = output("--eval-seq-len", "64")
    model = load_model(str(tiny_folder("llama")), device="cpu")
    expected = perplexity(model, load_evaluation(text_file, model.tokenizer, seq_len=64))
    row = next(line.split() for line in printed.splitlines() if " dense " in line)
    words = format(expected.word_perplexity, ",.5g")
    assert row[:3] == ["dense", format(expected.value, ",.5g"), words]
    assert "windows of 64 tokens" in printed
    assert "× dense" not in printed  # the only model is its own baseline


def test_json_has_the_protocol_and_the_figures(output: Callable[..., str]) -> None:
    options = ("--eval-seq-len", "32", "--eval-windows", "5", "--join", "\\n", "--batch-size", "2")
    content = json.loads(output(*options, "--special-tokens", "--json"))
    assert "/runs/evaluate-" in content["out"]
    row, protocol = content["results"][0], content["manifest"]["evaluation"]
    assert (row["model"], row["windows"], row["tokens"]) == ("dense", 5, 5 * 31)
    assert (protocol["seq_len"], protocol["stride"], protocol["n_windows"]) == (32, 32, 5)
    assert protocol["settings"]["join"] == interpret_escapes("\\n")
    assert protocol["settings"]["special_tokens"]["policy"] == "model"
    settings = content["manifest"]["settings"]
    assert (settings["batch_size"], settings["seed"]) == (2, 0)
    effect = settings["special_tokens_effect"]
    assert (effect["used"], effect["other"], effect["n_tokens"]) == ("none", "<s>", 31)
    assert content["manifest"]["models"]["dense"]["class"] == "LlamaForCausalLM"


@pytest.fixture
def adding(tmp_path: Path) -> Path:
    """Return the folder of a model whose tokenizer puts <s> before and </s> after a text."""
    save_tiny("llama", tmp_path / "adding")
    tiny_tokenizer(adds=True).save_pretrained(tmp_path / "adding")
    return tmp_path / "adding"


@pytest.mark.parametrize(
    ("given", "shown", "first", "predicted"),
    [
        ([], "<s> … </s>", [1], 30),
        (["--special-tokens"], "<s> … </s>", [1], 30),
        (["--special-tokens", "model"], "<s> … </s>", [1], 30),
        (["--special-tokens", "none"], "none", [], 31),
        (["--special-tokens=published"], "<s> … </s> once", [1], 31),
    ],
)
def test_special_tokens(
    given: list[str],
    shown: str,
    first: list[int],
    predicted: int,
    adding: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ["--eval-seq-len", "32", "--eval-windows", "4", "--device", "cpu", "--quiet"]
    command = ["evaluate", *given, str(adding), "--evaluation", str(text_file), *sizes]
    capsys.readouterr()
    assert main(command) == 0  # a bare option before MODEL does not take it for its value
    assert f"special tokens: {shown})" in " ".join(capsys.readouterr().out.split())
    assert main([*command, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["results"][0]["special_tokens"] == shown
    assert content["results"][0]["tokens"] == 4 * predicted
    assert content["manifest"]["evaluation"]["settings"]["special_tokens"]["before"] == first


def test_an_unknown_policy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--special-tokens=maybe"])
    assert caught.value.code == 2
    assert "maybe" in capsys.readouterr().err


def test_default_length_is_the_context(output: Callable[..., str]) -> None:
    content = json.loads(output("--eval-windows", "2", "--json"))
    assert content["manifest"]["evaluation"]["seq_len"] == 128


def test_result_folder(output: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = output("--eval-seq-len", "64", "--eval-windows", "3", "--out", str(out))
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
    options = ("--eval-seq-len", "64", "--eval-windows", "2", "--out", str(tmp_path / "out"))
    output(*options)
    assert main(_command(tiny_folder("llama"), text_file, *options)) == 2
    assert holds(capsys.readouterr().err, "exists --force")
    output(*options, "--force")


def test_a_nan_perplexity_is_said_and_saved(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module: Any = TINY["llama"]()
    module.model.norm.weight.fill_(math.nan)
    module.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options = ("--eval-seq-len", "64", "--eval-windows", "4", "--out", str(tmp_path / "out"))
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
        (["--eval-seq-len", "129"], "`seq_len` context 128 129"),
        (["--eval-seq-len", "1"], "`eval_seq_len` integer 2 1"),
        (["--eval-windows", "9999"], "`n_windows` most"),
        (["--eval-seq-len", "64", "--batch-size", "0"], "`batch_size` integer 1"),
        (["--seed", "-1"], "`seed` integer [0, 2**63)"),
        (["--evaluation-split", "test"], "`split` 'test' meaning"),
        (["--join", "\\q"], "backslash"),
        (["--evaluation", "/no/such/text.txt"], "'/no/such/text.txt' exist"),
        (["--out", "/no-such-root/x"], "written"),
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
    assert holds(error, message), error


def test_models_without_a_head_or_a_tokenizer(
    tiny_folder: Folder, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_folder("bert")
    capsys.readouterr()
    assert main(_command(folder, text_file, "--eval-seq-len", "64")) == 2
    assert "encoder" in capsys.readouterr().err
    module: Any = TINY["llama"]()
    module.save_pretrained(tmp_path / "model")
    assert main(_command(tmp_path / "model", text_file)) == 2
    assert holds(capsys.readouterr().err, "text tokenizer")


@pytest.fixture
def expansion(place: Path, calibration: CalibrationSet) -> Path:
    """The current folder: the tiny Llama ``model`` and its expansion ``x``."""
    _expand("model", calibration, "x")
    return place


def _expand(model: object, calibration: CalibrationSet, out: str) -> None:
    loaded = load_model(str(model), device="cpu") if isinstance(model, str) else model
    expand(
        loaded,  # type: ignore[arg-type]
        calibration, experts=3, sparsity=0.8, restarts=1, out=out, keep=False, progress=False,
    )  # fmt: skip


@pytest.mark.usefixtures("expansion")
def test_an_expansion_beside_its_dense_model(
    run: Run, text_file: Path, calibration: CalibrationSet
) -> None:
    model = load_model("model", device="cpu")
    text = load_evaluation(text_file, model.tokenizer, seq_len=64)
    built = expand(model, calibration, experts=3, sparsity=0.8, restarts=1, progress=False)
    assert built.model is not None
    results = {"dense": perplexity(model, text), "expansion": perplexity(built.model, text)}
    ratio = perplexity_ratio(results["expansion"], results["dense"], seed=0)
    status, out, err = run(*_command(Path("x"), text_file, "--eval-seq-len", "64", "--json"))
    assert (status, err) == (0, "")
    content = json.loads(out)
    for row, (label, result) in zip(content["results"], results.items(), strict=True):
        assert row["model"] == label
        assert row["perplexity"] == pytest.approx(result.value, rel=1e-12)
    assert abs(ratio.value - 1) > 1e-3  # the two models differ
    found = [content["results"][1][name] for name in ("ratio", "ratio_low", "ratio_high")]
    assert found == pytest.approx([ratio.value, ratio.low, ratio.high])
    described = content["manifest"]["models"]
    dense = json.loads(json.dumps(model.describe()))
    assert described["dense"] == dense | {"name": str(Path("model").absolute())}
    assert (described["expansion"]["name"], described["expansion"]["source"]) == ("x", "expansion")
    assert described["expansion"]["digest"] == load_expanded("x", device="cpu").digest


@pytest.mark.usefixtures("expansion")
def test_the_table_and_folder_of_an_expansion(run: Run, text_file: Path) -> None:
    command = _command(
        Path("x"), text_file, "--eval-seq-len", "64", "--eval-windows", "4", "--out", "out"
    )
    status, out, err = run(*command)
    assert (status, err) == (0, "")
    dense, expansion = (line.split() for line in out.splitlines() if "[" in line)
    assert (dense[0], dense[2:5]) == ("dense", ["1", "[1,", "1]"])
    table = pd.read_parquet("out/perplexity.parquet")
    shown = [format(table[name][1], spec) for name, spec in (("perplexity", ",.5g"),
                                                            ("ratio", ".4g"))]  # fmt: skip
    ends = [f"[{table['ratio_low'][1]:.4g},", f"{table['ratio_high'][1]:.4g}]"]
    assert expansion[:5] == ["expansion", *shown, *ends]
    assert pd.read_parquet("out/windows.parquet")["model"].tolist() == 4 * ["dense"] + 4 * [
        "expansion"
    ]
    manifest: Any = read_manifest("out", "evaluation")
    assert list(manifest["models"]) == ["dense", "expansion"]


def test_a_base_that_has_moved(run: Run, expansion: Path, text_file: Path) -> None:
    command = _command(
        Path("x"), text_file, "--eval-seq-len", "64", "--eval-windows", "4", "--json"
    )
    before = json.loads(run(*command).out)
    (expansion / "model").rename("moved")
    assert json.loads(run(*command).out) == before  # found again
    status, out, err = run(*command, "--force")
    assert status == 0
    digest = before["manifest"]["models"]["dense"]["digest"][:12]
    assert holds(err, f"'model' LlamaForCausalLM {digest} 'x' --base"), err
    alone = json.loads(out)["results"]
    assert [row["model"] for row in alone] == ["expansion"]
    assert alone[0]["perplexity"] == before["results"][1]["perplexity"]
    again = json.loads(run(*command, "--base", "moved").out)
    assert again["results"] == before["results"]


@pytest.mark.usefixtures("expansion")
def test_an_expansion_of_a_model_in_memory(
    run: Run, text_file: Path, calibration: CalibrationSet
) -> None:
    _expand(TINY["llama"](), calibration, "y")
    command = _command(Path("y"), text_file, "--eval-seq-len", "64", "--eval-windows", "4")
    status, out, err = run(*command)
    assert (status, out) == (2, "")  # it has no tokenizer
    assert holds(err, "'y' memory --base"), err
    assert run(*command, "--base", "model").status == 0


DAMAGES: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "truncated": (lambda content: content[:-5], "truncated altered"),
    "altered": (
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        "truncated altered",
    ),
    "missing": (lambda _content: None, "missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block(run: Run, expansion: Path, text_file: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    block = expansion / "x" / "block-0001.safetensors"
    content = change(block.read_bytes())
    block.unlink()
    if content is not None:
        block.write_bytes(content)
    status, out, err = run(*_command(Path("x"), text_file, "--out", "out"))
    assert (status, out) == (2, "")
    assert err.startswith("entangle: error: ")
    assert err.count("\n") == 1
    assert holds(err, f"'x/block-0001.safetensors' {message}"), err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("x --base other", "'other' digest"),
        ("x --base ./nowhere", "unknown model './nowhere'"),
        ("x --base x", "'x' digest"),
        ("x --dtype float32", "`--dtype` chosen 'x'"),
        ("x --revision main", "`--revision` chosen 'x'"),
        ("x --base model --revision main", "`revision` hub"),
        ("x --device-map auto --device auto", "`--device-map` chosen"),
        ("model --base model", "`--base` 'model'"),
        ("broken", "'broken/manifest.json' valid JSON"),
        ("empty", "'empty' damaged manifest.json"),
        ("scores", "'scores' 'expansion' 'scores'"),
    ],
)
def test_checkpoints_that_cannot_be_evaluated(
    run: Run, expansion: Path, text_file: Path, options: str, message: str
) -> None:
    module: Any = TINY["llama"]()
    module.lm_head.weight[0, 0] += 1
    module.save_pretrained("other")
    manifest = json.loads((expansion / "x" / "manifest.json").read_text())
    empty = sealed(Path("none"), manifest | {"model": {"name": "model"}})
    for name, content in (
        ("broken", "{"),
        ("empty", json.dumps(empty)),
        ("scores", json.dumps(manifest | {"kind": "scores"})),
    ):
        shutil.copytree("x", name)
        Path(name, "manifest.json").write_text(content)
    status, out, err = run("evaluate", *options.split(), "--evaluation", text_file, "--out", "out")
    assert (status, out) == (2, "")
    assert err.startswith("entangle: error: ")
    assert err.count("\n") == 1
    assert holds(err, message), err
    assert not Path("out").exists()


@pytest.mark.usefixtures("expansion")
def test_a_model_folder_with_a_manifest_of_its_own_is_a_model(run: Run, text_file: Path) -> None:
    Path("model", "manifest.json").write_text("{}")
    command = _command(
        Path("model"), text_file, "--eval-seq-len", "64", "--eval-windows", "2", "--json"
    )
    assert list(json.loads(run(*command).out)["manifest"]["models"]) == ["dense"]
