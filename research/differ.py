"""Why models differ: what could move a model's scores, each changed by itself and measured.

``python -m research.differ MODEL… --out FOLDER`` takes names, folders (checkpoints too) and files
that `entangle.load_model` takes. One pass records what the chosen layers receive; then, on the
same inputs, something is changed and WD measured again (`CHANGES`). ``facts.csv`` has a row a
model, ``changes.csv`` one a (model, change): WD's median and that of its top 3 %, their ratios to
the unchanged, rank correlation with it, and the share of the top 3 % that stays.

``--damage`` also prunes the top 3 % by WD and random neurons (`entangle.ablate`) and adds the
ratio of what both cost: the finding itself. That needs minutes a model on a GPU.

Gated MLPs and those without a gate are read alike; mixtures are refused.

Few models differ in many things at once, so that no table of four models says which of them
counts; a change within one model does. Width, depth and embedding scale are only described: of
models of one's own (`research.train --width --blocks`) they can be compared.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import kurtosis, spearmanr
from torch import Tensor, nn
from torch.nn import functional

import entangle
from entangle.activation.neurons import FeedForward, Part, feed_forwards
from entangle.memory import memory_for
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import LanguageModel
from entangle.packed.activations import ACTIVATIONS
from entangle.precision import full_precision
from entangle.recording.groups import record_groups
from entangle.stats.wasserstein import null_floor, shape_statistics
from entangle.studies.study import labelled
from entangle.studies.subject import first_layers
from entangle.texts.calibration_set import CalibrationSet

TOP = 0.03
BITS = (8, 4, 3)
STRONGEST = 3
CHANGES = {
    "without first tokens": "the first token of each sequence is left out (the attention sink)",
    **{f"{bits} bits": f"weights rounded to {bits} bits, blocks of 32" for bits in BITS},
    "noise as of 3 bits": "the control: Gaussian noise of the size of that rounding",
    "without strongest inputs": f"the {STRONGEST} inputs of largest variance held at their mean",
    "other activation": "what the activation gives computed with GELU for SiLU, or SiLU for GELU",
}
"""What is changed, by its name."""


def rounded(weight: Tensor, bits: int, block: int = 32) -> Tensor:
    """Return weights rounded to ``bits``, each block of a row with its own least and step (Q4_1).

    >>> rounded(torch.tensor([[0.0, 0.4, 1.0]]), 1)
    tensor([[0., 0., 1.]])
    """
    rows, columns = weight.shape
    short = -columns % block
    parts = functional.pad(weight.float(), (0, short), mode="replicate") if short else weight
    parts = parts.float().reshape(rows, -1, block)
    least = parts.amin(-1, keepdim=True)
    step = (parts.amax(-1, keepdim=True) - least) / (2**bits - 1)
    safe = torch.where(step > 0, step, 1)
    found = least + step * ((parts - least) / safe).round()
    whole: Tensor = found.reshape(rows, -1)[:, :columns]
    return whole


def wd_of(weight: Tensor, inputs: Tensor) -> np.ndarray:
    """Return the WD of all neurons on some inputs, NaN where outputs are constant."""
    parts = [shape_statistics(some.float() @ inputs.mT).wd for some in weight.split(512)]
    found: np.ndarray = torch.cat(parts).double().cpu().numpy()
    return found


def changed(
    layer: Layer, inputs: Tensor, first: Tensor, other: Tensor | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what WD becomes by every change that a layer can have.

    Parameters
    ----------
    layer
        The layer.
    inputs
        What it receives, (tokens, in_features).
    first
        Which tokens are first of their sequence, (tokens,).
    other
        What it would receive with the other activation, if it receives an activation's outputs.
    """
    weight = layer.weight.float()
    yield "without first tokens", wd_of(weight, inputs[~first])
    for bits in BITS:
        coarse = rounded(weight, bits)
        yield f"{bits} bits", wd_of(coarse, inputs)
        if bits == 3:
            size = (coarse - weight).square().mean(1, keepdim=True).sqrt()
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            yield "noise as of 3 bits", wd_of(weight + size * noise.to(weight.device), inputs)
    held, strongest = inputs.clone(), inputs.var(0).topk(STRONGEST).indices
    held[:, strongest] = inputs[:, strongest].mean(0)
    yield "without strongest inputs", wd_of(weight, held)
    if other is not None:
        yield "other activation", wd_of(weight, other)


def other_activation(part: FeedForward | None, seen: Mapping[str, Tensor]) -> Tensor | None:
    """Return what the last layer of a feed-forward part receives with the other activation.

    None where the activation is neither SiLU nor a GELU, or not known.

    Parameters
    ----------
    part
        As `entangle.activation.neurons.feed_forwards` finds it, with a gate or without.
    seen
        What the layers receive, (tokens, in_features), by name.
    """
    other = OTHER.get(part.activation or "") if part is not None else None
    if part is None or part.up is None or other is None:
        return None
    if part.gate is None:
        return other(_outputs(part.up, seen))
    return _outputs(part.up, seen) * other(_outputs(part.gate, seen))


