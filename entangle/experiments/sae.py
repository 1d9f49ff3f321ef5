"""Sparse autoencoders that others trained, as dictionaries of a layer's inputs.

Two layouts of a folder: SAELens (``cfg.json``, ``sae_weights.safetensors``) and sparsify
(``cfg.json``, ``sae.safetensors``). What a file asks for and is not done here is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from entangle.errors import InvalidInput, Unavailable
from entangle.stats.dictionary import Points

SAELENS, SPARSIFY = "sae_weights.safetensors", "sae.safetensors"


@dataclass(frozen=True, eq=False)
class EncoderDictionary:
    """The atoms of a sparse autoencoder, coded with by its own encoder."""

    atoms: Tensor
    """The decoder's rows, (atoms, features)."""
    bias: Tensor
    """Added to what codes stand for, (features,)."""
    encoder: Tensor
    """(atoms, features)."""
    encoder_bias: Tensor
    """(atoms,)."""
    shifts: bool
    """Whether ``bias`` is taken from the inputs before the encoder."""
    kept: int | None
    """Atoms of an input, the largest; None keeps all."""
    least: Tensor | None
    """What an atom must exceed, (atoms,); None is 0."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """Layout, hook and other facts of its file."""

    def codes(self, points: Points) -> Float[Tensor, "tokens atoms"]:
        """Return how much of every atom the encoder finds in every input."""
        moved = points - self.bias if self.shifts else points
        found = moved @ self.encoder.mT + self.encoder_bias
        codes = found.clamp_min(0)
        if self.least is not None:
            codes = torch.where(found > self.least, codes, 0)
        if self.kept is not None:
            values, places = codes.topk(self.kept, dim=1)
            codes = torch.zeros_like(codes).scatter_(1, places, values)
        return codes

    def rebuilt(self, codes: Float[Tensor, "tokens atoms"]) -> Points:
        """Return the inputs that codes stand for."""
        return codes @ self.atoms + self.bias

    def to(self, device: torch.device) -> "EncoderDictionary":
        """Return the same one on another device."""
        least = None if self.least is None else self.least.to(device)
        return EncoderDictionary(
            self.atoms.to(device), self.bias.to(device), self.encoder.to(device),
            self.encoder_bias.to(device), self.shifts, self.kept, least, self.facts,
        )  # fmt: skip


def load_sae(folder: str | Path) -> EncoderDictionary:
    """Load a sparse autoencoder from a folder of one of the two layouts.

    Parameters
    ----------
    folder
        With ``cfg.json`` and the weights; nothing is fetched.

    Raises
    ------
    Unavailable
        If the files are not there.
    InvalidInput
        If they cannot be read, lack a tensor, do not fit together, or ask for what is not done:
        normalised inputs, gates, transcoders, skip connections, groups, rescaled codes, tensors
        that are not read here.
    """
    place = Path(folder)
    weights = [name for name in (SAELENS, SPARSIFY) if (place / name).is_file()]
    if not weights or not (place / "cfg.json").is_file():
        raise Unavailable(
            f"`dictionary` must be a folder with cfg.json and {SAELENS} or {SPARSIFY}; "
            f"'{place}' has not."
        )
    try:
        config: Any = json.loads((place / "cfg.json").read_text("utf-8"))
        tensors = {name: one.float() for name, one in load_file(place / weights[0]).items()}
    except (ValueError, SafetensorError) as error:
        raise InvalidInput(f"'{place}' cannot be read: {error}; copy it again.") from error
    read = _saelens if weights[0] == SAELENS else _sparsify
    try:
        found = read(config, tensors)
    except InvalidInput:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(f"'{place}' lacks {error}; copy it again.") from error
    _check(found, config, place)
    return found


def _saelens(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> EncoderDictionary:
    told = {**config.get("metadata", {}), **config}
    kind = told.get("architecture", "standard")
    activation = told.get("activation_fn", told.get("activation_fn_str", "relu"))
    if kind == "standard" and activation == "topk":
        kind = "topk"
    _refuse("architecture", kind, ("standard", "topk", "jumprelu"))
    _refuse("activation_fn", activation, ("relu", "topk"))
    _refuse("normalize_activations", told.get("normalize_activations") or "none", ("none",))
    _refuse(
        "rescale_acts_by_decoder_norm", told.get("rescale_acts_by_decoder_norm", False), (False,)
    )
    kept = None
    if kind == "topk":
        kept = int(told["k"] if "k" in told else told["activation_fn_kwargs"]["k"])
    names = ("W_dec", "b_dec", "W_enc", "b_enc", *(("threshold",) if kind == "jumprelu" else ()))
    _refuse_others(tensors, names)
    return EncoderDictionary(
        atoms=tensors["W_dec"], bias=tensors["b_dec"], encoder=tensors["W_enc"].mT.contiguous(),
        encoder_bias=tensors["b_enc"], shifts=bool(told.get("apply_b_dec_to_input", True)),
        kept=kept, least=tensors["threshold"] if kind == "jumprelu" else None,
        facts={"layout": "SAELens", "kind": kind, "hook": told.get("hook_name", "")},
    )  # fmt: skip


def _sparsify(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> EncoderDictionary:
    _refuse("activation", config.get("activation", "topk"), ("topk",))
    for name in ("transcode", "skip_connection", "signed"):
        _refuse(name, config.get(name, False), (False,))
    _refuse_others(tensors, ("W_dec", "b_dec", "encoder.weight", "encoder.bias"))
    return EncoderDictionary(
        atoms=tensors["W_dec"], bias=tensors["b_dec"], encoder=tensors["encoder.weight"],
        encoder_bias=tensors["encoder.bias"], shifts=True, kept=int(config["k"]), least=None,
        facts={"layout": "sparsify", "kind": "topk", "hook": config.get("hookpoint", "")},
    )  # fmt: skip


def _refuse(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise InvalidInput(
            f"`{name}` of a sparse autoencoder must be one of {list(known)}; got {value!r}: it "
            "cannot be coded with here."
        )


def _refuse_others(tensors: Mapping[str, Tensor], read: tuple[str, ...]) -> None:
    """Refuse tensors that are not read, such as factors of codes, but factors of 1."""
    ones = [name for name, one in tensors.items()
            if name.endswith("scaling_factor") and bool((one == 1).all())]  # fmt: skip
    strange = sorted(set(tensors) - {*read, *ones})
    if strange:
        raise InvalidInput(
            f"the tensors of a sparse autoencoder must be {list(read)} here; got {strange} "
            "besides: it cannot be coded with."
        )


def _check(found: EncoderDictionary, config: Mapping[str, Any], place: Path) -> None:
    atoms, features = found.atoms.shape if found.atoms.ndim == 2 else (0, 0)
    least = found.encoder_bias if found.least is None else found.least
    shapes = found.encoder.shape, found.encoder_bias.shape, found.bias.shape, least.shape
    if shapes != ((atoms, features), (atoms,), (features,), (atoms,)):
        raise InvalidInput(
            f"the tensors of '{place}' must fit a decoder of shape {(atoms, features)}; got an "
            "encoder, its bias, the decoder's bias and what is compared with the codes of "
            f"{[tuple(one) for one in shapes]}."
        )
    for name, size in (("d_in", features), ("d_sae", atoms), ("num_latents", atoms)):
        if config.get(name) not in (None, 0, size):  # 0 of sparsify: by the factor of expansion
            raise InvalidInput(
                f"the decoder of '{place}' must have {name} = {config[name]}, as its cfg.json "
                f"says; got {atoms} atoms of {features} features."
            )
    if found.kept is not None and not 1 <= found.kept <= atoms:
        raise InvalidInput(f"`k` of '{place}' must lie in 1 to {atoms}; got {found.kept}.")
    held = (found.atoms, found.encoder, found.bias, found.encoder_bias)
    if least.isnan().any() or not all(torch.isfinite(one).all() for one in held):
        raise InvalidInput(f"the weights of '{place}' must be finite; copy it again.")
