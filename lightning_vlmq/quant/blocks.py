"""A model's activations after every block, beside full precision's, and what happens when they are changed there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import VLM
from lightning_vlmq.quant.rotation.rotate import rotated_towers
from lightning_vlmq.spectral import RadialSpectrum, SecondMoments, fourier_spectrum_2d

OUTPUTS = {"vision": "vision/output", "text": "text/output"}
"""Names of the towers' outputs (unit-norm features) among the sites."""
KEPT_BYTES = 256 * 2**20
"""What full precision's activations may take in memory between two validations."""
_BLOCK = re.compile(r"(^|\.)(resblocks|blocks|layers?|layer\d|stages)(\.\d+)+$")


def block_sites(vlm: VLM, tower: str) -> dict[str, str]:
    """The blocks of a tower: site name (``vision/block 0``) to qualified module name, in the model's order.

    A block is an entry of a list that is called as open_clip, timm and transformers call theirs, and holds no such list
    itself. A caption decoder's are left out, as no encoder runs them.
    """
    found = [name for name, _ in vlm.named_modules() if vlm.tower_of(name) == tower and not vlm.in_decoder(name)]
    candidates = [name for name in found if _BLOCK.search(name)]
    blocks = [name for name in candidates if not any(other.startswith(f"{name}.") for other in candidates)]
    return {f"{tower}/block {k}": name for k, name in enumerate(blocks)}


def as_rows(x: Tensor) -> Tensor:
    """A block's output as ``[samples, ..., channels]``: maps ``[samples, channels, height, width]`` change their order."""
    return x.movedim(1, -1) if x.ndim == 4 else x


@contextmanager
def watched(vlm: VLM, sites: Mapping[str, str], seen: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Within the block, ``seen(site, output)`` is called with the output of each site's module.

    What it returns, if anything, takes the output's place. Outputs are as :func:`as_rows` has them, and in full
    precision's coordinates: where the residual stream is rotated, they are turned back (the mean over channels, which
    such a stream does not carry, is missing from them).
    """
    hooks = []
    for site, name in sites.items():
        rotation = _stream_rotation(vlm, site.split("/")[0])

        def hook(module: Any, args: Any, output: Any, site: str = site, rotation: Any = rotation) -> Any:
            tensor = output[0] if isinstance(output, tuple) else output
            rows = as_rows(tensor)
            changed = seen(site, rows if rotation is None else rotation.inverse(rows))
            if changed is None:
                return None
            changed = changed if rotation is None else rotation(changed)
            changed = changed.movedim(-1, 1).contiguous() if tensor.ndim == 4 else changed
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        hooks.append(vlm.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def is_rotated(vlm: VLM, tower: str) -> bool:
    """Whether the tower's residual stream is rotated (and centred over channels)."""
    return tower in rotated_towers(vlm)


def _stream_rotation(vlm: VLM, tower: str) -> Any:
    """The rotation of a tower's residual stream, or ``None``. The first layer that reads rotated inputs reads the stream."""
    if not is_rotated(vlm, tower):
        return None
    for name, module in vlm.named_modules():
        if vlm.tower_of(name) == tower and "input" in getattr(module, "folds", {}):
            return module.folds["input"].rotation
    raise VLMQError(f"the {tower} tower's residual stream is rotated, but no layer says how; quantize it afresh")


def run_tower(vlm: VLM, tower: str, inputs: Tensor) -> Tensor:
    """Unit-norm features ``[n, dim]`` of images (uint8 ``[n, 3, h, w]``) or of token ids (int64 ``[n, length]``)."""
    inputs = inputs.to(vlm.mean.device)
    return vlm.encode_image(inputs) if tower == "vision" else vlm.encode_text(inputs)


