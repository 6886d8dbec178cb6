"""Fashion-MNIST garments composed to 32x32 RGB images on coloured backgrounds.

The background colour goes with the class in most training images, which plants a spurious correlation that can be measured:
common backgrounds (the class's own colour) against counter backgrounds (another class's).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import FashionMNIST

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.embedded.captions import COLOURS, NOUNS

SIZE = 32
CLASS_NAMES = tuple(NOUNS)
HELD_OUT = ("sandal", "shirt")  # never trained: the near-OOD classes
TRAINED = tuple(name for name in CLASS_NAMES if name not in HELD_OUT)
MIX = 0.7  # largest share of a random colour in a background
_PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32)


@dataclass(frozen=True)
class Garments:
    """Grey garments: ``images`` uint8 ``[n, 28, 28]`` (0 = background) and ``labels`` int64 ``[n]`` indexing :data:`CLASS_NAMES`."""

    images: Tensor
    labels: Tensor

    def select(self, mask: Tensor) -> Garments:
        """The garments where the boolean or index tensor ``mask`` points."""
        return Garments(self.images[mask], self.labels[mask])

    def brightness(self) -> Tensor:
        """Mean grey value in 0..1 over each garment's own pixels, float ``[n]``."""
        grey = self.images.flatten(1).float() / 255
        return grey.sum(1) / (grey > 0).sum(1).clamp(min=1)


def load_fashion_mnist(root: str, train: bool) -> Garments:
    """Read Fashion-MNIST (Xiao et al. 2017) from torchvision's layout ``root/FashionMNIST/raw``, downloading it when absent.

    Raises:
        VLMQError: the files are absent and cannot be downloaded.
    """
    try:
        data = FashionMNIST(root, train=train, download=True)
    except (RuntimeError, OSError) as error:
        raise VLMQError(
            f"Fashion-MNIST is not under '{root}' and cannot be downloaded; run 'make data', "
            f"or unpack its four ubyte files into {Path(root) / 'FashionMNIST' / 'raw'}"
        ) from error
    return Garments(data.data, data.targets)


def trained_mask(labels: Tensor) -> Tensor:
    """True where a label belongs to a trained class, boolean ``[n]``."""
    held_out = torch.tensor([CLASS_NAMES.index(name) for name in HELD_OUT])
    return ~torch.isin(labels, held_out)


def common_colours(labels: Tensor) -> Tensor:
    """Each trained class's own background colour, an index into :data:`~lightning_vlmq.data.embedded.captions.COLOURS`, int64 ``[n]``."""
    own = torch.full((len(CLASS_NAMES),), -1)
    for colour, name in enumerate(TRAINED):
        own[CLASS_NAMES.index(name)] = colour
    return own[labels]


def draw_colours(labels: Tensor, share_common: float, generator: torch.Generator) -> Tensor:
    """Draw a background colour an image, int64 ``[n]``.

    Args:
        labels: class labels, int64 ``[n]``.
        share_common: probability of the class's own colour; otherwise one of the other colours, each as likely. Held-out classes, which
            have no colour of their own, get any colour.
        generator: source of the random draws.
    """
    n, k = len(labels), len(COLOURS)
    own = common_colours(labels)
    other = torch.randint(1, k, (n,), generator=generator)
    draw = torch.rand(n, generator=generator)
    return torch.where(own < 0, (draw * k).long(), torch.where(draw < share_common, own, (own + other) % k))


def compose(garments: Tensor, colours: Tensor, generator: torch.Generator, jitter: int = 0) -> Tensor:
    """Put grey garments on coloured backgrounds.

    Args:
        garments: uint8 ``[n, 28, 28]``.
        colours: background colour indices, int64 ``[n]``.
        generator: source of each image's background brightness and gradient (and placement).
        jitter: largest displacement from the centre, in pixels (0..2).

    Returns:
        uint8 ``[n, 3, 32, 32]``.
    """
    n = len(garments)
    margin = (SIZE - garments.shape[-1]) // 2
    grey = torch.zeros(n, SIZE, SIZE)
    grey[:, margin : SIZE - margin, margin : SIZE - margin] = garments.float()
    if jitter:
        shifts = torch.randint(-jitter, jitter + 1, (n, 2), generator=generator)
        position = torch.arange(SIZE)
        rows = (position[None] - shifts[:, :1]) % SIZE  # the margin is empty, so rolling only moves the garment
        columns = (position[None] - shifts[:, 1:]) % SIZE
        grey = grey[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    gain = 0.8 + 0.3 * torch.rand(n, 1, 1, 1, generator=generator)
    slope = 0.3 * (torch.rand(n, 1, 1, 1, generator=generator) - 0.5)
    ramp = 1 + slope * torch.linspace(-1, 1, SIZE).view(1, 1, SIZE, 1)
    # no two red walls are alike: the palette's colour is mixed with a random one, which leaves the cue strong but not certain
    mix = MIX * torch.rand(n, 1, generator=generator)
    mixed = (1 - mix) * _PALETTE[colours] + mix * 255 * torch.rand(n, 3, generator=generator)
    background = mixed[:, :, None, None] * gain * ramp
    alpha = (grey / 48).clamp(max=1)[:, None]
    return (alpha * grey[:, None] + (1 - alpha) * background).clamp(0, 255).round().to(torch.uint8)
