import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import TruncatedSVD

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral import band_accuracy, band_projection, principal_directions, sqnr_db_per_rank

BANDS = ((0, 2), (2, 5), (5, None))


def low_rank(n: int, d: int, rank: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, rank, dtype=dtype) @ torch.randn(rank, d, dtype=dtype)


def test_principal_directions_rebuild_the_features():
    features = torch.randn(30, 7, dtype=torch.float64)
    values, directions = principal_directions(features)
    np.testing.assert_allclose(values.numpy(), np.linalg.svd(features.numpy(), compute_uv=False))
    torch.testing.assert_close(directions.mT @ directions, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close((features @ directions).norm(dim=0), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_principal_directions_stop_at_the_numerical_rank(dtype):
    features = low_rank(40, 10, 3, dtype)
    values, directions = principal_directions(features)
    assert len(values) == directions.shape[1] == int(torch.linalg.matrix_rank(features)) == 3
    assert len(principal_directions(torch.zeros(4, 3))[0]) == 0


def test_sqnr_agrees_with_numpy():
    features = torch.randn(50, 6, dtype=torch.float64)
    quantized = features + 0.01 * torch.randn(50, 6, dtype=torch.float64)
    z, zq = features.numpy(), quantized.numpy()
    eigenvalues, v = np.linalg.eigh(z.T @ z)
    expected = [
        10 * np.log10(np.sum((z @ v[:, k]) ** 2) / np.sum(((zq - z) @ v[:, k]) ** 2)) for k in np.argsort(-eigenvalues)
    ]
    np.testing.assert_allclose(sqnr_db_per_rank(features, quantized).numpy(), expected, rtol=1e-8)


def test_sqnr_closed_forms():
    features = torch.randn(20, 5, dtype=torch.float64)
    assert sqnr_db_per_rank(features, features).eq(math.inf).all()
    torch.testing.assert_close(sqnr_db_per_rank(features, 1.1 * features), torch.full((5,), 20.0, dtype=torch.float64))
    _, directions = principal_directions(features)
    only_third = features + features @ directions[:, 2:3] @ directions[:, 2:3].mT  # noise as large as the signal there
    sqnr = sqnr_db_per_rank(features, only_third)
    assert sqnr[2] == pytest.approx(0, abs=1e-9)
    assert (sqnr[[0, 1, 3, 4]] > 200).all()


def test_white_noise_lowers_sqnr_with_rank():
    scales = torch.logspace(0, -2, 8, dtype=torch.float64)
    features = torch.randn(4000, 8, dtype=torch.float64) * scales
    sqnr = sqnr_db_per_rank(features, features + 0.01 * torch.randn(4000, 8, dtype=torch.float64))
    assert (sqnr.diff() < 0).all()
    np.testing.assert_allclose(sqnr.numpy(), 20 * np.log10(scales.numpy() / 0.01), atol=0.5)


def test_sqnr_has_one_value_per_rank_the_features_have():
    features = low_rank(30, 9, 4)
    assert sqnr_db_per_rank(features, features + 0.1).shape == (4,)


def test_bands_sum_to_the_features_and_are_orthogonal():
    features = torch.randn(40, 9)
    parts = band_projection(features, BANDS)
    assert all(part.dtype == features.dtype and part.shape == features.shape for part in parts)
    torch.testing.assert_close(sum(parts), features)
    torch.testing.assert_close(parts[0] @ parts[1].mT, torch.zeros(40, 40), atol=1e-5, rtol=0)


def test_leading_band_is_the_truncated_svd_of_scikit_learn():
    features = torch.randn(40, 9, dtype=torch.float64)
    svd = TruncatedSVD(3, algorithm="arpack").fit(features.numpy())
    expected = svd.inverse_transform(svd.transform(features.numpy()))
    np.testing.assert_allclose(band_projection(features, ((0, 3),))[0].numpy(), expected, atol=1e-9)


def test_bands_beyond_the_rank_are_zero():
    features = low_rank(20, 9, 4)
    first, beyond = band_projection(features, ((0, 4), (4, None)))
    torch.testing.assert_close(first, features)
    assert beyond.abs().max() == 0


def test_bands_on_given_directions():
    features, reference = torch.randn(30, 6, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64)
    _, directions = principal_directions(reference)
    (part,) = band_projection(features, ((1, 3),), directions)
    torch.testing.assert_close(part @ directions[:, 1:3], features @ directions[:, 1:3])
    torch.testing.assert_close(part @ directions[:, 3:], torch.zeros(30, 3, dtype=torch.float64))


def test_band_accuracy_agrees_with_numpy():
    features, text = torch.randn(200, 8), torch.randn(10, 8)
    target = (features @ text.mT).argmax(-1)
    target[::3] = 0
    u, s, vt = np.linalg.svd(features.double().numpy(), full_matrices=False)
    expected = []
    for start, stop in BANDS:
        part = (u[:, start:stop] * s[start:stop]) @ vt[start:stop]
        expected.append(np.mean((part @ text.numpy().T).argmax(-1) == target.numpy()))
    accuracies = band_accuracy(features, text, target, BANDS)
    assert accuracies == pytest.approx(expected, abs=1 / 200)  # one sample may sit on a tie in single precision
    assert band_accuracy(features, text, target, ((0, None),)) == [
        float(((features @ text.mT).argmax(-1) == target).double().mean())
    ]


def test_band_accuracy_finds_the_band_that_holds_the_classes():
    target = torch.arange(300) % 3
    classes = torch.eye(6, dtype=torch.float64)[3:]  # class directions, orthogonal to the large nuisance directions
    nuisance = torch.randn(300, 3, dtype=torch.float64) * 10
    features = torch.cat([nuisance, torch.eye(3, dtype=torch.float64)[target]], 1)
    top, rest, beyond = band_accuracy(features, classes, target, ((0, 3), (3, 6), (6, None)))
    assert rest > 0.95 > 0.7 > top
    assert math.isnan(beyond)


def test_band_accuracy_of_one_sample_and_of_no_features():
    assert band_accuracy(torch.tensor([[1.0, 0.0]]), torch.eye(2), torch.tensor([0]), ((0, 1),)) == [1.0]
    assert math.isnan(band_accuracy(torch.zeros(3, 2), torch.eye(2), torch.zeros(3, dtype=torch.long), ((0, 1),))[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda: sqnr_db_per_rank(torch.ones(3, 2), torch.ones(2, 3)),
        lambda: sqnr_db_per_rank(torch.ones(3, 2), torch.full((3, 2), math.nan)),
        lambda: sqnr_db_per_rank(torch.full((3, 2), math.nan), torch.ones(3, 2)),
        lambda: principal_directions(torch.ones(0, 2)),
        lambda: principal_directions(torch.ones(3)),
        lambda: principal_directions(torch.ones(3, 2, dtype=torch.int64)),
        lambda: band_projection(torch.ones(3, 2), ((2, 2),)),
        lambda: band_projection(torch.ones(3, 2), ((-1, 2),)),
        lambda: band_projection(torch.ones(3, 2), ((0, 1),), torch.ones(3, 1)),
        lambda: band_accuracy(torch.ones(3, 2), torch.ones(4, 3), torch.zeros(3, dtype=torch.long)),
        lambda: band_accuracy(torch.ones(3, 2), torch.ones(4, 2), torch.zeros(2, dtype=torch.long)),
        lambda: band_accuracy(torch.ones(3, 2), torch.ones(4, 2), torch.full((3,), -1)),
        lambda: band_accuracy(torch.ones(3, 2), torch.ones(4, 2), torch.full((3,), 4)),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(VLMQError):
        call()
