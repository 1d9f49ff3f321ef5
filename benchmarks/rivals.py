"""Every training-free method in one table: ``python -m benchmarks.rivals FOLDER``.

Three tables on one model, calibration set and text: methods over the linears of feed-forward parts
(``mlp``, which Sparse Expansion touches), over all linears of the blocks (``all``), and with the
first 256 tokens of every window dense and not scored (``prefix``). Each method is a comparison of
its own in ``FOLDER/TABLE/METHOD``, kept arm by arm: the same command goes on where it ended, and
``FOLDER/TABLE.comparison`` (for `entangle show`), its figure and its CSVs are made anew after every
method. Cheap methods come first; ``--seconds`` lets none begin later than that.

``--small`` is for two cores: 8 sequences of 512 tokens to calibrate on, 8 windows of 256 tokens, 4
experts, without the searches of levels; what masks activations of one table is one comparison. No
method begins after 800 s; the same command goes on.

Special tokens are those of the model (BOS of Gemma's).
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from entangle.activation import ACTIVATION_METHODS
from entangle.allocation.allocate import allocate
from entangle.errors import EntangleError
from entangle.evaluation import load_evaluation
from entangle.experiments.compare import compare, known_methods
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel, load_model
from entangle.plotting import figure_density, save_figure
from entangle.results.comparison import DENSE, Comparison, flops_saved
from entangle.results.drawings import text_of
from entangle.runs.tables import latex_table
from entangle.texts.calibration import load_calibration

QUICK = ("teal", "column-norm", "cats", "chess", "wina", "magnitude", "magnitude-global")
"""A pass over the calibration text, or none."""
SOLVED = ("larosa", "rsparse", "cett", "wanda", "sparsegpt", "dsnot:wanda")
"""Decompositions, or a solve for every layer and density."""
SLOW = (
    "teal:wanda", "teal:sparsegpt", "dsnot:magnitude", "dsnot:sparsegpt", "sparsegpt+erk",
    "expansion", "teal:expansion", "expansion-random", "teal-greedy", "wina-greedy",
)  # fmt: skip
"""A solve for every expert, or a search."""
METHODS = {
    "mlp": (*QUICK, *SOLVED, *SLOW),
    "all": (
        "teal", "column-norm", "chess", "chess+", "cats", "wina", "larosa", "rsparse",
        "teal-greedy", "wina-greedy",
    ),
    "prefix": (
        "griffin", "coreinfer", "teal", "column-norm", "cats", "chess", "wanda", "sparsegpt",
        "expansion",
    ),
}  # fmt: skip
"""What every table has, in the order of the run; after a plus a rule of allocation."""
WINDOW_PREFIX = 256
_TURNED = ("wina", "larosa", "rsparse")
SMALL: dict[str, Any] = {
    "n_seq": 8, "seq_len": 512, "eval_windows": 8, "eval_seq_len": 256, "experts": 4, "prefix": 128,
    "tables": "prefix,mlp", "seconds": 800.0,
    "chosen": {
        "prefix": ("griffin", "coreinfer", "teal", "cats", "chess"),
        "mlp": (
            *QUICK[:4], *_TURNED, "magnitude", "wanda", "sparsegpt", "teal:sparsegpt", "expansion",
            "teal:expansion", "dsnot:wanda", "cett", "magnitude-global", "sparsegpt+erk",
            "expansion-random", "teal:wanda", "dsnot:magnitude", "dsnot:sparsegpt",
        ),
        "all": ("teal", "column-norm", "chess+", *_TURNED),
    },
}  # fmt: skip
"""What is other with ``--small``."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and print and draw what there is."""
    parser, started = _parser(), time.perf_counter()
    if parser.parse_args(argv).small:
        parser.set_defaults(**SMALL)
    given = parser.parse_args(argv)
    model = load_model(given.model, device=given.device)
    texts: dict[str, Any] = {"context_length": model.context_length, "vocab_size": model.vocab_size}
    of_demo: dict[str, Any] = {"split": "train"} if given.calibration == "demo" else {}
    settings: dict[str, Any] = {
        "calibration": load_calibration(
            given.calibration, model.tokenizer, n_seq=given.n_seq, seq_len=given.seq_len,
            **of_demo, **texts,
        ),
        "evaluation": load_evaluation(
            given.evaluation, model.tokenizer, seq_len=given.eval_seq_len,
            n_windows=given.eval_windows, **texts,
        ),
        "density": [float(one) for one in given.density.split(",")], "experts": given.experts,
    }  # fmt: skip
    for table in given.tables.split(","):
        done: list[Comparison] = []
        listed = given.methods.split(",") if given.methods else given.chosen[table]
        for method in _groups(listed) if given.small else [(one,) for one in listed]:
            late = time.perf_counter() - started > given.seconds
            folder = given.folder / table / "+".join(method).replace(":", "-")
            unknown = {_parts(one)[0] for one in method}.difference(known_methods())
            if (late and not folder.is_dir()) or unknown:
                print(f"{table} {method}: {'no time left' if late else 'unknown'}", flush=True)
                continue
            clock = time.perf_counter()
            try:
                done.append(_measure(model, method, table, folder, given.prefix, settings))
            except EntangleError as error:
                print(f"{table} {method}: {error}", flush=True)
                continue
            print(f"{table} {', '.join(method)}: {time.perf_counter() - clock:.1f} s", flush=True)
            _write(_merged(done), given.folder / table)
        if done:
            _print(_merged(done), table)
    print(f"{time.perf_counter() - started:.0f} s in all")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--calibration", default="demo")
    parser.add_argument("--evaluation", default="demo")
    parser.add_argument("--n-seq", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--eval-windows", type=int, default=40)
    parser.add_argument("--eval-seq-len", type=int, default=2048)
    parser.add_argument("--density", default="0.25,0.5,0.6,0.75")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=WINDOW_PREFIX)
    parser.add_argument("--tables", default="mlp,all,prefix")
    parser.add_argument("--methods", default="", help="in place of the tables' own")
    parser.add_argument("--small", action="store_true", help="for two cores")
    parser.set_defaults(chosen=METHODS)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    return parser


