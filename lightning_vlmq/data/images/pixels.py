"""From an image file to pixels: what an image shows, open_clip's resize and crop, and what to say of a file that cannot be read."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.core.preprocessing import Framing, Interpolation, ResizeMode

Orientation = Literal["exif", "stored"]
Decoder = Literal["pillow", "torchvision"]


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


def as_shown(image: Image.Image, orientation: Orientation = "exif") -> Image.Image:
    """An opened image as 8-bit pixels, the way a person sees it; its mode is kept where that has 8 bits per channel.

    16-bit grey values are scaled to 8 bits, ``round(v / 257)``. Of a JPEG that holds several pictures (MPO: thumbnails, second
    lens) the first is the image.

    Args:
        image: the image, perhaps not decoded yet.
        orientation: ``"exif"`` turns an image as its EXIF entry says; ``"stored"`` leaves the pixels as they are stored, as
            open_clip and torchvision do (of a TIFF, Pillow follows it by itself, there too).

    Raises:
        ValueError: an image that has no such pixels: several frames, floating-point or 32-bit values.
        Exception: whatever Pillow raises for a damaged file.
    """
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ValueError(f"it has {getattr(image, 'n_frames', 'several')} frames; store the one that counts")
    if orientation == "exif":
        image = _turned(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        # Pillow opens a portable grey map of more than 8 bits as 32-bit values, scaled to 16
        if not image.mode.startswith("I;16") and image.format not in ("PPM", "PNG"):
            kind = "floating-point" if image.mode == "F" else "32-bit"
            raise ValueError(f"it holds {kind} values, whose range nobody knows; store it with 8 or 16 bits")
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("its values do not fit 16 bits; store it with 8 or 16 bits")
        image = Image.fromarray(np.rint(values / 257.0).astype(np.uint8))
    return image


def _decoded(image: Image.Image, orientation: Orientation) -> Tensor | None:
    """Pixels of an opened JPEG, uint8 ``[3, height, width]``; ``None`` where Pillow has to read it, or to say what is wrong with it."""
    stream = getattr(image, "fp", None)
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or not isinstance(stream, io.BytesIO):
        return None
    if orientation == "exif" and _turned(image) is not image:
        return None
    try:
        return decode_jpeg(torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        return None


def _turned(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(0x0112, 1) != 1
    except Exception:  # damaged metadata of an image whose pixels may be sound: there is no orientation to follow
        return image
    return ImageOps.exif_transpose(image) if turned else image


@dataclass(frozen=True)
class Preprocess:
    """open_clip's preprocessing up to the normalisation: an image framed and made RGB.

    Attributes:
        size: height and width of the result, in pixels.
        resize_mode: this and the next four as :class:`~lightning_vlmq.core.preprocessing.Framing` has them.
        interpolation: see there.
        fill: see there.
        resize_to: see there.
        rgb_first: see there.
        border: pixels cut off at each edge first (ObjectNet's red frame).
        orientation: see :func:`as_shown`.
        decoder: ``"pillow"`` gives open_clip's pixels; ``"torchvision"`` reads JPEGs more than twice as fast, within two grey levels
            of them (the decoded pixels are the same, the resized ones are rounded elsewhere), and everything else by Pillow.
    """

    size: int
    resize_mode: ResizeMode = "shortest"
    interpolation: Interpolation = "bicubic"
    fill: int = 0
    resize_to: int | None = None
    rgb_first: bool = False
    border: int = 0
    orientation: Orientation = "exif"
    decoder: Decoder = "pillow"

    def __post_init__(self) -> None:
        for name, known in (("orientation", get_args(Orientation)), ("decoder", get_args(Decoder))):
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)
        self.framing  # noqa: B018 - says what is wrong with the settings

    @classmethod
    def of(cls, framing: Framing) -> Preprocess:
        """What frames images as a model wants them."""
        return cls(**vars(framing))

    @property
    def framing(self) -> Framing:
        """How the image is framed."""
        return Framing(self.size, self.resize_mode, self.interpolation, self.fill, self.resize_to, self.rgb_first)

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixels, uint8 ``[3, size, size]``. Raises as :func:`as_shown` does."""
        if self.decoder == "torchvision" and (pixels := _decoded(image, self.orientation)) is not None:
            height, width = pixels.shape[1:]
            return self.framing.quickly(
                pixels[:, self.border : height - self.border, self.border : width - self.border]
            )
        image = as_shown(image, self.orientation)
        if self.border:
            image = ImageOps.crop(image, self.border)
        image = self.framing(image).convert(
            "RGB"
        )  # converted last, as open_clip does, unless the framing converts first
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
