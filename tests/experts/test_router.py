import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import chi2_contingency, chisquare
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.experts import router as module
from entangle.experts.router import (
    KINDS,
    Kind,
    Router,
    RouterStatistics,
    fit_router,
    hash_key,
)
from entangle.packed.routing import hash_clusters
from tests.reference import routing as reference


def tokens(count: int = 600, features: int = 64, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    place = torch.randint(0, 5, (count, 1), generator=rng)
    return place * torch.linspace(-2, 3, features) + torch.randn(count, features, generator=rng)


def fitted(kind: Kind, x: Tensor) -> Router:
    return fit_router([x], 1 if kind == "single" else 6, seed=0, kind=kind, n_components=3)


def by_hand() -> Router:
    """Points of the plane, of which the second coordinate (less 1) meets centroids -2 and 4."""
    empty = torch.zeros(0, dtype=torch.int64)
    return Router(
        kind="kmeans",
        mean=torch.tensor([0.0, 1.0]),
        components=torch.tensor([[0.0, 1.0]]),
        centroids=torch.tensor([[-2.0], [4.0]]),
        hash_key=empty,
        statistics=RouterStatistics(
            tokens_per_cluster=torch.tensor([3, 1]),
            explained_variance=torch.ones(1, dtype=torch.float64),
            inertia=0.0,
            restart_inertias=torch.zeros(1, dtype=torch.float64),
            iterations=torch.ones(1, dtype=torch.int64),
        ),
    )


def test_by_hand() -> None:
    x = torch.tensor([[[9.0, 1.9], [-9.0, 2.1]], [[0.0, 2.0], [5.0, -7.0]]])
    assert by_hand().route(x).tolist() == [[0, 1], [0, 0]]  # 2.0 is a tie: the lower index


def test_nearest_centroid_by_the_slow_reference() -> None:
    x = tokens(80) + 5.0
    router = fitted("kmeans", x)
    arrays = (router.mean, router.components, router.centroids)
    mean, components, centroids = (a.double().numpy() for a in arrays)
    expected = reference.nearest(x.double().numpy(), mean, components, centroids)
    assert router.route(x).tolist() == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_goes_where_it_goes_alone(kind: Kind) -> None:
    x = tokens(120)
    router = fitted(kind, x)
    together = router.route(x)
    assert together.dtype == torch.int64
    assert [int(router.route(token)) for token in x] == together.tolist()
    assert torch.equal(router.route(x.view(4, 5, 6, 64)), together.view(4, 5, 6))
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    assert torch.equal(router.route(x[order]), together[order])
    assert torch.equal(router.route(x.mT.contiguous().mT), together)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_do_not_matter(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(100)
    router = fitted(kind, x)
    whole = router.route(x)
    monkeypatch.setattr(module, "rows_per_block", lambda features, *, item_bytes: 7)
    assert torch.equal(router.route(x), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_no_tokens_and_gradients(kind: Kind) -> None:
    x = tokens(50).bfloat16()
    router = fitted(kind, tokens())
    assert torch.equal(router.route(x), router.route(x.float()))
    assert router.route(torch.empty(2, 0, 64)).shape == (2, 0)
    assert not router.route(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_nan_is_routed_all_the_same(kind: Kind) -> None:
    router = fitted(kind, tokens())
    x = torch.full((2, 64), float("nan"))
    assert 0 <= int(router.route(x)[0]) < router.k
    assert router.route(x)[0] == router.route(x)[1]


def test_wrong_width_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"`x`.*\b2\b"):
        by_hand().route(torch.ones(4, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trip_through_safetensors(kind: Kind, tmp_path: Path) -> None:
    x = tokens()
    router = fitted(kind, x)
    save_file(router.state(), tmp_path / "router.safetensors")
    again = Router.from_state(load_file(tmp_path / "router.safetensors"))
    assert (again.kind, again.k, again.features) == (router.kind, router.k, router.features)
    assert torch.equal(again.route(x), router.route(x))
    for name, value in router.state().items():
        assert value.dtype == again.state()[name].dtype
        np.testing.assert_array_equal(again.state()[name], value, err_msg=name)


def test_a_broken_state_is_refused() -> None:
    state = by_hand().state()
    lacking = {name: value for name, value in state.items() if name != "mean"}
    with pytest.raises(InvalidInput, match=r"state.*mean"):
        Router.from_state(lacking)
    with pytest.raises(InvalidInput, match="components"):
        Router.from_state(state | {"components": torch.ones(2, 2)})
    with pytest.raises(InvalidInput, match=r"\b1\b.*dimension.*\b0\b"):
        Router.from_state(state | {"mean": torch.tensor(1.0)})
    with pytest.raises(InvalidInput, match=r"kind.*\[0, 3\).*\b3\b"):
        Router.from_state(state | {"kind": torch.tensor(3)})


def test_to_moves_the_tensors() -> None:
    moved = by_hand().to("meta")
    assert moved.centroids.device.type == moved.mean.device.type == "meta"
    assert moved.statistics.tokens_per_cluster.device.type == "cpu"


def test_effective_clusters() -> None:
    statistics = by_hand().statistics
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert statistics.effective_clusters == pytest.approx(math.exp(entropy))
    even = replace(statistics, tokens_per_cluster=torch.tensor([5, 0, 5]))
    assert even.effective_clusters == pytest.approx(2.0)


@pytest.mark.gpu
def test_cuda_routes_as_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for kind in KINDS:
        x = tokens()
        router = fitted(kind, x)
        assert torch.equal(router.to("cuda").route(x.cuda()).cpu(), router.route(x))


def test_stored_bytes_are_those_of_the_tensors_that_route() -> None:
    # float32: a mean of 2, 2 directions of 2, 2 offsets; a router of one cluster needs none
    assert by_hand().stored_bytes == 4 * (2 + 2 * 2 + 2)
    x = tokens()
    assert fitted("single", x).stored_bytes == 0
    assert fitted("random", x).stored_bytes == 8 * 64  # a key in int64
    assert fitted("kmeans", x).stored_bytes == 4 * (64 + 6 * 64 + 6)


def test_equals_the_hash_of_plain_integers() -> None:
    tokens = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    key = hash_key(5, seed=3)
    for k in (1, 2, 7, 16):
        expected = [reference.hash_cluster(t, key.tolist(), k) for t in tokens.tolist()]
        assert hash_clusters(tokens, key, k=k).tolist() == expected


def test_clusters_are_balanced() -> None:
    tokens = torch.randn(16_000, 8, generator=torch.Generator().manual_seed(1))
    counts = torch.bincount(hash_clusters(tokens, hash_key(8, seed=0), k=16), minlength=16)
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_clusters_are_balanced_for_bfloat16_values() -> None:
    tokens = torch.randn(16_000, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    counts = torch.bincount(hash_clusters(tokens, hash_key(8, seed=0), k=16), minlength=16)
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_clusters_say_nothing_about_where_tokens_lie() -> None:
    rng = torch.Generator().manual_seed(2)
    place = torch.randint(0, 4, (8000,), generator=rng)
    tokens = 10.0 * place[:, None] + torch.randn(8000, 6, generator=rng)
    clusters = hash_clusters(tokens, hash_key(6, seed=0), k=4)
    table = np.zeros((4, 4))
    np.add.at(table, (place.numpy(), clusters.numpy()), 1)
    assert chi2_contingency(table).pvalue > 1e-3


def test_the_next_float_is_in_an_unrelated_cluster() -> None:
    tokens = torch.randn(8000, 6, generator=torch.Generator().manual_seed(3))
    moved = tokens.clone()
    moved[:, 0] = torch.nextafter(tokens[:, 0], torch.tensor(float("inf")))
    key = hash_key(6, seed=0)
    same = (hash_clusters(tokens, key, k=8) == hash_clusters(moved, key, k=8)).double().mean()
    assert abs(float(same) - 1 / 8) < 0.02


def test_seeds_and_order_of_features_matter_and_the_sign_of_zero_does_not() -> None:
    tokens = torch.randn(200, 4, generator=torch.Generator().manual_seed(4))
    tokens[:, 1] = 0.0
    key = hash_key(4, seed=0)
    plain = hash_clusters(tokens, key, k=8)
    assert torch.equal(plain, hash_clusters(tokens * torch.tensor([1.0, -1.0, 1.0, 1.0]), key, k=8))
    assert not torch.equal(plain, hash_clusters(tokens, hash_key(4, seed=1), k=8))
    assert not torch.equal(plain, hash_clusters(tokens.flip(1), key, k=8))
