"""Running statistics of a layer's input beyond its range; see :mod:`lightning_vlmq.quant.calibrating` for how they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_vlmq.core.deterministic import running_sum
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch, RangeObserver, calibrate, shared_inputs
from lightning_vlmq.quant.layers import QuantConv2d, QuantizedLayer, static_layers, weight_quantized_layers
from lightning_vlmq.quant.rounding import all_finite
from lightning_vlmq.quant.scheme import QuantScheme

BINS = 4096
CHUNK = 2**23
"""Values sorted into a histogram at once, for the memory that their bins take."""
MOMENT_BUDGET = 2**28
"""Second-moment entries held at once (1 GiB of float32); more layers than fit are done in further passes."""


class HistogramObserver:
    """Histogram of a layer's input between ends known from an earlier pass.

    Attributes:
        counts: values per bin, float64 ``[bins]``.
        centers: middle of each bin, float64 ``[bins]``.
        seen: number of values.
    """

    def __init__(self, minimum: float, maximum: float, bins: int = BINS) -> None:
        if maximum <= minimum:  # a constant input still needs a bin of some width
            maximum = minimum + max(abs(minimum), 1.0) * 1e-6
        self.minimum, self.maximum, self.seen = minimum, maximum, 0
        self.counts = torch.zeros(bins, dtype=torch.float64)
        width = (maximum - minimum) / bins
        self.centers = minimum + width * (torch.arange(bins, dtype=torch.float64) + 0.5)

    def observe(self, x: Tensor) -> None:
        """Take in one batch of inputs, any shape."""
        bins = len(self.counts)
        for part in x.float().flatten().split(CHUNK):
            inside = part[(part >= self.minimum) & (part <= self.maximum)]
            place = ((inside - self.minimum) * (bins / (self.maximum - self.minimum))).long().clamp_(0, bins - 1)
            self.counts += place.bincount(minlength=bins).double().cpu()  # CUDA's histc is not deterministic
        self.seen += x.numel()

    def quantile(self, share: float) -> float:
        """Value below which a share (0 to 1) of the inputs lies, to within one bin; linear inside the bin."""
        cumulative = running_sum(self.counts)
        target = share * cumulative[-1]
        index = int(torch.searchsorted(cumulative, target.view(1)).clamp(max=len(self.counts) - 1))
        before = cumulative[index] - self.counts[index]
        inside = ((target - before) / self.counts[index].clamp_min(1)).clamp(0, 1).item()
        width = (self.maximum - self.minimum) / len(self.counts)
        return self.minimum + width * (index + inside)


class ChannelObserver:
    """Smallest and largest value of each input channel of a layer, float32 ``[channels]``.

    Attributes:
        minimum: ``min x_j``.
        maximum: ``max x_j``.
        seen: number of values.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._is_conv = isinstance(layer, nn.Conv2d)
        self.minimum: Tensor = torch.tensor(torch.inf)
        self.maximum: Tensor = torch.tensor(-torch.inf)
        self.seen = 0

    def observe(self, x: Tensor) -> None:
        """Take in ``[..., channels]`` of a linear layer, ``[batch, channels, height, width]`` of a convolution."""
        others = self._other_axes(x)
        self.minimum = torch.minimum(x.amin(others).float(), self.minimum.to(x.device))
        self.maximum = torch.maximum(x.amax(others).float(), self.maximum.to(x.device))
        self.seen += x.numel()

    @property
    def absolute_maximum(self) -> Tensor:
        """``max |x_j|``, float32 ``[channels]``."""
        return torch.maximum(-self.minimum, self.maximum)

    def scaled_range(self, factor: Tensor | float) -> tuple[Tensor, Tensor]:
        """Minimum and maximum, ``[1]`` each, of the whole input once each channel is divided by its ``factor`` (positive)."""
        return (self.minimum / factor).amin().view(1), (self.maximum / factor).amax().view(1)

    def _other_axes(self, x: Tensor) -> list[int]:
        channels = 1 if self._is_conv else x.ndim - 1
        return [axis for axis in range(x.ndim) if axis != channels]


