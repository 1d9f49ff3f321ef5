import json
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import entangle
from entangle.recording import hooks, recorder
from tests.cli.runs import Run

Folder = Callable[[str], Path]
Small = Sequence[object]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_tables(run: Run, small: Small) -> None:
    status, out, err = run(*small, "--top", 3)
    assert (status, err) == (0, "")
    lines = [line.rstrip() for line in out.splitlines() if line.strip()]
    assert lines[0] == "Wasserstein distance by layer (exact, 128 tokens, special tokens: none)"
    assert lines[1].split("   ")[0].strip() == "layer"
    assert "WD–MD ρ [95 %]" in lines[1]
    assert [line.split()[0] for line in lines[3:6]] == [
        f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    ]
    assert lines[6] == "The 3 largest WD"
    assert lines[7].split()[:5] == ["rank", "layer", "neuron", "wd", "wd_se"]
    assert [line.split()[0] for line in lines[9:12]] == ["1", "2", "3"]
    assert all(line.split()[1].startswith("model.layers.1.mlp.") for line in lines[9:12])
    assert lines[12].startswith("Saved to ")


def test_progress_is_told_in_lines_off_a_terminal(run: Run, small: Small) -> None:
    status, out, err = run(*(part for part in small if part != "--quiet"))
    assert status == 0
    assert err.splitlines()[0] == "scoring (exact): 0/7 sequences and layers"
    assert err.splitlines()[-1].startswith("scoring (exact): 7/7 sequences and layers, ")
    assert "scoring" not in out


