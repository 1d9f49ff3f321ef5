import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.decomposition import PCA
from torch import Tensor

from entangle.errors import InvalidInput, NumericalError
from entangle.experts import router
from entangle.experts.router import (
    KINDS,
    Kind,
    Router,
    _check_parameters,
    fit_router,
    fit_router_and_labels,
)


def tokens(count: int = 500, features: int = 64, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    centres = 3.0 * torch.randn(6, features, generator=rng)
    which = torch.randint(0, 6, (count,), generator=rng)
    return centres[which] + torch.randn(count, features, generator=rng)


def same_bytes(one: Router, two: Router) -> bool:
    a, b = one.state(), two.state()
    return all(a[name].numpy().tobytes() == b[name].numpy().tobytes() for name in a | b)


def test_as_good_as_scikit_learn() -> None:
    x = tokens()
    router = fit_router([x], 6, seed=0, n_components=4)
    exact = x.double().numpy()
    projected = PCA(4, svd_solver="full").fit_transform(exact)
    oracle = SklearnKMeans(6, n_init=10, random_state=0).fit(projected)
    assert router.statistics.inertia == pytest.approx(oracle.inertia_, rel=0.01)
    assert len(set(zip(router.route(x).tolist(), oracle.labels_.tolist(), strict=True))) == 6


def test_statistics_describe_the_fit() -> None:
    x = tokens()
    router = fit_router([x], 6, seed=0)
    statistics = router.statistics
    assert router.components.shape == (2, 64)
    assert statistics.tokens_per_cluster.tolist() == router.route(x).bincount(minlength=6).tolist()
    assert statistics.restart_inertias.shape == statistics.iterations.shape == (10,)
    assert 0.0 < float(statistics.explained_variance.sum()) < 1.0
    assert 1.0 < statistics.effective_clusters <= 6.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 37, 499])
def test_the_same_bytes_for_any_chunking(
    kind: Kind, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "BLOCK_BYTES", 100 * 64 * 4)
    x, k = tokens(), 1 if kind == "single" else 5
    whole = fit_router([x], k, seed=1, kind=kind, restarts=2)
    assert same_bytes(fit_router(x.split(size), k, seed=1, kind=kind, restarts=2), whole)


def test_seeds_matter() -> None:
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    one, two = (fit_router([x], 7, seed=seed, restarts=1, n_components=4) for seed in (0, 1))
    assert not same_bytes(one, two)


def test_translation_moves_only_the_mean() -> None:
    x = tokens()
    plain, moved = (fit_router([y], 6, seed=0, n_components=3) for y in (x, x + 100.0))
    torch.testing.assert_close(moved.mean, plain.mean + 100.0)
    torch.testing.assert_close(moved.components, plain.components, atol=1e-4, rtol=0)
    torch.testing.assert_close(moved.centroids, plain.centroids, atol=1e-2, rtol=0)
    assert torch.equal(moved.route(x + 100.0), plain.route(x))


def test_a_long_stream_is_subsampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "BLOCK_BYTES", 130 * 64 * 4)
    x = tokens()
    fitted = fit_router(x.split(90), 6, seed=0, max_tokens=200)
    assert int(fitted.statistics.tokens_per_cluster.sum()) == 200
    assert same_bytes(fitted, fit_router([x], 6, seed=0, max_tokens=200))
    whole = fit_router([x], 6, seed=0)
    assert torch.equal(fitted.mean, whole.mean)
    pairs = set(zip(fitted.route(x).tolist(), whole.route(x).tolist(), strict=True))
    assert len(pairs) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_one_cluster(kind: Kind) -> None:
    x = tokens(40)
    router = fit_router([x], 1, seed=0, kind=kind)
    assert router.route(x).tolist() == [0] * 40
    assert router.statistics.tokens_per_cluster.tolist() == [40]
    assert router.statistics.effective_clusters == 1.0


def test_a_random_router_ignores_where_tokens_lie() -> None:
    x = tokens(4000)
    near, control = (fit_router([x], 6, seed=0, kind=kind) for kind in ("kmeans", "random"))
    table = np.zeros((6, 6))
    np.add.at(table, (near.route(x).numpy(), control.route(x).numpy()), 1)
    shares = table / table.sum(1, keepdims=True)
    np.testing.assert_allclose(shares, 1 / 6, atol=0.08)
    assert control.statistics.effective_clusters > 5.9
    assert math.isnan(control.statistics.inertia)
    other = fit_router([x], 6, seed=1, kind="random")
    assert float((other.route(x) == control.route(x)).double().mean()) < 0.3


def test_duplicates() -> None:
    x = tokens(3, seed=2).repeat(20, 1)
    router = fit_router([x], 3, seed=0)
    assert router.statistics.tokens_per_cluster.tolist() == [20, 20, 20]
    with pytest.raises(InvalidInput, match=r"k=4.*\b3\b"):
        fit_router([x], 4, seed=0)


