"""Out-of-distribution scores, computed from cached model outputs only. HIGHER always means more in-distribution.

A score is one registered function that says what it needs; a new one needs nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_vlmq.core.calls import parse_call
from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.core.registry import Registry


@dataclass(frozen=True)
class ScoreInputs:
    """What a score may look at, for ``n`` samples, ``C`` classes and ``D`` feature dimensions.

    Attributes:
        cosine: float ``[n, C]``, cosine similarity of image and class-text features.
        logits: float ``[n, C]``, logit scale (and bias) applied.
        features: float ``[n, D]``, image features.
        local_cosine: float ``[n, L, C]``, cosine similarity of each of L image patches' features.
        calibration_features: float ``[m, D]``, features of in-distribution calibration images.
        calibration_target: int64 ``[m]``, their classes where they have any.

    Raises:
        VLMQError: shapes do not fit together.
    """

    cosine: Tensor
    logits: Tensor
    features: Tensor | None = None
    local_cosine: Tensor | None = None
    calibration_features: Tensor | None = None
    calibration_target: Tensor | None = None

    def __post_init__(self) -> None:
        if self.cosine.ndim != 2 or self.cosine.shape != self.logits.shape:
            raise VLMQError(
                f"cosine and logits must share a shape [n, C], got {tuple(self.cosine.shape)}"
                f" and {tuple(self.logits.shape)}"
            )
        n, n_classes = self.cosine.shape
        if self.local_cosine is not None and (
            self.local_cosine.ndim != 3 or self.local_cosine.shape[::2] != (n, n_classes)
        ):
            raise VLMQError(f"local_cosine must be [{n}, L, {n_classes}], got {tuple(self.local_cosine.shape)}")
        if self.features is not None and (self.features.ndim != 2 or self.features.shape[0] != n):
            raise VLMQError(f"features must be [{n}, D], got {tuple(self.features.shape)}")
        if self.calibration_target is not None and (
            self.calibration_features is None or self.calibration_target.shape != self.calibration_features.shape[:1]
        ):
            raise VLMQError("calibration_target must hold one class per row of calibration_features")

    def need(self, score: str, *names: str) -> list[Tensor]:
        """The named inputs, float32 at least. Raises :class:`VLMQError` naming the score if one was not given."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise VLMQError(
                f"the OOD score '{score}' needs {' and '.join(missing)}, which were not cached for this run"
            )
        return [_at_least_float32(getattr(self, name)) for name in names]


@dataclass(frozen=True)
class Score:
    """A score as it was registered: what to make ready for it, and which measures it has, follow from what it declares.

    Attributes:
        name: its name.
        function: of :class:`ScoreInputs` (with the declared fields alone) and parameters, to float32 ``[n]`` (float64 for float64).
        needs: the fields of :class:`ScoreInputs` that it reads.
        follows_logit_scale: whether another logit scale can change how it ranks.
    """

    name: str
    function: Callable[..., Tensor]
    needs: frozenset[str]
    follows_logit_scale: bool

    def __call__(self, inputs: ScoreInputs, **parameters: float) -> Tensor:
        """Scores ``[n]``. Raises :class:`VLMQError` if a needed input was not given, or one is read that was not declared."""
        inputs.need(self.name, *sorted(self.needs))
        return self.function(_Declared(inputs, self), **parameters)


class _Declared:
    """The inputs that a score declares, and no others."""

    def __init__(self, inputs: ScoreInputs, score: Score) -> None:
        self._inputs, self._score = inputs, score

    def __getattr__(self, name: str) -> Any:
        if name in _INPUTS and name not in self._score.needs | _OPTIONAL:
            raise VLMQError(f"the OOD score '{self._score.name}' reads {name}: declare it, needs={{..., '{name}'}}")
        return getattr(self._inputs, name)


_INPUTS = frozenset(field.name for field in fields(ScoreInputs))
_OPTIONAL = frozenset({"calibration_target"})