def test_json_and_a_result_folder_agree(run: Run, small: Small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, text, err = run(*small, "--json", "--out", out, "--top", 4, "--seed", 3)
    assert (status, err) == (0, "")
    printed, scores = json.loads(text), entangle.load_scores(out)
    assert printed.keys() == {"out", "manifest", "layers", "summary", "top"}
    assert printed["out"] == str(out)
    assert printed["manifest"] == scores.manifest
    assert printed["manifest"]["settings"]["seed"] == 3
    assert printed["manifest"]["calibration"]["settings"]["seed"] == 3
    top = scores.top(4)
    assert [row["neuron"] for row in printed["top"]] == top["neuron"].tolist()
    np.testing.assert_allclose([row["wd"] for row in printed["top"]], top["wd"], rtol=1e-12)
    assert [row["layer"] for row in printed["summary"]] == scores.layers["layer"].tolist()
    for row in printed["summary"]:
        part = scores.layer(row["layer"]).frame
        assert row["median wd"] == pytest.approx(part["wd"].median())
        assert row["WD–MD ρ"] == pytest.approx(part["wd"].corr(part["md"], method="spearman"))
        assert row["low"] <= row["WD–MD ρ"] <= row["high"]


def test_the_table_says_where_the_result_is_and_force_replaces_it(
    run: Run, small: Small, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert run(*small, "--out", out).out.splitlines()[-1] == f"Saved to {out}."
    status, text, err = run(*small, "--out", out)
    assert (status, text) == (2, "")
    assert err.endswith("exists; name another one or use --force (force=True) to replace it.\n")
    assert run(*small, "--out", out, "--force", "--layer", 0).status == 0
    assert set(entangle.load_scores(out).frame["block"]) == {0, 1}
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        (["--layer", "all"], 9),
        ([], 9),
        (["--layer", "1"], 3),
        (["--layer", "1", "--proj", "mlp,attn"], 7),
        (["--layer", "*.mlp.*"], 9),
        (["--layer", "model.layers.2.self_attn.o_proj"], 1),
        (["--layer", "0", "--layer", "*.2.self_attn.q_proj"], 4),
        (["--proj", "gate_proj"], 3),
        (["--layer", "2", "--proj", "mlp"], 3),
    ],
)
def test_which_layers(
    run: Run, tiny_folder: Folder, text_file: Path, chosen: list[str], count: int
) -> None:
    status, out, err = run(
        "score", tiny_folder("llama"), *chosen, "--calibration", text_file, "--n-seq", 2,
        "--seq-len", 16, "--quiet", "--json", "--no-md",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert len(json.loads(out)["layers"]) == count


def test_without_mapping_difficulty_its_columns_are_not_there(run: Run, small: Small) -> None:
    status, out, _ = run(*small, "--no-md", "--method", "sketch")
    assert status == 0
    assert "WD–MD" not in out
    assert "by layer (sketch, 128 tokens, special tokens: none)" in out


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt", "mixtral"])
def test_other_architectures(run: Run, tiny_folder: Folder, text_file: Path, name: str) -> None:
    status, out, err = run(
        "score", tiny_folder(name), "--layer", 1, "--proj", "attn", "--calibration", text_file,
        "--n-seq", 2, "--seq-len", 16, "--quiet",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "The 20 largest WD" in out


def test_token_ids_need_no_tokenizer_and_no_sizes(
    run: Run, tiny_folder: Folder, tmp_path: Path
) -> None:
    ids = torch.arange(4, 4 + 96).view(6, 16)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    status, out, err = run(
        "score", tiny_folder("llama"), "--layer", 1, "--calibration", tmp_path / "ids.safetensors",
        "--quiet", "--json",
    )  # fmt: skip
    assert (status, err) == (0, "")
    used = json.loads(out)["manifest"]["calibration"]
    assert (used["n_seq"], used["seq_len"]) == (6, 16)


def test_contiguous_text_can_be_recomputed(run: Run, small: Small, text_file: Path) -> None:
    printed = json.loads(run(*small, "--json", "--sampling", "contiguous", "--join", "\\t").out)
    used = printed["manifest"]["calibration"]
    assert used["settings"]["sampling"] == "contiguous"
    assert used["settings"]["join"] == "\t"
    assert used["n_tokens"] == 128


def test_two_runs_write_the_same_bytes(run: Run, small: Small, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run(*small, "--out", tmp_path / name).status == 0
    for file in names(tmp_path / "one"):
        contents = [(tmp_path / name / file).read_bytes() for name in ("one", "two")]
        if file == "manifest.json":
            manifests = [json.loads(content) for content in contents]
            for manifest in manifests:
                del manifest["seconds"], manifest["peak_memory_bytes"], manifest["memory_bytes"]
                del manifest["digests"]["manifest"]
            assert manifests[0] == manifests[1]
        else:
            assert contents[0] == contents[1]


def test_neurons_without_a_score_are_counted(run: Run, tmp_path: Path, text_file: Path) -> None:
    from tests.tiny_models import TINY, tiny_tokenizer

    module = TINY["llama"]()
    weight = module.get_submodule("model.layers.1.mlp.gate_proj").get_parameter("weight")
    weight[:2], weight[5] = 0, torch.nan
    module.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    status, out, err = run(
        "score", tmp_path / "model", "--layer", 1, "--proj", "mlp", "--calibration", text_file,
        "--n-seq", 2, "--seq-len", 16, "--quiet",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "33 neuron(s) with nan outputs have no score." in out
    assert "2 neuron(s) with constant outputs have no score." in out


def test_all_neurons_without_a_score(run: Run, small: Small, tmp_path: Path) -> None:
    save_file({"ids": torch.full((3, 1), 9)}, tmp_path / "ids.safetensors")
    status, out, err = run(*small[:6], "--calibration", tmp_path / "ids.safetensors", "--quiet")
    assert (status, err) == (0, "")
    assert "128 neuron(s) with constant outputs have no score." in out


def test_ctrl_c_leaves_nothing(
    run: Run, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt comes with the third pass over the text, while inputs are in a file."""
    forward, passes = hooks.forward, [0]

    def interrupted(*args: object, **kwargs: object) -> object:
        passes[0] += 1
        if passes[0] == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(*args, **kwargs)  # type: ignore[arg-type]

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(recorder, "forward", interrupted)
    assert run(*small, "--out", tmp_path / "run", "--batch-size", 1) == (
        130, "", "entangle: interrupted\n",
    )  # fmt: skip
    assert passes == [3]
    assert names(tmp_path) == ["temporary"]
    assert names(tmp_path / "temporary") == []
