"""Perplexity and bytes of sparse models beside dense ones: what the same bytes are worth.

``python -m benchmarks.quality --evaluation TEXT [options]`` prunes the MLP linears of a model to n
of 16 weights, and to as many in every row wherever they cost least, as one expert and as several,
with plain, int8 and int4 values (groups of 128 columns, rounded in the solve), and prints one table
beside the dense model in bfloat16, int8 and int4 (rounded to nearest, and by the solve). Bytes are
those of the MLP linears as `entangle.packed.formats` packs them, routers included; of dense codes,
the codes and their grid. ``*`` marks rows that no other row beats in bytes and perplexity at once.

``--rows FILE`` keeps finished rows, one JSON object a line, and goes on where a run of the same
options was ended.
"""

import argparse
import json
import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import entangle
from entangle.cli.tables import print_table
from entangle.evaluation import EvaluationText, perplexity
from entangle.experts.codes import codes_of
from entangle.experts.expand import Expansion, expand
from entangle.experts.linear import ExpandedLinear
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel, load_model
from entangle.packed.formats import GROUP, pack
from entangle.texts.calibration_set import CalibrationSet

LEVELS = (8, 5, 4, 3, 2)
"""Weights kept of 16: 50, 68.75, 75, 81.25 and 87.5 % zeros."""
VALUES = {"plain": None, "int8": 8, "int4": 4}
"""Bits of the values; None keeps the model's own dtype."""
FORMATS = {
    "zeros": ".2%", "perplexity": ".3f", "times dense": ".3f", "MiB": ".2f", "of dense": ".3f",
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One model to build."""

    model: str
    """``dense``, ``dense, nearest``, ``dense, solved``, ``n:16`` or ``row``."""
    k: int = 1
    kept: int = 16
    """Weights of 16."""
    values: str = "plain"
    """One of `VALUES`."""

    @property
    def settings(self) -> dict[str, Any]:
        """Of `entangle.expand`."""
        bits = VALUES[self.values]
        shared = {"bits": bits, "group_size": None if bits is None else GROUP}
        if self.model.startswith("dense"):
            pruner = "magnitude" if self.model.endswith("nearest") else "sparsegpt"
            return {"sparsity": 0.0, "pruner": pruner, **shared}
        if self.model == "n:16":
            return {"sparsity": None, "pattern": f"{self.kept}:16", **shared}
        return {"sparsity": 1 - self.kept / 16, **shared}


def arms(levels: list[int], experts: list[int], values: list[str]) -> Iterator[Arm]:
    """Yield every model of the table in its order."""
    yield Arm("dense")
    for name in values:
        if VALUES[name] is not None:
            yield Arm("dense, nearest", values=name)
            yield Arm("dense, solved", values=name)
    for kept in levels:
        for k in experts:
            for name in values:
                yield Arm("n:16", k, kept, name)
                yield Arm("row", k, kept, name)


def measured(
    arm: Arm, model: LanguageModel, calibration: CalibrationSet, text: EvaluationText, seed: int
) -> dict[str, object]:
    """Return a row of the table."""
    layers = find_layers(model.module, "all", "mlp")
    if arm == Arm("dense"):
        value, size = perplexity(model, text).value, sum(one.weight.nbytes for one in layers)
    else:
        found = expand(
            model, calibration, experts=arm.k, evaluation=text, seed=seed, **arm.settings
        )
        assert found.perplexity is not None
        value = found.perplexity.value
        size = dense_bytes(arm, model) if arm.kept == 16 else packed_bytes(arm, model, found)
    return {**asdict(arm), "perplexity": value, "bytes": size}


def dense_bytes(arm: Arm, model: LanguageModel) -> int:
    """Return the bytes of dense codes, and of a scale a row and a step a group."""
    shapes = [layer.shape for layer in find_layers(model.module, "all", "mlp")]
    bits = VALUES[arm.values] or 0
    return sum(
        rows * (math.ceil(cols * bits / 8) + 4 + math.ceil(cols / GROUP)) for rows, cols in shapes
    )


def packed_bytes(arm: Arm, model: LanguageModel, found: Expansion) -> int:
    """Return the bytes of all packed experts and of their routers."""
    assert found.model is not None
    dense = {layer.name: layer.weight for layer in find_layers(model.module, "all", "mlp")}
    form, bits = "n16" if arm.model == "n:16" else "bitmap", VALUES[arm.values]
    routers = found.layers.drop_duplicates(["block", "router"])
    total = int(routers["router_bytes"].sum())
    for name, module in found.model.module.named_modules():
        if isinstance(module, ExpandedLinear):
            weight = module.weight.detach()
            codes = None if bits is None else codes_of(dense[name].expand_as(weight), bits, GROUP)
            kept = arm.kept if form == "n16" else None
            _, tensors = pack(weight, form, codes=codes, kept=kept)
            total += sum(tensor.nbytes for tensor in tensors.values())
    return total


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows as they are printed."""
    dense = rows[0]
    return [
        {
            "model": row["model"] if row["model"] != "n:16" else f"{row['kept']}:16",
            "k": row["k"],
            "zeros": 1 - row["kept"] / 16,
            "values": row["values"],
            "perplexity": row["perplexity"],
            "times dense": row["perplexity"] / dense["perplexity"],
            "MiB": row["bytes"] / 2**20,
            "of dense": row["bytes"] / dense["bytes"],
            "best": "" if any(_beats(other, row) for other in rows) else "*",
        }
        for row in rows
    ]


def _beats(other: dict[str, Any], row: dict[str, Any]) -> bool:
    """Tell whether one is at least as good in both, and better in one."""
    pairs = [(other[name], row[name]) for name in ("bytes", "perplexity")]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__)
    add = parser.add_argument
    add("--evaluation", required=True, help="text to evaluate on: a path or a name")
    add("--model", default="demo", help="demo, or a local folder or .gguf file")
    add("--calibration", default="demo", help="text to prune on: a path or demo")
    add("--device", default="auto")
    add("--dtype", default="bfloat16", help="of the model, and of plain values")
    add("--experts", default="1,16")
    add("--levels", default=",".join(map(str, LEVELS)), help="weights kept of 16")
    add("--values", default=",".join(VALUES), help="plain, int8, int4")
    add("--n-seq", type=int, default=128)
    add("--seq-len", type=int, default=2048)
    add("--eval-seq-len", type=int, default=2048)
    add("--eval-windows", type=int)
    add("--seed", type=int, default=0)
    add("--rows", type=Path, help="file of finished rows, to go on with")
    return parser.parse_args()


