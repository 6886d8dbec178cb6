"""OOD scores that look at patches or at calibration features."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics import OOD_SCORES, ScoreInputs


def inputs(n=20, m=80, d=6, **kwargs):
    generator = torch.Generator().manual_seed(0)
    cosine = torch.randn(n, 4, generator=generator)
    given = {
        "features": torch.randn(n, d, generator=generator),
        "calibration_features": torch.randn(m, d, generator=generator) * torch.arange(1, d + 1) + 1,
        **kwargs,
    }
    return ScoreInputs(cosine, 10 * cosine, **given)


def test_gl_mcm():
    local = torch.randn(20, 9, 4)
    given = inputs(local_cosine=local)
    expected = softmax(given.cosine.numpy(), 1).max(1) + softmax(local.numpy(), 2).max((1, 2))
    np.testing.assert_allclose(OOD_SCORES["gl_mcm"](given), expected, rtol=1e-5)
    torch.testing.assert_close(OOD_SCORES["gl_mcm"](given, local_weight=0.0), OOD_SCORES["mcm"](given))
    local[:, 3] = 0  # nothing is left of a patch: it is as near to each class as to any other, and never the maximum
    others = inputs(local_cosine=local[:, [k for k in range(9) if k != 3]])
    zero = replace(others, local_cosine=local)
    torch.testing.assert_close(OOD_SCORES["gl_mcm"](zero), OOD_SCORES["gl_mcm"](others))


@pytest.mark.parametrize("k", [1, 7, 80])
def test_knn_against_sklearn(k):
    given = inputs()
    reference = NearestNeighbors(n_neighbors=k).fit(normalize(given.calibration_features.numpy()))
    distance = reference.kneighbors(normalize(given.features.numpy()))[0][:, -1]
    np.testing.assert_allclose(OOD_SCORES["knn"](given, k=k), -distance, atol=1e-3)


@pytest.mark.parametrize("classes", [None, 3])
def test_mahalanobis_against_sklearn(classes):
    target = None if classes is None else 5 * (torch.arange(80) % classes)  # labels need not be consecutive
    given = inputs(calibration_target=target)
    reference = given.calibration_features.double().numpy()
    label = np.zeros(80) if target is None else target.numpy()
    means = np.stack([reference[label == c].mean(0) for c in np.unique(label)])
    residual = np.concatenate([reference[label == c] - reference[label == c].mean(0) for c in np.unique(label)])
    precision = np.linalg.inv(LedoitWolf(assume_centered=True).fit(residual).covariance_)
    delta = given.features.double().numpy()[:, None] - means[None]
    expected = -np.einsum("nci,ij,ncj->nc", delta, precision, delta).min(1)
    score = OOD_SCORES["mahalanobis"](given)
    assert score.dtype == torch.float32
    np.testing.assert_allclose(score, expected, rtol=1e-4)


def test_calibration_features_are_fitted_once(monkeypatch):
    given, fits = inputs(), []
    fit = LedoitWolf.fit
    monkeypatch.setattr(LedoitWolf, "fit", lambda self, x: fits.append(len(x)) or fit(self, x))
    with torch.inference_mode():
        parts = [
            replace(given, features=given.features[k::2], cosine=given.cosine[k::2], logits=given.logits[k::2])
            for k in (0, 1)
        ]
        found = [OOD_SCORES["mahalanobis"](part) for part in parts]
    whole = OOD_SCORES["mahalanobis"](given)
    assert len(fits) == 1 and torch.equal(torch.stack(found, 1).flatten(), whole)
    given.calibration_features.mul_(2)  # other features now
    assert not torch.allclose(OOD_SCORES["mahalanobis"](given), whole) and len(fits) == 2


def test_mahalanobis_with_fewer_samples_than_dimensions():
    assert OOD_SCORES["mahalanobis"](inputs(m=4, d=30)).isfinite().all()


@pytest.mark.parametrize("name", ["knn", "mahalanobis"])
def test_broken_row_and_far_row(name):
    features = torch.zeros(3, 6)
    features[0], features[1], features[2] = torch.ones(6), -100 * torch.ones(6), torch.nan
    score = OOD_SCORES[name](inputs(n=3, features=features))
    assert score[0] > score[1] and score.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: OOD_SCORES["gl_mcm"](inputs()), "'gl_mcm' needs local_cosine"),
        (lambda: OOD_SCORES["knn"](inputs(features=None)), "'knn' needs features"),
        (lambda: OOD_SCORES["mahalanobis"](inputs(calibration_features=None)), "needs calibration_features"),
        (lambda: OOD_SCORES["knn"](inputs(m=3)), "set k lower"),
        (lambda: OOD_SCORES["knn"](inputs(calibration_features=torch.zeros(60, 2))), r"\[m, 6\]"),
        (lambda: OOD_SCORES["mahalanobis"](inputs(m=1)), "at least two"),
        (lambda: inputs(local_cosine=torch.zeros(20, 9, 5)), r"local_cosine must be \[20, L, 4\]"),
        (lambda: inputs(features=torch.zeros(3, 6)), "features must be"),
        (lambda: inputs(calibration_target=torch.zeros(3)), "one class per row"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(VLMQError, match=message):
        act()
