import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA, TruncatedSVD

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral import (
    SecondMoments,
    band_accuracy,
    band_directions,
    band_name,
    eigenbasis,
    own_band_accuracy,
    project,
    random_subspace,
)

BANDS = ((0, 2), (2, 5), (5, None))


def basis_of(features, centred=False):
    moments = SecondMoments(features.shape[1])
    moments.update(features, features)
    return eigenbasis(moments.matrices(centred)[0])[1], moments


def test_bands_are_named():
    assert [band_name(band) for band in BANDS] == ["0-2", "2-5", "5+"]


def test_bands_sum_to_the_features_and_are_orthogonal():
    features = torch.randn(40, 9)
    directions, _ = basis_of(features)
    parts = [project(features, band_directions(directions, band)) for band in BANDS]
    assert all(part.dtype == features.dtype for part in parts)
    torch.testing.assert_close(sum(parts), features)
    torch.testing.assert_close(parts[0] @ parts[1].mT, torch.zeros(40, 40), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["drop", "cumulative"])
def test_modes_are_sums_of_kept_bands(mode):
    features = torch.randn(40, 9, dtype=torch.float64)
    directions, _ = basis_of(features)
    kept = [project(features, band_directions(directions, band)) for band in BANDS]
    for k, band in enumerate(BANDS):
        expected = sum(kept[: k + 1]) if mode == "cumulative" else features - kept[k]
        torch.testing.assert_close(project(features, band_directions(directions, band, mode)), expected)


def test_leading_bands_are_scikit_learns():
    features = torch.randn(40, 9, dtype=torch.float64) + 1
    svd = TruncatedSVD(3, algorithm="arpack").fit(features.numpy())
    expected = svd.inverse_transform(svd.transform(features.numpy()))
    directions, _ = basis_of(features)
    np.testing.assert_allclose(project(features, directions[:, :3]).numpy(), expected, atol=1e-9)
    pca = PCA(3).fit(features.numpy())
    directions, moments = basis_of(features, centred=True)
    centred = project(features, directions[:, :3], moments.mean_z)
    np.testing.assert_allclose(centred.numpy(), pca.inverse_transform(pca.transform(features.numpy())), atol=1e-9)


def test_band_accuracy_agrees_with_numpy():
    features, text = torch.randn(200, 8), torch.randn(10, 8)
    target = (features @ text.mT).argmax(-1)
    target[::3] = 0
    directions, _ = basis_of(features)
    u, s, vt = np.linalg.svd(features.double().numpy(), full_matrices=False)
    expected = []
    for start, stop in BANDS:
        part = (u[:, start:stop] * s[start:stop]) @ vt[start:stop]
        expected.append(np.mean((part @ text.numpy().T).argmax(-1) == target.numpy()))
    found = band_accuracy(features, text, target, directions, BANDS)
    assert found == pytest.approx(expected, abs=1 / 200)  # one sample may sit on a tie in single precision
    whole = float(((features @ text.mT).argmax(-1) == target).double().mean())
    assert band_accuracy(features, text, target, directions, BANDS, "cumulative")[-1] == whole
    assert band_accuracy(features, text, target, directions, ((0, None),), mean=features.mean(0)) == [whole]


def test_band_accuracy_finds_the_band_that_holds_the_classes():
    target = torch.arange(300) % 3
    classes = torch.eye(6, dtype=torch.float64)[3:]  # class directions, orthogonal to the large nuisance directions
    nuisance = torch.randn(300, 3, dtype=torch.float64) * 10
    features = torch.cat([nuisance, torch.eye(3, dtype=torch.float64)[target]], 1)
    directions, _ = basis_of(features)
    bands = ((0, 3), (3, 6), (6, None))
    top, rest, beyond = band_accuracy(features, classes, target, directions, bands)
    assert rest > 0.95 > 0.7 > top and math.isnan(beyond)
    without_top, without_rest, _ = band_accuracy(features, classes, target, directions, bands, "drop")
    assert without_top > 0.95 > 0.7 > without_rest