SAME = (
    "model", "dtype", "calibration", "evaluation", "n_seq", "seq_len", "eval_seq_len",
    "eval_windows", "seed",
)  # fmt: skip
"""Options that a row depends on."""


def _finished(given: argparse.Namespace) -> dict[Arm, dict[str, Any]]:
    if given.rows is None or not given.rows.exists():
        return {}
    rows = [json.loads(line) for line in given.rows.read_text(encoding="utf-8").splitlines()]
    return {
        Arm(row["model"], row["k"], row["kept"], row["values"]): row
        for row in rows
        if row["options"] == _same(given)
    }


def _same(given: argparse.Namespace) -> dict[str, object]:
    return {name: getattr(given, name) for name in SAME}


def main() -> None:
    """Measure what is asked for and print the table."""
    import pandas as pd

    given = _options()
    model = load_model(given.model, dtype=given.dtype, device=given.device)
    sizes: dict[str, Any] = {"context_length": model.context_length, "vocab_size": model.vocab_size}
    calibration = entangle.load_calibration(
        given.calibration, model.tokenizer, n_seq=given.n_seq, seq_len=given.seq_len,
        seed=given.seed, split="train" if given.calibration == "demo" else None, **sizes,
    )  # fmt: skip
    text = entangle.load_evaluation(
        given.evaluation, model.tokenizer, seq_len=given.eval_seq_len,
        n_windows=given.eval_windows, **sizes,
    )  # fmt: skip
    levels, experts = (
        [int(one) for one in part.split(",")] for part in (given.levels, given.experts)
    )
    done = _finished(given)
    rows = []
    for arm in arms(levels, experts, given.values.split(",")):
        row = done.get(arm) or measured(arm, model, calibration, text, given.seed)
        if arm not in done and given.rows is not None:
            with given.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"options": _same(given)}) + "\n")
        rows.append(row)
    on = torch.cuda.get_device_name() if model.device.type == "cuda" else platform.machine()
    title = (
        f"{Path(given.model).name}, MLP linears in {given.dtype}; calibrated on {given.n_seq} × "
        f"{given.seq_len} tokens, evaluated on {text.windows.numel()} of "
        f"{Path(given.evaluation).name}; {on}, torch {torch.__version__}, "
        f"entangle {entangle.__version__}"
    )
    print_table(pd.DataFrame(table(rows)), title=title, formats=FORMATS)


if __name__ == "__main__":
    main()
