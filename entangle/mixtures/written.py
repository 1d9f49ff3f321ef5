"""A pruned mixture as an ordinary model: fewer experts, or smaller ones, in an ordinary folder.

What a configuration of transformers can say is written: all mixtures with as many experts, all
experts with as many neurons. Neurons that go beside larger ones stay as zeros.
"""

import copy
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.evaluation import Perplexity, perplexity
from entangle.mixtures.pruned import Change, PrunedMixtures
from entangle.models.layers import find_blocks, list_layers
from entangle.models.loading import LanguageModel, load_model
from entangle.models.mixtures import banks_of
from entangle.models.pretrained import quiet
from entangle.models.streaming import release
from entangle.recording.hooks import forward
from entangle.results.expansion import PruneReport, costs_to_write
from entangle.runs.places import check_room
from entangle.runs.provenance import RunClock, make_manifest, output_folder
from entangle.texts.evaluation import EvaluationText

_COUNT = re.compile(r"(num|n|moe_num)_(local_|routed_)?experts")
_WIDTH = re.compile(r"(moe_)?(intermediate_size|ffn_hidden_size)|ffn_hidden_size")
Named = dict[str, Tensor]
_TILE = 8
"""Neurons: products of stacked experts want rows of whole 16 bytes."""
_CHECKED = 128
"""Tokens on which what was written is held against what was measured."""


@dataclass(frozen=True, eq=False)
class WrittenMixtures:
    """A pruned model that was written."""

    model: LanguageModel
    """As loaded from its folder."""
    report: PruneReport
    """One row a mixture, and what it cost: as `entangle.load_result` reads it from the folder."""
    dense: Perplexity | None
    """Of the model before, on the evaluation text; None without one."""
    perplexity: Perplexity | None
    """Of the model that was written."""


def write_mixtures(
    pruned: PrunedMixtures,
    out: str | os.PathLike[str],
    *,
    evaluation: EvaluationText | None = None,
    force: bool = False,
    extra: Callable[[WrittenMixtures, Path], object] | None = None,
) -> WrittenMixtures:
    """Write a pruned model as an ordinary folder of transformers.

    Parameters
    ----------
    pruned
        From `prune_mixtures`; its model is left as it is.
    out
        Folder: configuration, weights and tokenizer as transformers writes them, and beside them
        ``manifest.json``, ``layers.parquet`` and ``run.json``, which alone are ours.
    evaluation
        Text to measure perplexity on, before and after.
    force
        Replace an existing result.
    extra
        Called with the result and its folder, before that takes the name ``out``.

    Raises
    ------
    InvalidInput
        If the configuration has no place for what is left (mixtures of unequal numbers of experts,
        groups of unequal ones, constants in the place of experts, merged experts), if the model
        is no transformers one, or if what was written computes something else than what was
        measured.
    """
    clock, dense = RunClock(), pruned.statistics.model
    check_expressible(pruned)
    weights = dense.module.parameters()
    check_room(out, sum(one.numel() * one.element_size() for one in weights))
    before = None if evaluation is None else perplexity(dense, evaluation, progress=False)
    ids = _probe(pruned)
    with pruned.applied():
        measured: Any = forward(dense.module, ids, all_logits=True)
        _count_calls(pruned, evaluation)
        tensors = [_tensors(pruned, narrow=narrow) for narrow in (True, False)]
    with output_folder(out, force=force) as folder:
        _save(_smaller(pruned, *tensors), dense, folder)
        model = load_model(folder, device=str(dense.device))
        _hold(measured, forward(model.module, ids, all_logits=True), os.fspath(out))
        own = None if evaluation is None else perplexity(model, evaluation, progress=False)
        model = LanguageModel(model.module, model.tokenizer, os.fspath(out), "folder", None)
        report = _report(pruned, model, own, clock, evaluation)
        found = WrittenMixtures(model, report, before, own)
        found.report.write(folder)
        if extra is not None:
            extra(found, folder)
    return found


