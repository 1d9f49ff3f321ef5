"""Sparse autoencoders of two layouts, coded with as their formulas say, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from entangle.errors import InvalidInput, Unavailable
from entangle.experiments.sae import SAELENS, SPARSIFY, load_sae
from entangle.seeding import torch_rng

ATOMS, FEATURES = 7, 4


def tensors() -> dict[str, torch.Tensor]:
    rng = torch_rng(0, "sae")
    shapes = {"W_enc": (FEATURES, ATOMS), "W_dec": (ATOMS, FEATURES), "b_enc": (ATOMS,),
              "b_dec": (FEATURES,), "threshold": (ATOMS,)}  # fmt: skip
    return {name: torch.randn(*shape, generator=rng) for name, shape in shapes.items()}


def saelens(folder: Path, **config: Any) -> Path:
    own = {"d_in": FEATURES, "d_sae": ATOMS, "hook_name": "blocks.1.hook_mlp_in", **config}
    (folder / "cfg.json").write_text(json.dumps(own))
    own = tensors()
    if config.get("architecture") != "jumprelu":
        del own["threshold"]
    save_file(own, folder / SAELENS)
    return folder


def sparsify(folder: Path, **config: Any) -> Path:
    (folder / "cfg.json").write_text(json.dumps({"d_in": FEATURES, "k": 2, **config}))
    own = tensors()
    renamed = {
        "encoder.weight": own["W_enc"].mT.contiguous(), "encoder.bias": own["b_enc"],
        "W_dec": own["W_dec"], "b_dec": own["b_dec"],
    }  # fmt: skip
    save_file(renamed, folder / SPARSIFY)
    return folder


def before(point: np.ndarray, *, shift: bool = True) -> np.ndarray:
    own = {name: one.numpy() for name, one in tensors().items()}
    found: np.ndarray = (point - shift * own["b_dec"]) @ own["W_enc"] + own["b_enc"]
    return found


def largest(values: np.ndarray, k: int) -> np.ndarray:
    kept: np.ndarray = np.maximum(values, 0)
    kept[np.argsort(-kept)[k:]] = 0
    return kept


POINTS = torch.randn(6, FEATURES, generator=torch_rng(1, "points"))


def test_relu_with_and_without_the_shift(tmp_path: Path) -> None:
    for shift in (True, False):
        found = load_sae(saelens(tmp_path, architecture="standard", apply_b_dec_to_input=shift))
        for point, codes in zip(POINTS.numpy(), found.codes(POINTS), strict=True):
            np.testing.assert_allclose(codes, np.maximum(before(point, shift=shift), 0), atol=1e-6)
    codes = found.codes(POINTS).numpy()
    expected = codes @ tensors()["W_dec"].numpy() + tensors()["b_dec"].numpy()
    np.testing.assert_allclose(found.rebuilt(found.codes(POINTS)), expected, atol=1e-6)
    assert found.facts["hook"] == "blocks.1.hook_mlp_in"


def test_largest_atoms_of_both_layouts(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}}
    for found in (
        load_sae(saelens(tmp_path / "a", architecture="topk", k=2)),
        load_sae(saelens(tmp_path / "b", architecture="standard", **old)),
        load_sae(sparsify(tmp_path / "c")),
    ):
        for point, codes in zip(POINTS.numpy(), found.codes(POINTS), strict=True):
            np.testing.assert_allclose(codes, largest(before(point), 2), atol=1e-6)


def test_thresholds_of_atoms(tmp_path: Path) -> None:
    found = load_sae(saelens(tmp_path, architecture="jumprelu"))
    threshold = tensors()["threshold"].numpy()
    for point, codes in zip(POINTS.numpy(), found.codes(POINTS), strict=True):
        values = before(point)
        np.testing.assert_allclose(codes, np.maximum(values, 0) * (values > threshold), atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "gated"}, {"normalize_activations": "expected_average_only_in"},
        {"activation_fn": "tanh-relu"}, {"architecture": "topk", "k": 99},
        {"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": True},
        {"architecture": "topk"},
    ],
)  # fmt: skip
def test_what_cannot_be_coded_with_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        load_sae(saelens(tmp_path, **config))


@pytest.mark.parametrize("name", ["transcode", "skip_connection", "signed", "activation"])
def test_what_sparsify_has_besides_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match=name):
        load_sae(sparsify(tmp_path, **{name: "groupmax" if name == "activation" else True}))


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        ({"scaling_factor": torch.full((ATOMS,), 2.0)}, True),
        ({"scaling_factor": torch.ones(ATOMS)}, False),
        ({"threshold": torch.ones(ATOMS, 1)}, True),
        ({"threshold": torch.full((ATOMS,), float("nan"))}, True),
        ({"b_enc": torch.full((ATOMS,), float("nan"))}, True),
    ],
)  # fmt: skip
def test_tensors_that_would_change_codes_unread_are_refused(
    tmp_path: Path, more: dict[str, torch.Tensor], refused: bool
) -> None:
    place = saelens(tmp_path, architecture="jumprelu")
    save_file(tensors() | more, place / SAELENS)
    if refused:
        with pytest.raises(InvalidInput):
            load_sae(place)
    else:
        assert torch.isfinite(load_sae(place).codes(POINTS)).all()
    (place / "cfg.json").write_text("{}")  # an old file without its architecture
    with pytest.raises(InvalidInput, match="threshold"):
        load_sae(place)


def test_sizes_are_those_that_the_file_tells(tmp_path: Path) -> None:
    for size in ({"d_in": ATOMS}, {"d_sae": FEATURES}):
        with pytest.raises(InvalidInput, match=next(iter(size))):
            load_sae(saelens(tmp_path, **size))
    (tmp_path / SAELENS).unlink()
    with pytest.raises(InvalidInput, match="num_latents"):
        load_sae(sparsify(tmp_path, num_latents=ATOMS + 1))
    assert load_sae(sparsify(tmp_path, num_latents=0, expansion_factor=2)).atoms.shape[0] == ATOMS


def test_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="has not"):
        load_sae(tmp_path)
    place = saelens(tmp_path, architecture="jumprelu")
    save_file({**tensors(), "b_enc": torch.zeros(3)}, place / SAELENS)
    with pytest.raises(InvalidInput, match="fit a decoder"):
        load_sae(place)
    save_file({"W_dec": tensors()["W_dec"]}, place / SAELENS)
    with pytest.raises(InvalidInput, match="lacks"):
        load_sae(place)
    save_file({**tensors(), "b_dec": torch.full((FEATURES,), float("nan"))}, place / SAELENS)
    with pytest.raises(InvalidInput, match="finite"):
        load_sae(place)
    (place / SAELENS).write_bytes(b"x")
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_sae(place)
    (place / "cfg.json").write_text("{")
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_sae(place)
