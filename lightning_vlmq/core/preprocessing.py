"""From an image of any size to what a model takes: said once, by the model; followed by whoever decodes or enlarges images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, TypeVar, get_args

from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.v2 import functional as quick

from lightning_vlmq.core.errors import VLMQError, unknown

ResizeMode = Literal["shortest", "longest", "squash"]
Interpolation = Literal["bicubic", "bilinear", "nearest"]

AnyImage = TypeVar("AnyImage", Image.Image, Tensor)


FARTHEST = 10.0
"""No mean and no standard deviation of pixels in 0..1 is beyond this, those of pixels in 0..255 are."""


@dataclass(frozen=True)
class Framing:
    """How an image of any size becomes a square: open_clip's resize modes, to the pixel.

    Attributes:
        size: height and width of the result, in pixels.
        resize_mode: ``shortest``: the shortest side to ``size``, then the centre; ``longest``: the longest side, then ``fill``
            around it; ``squash``: both sides, whatever the ratio.
        interpolation: ``bicubic``, ``bilinear`` (both antialiased) or ``nearest``.
        fill: grey level 0..255 of what is added in mode ``longest``.
        resize_to: side resized to before the centre of ``size`` is cut out, where that is larger than ``size``.
        rgb_first: pictures become RGB before they are resized, on white where they are transparent, as transformers does; open_clip
            makes them RGB afterwards and drops their transparency.
    """

    size: int
    resize_mode: ResizeMode = "shortest"
    interpolation: Interpolation = "bicubic"
    fill: int = 0
    resize_to: int | None = None
    rgb_first: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise VLMQError(f"image_size is a number of pixels and must be at least 1, got {self.size}")
        for kind, value, known in (
            ("resize mode", self.resize_mode, get_args(ResizeMode)),
            ("interpolation", self.interpolation, get_args(Interpolation)),
        ):
            if value not in known:
                raise unknown(kind, str(value), known)
        if isinstance(self.fill, bool) or not isinstance(self.fill, Real) or self.fill not in range(256):
            raise VLMQError(f"fill is a grey level, a whole number between 0 and 255, got {self.fill!r}")
        object.__setattr__(self, "fill", int(self.fill))
        if self.resize_to is not None and (self.resize_to < self.size or self.resize_mode == "longest"):
            raise VLMQError(
                f"resize_to {self.resize_to} goes before a cut of {self.size} pixels: it must be larger, and the resize mode "
                "shortest or squash"
            )

    def __call__(self, image: AnyImage) -> AnyImage:
        """The framed image.

        Args:
            image: of any mode, or tensor ``[..., height, width]``, uint8 in 0..255 or float in 0..1. Pillow and torch round
                differently: they agree to about one grey level.

        Returns:
            Of the same kind, ``size`` x ``size``. Bicubic interpolation of a float tensor may overshoot 0..1.
        """
        if self.rgb_first and isinstance(image, Image.Image):
            image = _on_white(image)
        return self._framed(image, F)

    def quickly(self, pixels: Tensor) -> Tensor:
        """The framed image by torchvision's kernels for bytes: seven times as fast as Pillow's, and within two grey levels of them.

        Args:
            pixels: uint8 ``[3, height, width]``, on the CPU.

        Returns:
            uint8 ``[3, size, size]``.
        """
        return self._framed(pixels, quick)

    def _framed(self, image: AnyImage, F: Any) -> AnyImage:
        """With the functions of one of torchvision's two modules of them."""
        height, width = F.get_dimensions(image)[1:]
        side = self.resize_to or self.size
        how = {"interpolation": InterpolationMode(self.interpolation), "antialias": self.interpolation != "nearest"}
        if self.resize_mode == "squash":
            image = F.resize(image, [side, side], **how)
        elif self.resize_mode == "shortest":
            image = F.resize(image, [side], **how)
        else:
            ratio = max(height, width) / side
            # a very thin image keeps a pixel; open_clip lets it vanish, and fails
            image = F.resize(image, [max(round(height / ratio), 1), max(round(width / ratio), 1)], **how)
            height, width = F.get_dimensions(image)[1:]
            tall, wide = side - height, side - width
            fill = self.fill if isinstance(image, Image.Image) or not image.is_floating_point() else self.fill / 255
            edges = [wide // 2, tall // 2, (wide + 1) // 2, (tall + 1) // 2]
            return F.pad(image, edges, fill=fill)  # type: ignore[no-any-return]
        return F.center_crop(image, [self.size, self.size])  # type: ignore[no-any-return]


def _on_white(image: Image.Image) -> Image.Image:
    """A picture in RGB, on a white ground where it is transparent."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass(frozen=True)
class Preprocessing:
    """All that happens to an image before a model sees it.

    Attributes:
        framing: how it becomes a square.
        mean: a channel's mean that is taken off, of pixels in 0..1, in the order red, green, blue.
        std: what is then divided by, likewise.
    """

    framing: Framing
    mean: tuple[float, float, float] = field(default=(0.0, 0.0, 0.0))
    std: tuple[float, float, float] = field(default=(1.0, 1.0, 1.0))

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3:
                raise VLMQError(f"{name} has one value per channel, red, green and blue; got {list(values)}")
            if not all(isinstance(value, Real) and math.isfinite(value) for value in values):
                raise VLMQError(f"{name} has to be finite numbers, got {list(values)}")
            if max(map(abs, values)) > FARTHEST:
                raise VLMQError(f"{name} is of pixels in 0..1, {list(values)} looks like one of 0..255; divide by 255")
            object.__setattr__(self, name, tuple(map(float, values)))
        if min(self.std) <= 0:
            raise VLMQError(f"std is divided by and must be positive, got {list(self.std)}")

    def __str__(self) -> str:
        framing = self.framing
        return (
            f"{framing.size} pixels, {framing.resize_mode}, {framing.interpolation}, mean {_shown(self.mean)}, "
            f"std {_shown(self.std)}"
        )


def _shown(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.3g}" for value in values)
