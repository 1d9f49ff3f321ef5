"""What scores do not hold: modes and experts, from a decomposition or from the model itself.

What a view of the explorer shows: pictures, HTML below them, and work it offers to do.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from entangle.errors import InvalidInput
from entangle.memory import memory_for
from entangle.models.blocks import evaluating
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import LanguageModel
from entangle.modes import describe_modes
from entangle.modes.decompose import decompose
from entangle.modes.groups import output_histogram
from entangle.modes.pairs import draw_all, near_pairs, separated_rows
from entangle.plotting import dense_output
from entangle.precision import full_precision
from entangle.recording.recorder import Recorded, Recorder, of_one_group
from entangle.recording.stream import ByteBudget, TokenStore
from entangle.results.decomposition import Decomposition
from entangle.texts.calibration_set import CalibrationSet, SeenTokens, Tokens
from entangle.texts.words import TokenText

NEAR, PAIRS = 0.01, 10
"""Share of all pairs of tokens that is near, and pairs that are shown of a neuron."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, and the text that it is looked at on."""

    model: LanguageModel
    """The model of the scores."""
    calibration: CalibrationSet
    """The text of the scores, or another one."""

    @property
    def size(self) -> str:
        """How much a pass over the text is."""
        text = self.calibration
        return f"{text.n_seq:,} × {text.seq_len:,} tokens of {text.source}"


@dataclass(frozen=True, eq=False)
class Modes:
    """The modes of one neuron."""

    modes: pd.DataFrame
    """As in `entangle.modes.NeuronModes`."""
    contexts: pd.DataFrame
    """As in `entangle.modes.NeuronModes`."""
    histogram: pd.DataFrame
    """``left``, ``right`` and ``count`` of the outputs that the modes are of."""
    mean: float
    """Of these outputs, in output units."""
    std: float
    """Of these outputs, in output units."""
    sent: str = ""
    """Of how many of the text's tokens they are, where an expert is sent some only."""


