import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from lightning_vlmq import metrics as m
from lightning_vlmq.core.errors import VLMQError


def scores(n1, n2, levels=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids, oods = 0.7 + torch.randn(n1, generator=generator), torch.randn(n2, generator=generator)
    return ((ids * levels).round() / levels, (oods * levels).round() / levels) if levels else (ids, oods)


def sklearn_values(ids, oods, drop_intermediate):
    y, s = np.r_[np.ones(len(ids)), np.zeros(len(oods))], torch.cat([ids, oods]).numpy()
    fpr, tpr, _ = roc_curve(y, s, drop_intermediate=drop_intermediate)
    fpr_ood, tpr_ood, _ = roc_curve(1 - y, -s, drop_intermediate=drop_intermediate)
    return {
        "auroc": roc_auc_score(y, s),
        "aupr_in": average_precision_score(y, s),
        "aupr_out": average_precision_score(1 - y, -s),
        "fpr95": fpr[np.argmax(tpr >= 0.95)],
        "fpr95_openood": fpr_ood[np.argmax(tpr_ood >= 0.95)],  # openood/evaluators/metrics.py, auc_and_fpr_recall
    }


@pytest.mark.parametrize("levels", [None, 10, 2, 0.5])
@pytest.mark.parametrize(("n1", "n2"), [(300, 200), (20, 60), (1, 5), (5, 1), (1, 1)])
def test_against_sklearn(n1, n2, levels):
    ids, oods = scores(n1, n2, levels, seed=n1 + n2)
    for name, expected in sklearn_values(ids, oods, drop_intermediate=False).items():
        assert getattr(m, name)(ids, oods).item() == pytest.approx(expected, abs=1e-12), name


@pytest.mark.parametrize("seed", range(3))
def test_openoods_own_call_where_scores_are_distinct(seed):
    ids, oods = scores(300, 200, seed=seed)
    for name, expected in sklearn_values(ids, oods, drop_intermediate=True).items():
        assert getattr(m, name)(ids, oods).item() == pytest.approx(expected, abs=1e-12), name


def test_dropped_points_of_sklearns_default_only_raise_the_rate():
    same = torch.arange(100).float()
    assert m.fpr95(same, same).item() == m.fpr95_openood(same, same).item() == pytest.approx(0.95)
    assert sklearn_values(same, same, drop_intermediate=True)["fpr95"] == 1.0


@pytest.mark.parametrize("shift", [-1e6, 0, 1e6])
def test_perfect_chance_and_reversed(shift):
    low, high = torch.arange(50.0) + shift, torch.arange(50.0) + 100 + shift
    assert [getattr(m, f)(high, low).item() for f in ("auroc", "aupr_in", "aupr_out")] == [1, 1, 1]
    assert m.fpr95(high, low) == m.fpr95_openood(high, low) == 0
    assert m.auroc(low, high) == 0 and m.fpr95(low, high) == m.fpr95_openood(low, high) == 1
    flat = torch.zeros(50)
    assert m.auroc(flat, flat) == 0.5 and m.aupr_in(flat, flat[:25]).item() == pytest.approx(2 / 3)
    assert m.fpr95(flat, flat) == m.fpr95_openood(flat, flat) == 1


def test_undefined_and_infinite():
    ids, oods = scores(10, 10)
    for fn in (m.auroc, m.aupr_in, m.aupr_out, m.fpr95, m.fpr95_openood):
        assert fn(ids[:0], oods).isnan() and fn(ids, oods[:0]).isnan()
        broken = ids.clone()
        broken[0] = torch.nan
        assert fn(broken, oods).isnan() and fn(oods, broken).isnan()
        assert fn(torch.stack([ids, broken]), oods).isnan().tolist() == [False, True]
    assert (
        m.auroc(torch.tensor([torch.inf, 0.0]), torch.tensor([-torch.inf, torch.inf])).item() == (1 + 0.5 + 1 + 0) / 4
    )


def test_mixed_precision_is_compared_exactly():
    assert m.auroc(torch.tensor([1.0 + 1e-12], dtype=torch.float64), torch.tensor([1.0])) == 1.0


def test_many_samples_do_not_overflow():
    ids = torch.linspace(0, 1, 200_000)
    assert m.auroc(ids + 2, ids) == 1.0


# --- the scores -------------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    cosine = torch.rand(30, 9, generator=generator) * 0.4 - 0.1
    return m.ScoreInputs(cosine=cosine, logits=100 * cosine)


def test_scores_against_scipy(inputs):
    cosine, logits = inputs.cosine.double().numpy(), inputs.logits.double().numpy()
    expected = {
        "mcm": softmax(cosine, 1).max(1),
        "msp": softmax(logits, 1).max(1),
        "maxlogit": logits.max(1),
        "energy": logsumexp(logits, 1),
        "entropy": -scipy_entropy(softmax(logits, 1), axis=1),
    }
    for name, values in expected.items():
        score = m.OOD_SCORES[name](inputs)
        assert score.shape == (30,) and score.dtype == torch.float32
        np.testing.assert_allclose(score, values, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["mcm", "msp", "maxlogit", "energy", "entropy"])
def test_higher_is_more_in_distribution(name):
    cosine = torch.tensor([[0.9, 0.1, 0.1], [0.11, 0.1, 0.1]])
    sure, unsure = m.OOD_SCORES[name](m.ScoreInputs(cosine, 10 * cosine))
    assert sure > unsure


@pytest.mark.parametrize("name", ["mcm", "msp", "maxlogit", "energy", "entropy"])
def test_scores_degenerate(name):
    assert m.OOD_SCORES[name](m.ScoreInputs(torch.zeros(0, 3), torch.zeros(0, 3))).shape == (0,)
    one_class = m.OOD_SCORES[name](m.ScoreInputs(torch.ones(2, 1), torch.ones(2, 1)))
    assert one_class.isfinite().all()
    broken = torch.tensor([[torch.nan, 0.0], [1.0, 0.0]])
    assert m.OOD_SCORES[name](m.ScoreInputs(broken, broken)).isnan().tolist() == [True, False]
    half = torch.randn(3, 4).half()
    assert m.OOD_SCORES[name](m.ScoreInputs(half, half)).dtype == torch.float32


def test_entropy_of_certainty_is_zero():
    sure = torch.tensor([[1e4, 0.0]])
    assert m.OOD_SCORES["entropy"](m.ScoreInputs(sure, sure)) == 0


def test_score_bad_input():
    with pytest.raises(VLMQError, match="share a shape"):
        m.ScoreInputs(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(VLMQError, match="unknown OOD score 'mcn'; did you mean mcm"):
        m.OOD_SCORES["mcn"]


def test_scores_take_parameters():
    cosine = torch.rand(7, 3)
    inputs = m.ScoreInputs(cosine, cosine)
    written = m.ood_score("mcm(temperature=0.05)")
    assert written == m.OODScore("mcm", {"temperature": 0.05}) and m.score_name("mcm(temperature=0.05)") == "mcm"
    torch.testing.assert_close(written(inputs), (cosine / 0.05).softmax(-1).amax(-1))
    torch.testing.assert_close(m.ood_score(" energy")(inputs), cosine.logsumexp(-1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mcn", "unknown OOD score 'mcn'; did you mean mcm"),
        ("mcm(temprature=1)", "unknown parameter of the OOD score 'mcm' 'temprature'; did you mean temperature"),
        ("msp(temperature=1)", "unknown parameter of the OOD score 'msp'"),
        ("mcm(1)", "cannot read the OOD score"),
        ("mcm(temperature='a')", "cannot read the OOD score"),
        ("mcm(temperature=x)", "cannot read the OOD score"),
        ("mcm(", "cannot read the OOD score"),
        ("mcm.energy", "cannot read the OOD score"),
        ("", "cannot read the OOD score"),
    ],
)
def test_scores_that_cannot_be_read(text, message):
    with pytest.raises(VLMQError, match=message):
        m.ood_score(text)


@pytest.mark.parametrize("temperature", ["0", "-1.0"])
def test_a_temperature_is_positive(temperature):
    with pytest.raises(VLMQError, match="temperature must be positive"):
        m.ood_score(f"mcm(temperature={temperature})")(m.ScoreInputs(torch.ones(1, 2), torch.ones(1, 2)))