OTHER: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": ACTIVATIONS["gelu_tanh"],
    "gelu": ACTIVATIONS["silu"],
    "gelu_tanh": ACTIVATIONS["silu"],
}
"""What is computed instead of an activation, by its name."""


def _outputs(part: Part, seen: Mapping[str, Tensor]) -> Tensor:
    layer = part.layer
    found = seen[layer.name] @ layer.weight.float().mT
    return part.of(found if layer.bias is None else found + layer.bias.float())


def mlp_layers(model: LanguageModel, blocks: Sequence[int] | None = None) -> tuple[Layer, ...]:
    """Return the linears of the MLPs of some blocks, or all.

    Raises
    ------
    SystemExit
        If one is part of an expert.
    """
    layers = find_layers(model.module, "all" if blocks is None else list(blocks), "mlp")
    expert = next((one.name for one in layers if one.is_expert), None)
    if expert is not None:
        raise SystemExit(
            f"this reads dense models: {expert!r} is part of an expert, which sees some of the "
            "tokens only"
        )
    return layers


def activation_of(module: nn.Module) -> str:
    """Return the name of the MLP's activation, as the configuration has it."""
    config = getattr(module, "config", None)
    text = getattr(config, "text_config", config)
    for name in ("hidden_activation", "hidden_act", "activation_function", "activation"):
        if getattr(text, name, None):
            return str(getattr(text, name))
    return ""


def measured(
    model: LanguageModel, calibration: CalibrationSet, blocks: Sequence[int]
) -> tuple[pd.DataFrame, float]:
    """Return WD by layer, neuron and change, and how heavy the inputs' tails are.

    Returns
    -------
    tuple
        Columns layer, block, projection, neuron, change, wd; the median excess kurtosis of the
        input channels.
    """
    layers = mlp_layers(model, blocks)
    made = {one.down.name: one for one in feed_forwards(model.module, calibration.ids)}
    first = torch.zeros(calibration.ids.shape, dtype=torch.bool)
    first[:, 0] = True
    parts, tails = list[pd.DataFrame](), list[float]()
    with ExitStack() as stack, full_precision():
        groups = record_groups(
            model.module, layers, calibration, memory=memory_for(None, model.module),
            stack=stack, report=lambda _n: None, what="a change of the weights",
        )  # fmt: skip
        seen: dict[str, Tensor] = {}
        for members, store in groups:
            inputs = torch.cat(list(store)).float()
            tails.append(float(np.nanmedian(kurtosis(inputs.double().cpu().numpy(), axis=0))))
            seen |= {layer.name: inputs for layer in members}
            for layer in members:
                other = other_activation(made.get(layer.name), seen)
                flat = first.flatten().to(inputs.device)
                arms = [("none", wd_of(layer.weight, inputs))]
                arms += changed(layer, inputs, flat, other)
                parts += [_rows(layer, name, wd) for name, wd in arms]
    return pd.concat(parts, ignore_index=True), float(np.median(tails))


def _rows(layer: Layer, change: str, wd: np.ndarray) -> pd.DataFrame:
    place = {"layer": layer.name, "block": layer.block, "projection": layer.projection}
    return pd.DataFrame({**place, "neuron": range(len(wd)), "change": change, "wd": wd})


