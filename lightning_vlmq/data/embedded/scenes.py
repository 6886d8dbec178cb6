"""Scenes: a drawing on a coloured, often textured background, the images of the embedded benchmark.

The background colour goes with the concept's group in most training images, which plants a spurious correlation that can be
measured: common backgrounds (the group's own colour) against counter backgrounds (another group's). Textures keep a model from
learning that everything but the drawing is flat; none of them is one of the corruption families.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 64  # pixels of a scene
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 50, 45),
    "orange": (235, 140, 40),
    "yellow": (225, 210, 60),
    "green": (50, 150, 65),
    "teal": (40, 165, 170),
    "blue": (45, 85, 200),
    "purple": (135, 60, 180),
    "pink": (240, 130, 180),
}
MIX = 0.6  # largest share of a random colour in a background
TEXTURED = 0.5  # share of backgrounds that are textured
OCTAVES = (2, 4, 8, 16, 32, 64)  # cells a side
_PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32)


def draw_colours(group: Tensor, share_common: float, generator: torch.Generator) -> Tensor:
    """Draw one background colour per image, an index into :data:`COLOURS`, int64 ``[n]``.

    Args:
        group: the concept's group, which owns the colour of the same index, int64 ``[n]``; -1 gets any colour.
        share_common: probability of the group's own colour; otherwise one of the others, each as likely.
        generator: source of the random draws.
    """
    n, k = len(group), len(COLOURS)
    other = torch.randint(1, k, (n,), generator=generator)
    draw = torch.rand(n, generator=generator)
    own = torch.where(draw < share_common, group, (group + other) % k)
    return torch.where(group < 0, (torch.rand(n, generator=generator) * k).long(), own)


def textures(n: int, generator: torch.Generator) -> Tensor:
    """Fractal noise: random grids of :data:`OCTAVES` cells a side, each octave weaker than the last by a random power.

    Half of them are grey, half have colour channels of their own.

    Returns:
        Zero mean and unit standard deviation an image, clipped at 2.5, float32 ``[n, 3, 64, 64]``.
    """
    roughness = torch.rand(n, 1, 1, 1, generator=generator)
    total = torch.zeros(n, 3, SIZE, SIZE)
    for cells in OCTAVES:
        grid = torch.randn(n, 3, cells, cells, generator=generator) * cells**-roughness
        total += F.interpolate(grid, (SIZE, SIZE), mode="bilinear")
    grey = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    total = torch.where(grey, total[:, :1], total)
    std, mean = torch.std_mean(total, dim=(1, 2, 3), keepdim=True)
    return ((total - mean) / std).clamp(-2.5, 2.5)


def backgrounds(colours: Tensor, texture: Tensor, generator: torch.Generator) -> Tensor:
    """Coloured grounds, no two alike: the palette's colour mixed with a random one, a gain, a slope, and often a texture.

    Args:
        colours: indices into :data:`COLOURS`, int64 ``[n]``.
        texture: from :func:`textures`, ``[n, 3, 64, 64]``.
        generator: source of the random draws.

    Returns:
        float32 ``[n, 3, 64, 64]`` in 0..255, not clipped.
    """
    n = len(colours)
    draw = torch.rand(n, 5, generator=generator)
    mix = MIX * draw[:, :1]
    colour = (1 - mix) * _PALETTE[colours] + mix * 255 * torch.rand(n, 3, generator=generator)
    gain = 0.75 + 0.4 * draw[:, 1].view(n, 1, 1, 1)
    slope = 0.4 * (draw[:, 2].view(n, 1, 1, 1) - 0.5)
    ramp = 1 + slope * torch.linspace(-1, 1, SIZE).view(1, 1, SIZE, 1)
    strength = torch.where(draw[:, 3] < TEXTURED, 8 + 42 * draw[:, 4], 0.0).view(n, 1, 1, 1)
    return colour[:, :, None, None] * gain * ramp + strength * texture


def place(drawings: Tensor, generator: torch.Generator, jitter: int = 6) -> Tensor:
    """Put drawings on empty ground of a scene's size, off the centre by up to ``jitter`` pixels.

    Args:
        drawings: RGBA, uint8 ``[n, 4, size, size]`` with ``size + 2 * jitter <= 64``.
        generator: source of the displacements.
        jitter: the largest displacement either way, in pixels.

    Returns:
        RGBA, float32 ``[n, 4, 64, 64]``: colours 0..255 times alpha, alpha 0..1.
    """
    n, size = len(drawings), drawings.shape[-1]
    shift = torch.randint(-jitter, jitter + 1, (n, 2), generator=generator) + (SIZE - size) // 2
    canvas = torch.zeros(n, 4, SIZE, SIZE)
    for out, image, (y, x) in zip(canvas, _premultiplied(drawings), shift.tolist()):
        out[:, y : y + size, x : x + size] = image
    return canvas


def place_freely(drawings: Tensor, generator: torch.Generator) -> Tensor:
    """As :func:`place`, for training: scaled (37 to 60 pixels), stretched, turned, sheared and shifted at random (bilinear)."""
    n = len(drawings)
    draw = torch.rand(n, 8, generator=generator) * 2 - 1
    size = torch.exp(math.log(47) + 0.24 * draw[:, 0])
    stretch = torch.exp(0.1 * draw[:, 1])
    angle = math.radians(15) * draw[:, 2] * draw[:, 3].abs()  # mostly upright
    shear = 0.1 * draw[:, 4]
    room = (SIZE - size).clamp(min=0) / SIZE + 4 / SIZE
    across, down = SIZE / (size * stretch), SIZE / (size / stretch)
    cos, sin = torch.cos(angle), torch.sin(angle)
    linear = torch.stack(
        [
            torch.stack([across * cos, across * (shear * cos - sin)], 1),
            torch.stack([down * sin, down * (shear * sin + cos)], 1),
        ],
        1,
    )
    offset = linear @ torch.stack([room * draw[:, 5], room * draw[:, 6]], 1)[:, :, None]
    grid = F.affine_grid(torch.cat([linear, -offset], 2), [n, 4, SIZE, SIZE], align_corners=False)
    return F.grid_sample(_premultiplied(drawings), grid, align_corners=False)


def recolour(placed: Tensor, generator: torch.Generator) -> Tensor:
    """Vary the drawings' colours for training: a gain a channel; one in twelve turns grey."""
    n = len(placed)
    colour, alpha = placed[:, :3], placed[:, 3:]
    gain = 0.8 + 0.4 * torch.rand(n, 3, 1, 1, generator=generator)
    grey = torch.rand(n, 1, 1, 1, generator=generator) < 1 / 12
    colour = torch.where(grey, colour.mean(1, keepdim=True), colour * gain)
    return torch.cat([torch.minimum(colour, 255 * alpha), alpha], 1)


