import numpy as np
import torch
from scipy.stats import chi2_contingency, chisquare

from entangle.experts.router import hash_clusters, hash_key
from tests.reference import routing as reference


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
