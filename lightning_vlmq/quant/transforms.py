"""Invertible maps of a layer's input whose inverse is folded into its weight: ``W x = (W T^-1) (T x)``.

They stand in the layer itself instead of in the layer before it, so that every linear and convolution can take one,
whatever precedes it; the price is one element-wise product (or small matrix product) per layer at inference. What can be
folded into the layer before as well is in :mod:`~lightning_vlmq.quant.rotation.rotate`.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
import scipy.linalg
import torch
from torch import Tensor, nn

from lightning_vlmq.core.registry import Registry

TRANSFORMS: Registry[type[nn.Module]] = Registry("input transform")


@TRANSFORMS.register("channel_scale")
class ChannelScale(nn.Module):
    """Divide each input channel by a positive factor, ``x / s``; the weight's input channels are multiplied by it.

    SmoothQuant (Xiao et al. 2023) Eq. 3; AWQ (Lin et al. 2024) Eq. 4.

    Args:
        factor: ``s``, shape ``[channels]`` for a linear layer's ``[..., channels]`` input, ``[channels, 1, 1]`` for a
            convolution's ``[batch, channels, height, width]``.
    """

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x / s``, same shape."""
        return x / self.factor


def scale_input_channels(layer: nn.Module, weight: Tensor, factor: Tensor) -> Tensor:
    """A weight with its input channels multiplied by ``factor``.

    Args:
        layer: the linear layer, or convolution of any grouping, that the weight is for.
        weight: of the shape of ``layer.weight``.
        factor: ``[in_features]`` or ``[in_channels]``.

    Returns:
        A new weight of the same shape.
    """
    if not isinstance(layer, nn.Conv2d):
        return weight * factor
    # a group's outputs see only that group's inputs, which the weight numbers from 0 within the group
    per_group = factor.view(layer.groups, 1, -1).expand(-1, layer.out_channels // layer.groups, -1)
    return weight * per_group.reshape(layer.out_channels, -1, 1, 1)


@TRANSFORMS.register("rotation")
class Rotation(nn.Module):
    """Rotate the input channels by ``R = (left ⊗ right) diag(signs)``, orthogonal and fast to apply.

    Applied to a weight's input channels it gives ``W R^T``, so the same call rotates inputs and folds the inverse.

    Args:
        signs: ``[channels]`` of +1 and -1 for a linear layer, ``[channels, 1, 1]`` for a convolution.
        left: orthogonal ``[a, a]``.
        right: orthogonal ``[b, b]``, ``a b = channels``.
    """

    signs: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, signs: Tensor, left: Tensor, right: Tensor) -> None:
        super().__init__()
        for name, tensor in (("signs", signs), ("left", left), ("right", right)):
            self.register_buffer(name, tensor.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the rotated input (or weight): channels last for a linear layer, second for a convolution."""
        is_conv = self.signs.dim() == 3
        signed = (x * self.signs).movedim(1, -1) if is_conv else x * self.signs
        blocks = signed.reshape(*signed.shape[:-1], len(self.left), len(self.right))
        out = (self.left @ (blocks @ self.right.T)).reshape(signed.shape)
        return out.movedim(-1, 1) if is_conv else out

    @property
    def macs_per_value(self) -> int:
        """Multiply-accumulates for each value that is rotated."""
        return len(self.left) + len(self.right)

    def inverse(self, x: Tensor) -> Tensor:
        """Undo a linear layer's rotation: ``R^T x``, channels last."""
        blocks = x.reshape(*x.shape[:-1], len(self.left), len(self.right))
        return (self.left.T @ (blocks @ self.right)).reshape(x.shape) * self.signs


@TRANSFORMS.register("head_rotation")
class HeadRotation(nn.Module):
    """Rotate across attention heads, ``R ⊗ I``: the same for every channel of a head.

    Args:
        matrix: orthogonal R, ``[heads, heads]``.
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix.detach().clone())

    @property
    def macs_per_value(self) -> int:
        """Multiply-accumulates for each value that is rotated."""
        return len(self.matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Return the rotated input (or weight), ``[..., heads * channels per head]``, one head after the other."""
        return (self.matrix @ x.unflatten(-1, (len(self.matrix), -1))).flatten(-2)


def randomized_hadamard(channels: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of a randomized Hadamard rotation of any size: signs ``[channels]``, left ``[a, a]``, right ``[b, b]``.

    ``channels = m 2^k`` with m odd gives ``H = DCT_m ⊗ Hadamard_(2^k)``, all factors orthonormal (float64). QuaRot (Ashkboos et
    al. 2024, section 3.1) takes tabled Hadamard matrices of sizes such as 12 and 20 for m; the cosine transform exists
    for every m and spreads nearly as evenly (entries at most ``sqrt(2/m)``). The two factors are of about equal size,
    for speed.
    """
    odd, power = channels, 0
    while odd % 2 == 0:
        odd, power = odd // 2, power + 1
    in_left = max(0, min(power, round((power - np.log2(odd)) / 2)))
    cosine = scipy.fft.dct(np.eye(odd), norm="ortho", axis=0)
    left = np.kron(cosine, scipy.linalg.hadamard(2**in_left) / 2 ** (in_left / 2))
    right = scipy.linalg.hadamard(2 ** (power - in_left)) / 2 ** ((power - in_left) / 2)
    signs = torch.randint(0, 2, (channels,), generator=generator).double() * 2 - 1
    return signs, torch.from_numpy(left), torch.from_numpy(right)