class MagnitudeObserver(ChannelObserver):
    """A :class:`ChannelObserver` that knows each channel's mean magnitude too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self._sum: Tensor | float = 0.0

    def observe(self, x: Tensor) -> None:
        """As :meth:`ChannelObserver.observe`."""
        super().observe(x)
        self._sum = self._sum + x.abs().sum(self._other_axes(x), dtype=torch.float32).double()

    @property
    def mean_magnitude(self) -> Tensor:
        """``mean |x_j|``, float32 ``[channels]``."""
        channels = self.minimum.numel()
        return (torch.as_tensor(self._sum) / max(self.seen // channels, 1)).float()


class SecondMomentObserver:
    """Mean of ``x x^T`` over the vectors that a layer multiplies its weight with.

    It holds all that a squared output error needs: ``E ||dW x||^2 = sum(dW M * dW)``. GPTQ's Hessian is ``2 M`` times
    the number of vectors. A convolution's vectors are its input patches, per group.

    Attributes:
        moment: ``[groups, values per output, values per output]``, float32; one group for a linear layer.
        seen: number of vectors.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._sum: Tensor | None = None
        self.seen = 0

    def observe(self, x: Tensor) -> None:
        """Take in one batch of the layer's inputs."""
        for vectors in _vectors(self._layer, x):
            if self._sum is None:
                self._sum = vectors.new_zeros(len(vectors), vectors.shape[2], vectors.shape[2])
            self._sum.baddbmm_(vectors.transpose(1, 2), vectors)
            self.seen += vectors.shape[1]

    @property
    def moment(self) -> Tensor:
        """See the class."""
        assert self._sum is not None, "nothing has been observed"
        return self._sum / self.seen


def _vectors(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The vectors behind a layer's products, ``[groups, vectors, values per output]``, image by image for a convolution."""
    if not isinstance(layer, QuantConv2d):
        yield x.reshape(1, -1, x.shape[-1]).float()
        return
    for image in layer.padded(x).float().split(1):  # patches of one image at a time: they are k*k times its size
        patches = F.unfold(image, layer.kernel_size, layer.dilation, 0, layer.stride)  # type: ignore[arg-type]
        yield patches[0].reshape(layer.groups, -1, patches.shape[-1]).transpose(1, 2)


def grouped_rows(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight as ``[groups, outputs per group, values per output]``, to go with :class:`SecondMomentObserver`."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def output_error(layer: nn.Module, weight: Tensor, moment: Tensor) -> Tensor:
    """Mean squared error, summed over outputs, that ``weight`` makes in place of the layer's own; scalar float64."""
    difference = grouped_rows(layer, weight - layer.weight)  # type: ignore[operator]
    return (difference @ moment).mul_(difference).sum(dtype=torch.float64)


def observe_histograms(vlm: VLM, scheme: QuantScheme, batches: Sequence[Batch]) -> dict[str, HistogramObserver]:
    """Of each layer with a static input grid: two calibration passes, ranges, then histograms between them; by name."""
    ranges = {name: RangeObserver() for name in static_layers(vlm)}
    calibrate(vlm, scheme, batches, ranges)
    histograms = {n: HistogramObserver(r.minimum.item(), r.maximum.item()) for n, r in ranges.items()}
    calibrate(vlm, scheme, batches, histograms)
    return histograms


def second_moments(
    vlm: VLM, scheme: QuantScheme, batches: Sequence[Batch]
) -> Iterator[tuple[str, QuantizedLayer, Tensor]]:
    """Yield each layer with a quantized weight, its name and second moment, in as many passes as memory asks for.

    Layers that share an input come one after the other and have one moment between them. The layers must not be changed
    between yields, or later passes would see it.

    Raises:
        VLMQError: what :func:`calibrate` refuses, or inputs so large that their squares leave float32.
    """
    layers = weight_quantized_layers(vlm)
    members = [[n for n in names if n in layers] for names in shared_inputs(vlm, scheme).values()]
    alike = {names[0]: names for names in members if names}
    for first, moment in _first_moments(vlm, scheme, batches, {name: layers[name] for name in alike}):
        for name in alike[first]:
            yield name, layers[name], moment


def _first_moments(
    vlm: VLM, scheme: QuantScheme, batches: Sequence[Batch], layers: dict[str, QuantizedLayer]
) -> Iterator[tuple[str, Tensor]]:
    """The second moments of these layers, in as many passes as memory asks for."""
    pending: dict[str, QuantizedLayer] = {}
    entries = 0
    for name, layer in layers.items():
        rows = grouped_rows(layer, layer.weight)
        size = rows.shape[0] * rows.shape[2] ** 2
        if pending and entries + size > MOMENT_BUDGET:
            yield from _moments_of(vlm, scheme, batches, pending)
            pending, entries = {}, 0
        pending[name] = layer
        entries += size
    if pending:
        yield from _moments_of(vlm, scheme, batches, pending)


def _moments_of(
    vlm: VLM, scheme: QuantScheme, batches: Sequence[Batch], layers: dict[str, QuantizedLayer]
) -> Iterator[tuple[str, Tensor]]:
    observers = {name: SecondMomentObserver(layer) for name, layer in layers.items()}
    calibrate(vlm, scheme, batches, observers)
    for name in layers:
        moment = observers.pop(name).moment
        if not all_finite(moment):  # a Cholesky factor of it is NaN or an error, by the library that computes it
            raise VLMQError(
                f"layer '{name}': the squares of its calibration inputs are too large to add up; check images and weights"
            )
        yield name, moment