def test_constant_features_and_a_constant_stream() -> None:
    x = tokens()
    x[:, 10:] = 7.0
    assert fit_router([x], 4, seed=0).components[:, 10:].abs().max() < 1e-5
    constant = torch.full((30, 5), 3.3)
    assert fit_router([constant], 1, seed=0).route(constant).tolist() == [0] * 30
    with pytest.raises(InvalidInput, match=r"differ.*k=2.*\b1\b"):
        fit_router([constant], 2, seed=0)


def test_one_token() -> None:
    assert fit_router([torch.ones(1, 3)], 1, seed=0).statistics.tokens_per_cluster.tolist() == [1]
    with pytest.raises(InvalidInput, match=r"`k`.*tokens.*\b1\b.*\b2\b"):
        fit_router([torch.ones(1, 3)], 2, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_tokens_are_refused(kind: Kind) -> None:
    x = tokens()
    x[17, 3] = float("nan")
    with pytest.raises(NumericalError, match=r"\b1\b.*\b500\b.*\bNaN\b.*float32"):
        fit_router([x], 1, seed=0, kind=kind)


def test_an_iterator_cannot_be_read_twice() -> None:
    with pytest.raises(InvalidInput, match=r"`stream`.*once"):
        fit_router(iter([tokens()]), 2, seed=0)


def test_a_stream_that_changes_is_refused() -> None:
    class Shrinking:
        reads = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.reads += 1
            return iter([tokens()[: 500 - 10 * self.reads]])

    with pytest.raises(InvalidInput, match=r"`stream`.*\b490\b.*\b480\b"):
        fit_router(Shrinking(), 2, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"`k`.*integer.*\b1\b.*\b0\b"),
        ({"kind": "single"}, r"`k`.*\b1\b.*cluster.*\b2\b"),
        ({"n_components": 0}, r"n_components.*\b1\b.*\b0\b"),
        ({"n_components": 65}, r"n_components.*\b64\b.*\b65\b"),
        ({"restarts": 0}, r"`restarts`.*\b1\b.*\b0\b"),
        ({"max_tokens": 1}, r"max_tokens.*\b2\b.*\b1\b"),
        ({"seed": -1}, r"`seed`.*-1\b"),
    ],
)
def test_bad_parameters(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        fit_router(stream=[tokens()], **({"k": 2, "seed": 0} | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_controls_leave_the_tokens_to_be_routed(kind: Kind) -> None:
    x, k = tokens(), 1 if kind == "single" else 6
    router, labels = fit_router_and_labels([x], k, seed=1, kind=kind, restarts=2, device="cpu")
    assert (labels is None) == (kind != "kmeans")
    assert labels is None or torch.equal(labels, router.route(x))
    assert same_bytes(router, fit_router([x], k, seed=1, kind=kind, restarts=2))


def test_the_fit_knows_the_clusters_of_all_its_tokens_or_of_none() -> None:
    x = tokens()
    router, labels = fit_router_and_labels(x.split(70), 6, seed=0, restarts=2, max_tokens=500)
    assert labels is not None
    assert torch.equal(labels, router.route(x))
    assert fit_router_and_labels([x], 6, seed=0, restarts=2, max_tokens=499)[1] is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_gives_the_clusters_of_its_tokens(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = tokens(3000, 3200).to("cuda", dtype)
    router, labels = fit_router_and_labels(x.split(700), 6, seed=0, restarts=3)
    assert labels is not None
    assert labels.is_cuda
    assert int((labels != router.route(x)).sum()) <= 1
    again, same = fit_router_and_labels(x.split(900), 6, seed=0, restarts=3)
    assert same is not None
    assert torch.equal(same, labels)
    assert same_bytes(again.to("cpu"), router.to("cpu"))


@pytest.mark.gpu
def test_cuda_fits_as_the_cpu_and_twice_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = tokens()
    plain = fit_router([x], 6, seed=0)
    one, two = (fit_router([x], 6, seed=0, device="cuda") for _ in range(2))
    assert same_bytes(one.to("cpu"), two.to("cpu"))
    # Restarts of nearly equal inertia may change places; each device finds as good a one.
    assert one.statistics.inertia == pytest.approx(plain.statistics.inertia, rel=1e-3)
    torch.testing.assert_close(one.mean.cpu(), plain.mean)
    torch.testing.assert_close(one.components.cpu(), plain.components, rtol=1e-3, atol=1e-3)
    assert torch.equal(one.route(x.cuda()).cpu(), one.to("cpu").route(x))


def test_controls_count_clusters_that_no_token_falls_into() -> None:
    router = fit_router([torch.randn(3, 8), torch.randn(2, 8)], 4000, seed=0, kind="random")
    counts = router.statistics.tokens_per_cluster
    assert counts.shape == (4000,)
    assert int(counts.sum()) == 5
    assert router.statistics.explained_variance.dtype == torch.float64
    assert math.isnan(router.statistics.inertia)


def test_other_kinds_are_refused() -> None:
    with pytest.raises(InvalidInput, match="'nearest'"):
        _check_parameters(2, 10, "nearest")
    _check_parameters(10, 10, "kmeans")
    with pytest.raises(InvalidInput, match=r"max_tokens.*\b11\b.*\b10\b"):
        _check_parameters(11, 10, "kmeans")
