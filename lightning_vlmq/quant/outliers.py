"""Models with outlier channels by name: as a run asks for them, and rebuilt from what was saved of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import VLM, load_origin
from lightning_vlmq.models.outliers import plant_outliers
from lightning_vlmq.quant.rotation.concentrate import concentrate_streams

MARK = "+outliers"
"""What stands in a model's name before the factor of its outlier channels, or before ``stream``."""


def with_outliers(vlm: VLM, outliers: float | Literal["stream"]) -> VLM:
    """The same model with outlier channels, called ``<name>+outliers<which>``; as it is for a factor of 1.

    Raises:
        VLMQError: as :func:`~lightning_vlmq.models.outliers.plant_outliers` and
            :func:`~lightning_vlmq.quant.rotation.concentrate.concentrate_streams`.
    """
    if outliers == "stream":
        concentrate_streams(vlm)
    elif outliers != 1:
        plant_outliers(vlm, outliers)
    if outliers != 1:
        vlm.name += MARK + str(outliers).removesuffix(".0")
    return vlm


def split_outliers(name: str) -> tuple[str, float | Literal["stream"]]:
    """A model's name without its outlier channels, and which these are; 1 where it has none.

    Raises:
        VLMQError: what follows :data:`MARK` is neither a factor nor ``stream``.
    """
    plain, mark, planted = name.partition(MARK)
    if not mark:
        return plain, 1.0
    if planted == "stream":
        return plain, "stream"
    try:
        return plain, float(planted)
    except ValueError:
        raise VLMQError(
            f"'{name[:100]}' names outlier channels by '{planted[:20]}', which is no factor and not 'stream'"
        ) from None


def rebuild(described: Mapping[str, Any], with_weights: bool = True, typed: str | None = None) -> VLM:
    """As :func:`~lightning_vlmq.models.loading.load_origin`, of a model with planted outlier channels too: they are planted again.

    Args:
        described: what :func:`~lightning_vlmq.models.loading.origin` said of it.
        with_weights: whether to load its weights; without, nothing is planted in the drawn ones.
        typed: the model's name, given by the user beside the description.

    Raises:
        VLMQError: as that, and as :func:`with_outliers`.
    """
    name = str(described.get("name", ""))
    plain, outliers = split_outliers(name)
    vlm = load_origin(
        {**described, "name": plain} if outliers != 1 else described, with_weights, plain if typed == name else typed
    )
    if with_weights:
        return with_outliers(vlm, outliers)
    vlm.name = name
    return vlm