@pytest.mark.parametrize("share", [0.0, 0.03, 0.4, 0.9, 1.0])
def test_a_random_subspace_holds_the_energy(share):
    features = torch.randn(200, 12, dtype=torch.float64) * torch.logspace(0, -2, 12, dtype=torch.float64)
    moment = features.mT @ features
    energy = share * float(moment.trace())
    for seed in range(5):
        directions = random_subspace(moment, energy, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(directions.mT @ directions, torch.eye(directions.shape[1], dtype=torch.float64))
        held = float((directions.mT @ moment @ directions).trace())
        assert held == pytest.approx(energy, rel=1e-9, abs=2 * float(torch.linalg.eigvalsh(moment)[0]))
    again = random_subspace(moment, energy, torch.Generator().manual_seed(4))
    assert torch.equal(again, directions)


def test_a_random_subspace_is_not_the_band():
    features = torch.randn(500, 12, dtype=torch.float64) * torch.logspace(0, -2, 12, dtype=torch.float64)
    moment = features.mT @ features
    values, vectors = eigenbasis(moment)
    directions = random_subspace(moment, float(values[:2].sum()), torch.Generator().manual_seed(0))
    assert directions.shape[1] > 2
    assert float((vectors[:, :2].mT @ directions).square().sum()) < 1.99


@pytest.mark.parametrize(
    "call",
    [
        lambda: band_name((2, 2)),
        lambda: band_name((-1, 2)),
        lambda: band_directions(torch.eye(3), (0, 1), "lift"),
        lambda: project(torch.ones(3, 2), torch.eye(3)),
        lambda: random_subspace(torch.eye(3, dtype=torch.float64), 4.0, torch.Generator()),
        lambda: random_subspace(torch.eye(3, dtype=torch.float64), -1.0, torch.Generator()),
        lambda: band_accuracy(torch.ones(3, 2), torch.ones(4, 3), torch.zeros(3, dtype=torch.long), torch.eye(2)),
        lambda: band_accuracy(torch.ones(3, 2), torch.ones(4, 2), torch.zeros(2, dtype=torch.long), torch.eye(2)),
        lambda: band_accuracy(torch.ones(3, 2), torch.ones(4, 2), torch.full((3,), -1), torch.eye(2)),
        lambda: band_accuracy(torch.ones(3, 2), torch.ones(4, 2), torch.full((3,), 4), torch.eye(2)),
        lambda: own_band_accuracy(torch.eye(3), torch.eye(3), torch.arange(3), around="median"),
        lambda: band_accuracy(torch.full((3, 2), math.nan), torch.ones(4, 2), torch.full((3,), 0), torch.eye(2)),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(VLMQError):
        call()


def test_own_bands_around_zero_are_the_published_measure():
    """The spectra's cuts by numpy's SVD of the features as they are; of their deviations, the mean put back, around it."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(12, 16, generator=generator)
    target = torch.randint(12, (300,), generator=generator)
    features = classes[target] + torch.randn(300, 16, generator=generator) + 3 * torch.randn(16, generator=generator)
    for around, mean in (("zero", 0.0), ("mean", features.numpy().mean(0))):
        u, s, vt = np.linalg.svd(features.double().numpy() - mean, full_matrices=False)
        for mode in ("keep", "drop"):
            found = own_band_accuracy(features, classes, target, BANDS, mode, around)
            for value, (start, stop) in zip(found, BANDS):
                part = (u[:, start:stop] * s[start:stop]) @ vt[start:stop]
                left = part if mode == "keep" else (features.numpy() - mean) - part
                expected = np.mean(((left + mean) @ classes.numpy().T).argmax(-1) == target.numpy())
                assert value == pytest.approx(expected, abs=1.5 / 300)


def test_the_mean_drowns_high_ranks_and_zero_does_not():
    """Classes told apart in weak ranks alone, beside a mean that prefers one class to all others by far."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(400) % 4
    classes = torch.cat([torch.tensor([[1.0], [0], [0], [0]]), torch.zeros(4, 1), 0.3 * torch.eye(4)], 1)
    features = torch.zeros(400, 6)
    features[:, 0] = 5 + torch.randn(400, generator=generator)
    features[:, 1] = 3 * torch.randn(400, generator=generator)
    features[torch.arange(400), 2 + target] = 0.5
    bands = ((0, 2), (2, None))
    around_mean = own_band_accuracy(features, classes, target, bands, around="mean")
    around_zero = own_band_accuracy(features, classes, target, bands, around="zero")
    assert around_mean == pytest.approx([0.25, 0.25], abs=0.01)
    assert around_zero[1] == 1.0


def test_bands_without_energy_are_not_guessed():
    """Fewer samples than dimensions, features of low rank, one and the same feature, one sample."""
    generator = torch.Generator().manual_seed(0)
    classes, target = torch.randn(3, 20, generator=generator), torch.arange(30) % 3
    low = torch.randn(30, 4, generator=generator) @ torch.randn(4, 20, generator=generator)
    bands = ((0, 2), (2, 5), (5, None))
    assert [v == v for v in own_band_accuracy(low, classes, target, bands)] == [True, True, False]
    few = torch.randn(6, 20, generator=generator)
    assert [v == v for v in own_band_accuracy(few, classes, target[:6], ((0, 5), (5, None)))] == [True, False]
    assert [v == v for v in own_band_accuracy(few, classes, target[:6], ((0, 6), (6, None)), around="zero")] == [
        True,
        False,
    ]
    same = torch.randn(1, 20, generator=generator).expand(30, 20)
    whole = float(((same @ classes.T).argmax(-1) == target).double().mean())
    for features, t in ((same, target), (same[:1], target[:1])):
        assert all(v != v for v in own_band_accuracy(features, classes, t, bands))
        own = own_band_accuracy(features, classes, t, ((0, 1), (1, None)), around="zero")
        assert own[0] == (whole if len(t) > 1 else float((features @ classes.T).argmax() == t)) and own[1] != own[1]