def _groups(methods: Sequence[str]) -> list[tuple[str, ...]]:
    """Return methods that mask activations together, which measure the dense model once."""
    masked = tuple(one for one in methods if one in ACTIVATION_METHODS)
    alone: list[tuple[str, ...]] = [(one,) for one in methods if one not in masked]
    return [masked, *alone] if masked else alone


def _parts(method: str) -> tuple[str, str]:
    """Return a method and its rule of allocation, which may be empty."""
    for rule in ("magnitude-global", "erk"):
        if method.endswith(f"+{rule}"):
            return method.removesuffix(f"+{rule}"), rule
    return method, ""


def _measure(
    model: LanguageModel, methods: Sequence[str], table: str, folder: Path, prefix: int,
    settings: dict[str, Any],
) -> Comparison:  # fmt: skip
    """Return the comparison of some methods, read where it is finished."""
    names, rule = [_parts(one)[0] for one in methods], _parts(methods[0])[1]
    made = [(rule, one) for one in _allocations(model, rule, settings["density"])] if rule else []
    folder.parent.mkdir(parents=True, exist_ok=True)
    return compare(
        model, methods=names, allocations=made, scope="all" if table == "all" else "mlp",
        prefix=prefix if table == "prefix" else 0, out=folder, resume=True,
        progress=False, **settings,
    )  # fmt: skip


def _allocations(model: LanguageModel, rule: str, densities: Sequence[float]) -> Iterator[Any]:
    """Return allocations of a rule that needs the weights alone."""
    layers = find_layers(model.module, "all", "mlp")
    rows = [pd.DataFrame({"layer": x.name, "neuron": range(x.out_features)}) for x in layers]
    for density in densities:
        yield allocate(pd.concat(rows), sparsity=1 - density, rule=rule, model=model)


def _merged(found: Sequence[Comparison]) -> Comparison:
    """Return comparisons of the same text as one, each arm once."""
    key = ["method", "sparsity", "experts", "allocation"]
    frame = pd.concat([one.frame for one in found], ignore_index=True).drop_duplicates(key)
    windows = pd.concat([one.windows for one in found], ignore_index=True)
    windows = windows.drop_duplicates(["window", *key], ignore_index=True)
    return replace(found[0], frame=frame.reset_index(drop=True), windows=windows)


def _write(found: Comparison, stem: Path) -> None:
    """Save a table's comparison, its CSVs and its figure beside the methods' folders."""
    found.save(stem.with_suffix(".comparison"), force=True)
    found.frame.to_csv(stem.with_suffix(".csv"), index=False)
    shown = ["method", "allocation", "experts", "density", "perplexity", "ratio", "ratio_low"]
    table = found.frame[[*shown, "ratio_high", "flops", "token_bytes", "nonzeros"]]
    Path(f"{stem}_table.tex").write_text(latex_table(table), encoding="utf-8")
    flops_saved(found).to_csv(f"{stem}_flops_saved.csv", index=False)
    try:
        figure = figure_density(found.frame, text=text_of(found.manifest), column="double")
        save_figure(figure, stem, formats="png", force=True)
    except EntangleError as error:
        print(f"no figure: {error}", file=sys.stderr)


def _print(found: Comparison, table: str) -> None:
    """Print perplexity at the density measured, and the FLOPs saved."""
    frame = found.frame[found.frame["method"] != DENSE]
    name = frame["method"].where(
        frame["allocation"] == "uniform", frame["method"] + " " + frame["allocation"]
    )
    cell = [
        f"{p:.3f} ({d:.3f})" for p, d in zip(frame["perplexity"], frame["density"], strict=True)
    ]
    rows = pd.DataFrame({"method": name, "asked": (1 - frame["sparsity"]).round(4), "cell": cell})
    dense = float(found.frame.loc[found.frame["method"] == DENSE, "perplexity"].iloc[0])
    print(f"\n{table}: perplexity (measured density in scope); dense {dense:.3f}")
    print(rows.pivot(index="method", columns="asked", values="cell").to_string())
    saved = flops_saved(found)
    saved["label"] = [
        f"{'' if r.reached else '>='}{r.saved:.3f} [{r.low:.3f}, {r.high:.3f}]"
        for r in saved.itertuples()
    ]
    saved["name"] = saved["method"] + saved["allocation"].where(
        saved["allocation"] != "uniform", ""
    )
    print("\nFLOPs of the whole model saved at a higher perplexity")
    print(saved.pivot(index="name", columns="increase", values="label").to_string(), flush=True)


if __name__ == "__main__":
    main()
