"""`entangle allocate`, and the commands that take what it writes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from entangle.allocation import FORMATS, RULES, import_allocation, load_allocation
from entangle.allocation.allocation import even
from entangle.cli.main import main
from entangle.experiments.compare import load_comparison
from entangle.experts.checkpoint import load_expanded
from entangle.results.ablation import load_ablation
from entangle.runs.sealing import manifest_digest
from tests.cli.expansions import check_one_line, experts_of, listing
from tests.cli.runs import Run

pytestmark = pytest.mark.usefixtures("scored")

TEXT = ("--calibration", "text.txt", "--n-seq", 6, "--seq-len", 32, "--device", "cpu", "--quiet")
EVALUATE = ("--eval-seq-len", 64, "--eval-windows", 4)
ALLOCATE = ("allocate", "scores", "--sparsity", 0.7, "--device", "cpu", "--quiet")
LAYERS = [
    f"model.layers.{block}.mlp.{name}"
    for block in range(3)
    for name in ("gate_proj", "up_proj", "down_proj")
]
WEIGHTS = 9 * 32 * 48


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Callable[[str], Path],
    text_file: Path,
) -> Path:
    """A folder with the model's scores, ``scores``, and two allocations."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(tiny_folder("llama"), "model")
        shutil.copy(text_file, "text.txt")
        score = ("score", "model", "--proj", "mlp", "--no-md", "--out", "scores", *TEXT)
        allocate = (*ALLOCATE, "--protect", 0.1, "--out", "a.safetensors")
        shared = (*ALLOCATE, "--experts", 2, "--out", "shared.safetensors")
        for command in (score, allocate, shared):
            assert main([str(part) for part in command]) == 0
    return folder


@pytest.fixture
def scored(place: Path, made: Path) -> Path:
    """The current folder, with scores of the model's MLP in ``scores``."""
    shutil.copytree(made / "scores", "scores")
    return place


@pytest.fixture
def allocated(scored: Path, made: Path) -> Path:
    """The same, with an allocation in ``a.safetensors``, one with experts of its own beside it."""
    shutil.copy(made / "a.safetensors", "a.safetensors")
    shutil.copy(made / "shared.safetensors", "shared.safetensors")
    return scored


def zeros_of(folder: str) -> dict[str, torch.Tensor]:
    """Return the zeros of every row, (experts, rows), of every layer of an expansion."""
    experts = experts_of(load_expanded(folder, device="cpu"))
    return {name: (weight == 0).sum(2) for name, weight in experts.items()}


def test_the_tables_and_the_file(run: Run) -> None:
    status, out, err = run(*ALLOCATE, "--rule", "linear", "--out", "a.safetensors")
    assert (status, err) == (0, "")
    allocation = load_allocation("a.safetensors")
    rows = [line.split() for line in out.splitlines() if line.strip()]
    assert rows[1] == ["layer", "block", "projection", "rows", "zeros", "sparsity", "lowest",
                       "highest"]  # fmt: skip
    for row, (_, layer) in zip(rows[3:12], allocation.layers.iterrows(), strict=True):
        assert row[0] == layer["layer"]
        assert row[3:5] == [str(layer["rows"]), f"{layer['zeros']:,}"]
        numbers = [f"{layer[name]:.4f}" for name in ("sparsity", "lowest", "highest")]
        assert row[5:] == numbers
    budget = round(0.7 * WEIGHTS)
    assert rows[15] == ["9", "384", f"{budget:,}", f"{WEIGHTS:,}", "0.7000"]
    assert rows[16] == ["Saved", "to", "a.safetensors."]
    assert allocation.n_zeros == budget
    assert list(allocation.zeros) == LAYERS


