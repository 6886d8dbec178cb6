"""What a model with rotated residual streams has in it: folds kept beside the layers, and where a stream starts and ends.

There the papers rotate an embedding and a head (Ashkboos et al. 2024, SliceGPT, arXiv 2401.15024, Eq. 3 and 7; QuaRot,
arXiv 2404.00456, stage 1a); where a tower has a norm instead at either end, the rotation runs there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_vlmq.quant.transforms import Rotation


class StreamEntry(nn.Module):
    """A norm, then centring and rotation at run time: where a stream starts from a norm's output.

    Args:
        norm: the LayerNorm, unchanged.
        rotation: the stream's.
    """

    def __init__(self, norm: nn.Module, rotation: Rotation) -> None:
        super().__init__()
        self.norm, self.rotation = norm, rotation

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., width]`` to the rotated stream, same shape."""
        x = self.norm(x)
        return self.rotation(x - x.mean(-1, keepdim=True))


class StreamExit(nn.Module):
    """The rotation undone at run time, then a norm: where a stream leaves through a norm with no linear layer behind it.

    Args:
        norm: the LayerNorm, unchanged; the mean that centring took away is nothing to it.
        rotation: the stream's.
    """

    def __init__(self, norm: nn.Module, rotation: Rotation) -> None:
        super().__init__()
        self.norm, self.rotation = norm, rotation

    def forward(self, x: Tensor) -> Tensor:
        """Map the rotated stream ``[..., width]`` to the norm's output, same shape."""
        return self.norm(self.rotation.inverse(x))

    @property
    def macs_per_value(self) -> int:
        """Multiply-accumulates for each value that is rotated back."""
        return self.rotation.macs_per_value


class InputFold(nn.Module):
    """What a weight's input channels were multiplied with, ``W' = W diag(gain) R^T``, kept to tell W from W'; QuaRot Eq. 4.

    Args:
        rotation: R.
        gain: of the norm before the layer, ``[in]``.
    """

    gain: Tensor

    def __init__(self, rotation: Rotation, gain: Tensor) -> None:
        super().__init__()
        self.rotation = rotation
        self.register_buffer("gain", gain)

    def original(self, weight: Tensor) -> Tensor:
        """W of W', ``[out, in]``; columns that a gain of zero had shut out are zero.

        An error of W' in the direction of a channel comes out ``1 / gain`` times as large: that is what it amounts to
        for the input that W itself would be given.
        """
        columns = self.rotation.inverse(weight)
        return torch.where(self.gain == 0, 0, columns / self.gain)


class OutputFold(nn.Module):
    """What some of a weight's output channels were multiplied with, ``W' = R C diag(scale) W``, kept to tell W from W'.

    SliceGPT section 3.2 (C) and Eq. 5 (R).

    Args:
        rotation: R.
        scale: LayerScale's factors, ``[rows]``.
        mean: what the centring C took from every row of ``diag(scale) W``, ``[weights per row, 1]``; zero without C.
        start: the first of the rows; they are as many as ``scale`` is long.
    """

    scale: Tensor
    mean: Tensor

    def __init__(self, rotation: Rotation, scale: Tensor, mean: Tensor, start: int) -> None:
        super().__init__()
        self.rotation, self.start = rotation, start
        self.register_buffer("scale", scale)
        self.register_buffer("mean", mean)

    def original(self, weight: Tensor) -> Tensor:
        """W of W', ``[out, ...]``; rows that a scale of zero had shut out are zero."""
        flat, rows = weight.flatten(1).clone(), slice(self.start, self.start + len(self.scale))
        scaled = self.rotation.inverse(flat[rows].T) + self.mean
        flat[rows] = torch.where(self.scale == 0, 0, scaled / self.scale).T
        return flat.reshape(weight.shape)