class ScoreRegistry(Registry[Score]):
    """Scores by name, each with what it needs."""

    def register(  # type: ignore[override]
        self, name: str, needs: Collection[str], follows_logit_scale: bool | None = None
    ) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
        """Decorator that files a function of :class:`ScoreInputs` under ``name``.

        Args:
            name: its name in configurations and results.
            needs: the fields of :class:`ScoreInputs` that it reads.
            follows_logit_scale: whether another scale changes how it ranks; by default if it needs ``logits``.

        Raises:
            VLMQError: an unknown input.
            KeyError: the name is taken.
        """
        for need in needs:
            if need not in _INPUTS:
                raise unknown("input of a score", need, sorted(_INPUTS))
        follows = "logits" in needs if follows_logit_scale is None else follows_logit_scale

        def file(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            super(ScoreRegistry, self).register(name)(Score(name, function, frozenset(needs), follows))
            return function

        return file


OOD_SCORES = ScoreRegistry("OOD score")
"""Every score by name. Parameters beyond the inputs have the published defaults."""


@dataclass(frozen=True)
class OODScore:
    """A score of :data:`OOD_SCORES` with its parameters.

    Attributes:
        name: its name in the registry.
        parameters: what differs from the published defaults.
    """

    name: str
    parameters: Mapping[str, float]

    @property
    def needs(self) -> frozenset[str]:
        """What it reads; see :class:`Score`."""
        return OOD_SCORES[self.name].needs

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """Scores ``[n]``; see :data:`OOD_SCORES`."""
        return OOD_SCORES[self.name](inputs, **self.parameters)


def ood_score(text: str) -> OODScore:
    """A score as configurations write it: ``"mcm"``, or with parameters, ``"mcm(temperature=0.5)"``.

    Raises:
        VLMQError: unknown score or parameter, or not of this form.
    """
    name, parameters = parse_call(text, "OOD score")
    known = list(inspect.signature(OOD_SCORES[name].function).parameters)[1:]
    for parameter, value in parameters.items():
        if parameter not in known:
            raise unknown(f"parameter of the OOD score '{name}'", parameter, known)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise VLMQError(f"cannot read the OOD score '{text}': {parameter} is a number, e.g. mcm(temperature=0.5)")
    return OODScore(name, parameters)


def score_name(text: str) -> str:
    """The registry's name in a score that :func:`ood_score` takes."""
    return text.partition("(")[0].strip()


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.element_size() >= 4 else values.float()


def _positive(temperature: float) -> float:
    if not temperature > 0:
        raise VLMQError(f"a temperature must be positive, got {temperature}")
    return temperature


@OOD_SCORES.register("mcm", needs={"cosine"})
def mcm(inputs: ScoreInputs, temperature: float = 1.0) -> Tensor:
    """Maximum concept matching: max_c softmax_c(cosine / T) (Ming et al. 2022, eq. 1). ``[n]`` in (0, 1]."""
    return (_at_least_float32(inputs.cosine) / _positive(temperature)).softmax(-1).amax(-1)


@OOD_SCORES.register("msp", needs={"logits"})
def msp(inputs: ScoreInputs) -> Tensor:
    """Maximum softmax probability of the logits (Hendrycks & Gimpel 2017). ``[n]`` in (0, 1]."""
    return _at_least_float32(inputs.logits).softmax(-1).amax(-1)


@OOD_SCORES.register("maxlogit", needs={"logits"}, follows_logit_scale=False)
def maxlogit(inputs: ScoreInputs) -> Tensor:
    """Highest logit (Hendrycks et al. 2022). ``[n]``."""
    return _at_least_float32(inputs.logits).amax(-1)


@OOD_SCORES.register("energy", needs={"logits"})
def energy(inputs: ScoreInputs) -> Tensor:
    """Negative free energy at T = 1: log sum_c exp(logit_c) (Liu et al. 2020, eq. 4). ``[n]`` in nats."""
    return _at_least_float32(inputs.logits).logsumexp(-1)


@OOD_SCORES.register("entropy", needs={"logits"})
def entropy(inputs: ScoreInputs) -> Tensor:
    """Negated Shannon entropy of the softmax of the logits. ``[n]`` in nats, in [-log C, 0]."""
    log_probs = _at_least_float32(inputs.logits).log_softmax(-1)
    probs = log_probs.exp()
    return (probs * log_probs.where(probs > 0, 0.0)).sum(-1)  # p log p is 0 at p = 0


@OOD_SCORES.register("gl_mcm", needs={"cosine", "local_cosine"})
def gl_mcm(inputs: ScoreInputs, temperature: float = 1.0, local_weight: float = 1.0) -> Tensor:
    """Global-local MCM: MCM + weight * max over patches and classes of softmax_c(local cosine / T) (Miyai et al. 2023).

    ``[n]`` in (0, 1 + weight]. Needs ``local_cosine``.
    """
    (local,) = inputs.need("gl_mcm", "local_cosine")
    return mcm(inputs, temperature) + local_weight * (local / _positive(temperature)).softmax(-1).amax((-2, -1))


def _feature_pair(score: str, inputs: ScoreInputs) -> tuple[Tensor, Tensor]:
    features, reference = inputs.need(score, "features", "calibration_features")
    if reference.ndim != 2 or reference.shape[1] != features.shape[1] or len(reference) == 0:
        raise VLMQError(
            f"calibration_features must be [m, {features.shape[1]}] with m > 0, got {tuple(reference.shape)}"
        )
    return features, reference


@OOD_SCORES.register("knn", needs={"features", "calibration_features"})
def knn(inputs: ScoreInputs, k: int = 50) -> Tensor:
    """Negated distance to the k-th nearest calibration feature, all features normalised (Sun et al. 2022). ``[n]``.

    Needs ``features`` and at least ``k`` ``calibration_features``. In [-2, 0].
    """
    features, reference = _feature_pair("knn", inputs)
    if not 1 <= k <= len(reference):
        raise VLMQError(f"the {k}-th nearest of {len(reference)} calibration features does not exist: set k lower")
    reference = torch.nn.functional.normalize(reference, dim=-1)
    distances = [
        torch.cdist(chunk, reference)
        .topk(k, dim=-1, largest=False)
        .values[:, -1]  # CUDA's kthvalue is not deterministic
        for chunk in torch.nn.functional.normalize(features, dim=-1).split(4096)
    ]
    return -torch.cat(distances)


@OOD_SCORES.register("mahalanobis", needs={"features", "calibration_features"})
def mahalanobis(inputs: ScoreInputs) -> Tensor:
    """Negated squared Mahalanobis distance to the nearest class mean of the calibration features (Lee et al. 2018).

    One covariance for all classes, with Ledoit-Wolf shrinkage (2004), as there are often fewer calibration samples than
    dimensions. Without ``calibration_target`` all calibration features are one class. ``[n]``, at most 0; a row of
    features with a NaN scores NaN. Needs ``features`` and at least two finite ``calibration_features``.
    """
    features, reference = _feature_pair("mahalanobis", inputs)
    whiten, centres = _class_means(reference, inputs.calibration_target)
    nearest = [torch.cdist(part, centres).amin(-1).square() for part in _whitened(features, whiten).split(4096)]
    return -torch.cat(nearest).to(features.dtype)


_FITTED: MutableMapping[Tensor, tuple[int, Tensor | None, Tensor, Tensor]] = WeakTensorKeyDictionary()
"""What :func:`mahalanobis` found of calibration features that are still there: every batch asks for the same."""


def _class_means(reference: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
    """The covariance's Cholesky factor, and the whitened class means."""
    version = 0 if reference.is_inference() else reference._version  # changed in place, it is another
    known = _FITTED.get(reference)
    if known is not None and known[0] == version and known[1] is label:
        return known[2:]
    found = _fit_class_means(reference.to(torch.float64), label)
    _FITTED[reference] = (version, label, *found)
    return found


def _whitened(rows: Tensor, whiten: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(whiten, rows.to(torch.float64).mT, upper=False).mT


def _fit_class_means(reference: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
    from sklearn.covariance import LedoitWolf  # here, not at the top: seconds to import, for one score

    if len(reference) < 2 or not bool(reference.isfinite().all()):
        raise VLMQError("the OOD score 'mahalanobis' needs at least two calibration features, all finite")
    label = torch.zeros(len(reference), dtype=torch.int64) if label is None else label
    classes, member = label.to(reference.device).unique(return_inverse=True)
    sums = torch.zeros(len(classes), reference.shape[1], dtype=torch.float64, device=reference.device)
    means = sums.index_add(0, member, reference) / member.bincount().unsqueeze(1)
    fitted = LedoitWolf(assume_centered=True).fit((reference - means[member]).cpu().numpy())
    covariance = torch.from_numpy(fitted.covariance_).to(reference.device)
    whiten = torch.linalg.cholesky(covariance)
    return whiten, _whitened(means, whiten)