class ModeFinder:
    """Finds modes of neurons, with one pass over the text for all neurons of a layer.

    Parameters
    ----------
    known
        Whose modes are taken as they are.
    subject
        For all other neurons; None if there is none.
    memory
        Bytes for the inputs of the layer looked at last, None for half of what is free; what is
        beyond spills (`entangle.recording.stream.TokenStore`).
    seed
        Of the contexts that are drawn.
    """

    def __init__(
        self, known: Decomposition | None, subject: Subject | None, *, memory: int | None, seed: int
    ) -> None:
        self.subject = subject
        self._known, self._memory, self._seed = known, memory, seed
        self._layer: Layer | None = None
        self._inputs: TokenStore | None = None
        self._given: TokenStore | None = None
        self._near: np.ndarray | None = None
        self._at: NDArray[np.int64] | None = None
        self._found: dict[tuple[str, int], Modes] = {}

    def known(self, layer: str, neuron: int) -> Modes | None:
        """Return the modes of a neuron if they take no pass over the text."""
        if (layer, neuron) in self._found:
            return self._found[layer, neuron]
        if self._layer is not None and self._layer.name == layer:
            return self.find(layer, neuron)
        if self._known is None:
            return None
        modes, contexts = (
            frame[(frame["layer"] == layer) & (frame["neuron"] == neuron)]
            for frame in (self._known.modes, self._known.contexts)
        )
        if modes.empty:
            return None
        outputs, neurons = self._known.outputs, self._known.neurons
        histogram, item = dense_output(outputs, neurons, layer=layer, neuron=neuron)
        return Modes(modes, contexts, histogram, item.mean, item.std)

    def is_recorded(self, layer: str) -> bool:
        """Tell whether the text has been run up to this layer."""
        return self._layer is not None and self._layer.name == layer

    def outputs(self, layer: str, neuron: int) -> np.ndarray:
        """Return a neuron's outputs on all tokens; the first one of a layer takes a pass.

        They are NaN on tokens that an expert is not sent.
        """
        subject = self.subject
        assert subject is not None  # noqa: S101
        found = self._outputs(self._recorded(subject, layer), neuron)
        if self._at is None:
            return found
        everywhere = np.full(subject.calibration.n_tokens, np.nan, found.dtype)
        everywhere[self._at] = found
        return everywhere

    def sent(self, layer: str) -> str:
        """Say how many tokens an expert is sent; nothing of others, and before the pass."""
        if self._at is None or self.subject is None or not self.is_recorded(layer):
            return ""
        n, whole = len(self._at), self.subject.calibration.n_tokens
        return f"The router sends this expert {n:,} of {whole:,} tokens ({100 * n / whole:.3g} %)."

    def has_modes(self, layer: str) -> bool:
        """Tell whether the decomposition holds modes of the layer."""
        return self._known is not None and bool((self._known.modes["layer"] == layer).any())

    def modes_of(self, layer: str) -> pd.DataFrame:
        """Return the modes of all neurons of a layer that the decomposition holds."""
        assert self._known is not None  # noqa: S101
        return self._known.modes[self._known.modes["layer"] == layer]

    def known_pairs(self, layer: str, neuron: int) -> pd.DataFrame | None:
        """Return separated pairs of tokens if they take no pass over the text."""
        if self.is_recorded(layer):
            return self.pairs(layer, neuron)
        if self._known is None:
            return None
        rows = self._known.separated
        rows = rows[(rows["layer"] == layer) & (rows["neuron"] == neuron)]
        return rows if len(rows) else None

    def pairs(self, layer: str, neuron: int) -> pd.DataFrame:
        """Find pairs of tokens that are near in the input and far in the output.

        Raises
        ------
        InvalidInput
            If the layer does not multiply its inputs by its weight.
        """
        subject = self.subject
        assert subject is not None  # noqa: S101
        outputs = self._outputs(self._recorded(subject, layer), neuron)
        inputs = self._inputs
        if inputs is None or inputs.n_tokens == 0:
            raise InvalidInput(f"layer {layer!r} has no inputs of its own to compare.")
        if self._near is None:
            drawn = draw_all(inputs, seed=self._seed)
            self._near = near_pairs(inputs, drawn, near=NEAR, seed=self._seed)
        words, values = TokenText(subject.model.tokenizer), torch.from_numpy(outputs)[None]
        text, at = self._seen(subject), self._at
        rows = separated_rows(values, (neuron,), self._near, inputs, text, words, most=PAIRS)
        if at is not None and not rows.empty:
            rows = rows.assign(**{name: at[rows[name]] for name in ("position_a", "position_b")})
        return rows

    def text_of(self, layer: str, neuron: int) -> object | None:
        """Return the description of the text that a neuron's modes are of, None where unknown."""
        made = self.is_recorded(layer) or (layer, neuron) in self._found
        if made and self.subject is not None:
            return self.subject.calibration.describe()
        return None if self._known is None else self._known.manifest.get("calibration")

    def find(self, layer: str, neuron: int) -> Modes:
        """Find the modes of a neuron; the first one of a layer takes a pass over the text.

        Raises
        ------
        InvalidInput, UnknownName
            As `entangle.modes.neuron_modes`.
        """
        subject = self.subject
        assert subject is not None  # noqa: S101
        outputs = self._outputs(self._recorded(subject, layer), neuron)
        modes, contexts = describe_modes(
            {neuron: outputs}, self._seen(subject), subject.model.tokenizer, layer, seed=self._seed
        )
        if self._at is not None:
            contexts["position"] = self._at[contexts["position"]]
        mean, std = float(outputs.mean(dtype=np.float64)), float(outputs.std(dtype=np.float64))
        histogram = output_histogram(outputs)
        found = Modes(modes, contexts, histogram, mean, std, self.sent(layer))
        self._found[layer, neuron] = found
        return found

    def _recorded(self, subject: Subject, name: str) -> Layer:
        """Record the inputs of a layer unless they were the last ones recorded."""
        if self._layer is not None and self._layer.name == name:
            return self._layer
        self._layer = self._near = self._at = None
        for held in (self._inputs, self._given):
            if held is not None:
                held.close()
        (layer,) = find_layers(subject.model.module, name)
        memory = memory_for(self._memory, subject.model.module)
        store = self._inputs = TokenStore(ByteBudget(memory))

        outputs = self._given = TokenStore(ByteBudget(memory))
        places = list[NDArray[np.int64]]()

        def keep(seen: Recorded) -> None:
            if seen.at is not None:
                places.append(seen.at.cpu().numpy())
            if seen.affine:
                store.append(seen.inputs)
            else:
                outputs.append(seen.outputs)

        batches = of_one_group(subject.calibration)
        with evaluating(subject.model.module):
            Recorder([layer], keep, once=True).run(subject.model.module, batches)
        self._layer, self._at = layer, np.concatenate(places) if places else None
        return layer

    def _seen(self, subject: Subject) -> Tokens:
        """Return the tokens that outputs are of."""
        text = subject.calibration
        return text if self._at is None else SeenTokens(text, torch.from_numpy(self._at))

    def _outputs(self, layer: Layer, neuron: int) -> np.ndarray:
        assert self._inputs is not None  # noqa: S101
        if self._given is not None and self._given.n_tokens:
            return torch.cat([rows[:, neuron].float().cpu() for rows in self._given]).numpy()
        weight = layer.weight[[neuron]].float()
        bias = None if layer.bias is None else layer.bias[[neuron]].float()
        with full_precision():
            parts = [
                nn.functional.linear(rows.to(weight.device).float(), weight, bias).cpu()
                for rows in self._inputs
            ]
        return torch.cat(parts)[:, 0].numpy()