def test_json_exports_and_figure(run: Run) -> None:
    exports = [("--export", f"{name}:out/x{ending}") for name, ending in FORMATS.items()]
    options = [part for export in exports for part in export]
    status, out, err = run(
        *ALLOCATE, "--out", "out/a.safetensors", *options[:-2], "--export",
        "safetensors:out/rows.safetensors", "--plot", "out/figure.png", "--json",
    )  # fmt: skip
    assert (status, err) == (0, "")
    content = json.loads(out)
    assert content["out"] == "out/a.safetensors"
    assert content["overall"] == round(0.7 * WEIGHTS) / WEIGHTS
    assert [row["layer"] for row in content["layers"]] == LAYERS
    assert content["manifest"]["settings"]["rule"] == "protect"
    assert content["figures"] == [
        f"out/figure.{ending}" for ending in ("pdf", "png", "tex", "txt", "csv")
    ]
    assert all(Path(path).stat().st_size for path in content["figures"])
    assert "sparsity of single rows" in content["exports"]["out/x.yaml"][0]
    allocation = load_allocation("out/a.safetensors")
    for name, path in (("csv", "out/x.csv"), ("safetensors", "out/rows.safetensors")):
        found = import_allocation(path, name)
        assert all(torch.equal(found.zeros[n], zeros) for n, zeros in allocation.zeros.items())


def test_the_figure_names_the_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []

    def keep(figure: Figure, *_given: object, **_options: object) -> list[Path]:
        drawn.append(figure)
        return []

    monkeypatch.setattr("entangle.plotting.save_figure", keep)
    assert run(*ALLOCATE, "--out", "a.safetensors", "--plot", "figure").status == 0
    digest = manifest_digest(load_allocation("a.safetensors").manifest)
    assert f"run {digest[:12]}" in [text.get_text() for text in drawn[0].texts]


def test_what_a_pattern_leaves_over_is_told(run: Run) -> None:
    status, out, err = run(*ALLOCATE, "--rule", "linear", "--pattern", "n:4")
    assert (status, err) == (0, "")
    assert "+1 zeros to the budget, which the pattern leaves over." in out
    assert "budget" not in run(*ALLOCATE, "--rule", "linear").out


def test_the_model_is_the_one_that_was_scored(run: Run) -> None:
    Path("model").rename("moved")
    check_one_line(run(*ALLOCATE), "'model'")
    assert run(*ALLOCATE, "--model", "moved").status == 0


