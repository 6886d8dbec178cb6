"""From an image file to pixels: decoding, open_clip's resize and crop, and what to say of a file that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from lightning_vlmq.core.errors import VLMQError


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
    """Shortest side to ``size`` (bicubic, antialiased), centre crop, RGB: open_clip's preprocessing up to the normalisation.

    Attributes:
        size: height and width of the result, in pixels.
        border: pixels cut off at each edge first (ObjectNet's red frame).
    """

    size: int
    border: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise VLMQError(f"image_size is a number of pixels and must be at least 1, got {self.size}")

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixels, uint8 ``[3, size, size]``. Raises Pillow's errors for a damaged file."""
        if self.border:
            image = ImageOps.crop(image, self.border)
        image = F.resize(image, self.size, InterpolationMode.BICUBIC)
        image = F.center_crop(image, [self.size, self.size]).convert("RGB")  # converted last, as open_clip does
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
