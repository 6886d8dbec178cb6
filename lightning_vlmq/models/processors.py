"""Image processors of transformers, as preprocessing here."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.preprocessing import Framing, Interpolation, Preprocessing, ResizeMode

log = logging.getLogger(__name__)

INTERPOLATIONS: dict[int, Interpolation] = {
    int(Image.Resampling.NEAREST): "nearest",
    int(Image.Resampling.BILINEAR): "bilinear",
    int(Image.Resampling.BICUBIC): "bicubic",
}


def preprocessing_of(config: Any, processor: Any, folder: Path) -> Preprocessing:
    """What an image processor of transformers does, in this package's terms.

    Args:
        config: the model's.
        processor: as transformers loads it.
        folder: where it comes from, for messages.

    Raises:
        VLMQError: it does something that is not known here, or does not say what it does.
    """

    def get(key: str, default: Any = None) -> Any:
        return getattr(processor, key, default)

    def refuse(reason: str) -> VLMQError:
        return VLMQError(
            f"the image processor in '{folder}' {reason}, which is not supported; correct its preprocessor_config.json"
        )

    if not get("do_resize", True) or not get("do_rescale", True):
        raise refuse("does not resize or rescale")
    for entry in ("do_pad", "do_flip_channel_order"):
        if get(entry):
            raise refuse(f"has {entry}")
    resample = get("resample")
    if resample not in INTERPOLATIONS:
        raise refuse(f"resizes by Pillow's method {resample}")
    how = INTERPOLATIONS[resample]
    if config.model_type == "siglip2":
        size = math.isqrt(int(get("max_num_patches"))) * int(config.vision_config.patch_size)
        log.warning("'%s' takes images of any ratio; here each is squashed to %d x %d pixels", folder, size, size)
        framing = Framing(size, "squash", how, rgb_first=True)
    else:
        crop = dict(get("crop_size") or {}) if get("do_center_crop") else {}
        framing = framing_of(dict(get("size") or {}), crop, how, refuse)
        wanted = config.vision_config.image_size
        if framing.size != wanted:
            raise refuse(f"makes images of {framing.size} pixels for a model of {wanted}")
    mean, std = [0.0] * 3, [1.0] * 3
    if get("do_normalize", True):
        mean, std = (
            [value] * 3
            if isinstance(value, int | float)
            else list(value)  # one for all channels, as transformers takes it
            for value in (get("image_mean"), get("image_std"))
        )
    # p in 0..1 becomes (255 * factor * p - offset - mean) / std
    factor, offset = 255 * float(get("rescale_factor")), 1.0 if get("rescale_offset", False) else 0.0
    again = std if get("include_top", False) else [1.0] * 3  # EfficientNet's classifiers divide once more
    centre = tuple((m + offset) / factor for m in mean)
    spread = tuple(s * a / factor for s, a in zip(std, again))
    return Preprocessing(framing, centre, spread)  # type: ignore[arg-type]


def framing_of(size: dict[str, Any], crop: dict[str, Any], how: Interpolation, refuse: Any) -> Framing:
    """From a processor's sizes: a square is squashed to, or the shortest edge resized to and a square cut out.

    Raises what ``refuse`` makes of a reason where the sizes are others.
    """
    size, crop = ({key: value for key, value in sides.items() if value is not None} for sides in (size, crop))
    shortest = set(size) == {"shortest_edge"}
    if not shortest and (set(size) != {"height", "width"} or size["height"] != size["width"]):
        raise refuse(f"resizes to {size or 'no size'}")
    if crop and (set(crop) != {"height", "width"} or crop["height"] != crop["width"]):
        raise refuse(f"cuts out {crop}")
    if shortest and not crop:
        raise refuse("keeps the ratio and cuts nothing out")
    side = int(next(iter(size.values())))
    final = int(crop["height"]) if crop else side
    mode: ResizeMode = "shortest" if shortest else "squash"
    if final > side:
        raise refuse(f"cuts {final} pixels out of {side}")
    return Framing(final, mode, how, resize_to=side if side != final else None, rgb_first=True)