def _count_calls(pruned: PrunedMixtures, evaluation: EvaluationText | None) -> None:
    """Run a text, so that it is known how often each expert is called."""
    model, text = pruned.statistics.model, pruned.statistics.calibration
    if evaluation is not None:
        perplexity(model, evaluation, progress=False)
    else:
        for _, ids in text.batches():
            forward(model.module, ids)


def check_expressible(pruned: PrunedMixtures) -> None:
    """Raise `InvalidInput` where no configuration of transformers can say what is left."""
    module, changes = pruned.statistics.model.module, pruned.changes
    if not hasattr(module, "save_pretrained"):
        raise InvalidInput(
            f"only a model of transformers can be written; {type(module).__name__} has no "
            "save_pretrained."
        )
    if pruned.sparsity > 0 and not any(change.changes for change in pruned.changes):
        raise InvalidInput(
            f"nothing of the experts goes at `sparsity` {pruned.sparsity:g}, as whole experts or "
            f"neurons are rounded to the nearest number; a mixture here has "
            f"{pruned.changes[0].mixture.n_experts} experts: choose a larger one."
        )
    remedy = "choose a method that drops as many experts of each (reap, ean, …) or neurons (heapr)"
    for change in changes:
        name = change.mixture.name
        if change.novices.any():
            raise InvalidInput(
                f"experts of {name!r} become constants, for which a model of transformers has no "
                f"place; {remedy}, or measure it by `entangle compare`."
            )
        if change.merged:
            raise InvalidInput(
                f"experts of {name!r} are merged, and routers send tokens to them by several "
                f"logits, for which a model of transformers has no place; {remedy}."
            )
        sizes = _group_sizes(change)
        if len(sizes) > 1 and (len(set(sizes)) > 1 or min(sizes) < 2):
            raise InvalidInput(
                f"groups of the experts of {name!r} are left with {sizes} experts, but a "
                "configuration has one number for all, of at least 2; choose another sparsity, or "
                "a method that removes neurons (heapr)."
            )
    left = {int((~one.dropped).sum()) for one in changes}
    if len(left) > 1:
        raise InvalidInput(
            f"mixtures are left with {min(left)} to {max(left)} experts, but a configuration has "
            f"one number for all; {remedy} (experts of zeros would save no memory)."
        )


def _group_sizes(change: Change) -> list[int]:
    """Return how many experts are left in every group that the router chooses first."""
    holders = (change.mixture.router.holder, *_around(change))
    groups = next((n for one in holders if isinstance(n := getattr(one, "n_group", None), int)), 1)
    kept = (~change.dropped).view(max(1, groups), -1)
    return [int(n) for n in kept.sum(1)]


def _around(change: Change) -> Iterator[Any]:
    router: Any = change.mixture.router.holder
    yield getattr(router, "config", None)
    yield from (getattr(one, "config", None) for one in change.mixture.bank.runs)


def _probe(pruned: PrunedMixtures) -> Tensor:
    ids = next(iter(pruned.statistics.calibration.batches(1)))[1]
    return ids[:1, :_CHECKED]


def _hold(measured: Any, written: Any, folder: str) -> None:
    """Refuse what computes something else than what was measured."""
    one, two = (found.logits.float() for found in (measured, written))
    if not bool(one.isfinite().all()):
        raise InvalidInput(
            "the pruned model's logits are not finite, so what is written cannot be held against "
            "what was measured; mend the model, or prune the experts that make them so."
        )
    apart = float((one - two.to(one.device)).norm() / one.norm())
    exact = measured.logits.dtype == torch.float32
    if not apart <= (1e-3 if exact else 0.1):
        raise InvalidInput(
            f"the model that was written to {folder!r} computes other logits than the one "
            f"that was measured ({apart:.2g} of their norm): this architecture's experts cannot be "
            "removed; measure it by `entangle compare`."
        )


