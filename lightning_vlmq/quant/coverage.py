"""How much of a model is really quantized: matrix weights and multiply-accumulates, by tower and layer type.

A quantizer that walks ``nn.Linear`` can miss packed attention without a word; a layer whose weight is read directly
instead of through its forward escapes quantization too. So weights count as quantized only where a quantized layer ran.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.vlm import TOWERS, VLM
from lightning_vlmq.quant.attention import AttentionProducts
from lightning_vlmq.quant.clipping import COSTLY, REPORTED, ClippedGrid
from lightning_vlmq.quant.layers import QuantizedLayer
from lightning_vlmq.quant.rotation.folds import StreamExit
from lightning_vlmq.quant.rotation.rotate import rotation_kinds
from lightning_vlmq.quant.scheme import SCOPES, QuantScheme
from lightning_vlmq.quant.transforms import HeadRotation, Rotation

TABLE_NAME = re.compile(
    r"(^|_)(pos|positional|class|cls|reg|mask|dist)_?(embed\w*|token|emb)s?$|^(query|probe|latent)$|bias_table$"
)
"""Last name parts of parameters that are looked up or added, not multiplied with activations."""

RUN_TIME_ROTATIONS = (Rotation, HeadRotation, StreamExit)


@dataclass(frozen=True)
class CoverageRow:
    """One tower's layers of one type.

    Attributes:
        tower: ``vision`` or ``text``.
        layer_type: ``linear``, ``conv2d``, ``depthwise_conv2d``, ``other`` (matrix parameters outside such layers),
            ``activation_product`` (products of two activations, as in attention; they have no weights, and are quantized where
            the scheme's ``attention`` says so) or ``rotation`` (fixed rotations at run time, in full precision).
        weights: matrix weights.
        weights_quantized: of these, in quantized layers.
        macs: multiply-accumulates for one image or one text.
        macs_quantized: of these, in quantized layers.
    """

    tower: str
    layer_type: str
    weights: int
    weights_quantized: int
    macs: int
    macs_quantized: int


@dataclass(frozen=True)
class CoverageReport:
    """Shares of matrix weights and multiply-accumulates in quantized layers.

    Attributes:
        rows: by tower and layer type.
        excluded: tables and vectors with two or more axes that no activation is multiplied with, by name, with their
            sizes.
        unquantized: matrix weights left in full precision, by name, with their sizes.
        rotations: where a tower is rotated, by tower: ``residual stream``, or ``inside the blocks`` with the reason.
        clipped: the grids that clip a share of their values worth telling, or lose much by it, or whose zero point is saturated.
    """

    rows: tuple[CoverageRow, ...]
    excluded: dict[str, int]
    unquantized: dict[str, int]
    rotations: dict[str, str] = field(default_factory=dict)
    clipped: tuple[ClippedGrid, ...] = ()

    def weight_share(self, towers: tuple[str, ...] = TOWERS) -> float:
        """Share (0 to 1) of the towers' matrix weights that is in quantized layers; 0 where they have none."""
        rows = [row for row in self.rows if row.tower in towers]
        return sum(r.weights_quantized for r in rows) / max(sum(r.weights for r in rows), 1)

    def mac_share(self, towers: tuple[str, ...] = TOWERS) -> float:
        """Share (0 to 1) of the towers' multiply-accumulates that is in quantized layers; 0 where they have none."""
        rows = [row for row in self.rows if row.tower in towers]
        return sum(r.macs_quantized for r in rows) / max(sum(r.macs for r in rows), 1)

    def to_rows(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries."""
        return [asdict(row) for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types; :meth:`from_dict` takes it back."""
        return {
            "rows": self.to_rows(),
            "excluded": self.excluded,
            "unquantized": self.unquantized,
            "rotations": self.rotations,
            "clipped": [asdict(grid) for grid in self.clipped],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> CoverageReport:
        """Rebuild a report that :meth:`to_dict` made."""
        rows = tuple(CoverageRow(**r) for r in content["rows"])
        clipped = tuple(ClippedGrid(**grid) for grid in content["clipped"])
        return cls(rows, dict(content["excluded"]), dict(content["unquantized"]), dict(content["rotations"]), clipped)

    def lines(self) -> list[str]:
        """What share of matrix weights and multiply-accumulates is quantized, by tower; the largest of what is not; and what clips, if any.

        A line each.
        """
        towers = [tower for tower in TOWERS if any(row.tower == tower for row in self.rows)]
        parts = [
            f"{tower} {self.weight_share((tower,)):.1%} of weights, {self.mac_share((tower,)):.1%} of MACs"
            for tower in towers
        ]
        left = {row.layer_type: 0 for row in self.rows}
        for row in self.rows:
            left[row.layer_type] += row.macs - row.macs_quantized
        total = max(sum(row.macs for row in self.rows), 1)
        kept = [f"{kind} {macs / total:.1%}" for kind, macs in sorted(left.items(), key=lambda item: -item[1]) if macs]
        return [
            f"Quantized: {'; '.join(parts)}",
            f"In full precision, of all MACs: {', '.join(kept[:3]).replace('_', ' ') or 'none'}",
            *([self.clips(1)] if self.clipped else []),
        ]

    @property
    def clipped_layers(self) -> int:
        """Number of layers of which a grid, the weight's or the input's, is among :attr:`clipped`."""
        return len({grid.layer for grid in self.clipped})

    def clips(self, named: int) -> str:
        """One line: how many layers clip beyond the bounds, and the grids that are worst.

        Args:
            named: how many of these are named.
        """
        bounds = f"clip more than {REPORTED:.0%} of a grid's values, or to {COSTLY:.0f} times min-max's error"
        worst = sorted(self.clipped, key=lambda grid: (not grid.saturated, grid.cost <= COSTLY, -grid.share))
        told = "; ".join(map(str, worst[:named])) + ("; ..." if len(worst) > named else "")
        return f"Layers that {bounds}: {self.clipped_layers}" + (f"; worst: {told}" if told else "")

    def table(self) -> Table:
        """A table for ``rich.print``; exclusions, rotations and the grids that clip most are named in its caption."""
        listed = ", ".join(f"{name} ({size:,})" for name, size in self.excluded.items()) or "none"
        rotated = "".join(f"\nRotated, {tower}: {kind}" for tower, kind in self.rotations.items())
        clips = f"\n{self.clips(5)}" if self.clipped else ""
        table = Table(title="Quantization coverage", caption=f"Not matrix weights: {listed}{rotated}{clips}")
        for column in ("tower", "layer type", "weights", "quantized", "MACs", "quantized "):
            table.add_column(column, justify="left" if column in ("tower", "layer type") else "right")
        for r in self.rows:
            weights, macs = _percent(r.weights_quantized, r.weights), _percent(r.macs_quantized, r.macs)
            table.add_row(r.tower, r.layer_type, f"{r.weights:,}", weights, f"{r.macs:,}", macs)
        return table


def measure_coverage(vlm: VLM, clipped: tuple[ClippedGrid, ...] = ()) -> CoverageReport:
    """Count what is quantized, with one blank image and one short text run through the encoders.

    A text decoder (CoCa's) runs too and counts as part of the text tower.

    Multiply-accumulates come from torch's flop counter (half its count), with attention decomposed into matrix
    products so that these are counted on every device; each layer's own from the number of its outputs.

    Args:
        vlm: quantized or not.
        clipped: what :func:`~lightning_vlmq.quant.clipping.measure_clipping` found, to be told along.
    """
    layer_macs, total_macs = _count_macs(vlm)
    weights: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    excluded: dict[str, int] = {}
    unquantized: dict[str, int] = {}
    owners = {id(p): m for m in vlm.modules() for p in m._parameters.values() if p is not None}
    for name, parameter in vlm.named_parameters():
        tower = vlm.tower_of(name)
        if tower is None or parameter.ndim < 2:
            continue
        owner = owners[id(parameter)]
        if _is_table(name, parameter, owner):
            excluded[name] = parameter.numel()
            continue
        done = _quantizes(owner) and bool(layer_macs.get((tower, owner)))
        count = weights[tower, _layer_type(owner)]
        count[0] += parameter.numel()
        count[1] += parameter.numel() * done
        if not done:
            unquantized[name] = parameter.numel()
    macs: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for (tower, layer), count_of_layer in layer_macs.items():
        count = macs[tower, _layer_type(layer)]
        count[0] += count_of_layer
        count[1] += count_of_layer * _quantizes(layer)
    for tower, total in total_macs.items():
        rest = total - sum(m for (t, _), m in layer_macs.items() if t == tower)
        macs[tower, "activation_product"][0] += rest
    keys = sorted({*weights, *macs}, key=lambda key: (TOWERS.index(key[0]), key[1]))
    rows = tuple(CoverageRow(*key, *weights[key], *macs[key]) for key in keys if any(weights[key]) or any(macs[key]))
    return CoverageReport(rows, excluded, unquantized, rotation_kinds(vlm), clipped)


def assert_covered(report: CoverageReport, scope: str, minimum: float = 0.95) -> None:
    """Raise :class:`VLMQError`, naming the largest matrix weights left out, when too little of the scope is quantized.

    Args:
        report: what was measured.
        scope: ``vision`` or ``vision_text``.
        minimum: smallest share (0 to 1) of the scope's matrix weights that must be quantized.
    """
    towers = SCOPES[scope]
    share = report.weight_share(towers)
    if share >= minimum:
        return
    left = sorted(report.unquantized.items(), key=lambda item: -item[1])
    named = ", ".join(f"{n} ({s:,})" for n, s in left[:3]) or "the scope has no matrix weights"
    raise VLMQError(
        f"only {share:.1%} of the {scope} matrix weights are quantized, {minimum:.0%} wanted; left out: {named}; "
        "if that is meant, lower minimum_coverage"
    )


def assert_attention(report: CoverageReport, scheme: QuantScheme) -> None:
    """Raise :class:`VLMQError` where a scheme quantizes the products of attention and some of its scope stay in float."""
    rows = [row for row in report.rows if row.layer_type == "activation_product" and row.tower in scheme.towers]
    left = sum(row.macs - row.macs_quantized for row in rows)
    if scheme.attention != "float" and left:
        raise VLMQError(
            f"{left / sum(row.macs for row in rows):.1%} of the products of activations stay in float, as not all attention calls "
            "scaled_dot_product_attention; set attention to float"
        )


def _count_macs(vlm: VLM) -> tuple[dict[tuple[str, nn.Module], int], dict[str, int]]:
    """Multiply-accumulates of each layer in each tower's run, and of each tower as a whole."""
    per_layer: defaultdict[tuple[str, nn.Module], int] = defaultdict(int)
    totals: dict[str, int] = {}
    running = ""

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, AttentionProducts):
            per_layer[running, module] += module.macs(*args[:3])
            return
        if isinstance(module, RUN_TIME_ROTATIONS):
            per_layer[running, module] += output.numel() * module.macs_per_value
            return
        weight = module.weight
        assert isinstance(weight, Tensor)
        outputs = (
            output.numel() // output.shape[1] if isinstance(module, nn.Conv2d) else output.numel() // weight.shape[0]
        )
        per_layer[running, module] += outputs * weight.numel()

    device = next(vlm.parameters()).device
    image = torch.zeros(1, 3, vlm.image_size, vlm.image_size, dtype=torch.uint8, device=device)
    tokens = vlm.tokenize(["a photo"]).to(device)
    run_text: Callable[[Tensor], Tensor] = vlm.encode_text
    training, learnable = vlm.training, [p for p in vlm.parameters() if p.requires_grad]
    # the counter trips over a learnable parameter that is a layer's input, as SigLIP's latent is
    vlm.eval().requires_grad_(False)
    if vlm.has_decoder:  # shown an image that is encoded here, out of the count, as the text tower does not pay for it
        with torch.no_grad():
            run_text = partial(vlm.caption_logits, vlm.image_tokens(image))
    counted = (nn.Linear, nn.Conv2d, AttentionProducts, *RUN_TIME_ROTATIONS)
    hooks = [m.register_forward_hook(count) for m in vlm.modules() if isinstance(m, counted)]
    try:
        for running, run, dummy in (("vision", vlm.encode_image, image), ("text", run_text, tokens)):
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                run(dummy)
            totals[running] = counter.get_total_flops() // 2
    finally:
        for hook in hooks:
            hook.remove()
        vlm.train(training)
        for parameter in learnable:
            parameter.requires_grad_(True)
    return dict(per_layer), totals


def _is_table(name: str, parameter: Tensor, owner: nn.Module) -> bool:
    """Whether a parameter with two or more axes is looked up or added instead of multiplied with activations."""
    vector_in_disguise = sum(size > 1 for size in parameter.shape) <= 1 and not isinstance(owner, nn.Linear | nn.Conv2d)
    return isinstance(owner, nn.Embedding) or vector_in_disguise or bool(TABLE_NAME.search(name.rsplit(".", 1)[-1]))


def _quantizes(module: nn.Module) -> bool:
    if isinstance(module, AttentionProducts):
        return module.quantizes
    return isinstance(module, QuantizedLayer) and (module.weight_fake_quant.enabled or module.act_fake_quant.enabled)


def _layer_type(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        return "depthwise_conv2d" if module.groups == module.in_channels > 1 else "conv2d"
    if isinstance(module, RUN_TIME_ROTATIONS):
        return "rotation"
    if isinstance(module, AttentionProducts):
        return "activation_product"
    return "linear" if isinstance(module, nn.Linear) else "other"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