def compared(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row a change: means over layers of what it does to WD."""
    table = rows.pivot(index=["layer", "neuron"], columns="change", values="wd")
    found = []
    for change in table.columns.drop("none"):
        pairs = table[["none", change]].dropna().groupby("layer")
        numbers = pd.DataFrame([_one(own["none"], own[change]) for _, own in pairs])
        spread = numbers["spearman"].std(ddof=1) if len(numbers) > 1 else np.nan
        told: dict[str, object] = {"change": change, "layers": len(numbers), "spearman_sd": spread}
        found.append(told | {name: numbers[name].mean() for name in numbers})
    return pd.DataFrame(found)


def _one(before: "pd.Series[float]", after: "pd.Series[float]") -> dict[str, float]:
    count = max(1, round(TOP * len(before)))
    top, moved = before.nlargest(count), after.nlargest(count)
    return {
        "median_ratio": after.median() / before.median(),
        "top_ratio": moved.mean() / top.mean(),
        "spearman": float(spearmanr(before, after).statistic),
        "top_kept": len(top.index.intersection(moved.index)) / count,
    }


@torch.no_grad()
def stream_facts(model: LanguageModel, calibration: CalibrationSet) -> dict[str, float]:
    """Return facts of the residual stream on 4 sequences: scale, sink, outlier dimensions.

    ``embedding_rms`` is that of the first block's input, and ``embedding_share`` its size beside
    the middle block's. ``sink`` is the first token's norm in the middle over the median one,
    ``outlier_dims`` the number of dimensions whose RMS is 6 times the median one there, and
    ``largest_dim`` the largest RMS over the median; first tokens are left out of both.
    """
    ids = calibration.ids[:4].to(next(model.module.parameters()).device)
    states = model.module(ids, output_hidden_states=True).hidden_states
    begin, middle = states[0].float(), states[len(states) // 2].float()
    norms, later = middle.norm(dim=-1), middle[:, 1:].flatten(0, 1)
    rms = later.square().mean(0).sqrt()
    return {
        "embedding_rms": float(begin.square().mean().sqrt()),
        "embedding_share": float(begin.norm(dim=-1).median() / norms[:, 1:].median()),
        "sink": float(norms[:, 0].median() / norms[:, 1:].median()),
        "outlier_dims": float((rms > 6 * rms.median()).sum()),
        "largest_dim": float(rms.max() / rms.median()),
    }


def damage(
    model: LanguageModel, calibration: CalibrationSet, evaluation: str, layers: Sequence[Layer]
) -> dict[str, float]:
    """Return how much more the top 3 % by WD cost at 95 % than random neurons, as log perplexity.

    The ratio of rises of the log perplexity, NaN where random neurons cost nothing, and its parts;
    neurons are those of ``layers``.
    """
    text = entangle.load_evaluation(
        evaluation, model.tokenizer, seq_len=calibration.ids.shape[1], n_windows=24
    )
    found = entangle.ablate(
        model, calibration, evaluation=text, selections=("top", "random"), fraction=TOP,
        strengths=0.95, seeds=5, layers=[one.name for one in layers], proj=None,
        measures="perplexity", md=False, progress=False,
    )  # fmt: skip
    rows = found.frame[found.frame["measure"] == "perplexity"]
    logs = np.log(rows["value"]).groupby(rows["selection"]).mean()
    top, random = (float(logs[one] - logs["dense"]) for one in ("top", "random"))
    return {
        "dense_log_ppl": float(logs["dense"]), "top_rise": top, "random_rise": random,
        "ratio": top / random if random > 0 else np.nan,
    }  # fmt: skip


def facts_of(
    name: str, model: LanguageModel, calibration: CalibrationSet, rows: pd.DataFrame, tails: float
) -> dict[str, object]:
    """Return what a model is, and its scores in short."""
    plain = rows[rows["change"] == "none"].dropna()
    floor = null_floor(calibration.n_tokens)[0]
    by_layer = plain.groupby("layer")["wd"]
    every = mlp_layers(model)
    width = first_layers(every, model.module)[0].in_features
    top = by_layer.apply(lambda wd: wd.nlargest(max(1, round(TOP * len(wd)))).mean())
    depths = plain.groupby("block")["wd"].median()
    trend = spearmanr(depths.index.astype(float), depths).statistic if len(depths) > 2 else np.nan
    blocks = max(one.block or 0 for one in every) + 1
    return {
        "model": name, "activation": activation_of(model.module), "width": width,
        "mlp": max(one.in_features for one in every), "blocks": blocks, "floor": floor,
        "median_wd": float(by_layer.median().mean()), "top_wd": float(top.mean()),
        "wd_with_depth": float(trend), "input_kurtosis": tails,
        **stream_facts(model, calibration),
    }  # fmt: skip


def chosen_blocks(model: LanguageModel, count: int) -> list[int]:
    """Return ``count`` blocks, evenly spaced, the first and the last among them."""
    every = sorted({one.block for one in mlp_layers(model) if one.block is not None})
    places = np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int)
    return [every[place] for place in dict.fromkeys(places.tolist())]


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="names, folders or files of models")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the tables")
    parser.add_argument("--calibration", default="demo", help="text (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=4, help="blocks (default: %(default)s)")
    parser.add_argument("--n-seq", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--damage", metavar="TEXT", help="also prune, and evaluate on this text")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    return given


def main() -> None:
    """Measure every model of the command line and write the tables."""
    given = parse()
    facts, changes = list[dict[str, object]](), list[pd.DataFrame]()
    for name, label in zip(given.models, labelled(given.models), strict=True):
        model = entangle.load_model(name)
        calibration = entangle.load_calibration(
            given.calibration, model.tokenizer, n_seq=given.n_seq, seq_len=given.seq_len,
            context_length=model.context_length, vocab_size=model.vocab_size,
        )  # fmt: skip
        rows, tails = measured(model, calibration, chosen_blocks(model, given.blocks))
        told = facts_of(label, model, calibration, rows, tails)
        if given.damage:
            layers = first_layers(mlp_layers(model), model.module)
            told |= damage(model, calibration, given.damage, layers)
        facts.append(told)
        changes.append(compared(rows).assign(model=label))
        pd.DataFrame(facts).to_csv(given.out / "facts.csv", index=False)
        pd.concat(changes).to_csv(given.out / "changes.csv", index=False)
        print(pd.DataFrame([told]).T.to_string(header=False))
        print(changes[-1].round(3).to_string(index=False), flush=True)
        for change in CHANGES.keys() - set(changes[-1]["change"]):
            print(f"not measured: {change} (the activation is {told['activation'] or 'not known'})")


if __name__ == "__main__":
    main()