class ExpertFinder:
    """Finds what experts make of neurons, a whole layer at a time.

    Parameters
    ----------
    known
        A decomposition made before.
    subject
        Decomposed on demand; None if there is none.
    experts, sparsity, seed
        Of decompositions on demand.
    """

    def __init__(
        self,
        known: Decomposition | None,
        subject: Subject | None,
        *,
        experts: Sequence[int],
        sparsity: float,
        seed: int,
    ) -> None:
        self.subject, self.experts, self.sparsity = subject, tuple(experts), sparsity
        self._seed = seed
        self._known = [] if known is None else [known]

    def known(self, layer: str, neuron: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the rows of ``neurons`` and ``outputs`` of a neuron; empty where unknown."""
        nothing = pd.DataFrame(), pd.DataFrame()
        best = nothing
        for one in self._known:
            rows, outputs = (
                frame[(frame["layer"] == layer) & (frame["neuron"] == neuron)]
                for frame in (one.neurons, one.outputs)
            )
            if not outputs.empty:
                return rows, outputs
            best = best if rows.empty else (rows, outputs)
        return best

    def text_of(self, layer: str, neuron: int) -> object | None:
        """Return the description of the text that `known` is of, None where there is nothing."""
        rows, outputs = self.known(layer, neuron)
        for one in () if rows.empty else self._known:
            held = one.neurons if outputs.empty else one.outputs
            if ((held["layer"] == layer) & (held["neuron"] == neuron)).any():
                return one.manifest.get("calibration")
        return None

    def find(self, layer: str, neurons: Sequence[int]) -> None:
        """Decompose a layer, and keep the outputs of some of its neurons.

        Raises
        ------
        EntangleError
            As `entangle.decompose`.
        """
        assert self.subject is not None  # noqa: S101
        found = decompose(
            self.subject.model,
            self.subject.calibration,
            layers=layer,
            neurons=neurons,
            experts=self.experts,
            sparsity=self.sparsity,
            contexts=0,
            token_pairs=0,
            separated=0,
            seed=self._seed,
            progress=False,
        )
        self._known.append(found)


_DPI = 200.0
_SHOWN_DPI = 115.0


@dataclass(frozen=True)
class Content:
    """What a view shows of one neuron."""

    pictures: tuple[bytes, ...] = ()
    """PNGs, at most two."""
    html: str = ""
    """Escaped, shown below the pictures."""
    note: str = ""
    """HTML above the pictures: what they are of."""
    offer: str = ""
    """What a click would compute; empty if there is nothing more to compute."""


def picture(figure: Figure) -> bytes:
    """Return a figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def shown_width(png: bytes) -> int:
    """Return how wide a PNG of `picture` is shown, in pixels, so that its text can be read."""
    return round(int.from_bytes(png[16:20], "big") / _DPI * _SHOWN_DPI)


def image(png: bytes) -> str:
    """Return an HTML element that shows a PNG without a file beside it."""
    data = base64.b64encode(png).decode("ascii")
    style = f"width: {shown_width(png)}px; max-width: 100%"
    return f'<img alt="" style="{style}" src="data:image/png;base64,{data}">'


Render = Callable[[str, int, bool], Content]
"""Called as ``render(layer, neuron, asked)``; ``asked`` if the offered work may be done."""


@dataclass(frozen=True)
class Question:
    """A view that takes a text."""

    answer: Callable[[str, int, str, bool], Content]
    """Called as ``answer(layer, neuron, text, asked)``; the work is done if ``asked``."""
    hint: str
    """Stands in the empty field."""
    lines: int = 1
    """Height of the field; one line is answered at Enter too."""
