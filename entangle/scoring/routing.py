"""What a mixture's own router does to its experts' neurons: WD of its tokens against other tokens.

Sparse Expansion sends the tokens of a neuron to k experts, and their WD falls. Here the router was
trained with the model: the same rows are measured on the tokens that it sends them, and on as many
tokens drawn from all of the text, twice: the second draw is what a router without meaning gives.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.models.layers import Layer, list_layers
from entangle.models.mixtures import ExpertBank, ExpertLinear
from entangle.precision import full_precision
from entangle.recording.recorder import Batch, Recorded, Recorder
from entangle.seeding import numpy_rng
from entangle.stats.wasserstein import shape_statistics

COLUMNS = ("wd_inside", "wd_outside", "wd_control")


@dataclass(eq=False)
class _Seen:
    """What entered a mixture: every token once, and which of them each expert saw."""

    hidden: Float[Tensor, "tokens features"]
    at: dict[int, list[Int64[Tensor, " tokens"]]] = field(default_factory=lambda: defaultdict(list))


def routing_distances(
    module: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    *,
    n_tokens: int,
    least: int,
    seed: int,
    memory: int,
) -> pd.DataFrame:
    """Measure the neurons of experts on their own tokens and on as many others.

    Parameters
    ----------
    module
        The model.
    layers
        Layers of experts held in stacked parameters; others are passed over.
    batches
        All of the text.
    n_tokens
        Tokens in it.
    least
        Tokens that an expert must see.
    seed
        Of the draws.
    memory
        Bytes for what enters the mixtures, which is held once a mixture; of more than fit at once,
        the text runs again.

    Returns
    -------
    pandas.DataFrame
        ``layer``, ``neuron`` and WD, in σ: ``wd_inside`` on the tokens that the router sends,
        ``wd_outside`` on as many drawn from all tokens without repeats, ``wd_control`` on another
        such draw; NaN below ``least`` tokens. All by sorted outputs, computed in float32.

    Raises
    ------
    InvalidInput
        If no layer is an expert's, or a mixture does not tell which tokens its experts see.
    """
    banks: dict[int, list[Layer]] = defaultdict(list)
    for layer in layers:
        if isinstance(layer.module, ExpertLinear):
            banks[id(layer.module.bank)].append(layer)
    if not banks:
        raise InvalidInput(
            "`routing` compares an expert's own tokens with others, but none of the layers is part "
            "of a mixture whose experts are stacked; choose such layers (--proj experts)."
        )
    batches, every = list(batches), list_layers(module)
    parts = []
    for several in _at_once(list(banks.values()), n_tokens, memory):
        seen = _record(module, every, several, batches, n_tokens)
        with full_precision(), torch.no_grad():
            parts += [
                part for own in several for part in _measured(own, seen, n_tokens, least, seed)
            ]
    return pd.concat(parts, ignore_index=True)


def _bank(layers: Sequence[Layer]) -> ExpertBank:
    linear = layers[0].module
    assert isinstance(linear, ExpertLinear)  # noqa: S101
    return linear.bank


def _at_once(
    mixtures: Sequence[list[Layer]], n_tokens: int, memory: int
) -> Iterator[list[list[Layer]]]:
    """Part the mixtures so that what enters those of a part fits into memory."""
    part: list[list[Layer]] = []
    held = 0
    for own in mixtures:
        first = next(iter(_bank(own).stacks.values()))
        needed = n_tokens * first.shape[1] * first.stored.element_size()
        if part and held + needed > memory:
            yield part
            part, held = [], 0
        part.append(own)
        held += needed
    yield part


def _record(
    module: nn.Module,
    every: Sequence[Layer],
    mixtures: Sequence[Sequence[Layer]],
    batches: Sequence[Batch],
    n_tokens: int,
) -> Mapping[int, _Seen]:
    """Run the text; return what entered each mixture, by its identity."""
    wanted = {id(_bank(own)) for own in mixtures}
    watched = [
        layer
        for layer in every
        if isinstance(layer.module, ExpertLinear)
        and id(layer.module.bank) in wanted
        and layer.projection == next(iter(layer.module.bank.stacks))
    ]
    found: dict[int, _Seen] = {}

    def keep(seen: Recorded) -> None:
        linear = seen.layer.module
        assert isinstance(linear, ExpertLinear)  # noqa: S101
        bank = linear.bank
        if seen.at is None or (
            bank.layout == "repeated" and round(seen.layer.share * bank.n_experts) > 1
        ):
            raise InvalidInput(
                f"the mixture {bank.name!r} does not give an expert the tokens as all others get "
                "them, so what it would make of others is not known; leave `routing` out."
            )
        if id(bank) not in found:
            found[id(bank)] = _Seen(seen.inputs.new_zeros(n_tokens, seen.inputs.shape[1]))
        found[id(bank)].hidden[seen.at] = seen.inputs
        found[id(bank)].at[linear.number].append(seen.at)

    Recorder(watched, keep, compared=False, lenient=True).run(module, batches)
    return found


def _measured(
    layers: Sequence[Layer], found: Mapping[int, _Seen], n_tokens: int, least: int, seed: int
) -> Iterator[pd.DataFrame]:
    """Yield the rows of every layer of a mixture."""
    bank = _bank(layers)
    seen = found.get(id(bank))
    by_expert: dict[int, dict[str, Layer]] = defaultdict(dict)
    for layer in layers:
        assert isinstance(layer.module, ExpertLinear)  # noqa: S101
        by_expert[layer.module.number][layer.projection] = layer
    for number, own in by_expert.items():
        parts = [] if seen is None else seen.at.get(number, [])
        at = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
        columns: dict[str, dict[str, Tensor]] = {}
        if seen is not None and len(at) >= max(least, 2):
            rng = numpy_rng(seed, "routing", f"{bank.name}.{number}")
            draws = [torch.from_numpy(np.sort(rng.permutation(n_tokens)[: len(at)])) for _ in "ab"]
            for name, places in zip(COLUMNS, (at, *draws), strict=True):
                rows = seen.hidden[places.to(seen.hidden.device)]
                columns[name] = _distances(bank, number, rows, own)
        for key, layer in own.items():
            unknown = np.full(layer.out_features, np.nan)
            yield pd.DataFrame(
                {
                    "layer": layer.name,
                    "neuron": np.arange(layer.out_features),
                    **{
                        name: columns[name][key].double().cpu().numpy() if columns else unknown
                        for name in COLUMNS
                    },
                }
            )


def _distances(
    bank: ExpertBank, number: int, rows: Tensor, own: Mapping[str, Layer]
) -> dict[str, Float[Tensor, " neurons"]]:
    """Return the WD of an expert's neurons on some tokens, by projection."""
    outputs: dict[str, Tensor] = {}

    def multiply(key: str, x: Tensor) -> Tensor:
        stack = bank.stacks[key]
        bias = None if stack.bias is None else stack.bias[number].float()
        outputs[key] = nn.functional.linear(x, stack.weight[number].float(), bias)
        return outputs[key]

    rows = rows.float()
    gate = multiply("gate_proj", rows) if "gate_proj" in bank.stacks else None
    up = multiply("up_proj", rows)
    if "down_proj" in own:
        multiply("down_proj", bank.activate(gate, up))
    return {key: shape_statistics(outputs[key].T).wd for key in own}
