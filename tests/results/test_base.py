"""What all results have in common."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import entangle
from entangle.errors import InvalidInput, UnknownName
from entangle.results import CLASSES
from entangle.results.allocation import AllocationReport
from entangle.results.base import Result
from entangle.results.drawings import FIGURES
from entangle.results.expansion import ExpansionReport
from entangle.results.statement import statement
from entangle.runs.sealing import manifest_digest
from entangle.runs.tables import latex_table
from tests.saved import without_digests


@pytest.fixture(params=CLASSES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def result(kind: str, made: Mapping[str, Path]) -> Result:
    return entangle.load_result(made[kind])


def test_a_result_of_any_kind_is_known_by_its_manifest(kind: str, result: Result) -> None:
    assert (type(result).KIND, result.manifest["kind"]) == (kind, kind)
    assert len(result.frame)


def test_saved_and_loaded_again(kind: str, result: Result, tmp_path: Path) -> None:
    place = tmp_path / ("x.safetensors" if kind == "allocation" else "x")
    notes: list[Path] = []
    assert result.save(place, extra=notes.append) == place
    assert len(notes) == 1
    assert not notes[0].exists()  # by then it had its name
    again = type(result).load(place)
    assert again.manifest == result.manifest
    tables = [name for name, one in vars(result).items() if isinstance(one, pd.DataFrame)]
    for name in {"frame", *tables}:
        pd.testing.assert_frame_equal(getattr(again, name), getattr(result, name))
    with pytest.raises(InvalidInput, match="force"):
        result.save(place)
    result.save(place, force=True)


def test_drawn_and_shown(kind: str, result: Result) -> None:
    assert isinstance(result.plot(), Figure)
    assert f"<b>{type(result)._TITLE} " in result._repr_html_()
    text = result.to_latex(caption=f"50 % of {kind}", label="tab:x")
    assert rf"\caption{{50 \% of {kind}}}" in text
    assert r"\label{tab:x}" in text
    assert text.count(r"\\") >= 2
    assert result.to_latex(result.frame.head(1)).count(r"\\") == 2


def test_every_figure_as_it_is_asked_for(kind: str, result: Result, tmp_path: Path) -> None:
    (name, *_) = FIGURES[kind]
    options: dict[str, Any] = {"width": 5.0, "caption": False, "formats": "png"}
    found = result.figures(tmp_path, only=name, title="Mine", **options)
    assert found == {name: tmp_path / name}
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".csv"}
    with pytest.raises(InvalidInput, match="force"):
        result.figures(tmp_path, only=name, **options)
    for wrong in ({"only": "nobody"}, {"palette": {"nobody": "red"}}, {"subset": "nobody"}):
        with pytest.raises(UnknownName, match="nobody"):
            result.figures(tmp_path / "f", **wrong)
    assert not (tmp_path / "f").exists()


def test_how_to_make_it_again_in_two_sentences(kind: str, result: Result) -> None:
    said = result.cite()
    assert re.fullmatch(r"For the .*[^.]\. The seed is .*[^.]\.", said)
    assert len(re.findall(r"\. [A-Z]", said)) == 1
    model: Any = result.manifest["model"]
    if kind == "difference":
        model = result.manifest["a"]["model"]  # type: ignore[index]
    facts = [model["digest"][:16], model["dtype"], model["device"], Path(model["name"]).name]
    text: Any = result.manifest.get("calibration")
    if text is not None:
        facts += [f"{text['n_tokens']:,} tokens", text["digest"][:16], "special tokens"]
    packages: Any = result.manifest.get("packages", {})
    facts += [f"{name} {packages[name]}" for name in ("torch", "transformers") if packages]
    assert [fact for fact in facts if fact not in said] == []
    assert manifest_digest(result.manifest)[:16] in said
    assert str(Path.home()) not in said


def test_what_a_manifest_does_not_say_is_not_made_up() -> None:
    said = statement("Scores of", {"kind": "scores"})
    assert said.count("not recorded") == 4  # model, texts, versions, seed
    model = {"name": "/home/me/a model\x1b[31m", "dtype": "float32"}
    text: dict[str, object] = {"source": "text", "n_tokens": None, "settings": {}}
    said = statement("Scores of", {"model": model, "calibration": text, "packages": {}})
    for fact in ("digest not recorded", "device not recorded", "tokens not recorded",
                 "torch not recorded", "entangle not recorded", "seed is not recorded",
                 "special tokens: unknown"):  # fmt: skip
        assert fact in said
    assert "/home" not in said
    assert "\x1b" not in said
    command = {"command": "entangle score /home/me/model --seed 3"}
    assert "`entangle score model --seed 3`" in statement("Scores of", command)


def test_scores_are_summed_up_by_layer(made: Mapping[str, Path]) -> None:
    scores = entangle.load_scores(made["scores"])
    scores.frame.loc[0, "wd"] = float("nan")
    table = scores.summary().set_index("layer")
    assert list(table.index) == scores.layers["layer"].tolist()
    for layer, rows in scores.frame.groupby("layer"):
        kept = rows[rows["wd"].notna()]
        assert table.loc[str(layer), "wd_median"] == np.median(kept["wd"])
        assert table.loc[str(layer), "largest"] == kept["neuron"].iloc[int(np.argmax(kept["wd"]))]
        assert table.loc[str(layer), "unscored"] == len(rows) - len(kept)
    text = scores.to_latex()
    assert r"wd median ($\sigma$)" in text
    assert text.count(r"\\") == 1 + len(table)


def test_a_folder_of_another_kind(kind: str, result: Result, made: Mapping[str, Path]) -> None:
    other = "ablation" if kind == "scores" else "scores"
    said = "allocate`" if kind == "allocation" else f"{kind!r}; got {other!r}"
    with pytest.raises(InvalidInput, match=said):
        type(result).load(made[other])


def test_what_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"kind": "novel", "schema_version": 1}')
    with pytest.raises(UnknownName, match="'novel'"):
        entangle.load_result(tmp_path)
    with pytest.raises(InvalidInput, match="no result"):
        entangle.load_result(tmp_path / "missing")


def test_the_report_of_an_expansion(made: Mapping[str, Path], tmp_path: Path) -> None:
    found = ExpansionReport.load(made["expansion"])
    assert found.costs == found.manifest["costs"]
    assert found.perplexity is None
    assert found.run["seconds"]
    assert [len(found.plot(value).axes) for value in (None, "sparsity", "experts")] == [2, 1, 1]
    folder = without_digests(found.save(tmp_path / "x"))
    (folder / "run.json").unlink()
    assert ExpansionReport.load(folder).run == {}
    layers = found.layers.drop(columns=["router", "router_flops", "damping"])
    layers.to_parquet(folder / "layers.parquet")
    pd.testing.assert_frame_equal(ExpansionReport.load(folder).layers, layers)
    for flag in ("nan", "infinite"):
        manifest = {"perplexity": None, "perplexity_flag": flag}
        told = ExpansionReport(layers, manifest)._repr_html_()
        assert f"perplexity {'–' if flag == 'nan' else '∞'}" in told


def test_an_allocation_without_torch_is_the_same(made: Mapping[str, Path], tmp_path: Path) -> None:
    light, whole = (
        load(made["allocation"]) for load in (AllocationReport.load, entangle.load_allocation)
    )
    for name in ("layers", "neurons"):
        pd.testing.assert_frame_equal(getattr(light, name), getattr(whole, name))
    same = light.save(tmp_path / "a.safetensors"), whole.save(tmp_path / "b.safetensors")
    assert {path.read_bytes() for path in same} == {made["allocation"].read_bytes()}


def test_latex_by_hand() -> None:
    frame = pd.DataFrame(
        {
            "layer": ["a_b & \\c", "100 %"],
            "wd": [0.123456, float("nan")],
            "sparsity": [0.5, 0.25],
            "ratio": [12345.6, -2e-7],
            "ratio_low": [1.0, float("nan")],
            "ratio_high": [float("inf"), float("nan")],
            "value": [1.5, 2.5],
            "low": [1.0, 2.0],
            "high": [2.0, 3.0],
            "seeds": pd.array([3, None], dtype="Int64"),
        }
    )
    assert latex_table(frame).splitlines() == [
        r"\begin{table}", r"\centering", r"\begin{tabular}{lrrrrr}", r"\toprule",
        r"layer & wd ($\sigma$) & sparsity (\%) & ratio & value & seeds \\", r"\midrule",
        r"a\_b \& \textbackslash{}c & 0.1235 & 50 & $1.235 \times 10^{4}$ [1, $\infty$] & "
        r"1.5 [1, 2] & 3 \\",
        r"100 \% & -- & 25 & $-2 \times 10^{-7}$ & 2.5 [2, 3] & -- \\",
        r"\bottomrule", r"\end{tabular}", r"\end{table}",
    ]  # fmt: skip