def test_the_help_names_every_rule(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # argparse breaks lines at hyphens
    words = set(run("allocate", "--help").out.replace(",", " ").split())
    assert {*RULES, "search"} <= words


def test_layers_can_be_chosen(run: Run) -> None:
    status, out, _ = run(*ALLOCATE, "--layer", 1, "--proj", "up_proj", "--json")
    assert status == 0
    assert [row["layer"] for row in json.loads(out)["layers"]] == [LAYERS[4]]


def test_a_rule_that_measures(run: Run) -> None:
    status, out, err = run(*ALLOCATE[:4], "--rule", "owl", *TEXT, "--json")
    assert (status, err) == (0, "")
    assert len({row["sparsity"] for row in json.loads(out)["layers"]}) > 1


def test_a_search(run: Run) -> None:
    search = ("--rule", "search", "--tune", "rank", "--evaluations", 3, *TEXT)
    status, out, err = run(*ALLOCATE[:4], *search, "--out", "a.safetensors")
    assert (status, err) == (0, "")
    told: Any = load_allocation("a.safetensors").manifest["search"]
    assert told["held_out"]["n_windows"] == 2
    title = f"Held-out perplexity by strength of rule rank (3 candidates, {told['seconds']:.0f} s)"
    assert title in out
    assert len(told["tried"]) == 3


def test_experts_are_shared_out(run: Run) -> None:
    status, out, err = run(*ALLOCATE, "--experts", 3, "--entangled", 0.2, "--json")
    assert (status, err) == (0, "")
    rows = {row["layer"]: row for row in json.loads(out)["layers"]}
    numbers = {name: row["experts"] for name, row in rows.items()}
    assert all(numbers[LAYERS[3 * b]] == numbers[LAYERS[3 * b + 1]] for b in range(3))
    kept = {name: row["rows"] * row["in_features"] - row["zeros"] for name, row in rows.items()}
    assert sum(numbers[n] * kept[n] for n in LAYERS) <= 3 * sum(kept.values())
    assert len(set(numbers.values())) > 1


@pytest.mark.parametrize("experts", [False, True])
def test_an_expansion_is_built_from_it(run: Run, allocated: Path, experts: bool) -> None:
    if experts:
        extra = ("--protect", 0.1, "--out", "a.safetensors", "--force")
        assert run(*ALLOCATE, *extra, "--experts", 3, "--entangled", 0.2).status == 0
    allocation = load_allocation("a.safetensors")
    own = () if experts else ("--experts", 2)
    status, out, err = run(
        "expand", "model", *TEXT, *own, "--allocation", "a.safetensors", "--out", "x",
        "--evaluation", "text.txt", *EVALUATE,
    )  # fmt: skip
    assert (status, err) == (0, "")
    found = zeros_of("x")
    assert list(found) == LAYERS
    for name, zeros in found.items():
        assert torch.equal(zeros, allocation.zeros[name].expand(len(zeros), -1))
        assert len(zeros) == (2 if allocation.experts is None else allocation.experts[name])
    assert "plain pruning (k = 1)" in out
    numbers = sorted({len(zeros) for zeros in found.values()})
    k = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    assert f"expansion (k = {k})" in out
    assert (len(numbers) > 1) == experts
    assert (
        run("evaluate", "x", "--evaluation", "text.txt", "--eval-seq-len", 64, "--quiet").status
        == 0
    )


def test_what_prunes_by_a_pattern_needs_no_option_for_it(run: Run, scored: Path) -> None:
    assert (
        run(*ALLOCATE, "--rule", "linear", "--pattern", "n:8", "--out", "n.safetensors").status == 0
    )
    allocation = load_allocation("n.safetensors")
    given = ("--allocation", "n.safetensors", "--out")
    assert run("expand", "model", *TEXT, "--experts", 2, *given, "x").status == 0
    for name, weight in experts_of(load_expanded("x", device="cpu")).items():
        groups = (weight == 0).unflatten(2, (-1, 8)).sum(3)
        each = allocation.zeros[name] // groups.shape[2]
        assert torch.equal(groups, each[:, None].expand_as(groups))
    data = ("--evaluation", "text.txt", *EVALUATE)
    arms = ("--methods", "magnitude", *data)
    assert run("compare", "model", *TEXT, *arms, *given, "c").status == 0
    prune = ("--intervention", "prune-magnitude", "--scores", "scores", *data)
    assert run("ablate", "model", *TEXT, *prune, *given, "r").status == 0
    compared = load_comparison("c").frame["perplexity"]
    ablated = load_ablation("r").frame.query("measure == 'perplexity'")["value"]
    assert ablated.tolist() == pytest.approx(compared.tolist(), rel=1e-5)  # dense, even, allocated


def test_a_comparison_has_every_allocation_beside_uniform(run: Run, allocated: Path) -> None:
    """The uniform arm is the allocation's own zeros spread evenly, so that it costs what b does."""
    even(load_allocation("a.safetensors")).save("b.safetensors")
    status, out, err = run(
        "compare", "model", *TEXT, "--methods", "magnitude", "--evaluation", "text.txt", *EVALUATE,
        "--allocation", "b.safetensors,top=a.safetensors", "--out", "c",
    )  # fmt: skip
    assert (status, err) == (0, "")
    found = load_comparison("c")
    keys = found.frame[["method", "sparsity", "allocation"]].to_numpy().tolist()
    assert keys == [["dense", 0.0, "uniform"]] + [
        ["magnitude", 0.7, name] for name in ("uniform", "b", "top")
    ]
    assert found.frame["nonzeros"].nunique() == 2  # dense, and all others alike
    _, uniform, b, top = found.frame["perplexity"]
    assert b == uniform != top
    assert found.frame["uniform_ratio"].tolist()[2:] == [1.0, pytest.approx(top / uniform)]
    assert Path("c/figures/perplexity.png").exists()
    assert "uniform_ratio" in out
    manifest = json.loads(Path("c/manifest.json").read_text())
    rules = [one["settings"]["rule"] for one in manifest["settings"]["allocations"]]
    assert rules == ["uniform", "protect"]


def test_an_ablation_by_allocation(run: Run, allocated: Path) -> None:
    status, out, err = run(
        "ablate", "model", *TEXT, "--scores", "scores", "--allocation", "a.safetensors",
        "--evaluation", "text.txt", *EVALUATE, "--out", "r",
    )  # fmt: skip
    assert (status, err) == (0, "")
    frame = load_ablation("r").frame
    assert frame["selection"].unique().tolist() == ["dense", "all", "allocation"]
    assert frame["by"].unique().tolist() == ["", "protect wd"]
    assert "Perplexity after the allocation ÷ after the others" in out
    assert pd.read_parquet("r/selections.parquet")["selection"].value_counts().to_dict() == {
        "all": 384, "allocation": 384,
    }  # fmt: skip


MISTAKES = {
    "--rule protest": "unknown allocation rule 'protest' protect",
    "--by dw": "unknown column 'dw'",
    "--sparsity 1.5": "`sparsity` [0, 1] 1.5",
    "--highest 0.6": "0.6",
    "--tune uniform --rule search": "rule 'uniform' spread tune",
    "--export yaml:x.yaml": "unknown format 'yaml'",
    "--export llmcompressor:x.yml": ".yaml 'x.yml'",
    "--export recipe.yaml": "--export llmcompressor:recipe.yaml 'recipe.yaml'",
    "--export csv:x.csv --export csv:x.csv": "'x.csv' twice",
    "--export safetensors:a.safetensors": "'a.safetensors' twice",
    "--out a.npz": ".safetensors 'a.npz'",
    "--out scores": ".safetensors 'scores'",
    "--plot figure": "'figure.png' exists --plot --force",
    "--out ./a.safetensors --export safetensors:a.safetensors": "a.safetensors' twice",
    "--plot out/x --export csv:out/x.csv": "'out/x.csv' twice",
    "--tune rank": "--tune meaning without --rule",
    "--evaluations 3 --rule rank": "--evaluations meaning without --rule",
    "--protect-sparsity 0.1 --rule rank": "--protect-sparsity meaning without rule",
    "--protect 0.1 --rule search": "--protect meaning without rule",
    "--entangled 0.1": "--entangled meaning without --experts",
    "--spread 0.1": "rule 'protect' spread (got 0.1)",
    "--spread 0.1 --rule search": "`spread` rule 'linear'",
    "--protect 0.1 --rule search --tune protect": "`protect` rule 'protect'",
    "--memory lots": "size 512M 2G 'lots'",
    "--layer 7": "index 0..2",
    "--experts 0": "`experts` integer 1 0",
    "--model elsewhere": "elsewhere",
}


@pytest.mark.parametrize("case", MISTAKES)
def test_one_clear_line(run: Run, case: str) -> None:
    Path("figure.png").touch()
    before = listing()
    options = case.split()
    if "--out" not in options:
        options += ["--out", "a.safetensors"]
    text = TEXT[:6] if "search" in options else ()
    check_one_line(run(*ALLOCATE, *text, *options), MISTAKES[case])
    assert listing() == before


def test_what_exists_is_not_replaced(run: Run, allocated: Path) -> None:
    before = Path("a.safetensors").read_bytes()
    check_one_line(run(*ALLOCATE, "--out", "a.safetensors"), "'a.safetensors' exists")
    assert Path("a.safetensors").read_bytes() == before


CONSUMERS = {
    "expand --allocation a.safetensors --sparsity 0.5": "--sparsity --allocation",
    "expand --allocation a.safetensors,a.safetensors": "--allocation one",
    "expand --allocation a.safetensors --allocation a.safetensors": "'a.safetensors,a.safetensors'",
    "expand --allocation nowhere.safetensors": "'nowhere.safetensors' file",
    "expand --allocation text.txt": "'text.txt' read",
    "expand --allocation a.safetensors --proj up_proj": "allocation's budget",
    "expand --allocation a.safetensors --pattern 2:4": "needs `pattern` 'row' '2:4'",
    "compare --evaluation text.txt --allocation a.safetensors,a.safetensors": "called 'a'",
    "compare --evaluation text.txt --allocation uniform=a.safetensors": "called 'uniform'",
    "ablate --evaluation text.txt --allocation a.safetensors --select top": "--select meaning",
    "ablate --evaluation text.txt --allocation a.safetensors --strength 0.5": "--strength meaning",
    "ablate --evaluation text.txt --allocation a.safetensors --experts 4": "`experts` 1 [4]",
    "expand --allocation shared.safetensors --experts 4": "--experts 4 meaning",
}


@pytest.mark.parametrize("case", CONSUMERS)
def test_consumers_refuse_what_does_not_fit(run: Run, allocated: Path, case: str) -> None:
    command, *options = case.split()
    before = listing()
    check_one_line(run(command, "model", *TEXT, *options, "--out", "y"), CONSUMERS[case])
    assert listing() == before