class KeptActivations:
    """Full precision's activations of the batches seen so far, for the next time that the same ones come in the same order.

    Args:
        limit: bytes that they may take; what comes after is computed each time.
    """

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self.limit, self.computed = limit, 0
        self._batches: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._bytes = 0

    def of(self, place: int, inputs: Tensor, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Activations by site of the batch at a place in the order; computed where another batch was there."""
        if place < len(self._batches):
            known, activations = self._batches[place]
            if known.shape == inputs.shape and torch.equal(known, inputs):
                return activations
            self._batches, self._bytes = [], 0  # other data: nothing that was kept will come again
        made = compute()
        self.computed += 1
        size = sum(x.numel() * x.element_size() for x in (inputs, *made.values()))
        if place == len(self._batches) and self._bytes + size <= self.limit:
            self._batches.append((inputs.detach().clone(), made))
            self._bytes += size
        return made


class BlockWatcher:
    """Second moments of both models' activations at every site of a tower, batch by batch; no activation is kept.

    Where the quantized model's residual stream is rotated, the mean over channels is taken from full precision's
    activations too, as the rotated stream does not carry it.

    Args:
        reference: the full-precision model.
        vlm: the quantized one.
        tower: ``vision`` or ``text``.
        fourier: whether to also average the Fourier spectra of sites whose rows lie on a grid.
        full: full precision's activations that are known from before; it gets those that are not.

    Attributes:
        moments: by site, in the model's order, the tower's output last.
    """

    def __init__(
        self, reference: VLM, vlm: VLM, tower: str, fourier: bool = True, full: KeptActivations | None = None
    ) -> None:
        self.reference, self.vlm, self.tower, self.fourier = reference, vlm, tower, fourier
        self.sites = {model: block_sites(model, tower) for model in (reference, vlm)}
        self.moments: dict[str, SecondMoments] = {}
        self._power: dict[str, tuple[Tensor, Tensor]] = {}  # sums of power [2, frequencies]: full, quantized
        self._maps = self._seen = 0
        self._full = KeptActivations(limit=0) if full is None else full

    @torch.no_grad()
    def activations(self, inputs: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Full precision's and the quantized model's activations of one batch by site, each ``[samples, ..., channels]``.

        See :func:`run_tower` for the inputs; both models should be in evaluation mode.

        Raises:
            VLMQError: the models' blocks differ.
        """
        full = self._full.of(self._seen, inputs, lambda: self._outputs(self.reference, inputs))
        quantized = self._outputs(self.vlm, inputs)
        self._seen += 1
        if full.keys() != quantized.keys():
            raise VLMQError("the two models have other blocks; compare a model with its own full precision")
        lacks_mean = is_rotated(self.vlm, self.tower)
        found = {}
        for site, z in full.items():
            q = quantized[site]
            if lacks_mean and site != OUTPUTS[self.tower]:
                z, q = (x - x.mean(-1, keepdim=True) for x in (z, q))
            found[site] = z, q
        return found

    def update(self, inputs: Tensor) -> None:
        """Run both models over one batch and add up its moments; an empty one changes nothing.

        Raises:
            VLMQError: as :meth:`activations`, or activations are not finite.
        """
        if not len(inputs):
            return
        for site, (z, q) in self.activations(inputs).items():
            if site not in self.moments:
                self.moments[site] = SecondMoments(z.shape[-1], z.device)
            self.moments[site].update(z, q)
            if self.fourier:
                self._add_power(site, z, q)
        self._maps += len(inputs)

    def synchronise(self) -> None:
        """Add up over all processes; all of them must have seen at least one batch."""
        for moments in self.moments.values():
            moments.synchronise()
        if not (dist.is_available() and dist.is_initialized()):
            return
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, (self._power, self._maps))
        self._power, self._maps = {}, sum(maps for _, maps in shares)
        for power, _ in shares:
            for site, (frequency, own) in power.items():
                before = self._power.get(site, (frequency, torch.zeros_like(own)))[1]
                self._power[site] = frequency, before + own

    def fourier_spectra(self) -> dict[str, tuple[RadialSpectrum, RadialSpectrum]]:
        """Radial power of full precision's and of quantized maps, mean over images and channels, by site.

        Of all processes once synchronised.
        """
        return {
            site: (RadialSpectrum(frequency, power[0] / self._maps), RadialSpectrum(frequency, power[1] / self._maps))
            for site, (frequency, power) in self._power.items()
        }

    def _outputs(self, model: VLM, inputs: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        with watched(model, self.sites[model], lambda site, rows: seen.__setitem__(site, rows)):
            seen[OUTPUTS[self.tower]] = run_tower(model, self.tower, inputs)
        return {site: seen[site] for site in (*self.sites[model], OUTPUTS[self.tower]) if site in seen}

    @torch.no_grad()
    def _add_power(self, site: str, z: Tensor, q: Tensor) -> None:
        maps = [on_grid(x) for x in (z, q)]
        if maps[0] is None or maps[1] is None:
            return
        spectra = [fourier_spectrum_2d(x) for x in maps if x is not None]
        power = torch.stack([s.power.double().mean(1).sum(0) for s in spectra]).cpu()
        before = self._power.get(site, (None, torch.zeros_like(power)))[1]
        self._power[site] = spectra[0].frequency, before + power


def on_grid(rows: Tensor) -> Tensor | None:
    """Rows of a vision block as maps ``[samples, channels, h, w]``; ``None`` where they lie on no square grid of at least 2 x 2.

    A class token before the patches is left out.
    """
    if rows.ndim == 4:
        return rows.movedim(-1, 1) if min(rows.shape[1:3]) > 1 else None
    if rows.ndim != 3:
        return None
    for prefix in (0, 1):
        side = round((rows.shape[1] - prefix) ** 0.5)
        if side > 1 and side * side == rows.shape[1] - prefix:
            return rows[:, prefix:].mT.unflatten(-1, (side, side))
    return None


@torch.no_grad()
def features_with(
    vlm: VLM, batches: Iterable[Tensor], sites: Mapping[str, str], change: Callable[[str, Tensor], Tensor | None]
) -> Tensor:
    """Image features ``[n, dim]`` when the output of the given sites is changed on the way; see :func:`watched`."""
    with watched(vlm, sites, change):
        return torch.cat([run_tower(vlm, "vision", images) for images in batches])