def _smaller(pruned: PrunedMixtures, narrow: Named, whole: Named) -> Any:
    """Return a copy of the model with the experts and neurons that are left.

    Parameters
    ----------
    pruned
        What goes.
    narrow, whole
        Its tensors, from `_tensors`: experts as wide as the widest, or as before, with zeros.
    """
    module: Any = pruned.statistics.model.module
    made, first = _copied(module), pruned.changes[0]
    counts = {first.mixture.n_experts: int((~first.dropped).sum())}
    plans = [(narrow, {first.mixture.width: _width(pruned)}), (whole, {})]
    for found, widths in plans:  # the width may be that of other parts too
        made.config = _config(module.config, counts, widths)
        if _fits(made, found):
            for name, value in found.items():
                _put(made, name, value)
            return made
    n = first.mixture.n_experts
    raise InvalidInput(
        f"a configuration of {type(module).__name__} has no place for {counts[n]} of {n} experts "
        "of its feed-forward mixtures alone; choose heapr, or measure it by `entangle compare`."
    )


def _copied(module: nn.Module) -> Any:
    """Copy a model's modules but not its tensors."""
    release(module)
    memo: dict[int, Any] = {id(one): one for one in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def _width(pruned: PrunedMixtures) -> int:
    """Return the neurons of the largest expert that is left, rounded up to whole tiles."""
    widest = max(int(one.neurons[~one.dropped].sum(1).max()) for one in pruned.changes)
    return min(pruned.changes[0].mixture.width, max(_TILE, -(-widest // _TILE) * _TILE))


def _tensors(pruned: PrunedMixtures, *, narrow: bool) -> Named:
    """Return what becomes of parameters and buffers, by their names."""
    found: dict[int, Tensor] = {}
    width = _width(pruned) if narrow else pruned.changes[0].mixture.width
    for change in pruned.changes:
        kept = (~change.dropped).nonzero()[:, 0].tolist()
        stored = {id(stack.stored): stack for stack in change.mixture.bank.stacks.values()}
        for key, stack in stored.items():
            own = [one for one in change.mixture.bank.stacks.items() if id(one[1].stored) == key]
            found[key] = _stacked(change, [name for name, _ in own], kept, width)
            bias = None if stack.bias_key is None else stack.holder._parameters[stack.bias_key]
            if bias is not None:
                found[id(bias)] = _biases(change, [name for name, _ in own], kept, width)
        router = change.mixture.router
        of_router = [one for one in router.holder._parameters.values() if one is not None]
        for own_tensor in of_router:
            found[id(own_tensor)] = own_tensor.detach()[kept].clone()
        for tensor in (*router.biases, *router.scales):
            found[id(tensor)] = tensor.detach()[..., kept].clone()
    module = pruned.statistics.model.module
    names = {id(one): name for name, one in (*module.named_parameters(), *module.named_buffers())}
    return {names[key]: value for key, value in found.items()}


def _stacked(change: Change, keys: list[str], kept: list[int], width: int) -> Tensor:
    """Return a stored parameter with the experts that are left, each of ``width`` neurons."""
    stacks = [change.mixture.bank.stacks[key] for key in keys]
    rows = [_narrowed(change, key, kept, width) for key in keys]
    joined = rows[0]
    if len(rows) == 2:  # one after the other, or in turns
        turns = stacks[0].rows.step == 2
        joined = torch.stack(rows, 2).flatten(1, 2) if turns else torch.cat(rows, 1)
    joined = joined.mT if stacks[0].transposed else joined
    return (joined if stacks[0].stored.ndim == 3 else joined.flatten(0, 1)).contiguous()


def _narrowed(change: Change, key: str, kept: list[int], width: int) -> Tensor:
    """Return an expert's rows, or columns of ``down_proj``: those that stay, then zeros."""
    axis = 1 if key == "down_proj" else 0
    whole = change.mixture.bank.stacks[key].weight
    shape = list(whole.shape)
    shape[0], shape[axis + 1] = len(kept), width
    found = whole.new_zeros(shape)
    for place, number in enumerate(kept):
        own = change.neurons[number].to(whole.device).nonzero()[:, 0]
        found[place].narrow(axis, 0, len(own)).copy_(whole[number].index_select(axis, own))
    return found


def _biases(change: Change, keys: list[str], kept: list[int], width: int) -> Tensor:
    parts = []
    for key in keys:
        bias = change.mixture.bank.stacks[key].bias
        assert bias is not None  # noqa: S101
        if key == "down_proj":
            return bias[kept].clone()
        found = bias.new_zeros(len(kept), width)
        for place, number in enumerate(kept):
            own = change.neurons[number].to(bias.device)
            found[place, : int(own.sum())] = bias[number, own]
        parts.append(found)
    if len(parts) == 1:
        return parts[0]
    turns = change.mixture.bank.stacks[keys[0]].rows.step == 2
    return torch.stack(parts, 2).flatten(1) if turns else torch.cat(parts, 1)


def _config(config: Any, counts: dict[int, int], widths: dict[int, int]) -> Any:
    """Return a configuration with other numbers of experts and neurons."""
    made = copy.deepcopy(config)
    for one in (made, *(getattr(made, key, None) for key in made.sub_configs)):
        for key, value in list(vars(one).items()) if one is not None else ():
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            for pattern, changed in ((_COUNT, counts), (_WIDTH, widths)):
                if pattern.fullmatch(key) and value in changed:
                    setattr(one, key, changed[value])
    return made


def _fits(made: Any, found: Named) -> bool:
    """Tell whether a model of this configuration has exactly these shapes."""
    with quiet(), torch.device("meta"):
        try:
            blank: Any = type(made)(made.config)
        except (ValueError, TypeError, AssertionError, RuntimeError, ZeroDivisionError):
            return False
    own = {name: found.get(name, one).shape for name, one in made.state_dict().items()}
    return own == {name: one.shape for name, one in blank.state_dict().items()}


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    home, _, key = name.rpartition(".")
    part = module.get_submodule(home)
    if key in part._parameters:
        part._parameters[key] = nn.Parameter(value, requires_grad=False)
    else:
        part._buffers[key] = value


def _save(made: Any, dense: LanguageModel, folder: Path) -> None:
    try:
        with quiet():
            made.save_pretrained(folder)
            if dense.tokenizer is not None:
                dense.tokenizer.save_pretrained(folder)
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"transformers cannot write the pruned model: {error}") from error


def _report(
    pruned: PrunedMixtures,
    written: LanguageModel,
    own: Perplexity | None,
    clock: RunClock,
    evaluation: EvaluationText | None,
) -> PruneReport:
    seen, costs, rows = pruned.statistics, pruned.costs(), pruned.layers
    dense = seen.model.module
    everything = sum(math.prod(layer.shape) for layer in list_layers(dense))
    path, width = find_blocks(dense)[0], next(dense.parameters()).element_size()
    held = {
        bank.name: sum(math.prod(stack.shape) for stack in bank.stacks.values()) * bank.n_experts
        for bank in banks_of(written.module)
    }
    gone = int(rows["stored_before"].sum()) - sum(held[name] for name in rows["layer"])
    table = pd.DataFrame(
        {
            "layer": rows["layer"],
            "block": rows["layer"].str.extract(rf"^{re.escape(path)}\.(\d+)\.")[0].astype("Int64"),
            "projection": "experts", "experts": rows["experts"],
            "sparsity": 1 - rows["stored"] / rows["stored_before"], "relative_error": math.nan,
            "nonzeros": rows["stored"].astype("int64"),
            "bytes": [held[name] * width for name in rows["layer"]], "flops": 2 * rows["active"],
            **{name: rows[name] for name in ("experts_before", "neurons", "neurons_before")},
        }
    )  # fmt: skip
    manifest = make_manifest(
        PruneReport.KIND, model=seen.model.describe(), calibration=seen.calibration.describe(),
        settings={"method": pruned.name, "sparsity": pruned.sparsity, "experts": 1},
        costs=costs_to_write({
            "flops": costs["flops"], "nonzeros": costs["nonzeros"], "bytes": 1 - gone / everything
        }),
        perplexity=None if own is None else own.value,
        evaluation=None if evaluation is None else evaluation.describe(),
    )  # fmt: skip
    return PruneReport(table, manifest, clock.read())
