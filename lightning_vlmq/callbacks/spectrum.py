"""Watches the singular values of every layer's effective weight while a model is trained or evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch import distributed as dist

from lightning_vlmq.callbacks.loggers import log_figure, takes_figures
from lightning_vlmq.callbacks.sharing import dealt_out
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.identity import tensors_digest
from lightning_vlmq.evaluation.digests import SPECTRA
from lightning_vlmq.evaluation.features import FeatureCache
from lightning_vlmq.plotting.spectra import log_ratio_heatmap, singular_value_curves
from lightning_vlmq.spectral import LayerSpectrum, Spectrum, layer_group, matrix_weights, weight_spectra

CURVE_COLUMNS = ("kind", "layer", "group", "x", "y", "y_reference")


class SingularValueSpectrum(Callback):
    """Layer-wise singular values of the dequantized weights beside full precision's.

    At the end of every validation (but the sanity check) and test, at the start of a fit and then every ``every_n_steps``
    optimizer steps, rank zero writes to all loggers (figures to those that take images), at the trainer's global step:

    * ``singular_values/<tower>_<kind>``: figure, a line per layer and its reference dashed;
    * ``singular_values/log_ratio``: figure, layer by relative rank, ``log2(quantized / reference)``;
    * in a fit, where they make curves, ``spectrum/<tower>_<kind>/<metric>``: scalars, the mean over a group's layers; on request
      also ``spectrum_layers/<metric>/<layer>``, each layer's.

    The Lightning module must have ``vlm`` (the model under test, with ``tower_of(name)``) and may have ``reference``
    (the full-precision model, or ``None``). Without a reference a fit compares with the weights it started from; a
    stand-alone validation then shows no ratio. Full precision's spectra are decomposed once and kept in the module's cache of
    features. Scales and rotations that a method has moved between a layer's input and its weight (SmoothQuant, AWQ, QuaRot) are
    folded back before spectra are compared.

    Args:
        every_n_steps: optimizer steps between two records during fit; 0 for the start and validation only.
        top_ranks: ranks k of the scalars "share of energy in the top k". The first is the metric ``top_energy``,
            others are ``top_energy_<k>``.
        layer_scalars: whether each layer's scalars are logged, hundreds per model.

    Raises:
        VLMQError: if an argument is out of range; later, if the module has no ``vlm`` or a weight is not finite.
    """

    def __init__(self, every_n_steps: int = 50, top_ranks: Sequence[int] = (8,), layer_scalars: bool = False) -> None:
        if every_n_steps < 0:
            raise VLMQError(f"every_n_steps must be 0 or more, not {every_n_steps}")
        if not top_ranks or min(top_ranks) < 1:
            raise VLMQError(f"top_ranks must be one or more positive ranks, not {list(top_ranks)}")
        self.every_n_steps = every_n_steps
        self.top_ranks = tuple(top_ranks)
        self.layer_scalars = layer_scalars
        self._layers: list[LayerSpectrum] = []
        self._layer_scalars: dict[str, dict[str, float]] = {}
        self._reference_digest = ""
        self._reference: dict[str, Spectrum] = {}
        self._fit_start: dict[str, Spectrum] | None = None
        self._written_step: int | None = None

    def identity(self) -> dict[str, Any]:
        """What decides the rows; how often they are recorded on the way does not."""
        return {"top_ranks": self.top_ranks}

    def curves(self) -> pd.DataFrame:
        """The singular values last computed, one row per layer and rank.

        Returns:
            columns kind (``"singular_values"``), layer, group, x (rank from 1), y, y_reference (NaN without one).

        Raises:
            VLMQError: before the first validation or training step.
        """
        parts = []
        for layer in self._computed():
            size = len(layer.spectrum)
            reference = np.full(size, np.nan) if layer.reference is None else layer.reference.singular_values.numpy()
            columns = (
                "singular_values",
                layer.name,
                layer.group,
                np.arange(1, size + 1),
                layer.spectrum.singular_values.numpy(),
                reference,
            )
            parts.append(pd.DataFrame(dict(zip(CURVE_COLUMNS, columns, strict=True))))
        return pd.concat(parts, ignore_index=True)

    def rows(self) -> dict[str, dict[str, float]]:
        """Scalars last computed, averaged over the layers of a group: ``{group: {metric: value}}``.

        Metrics are ``stable_rank``, ``effective_rank`` (both counts of directions) and ``top_energy`` (a fraction).

        Raises:
            VLMQError: before the first validation or training step.
        """
        groups: dict[str, list[dict[str, float]]] = {}
        for layer in self._computed():
            groups.setdefault(layer.group, []).append(self._layer_scalars[layer.name])
        return {
            group: {metric: fmean(values[metric] for values in members) for metric in members[0]}
            for group, members in groups.items()
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the spectra that training starts from, where there is no full-precision model to compare with."""
        self._fit_start, self._written_step = None, None
        if getattr(pl_module, "reference", None) is None:
            self._fit_start = shared_weight_spectra(matrix_weights(_vlm(pl_module)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the state before the first step."""
        self._record(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record when ``every_n_steps`` optimizer steps have passed; accumulated batches in between do not count."""
        step, every = trainer.global_step, self.every_n_steps
        if every and step % every == 0 and step != self._written_step:
            self._record(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record, unless this was the sanity check or training has just recorded this very step."""
        if trainer.sanity_checking or (trainer.state.fn == "fit" and self._written_step == trainer.global_step):
            return
        self._record(trainer, pl_module)

    on_test_end = on_validation_end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the start of the fit: a later validation is not compared with it."""
        self._fit_start = None

    def _computed(self) -> list[LayerSpectrum]:
        if not self._layers:
            raise VLMQError("no spectra yet; run validate or fit with this callback first (rank zero has them)")
        return self._layers

    def _scalars(self, spectrum: Spectrum) -> dict[str, float]:
        first, *others = self.top_ranks
        return {
            "stable_rank": spectrum.stable_rank,
            "effective_rank": spectrum.effective_rank,
            "top_energy": spectrum.energy_at(first),
            **{f"top_energy_{k}": spectrum.energy_at(k) for k in others},
        }

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        vlm = _vlm(pl_module)
        weights = matrix_weights(vlm)
        if not weights:
            raise VLMQError(
                "the model has no linear or convolution layer, so no spectrum; remove SingularValueSpectrum"
            )
        reference, reference_label = self._reference_spectra(pl_module)
        self._layers = []
        for name, spectrum in shared_weight_spectra(weights).items():
            beside = reference.get(name)
            if beside is not None and len(beside) != len(spectrum):
                beside = None
            self._layers.append(
                LayerSpectrum(name, layer_group(name, weights[name], vlm.tower_of(name)), spectrum, beside)
            )
        self._layer_scalars = {layer.name: self._scalars(layer.spectrum) for layer in self._layers}
        self._written_step = trainer.global_step
        if trainer.state.fn == "fit":
            self._log_scalars(trainer)
        if trainer.is_global_zero and takes_figures(trainer):
            is_quantized = any(hasattr(module, "effective_weight") for module in vlm.modules())
            self._draw(trainer, "quantized" if is_quantized else "model", reference_label)

    def _reference_spectra(self, pl_module: LightningModule) -> tuple[Mapping[str, Spectrum], str]:
        model = getattr(pl_module, "reference", None)
        if model is None:
            return self._fit_start or {}, "start of fit"
        weights = matrix_weights(model)
        if (digest := tensors_digest(weights)) != self._reference_digest:  # decomposed once, then only hashed
            kept = getattr(pl_module, "cache", FeatureCache(None))
            self._reference, self._reference_digest = kept_spectra(weights, digest, kept), digest
        return self._reference, "FP32"

    def _log_scalars(self, trainer: Trainer) -> None:
        scalars = {
            f"spectrum/{group.replace('/', '_')}/{metric}": value
            for group, values in self.rows().items()
            for metric, value in values.items()
        }
        if self.layer_scalars:
            for name, values in self._layer_scalars.items():
                scalars |= {f"spectrum_layers/{metric}/{name}": value for metric, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, trainer.global_step)

    def _draw(self, trainer: Trainer, label: str, reference_label: str) -> None:
        step = trainer.global_step
        groups: dict[str, list[LayerSpectrum]] = {}
        for layer in self._layers:
            groups.setdefault(layer.group, []).append(layer)
        for group, layers in groups.items():
            figure = singular_value_curves(layers, f"{group}, step {step}", label, reference_label)
            log_figure(trainer, f"singular_values/{group.replace('/', '_')}", figure)
        if compared := [layer for layer in self._layers if layer.reference is not None]:
            figure = log_ratio_heatmap(compared, f"change of singular values, step {step}", label, reference_label)
            log_figure(trainer, "singular_values/log_ratio", figure)


def shared_weight_spectra(weights: Mapping[str, Tensor]) -> dict[str, Spectrum]:
    """As :func:`~lightning_vlmq.spectral.weight_spectra`, each process of the default group decomposing its share of the layers.

    Every process has to call it with the same weights, and gets all spectra.

    Raises:
        VLMQError: in every process, naming the layer whose weight is no finite matrix.
    """
    sizes = {name: weight.numel() for name, weight in weights.items()}
    return dealt_out(sizes, lambda names: weight_spectra({name: weights[name] for name in names}))


def kept_spectra(weights: Mapping[str, Tensor], digest: str, cache: FeatureCache) -> dict[str, Spectrum]:
    """As :func:`shared_weight_spectra`, from the cache of features where an earlier run of one process has put them.

    Args:
        weights: by layer name.
        digest: of these.
        cache: where they are kept, under the digest; processes of a group go without, as one alone may find an entry.
    """
    if dist.is_available() and dist.is_initialized():
        return shared_weight_spectra(weights)
    sizes = [min(len(weight), weight[0].numel()) for weight in weights.values()]
    values = cache.get(digest, f"{SPECTRA}weights", sum(sizes))
    if values is None:
        found = weight_spectra(weights)
        cache.put(digest, f"{SPECTRA}weights", torch.cat([own.singular_values for own in found.values()])[:, None])
        return found
    return {name: Spectrum(own) for name, own in zip(weights, values[:, 0].split(sizes))}


def _vlm(pl_module: LightningModule) -> Any:
    if not isinstance(vlm := getattr(pl_module, "vlm", None), torch.nn.Module):
        raise VLMQError(f"{type(pl_module).__name__} has no 'vlm' to watch; remove SingularValueSpectrum or set it")
    return vlm