def compose(placed: Tensor, ground: Tensor) -> Tensor:
    """Lay placed drawings over grounds: uint8 ``[n, 3, 64, 64]``."""
    return (placed[:, :3] + (1 - placed[:, 3:]) * ground).round_().clamp_(0, 255).to(torch.uint8)


def print_on_paper(scenes: Tensor, texture: Tensor, generator: torch.Generator) -> Tensor:
    """Vary whole scenes for training: contrast, and in three of ten the grain of a paper, fractal noise over everything.

    Args:
        scenes: uint8 ``[n, 3, 64, 64]``.
        texture: from :func:`textures`, ``[n, 3, 64, 64]``.
        generator: source of the random draws.

    Returns:
        uint8 ``[n, 3, 64, 64]``.
    """
    n = len(scenes)
    draw = torch.rand(n, 4, generator=generator)
    contrast = (0.7 + 0.5 * draw[:, 0]).view(n, 1, 1, 1)
    grain = torch.where(draw[:, 1] < 0.3, 30 * draw[:, 2], 0.0).view(n, 1, 1, 1)
    light = (40 * (draw[:, 3] - 0.5)).view(n, 1, 1, 1)
    x = scenes.float()
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return ((x - mean).mul_(contrast).add_(mean + light).add_(grain * texture)).round_().clamp_(0, 255).to(torch.uint8)


def _premultiplied(drawings: Tensor) -> Tensor:
    x = drawings.float()
    alpha = x[:, 3:] / 255
    return torch.cat([x[:, :3] * alpha, alpha], 1)
