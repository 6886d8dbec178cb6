"""From an image file to pixels: decoding, open_clip's resize and crop, and what to say of a file that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.preprocessing import Framing, Interpolation, ResizeMode


class UnreadableImage(VLMQError):
    """An image that cannot be decoded, named.

    A loader's worker hands an exception over as text, traceback first, and the loader raises the class anew on that text: only its
    last line, the message, is kept.

    Args:
        message: one line, or such a text.
    """

    def __init__(self, message: str) -> None:
        line = message.strip().splitlines()[-1]
        super().__init__(line.removeprefix(f"{__name__}.{type(self).__name__}: "))


@dataclass(frozen=True)
class Preprocess:
    """open_clip's preprocessing up to the normalisation: an image framed and made RGB.

    Attributes:
        size: height and width of the result, in pixels.
        resize_mode: this and the next three as :class:`~lightning_vlmq.core.preprocessing.Framing` has them.
        interpolation: see there.
        fill: see there.
        resize_to: see there.
        border: pixels cut off at each edge first (ObjectNet's red frame).
    """

    size: int
    resize_mode: ResizeMode = "shortest"
    interpolation: Interpolation = "bicubic"
    fill: int = 0
    resize_to: int | None = None
    border: int = 0

    def __post_init__(self) -> None:
        self.framing  # noqa: B018 - says what is wrong with the settings

    @classmethod
    def of(cls, framing: Framing) -> Preprocess:
        """What frames images as a model wants them."""
        return cls(**vars(framing))

    @property
    def framing(self) -> Framing:
        """How the image is framed."""
        return Framing(self.size, self.resize_mode, self.interpolation, self.fill, self.resize_to)

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixels, uint8 ``[3, size, size]``. Raises Pillow's errors for a damaged file."""
        if self.border:
            image = ImageOps.crop(image, self.border)
        image = self.framing(image).convert("RGB")  # converted last, as open_clip does
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
