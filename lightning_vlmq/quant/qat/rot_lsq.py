"""Rotation, then LSQ ("Rot+LSQ")."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibration import Batch
from lightning_vlmq.quant.methods import METHODS
from lightning_vlmq.quant.ptq.quarot import rotate_layers
from lightning_vlmq.quant.qat.lsq import CLIP_KD_FEATURE_WEIGHT, LSQContrastive
from lightning_vlmq.quant.scheme import QuantScheme


@METHODS.register("rot_lsq_contrastive")
class RotLSQContrastive(LSQContrastive):
    """QuaRot's rotations (Ashkboos et al. 2024), fixed, then LSQ (Esser et al. 2020) on the rotated weights and inputs."""

    def fit_transforms(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Rotate every layer that mixes its input channels."""
        rotate_layers(vlm)


@METHODS.register("rot_lsq_feature")
class RotLSQFeature(RotLSQContrastive):
    """The same with CLIP-KD's feature loss added."""

    feature_weight = CLIP_KD_FEATURE_WEIGHT
