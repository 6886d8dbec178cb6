"""The fitted logit scale against losses written out pair by pair and minimised by scipy's other methods."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch.nn.functional import normalize

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics import LogitScale, fit_logit_scale, pairs_nll
from lightning_vlmq.metrics.functional.logit_scale import LOGIT_SCALE_RANGE


def pairs(seed, n=60, captions=25, dim=8, noise=0.7):
    generator = torch.Generator().manual_seed(seed)
    texts = normalize(torch.randn(captions, dim, generator=generator), dim=-1)
    caption = torch.randint(captions, (n,), generator=generator)
    images = normalize(texts[caption] + noise * torch.randn(n, dim, generator=generator), dim=-1)
    return images, texts, caption


def loops(images, texts, caption, batch_size=10**9):
    """Cosines [n, n] of all pairs of a batch and whether they share a caption, as numpy."""
    n_batches = -(-len(caption) // batch_size)
    for k in range(n_batches):
        own = caption[k::n_batches]
        cosine = images[k::n_batches].double() @ texts[own].double().T
        yield cosine.numpy(), (own[:, None] == own[None]).numpy()


def contrastive(scale, batches):
    total, n = 0.0, 0
    for cosine, positive in batches:
        for logits, right in ((scale * cosine, positive), (scale * cosine.T, positive)):
            for i in range(len(logits)):
                total += logsumexp(logits[i]) - logsumexp(logits[i][right[i]])
        n += len(cosine)
    return total / (2 * n)


@pytest.mark.parametrize("seed", range(4))
def test_softmax_models_get_the_minimum_of_the_contrastive_nll(seed):
    data = pairs(seed)
    batches = list(loops(*data))
    best = minimize_scalar(
        lambda x: contrastive(np.exp(x), batches), bounds=(-4, 6), method="bounded", options={"xatol": 1e-9}
    )
    fitted = fit_logit_scale(*data, LogitScale(100.0))
    assert fitted.bias is None and np.log(fitted.scale) == pytest.approx(best.x, abs=1e-5)


@pytest.mark.parametrize("batch_size", [13, 1024])
def test_the_loss_is_the_one_written_out(batch_size):
    data = pairs(9)
    for scale in (0.5, 20.0, 900.0):
        assert pairs_nll(*data, scale, batch_size) == pytest.approx(contrastive(scale, loops(*data, batch_size)))
    assert np.isnan(pairs_nll(data[0][:0], data[1], data[2][:0], 1.0))


def test_a_bias_is_carried_along():
    data = pairs(2)
    fitted = fit_logit_scale(*data, LogitScale(10.0, -7.0))
    assert fitted == LogitScale(fit_logit_scale(*data, LogitScale(10.0)).scale, -7.0)


@pytest.mark.parametrize("start", [LogitScale(0.5), LogitScale(14.0), LogitScale(400.0)])
def test_the_start_does_not_matter(start):
    data = pairs(7)
    assert fit_logit_scale(*data, start).scale == pytest.approx(
        fit_logit_scale(*data, LogitScale(20.0)).scale, rel=1e-5
    )


def test_pairs_are_negatives_of_their_own_batch_only():
    data = pairs(3, n=50)
    batches = list(loops(*data, batch_size=20))
    assert [len(cosine) for cosine, _ in batches] == [17, 17, 16]
    best = minimize_scalar(
        lambda x: contrastive(np.exp(x), batches), bounds=(-4, 6), method="bounded", options={"xatol": 1e-9}
    )
    fitted = fit_logit_scale(*data, LogitScale(10.0), batch_size=20).scale
    assert np.log(fitted) == pytest.approx(best.x, abs=1e-5)
    assert fitted != pytest.approx(fit_logit_scale(*data, LogitScale(10.0)).scale, rel=1e-4)


def test_pairs_that_are_told_apart_or_worse_than_chance():
    corners = torch.eye(5)
    right = torch.arange(5)
    sure = fit_logit_scale(corners, corners, right, LogitScale(1.0)).scale  # the sharper the better
    assert contrastive(sure, loops(corners, corners, right)) < 1e-8 and sure < LOGIT_SCALE_RANGE[1]
    assert fit_logit_scale(-corners, corners, right, LogitScale(10.0)).scale == pytest.approx(LOGIT_SCALE_RANGE[0])
    far = fit_logit_scale(-corners, corners, right, LogitScale(LOGIT_SCALE_RANGE[1]))  # exp(1000) on the way
    assert np.isfinite(far.scale)


def test_same_numbers_twice_and_under_no_grad():
    data = pairs(5)
    with torch.no_grad():
        inside = fit_logit_scale(*data, LogitScale(10.0, -3.0))
    assert inside == fit_logit_scale(*data, LogitScale(10.0, -3.0))


def test_broken_features_have_no_scale():
    images, texts, caption = pairs(1)
    images[3, 0] = torch.nan
    assert np.isnan(fit_logit_scale(images, texts, caption, LogitScale(10.0)).scale)
    assert np.isnan(pairs_nll(images, texts, caption, 10.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": torch.zeros(60, dtype=torch.int64)}, "two distinct captions"),
        ({"caption": torch.full((60,), 25)}, r"\[0, 25\)"),
        ({"caption": torch.zeros(59, dtype=torch.int64)}, "caption index"),
        ({"images": torch.zeros(60, 7)}, "images"),
        ({"batch_size": 1}, "at least 2"),
        ({"images": torch.zeros(0, 8), "caption": torch.zeros(0, dtype=torch.int64)}, "two distinct captions"),
    ],
)
def test_bad_input(change, message):
    images, texts, caption = pairs(0)
    arguments = {"images": images, "texts": texts, "caption": caption, "start": LogitScale(10.0)} | change
    with pytest.raises(VLMQError, match=message):
        fit_logit_scale(**arguments)
