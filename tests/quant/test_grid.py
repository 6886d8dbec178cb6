"""A study's grid: every method on every tower family, both scopes and all bit-widths, with coverage counted anew."""

import itertools

import pytest
import torch
from cases.quant import INTEGER_METHODS, build, make_batches, shallow, twin
from torch import Tensor

from lightning_vlmq.models import VLM
from lightning_vlmq.quant import QuantScheme, quantize, quantized_layers

FAMILIES = ("vit", "convnext", "siglip", "coca", "align")
EVERYWHERE = ((8, 8), (4, 8))
IN_TURN = ((2, 8), (3, 8), (8, 4), (4, 16), (16, 8))
"""Of these, each pair of method and family takes another one in either scope."""
TABLES = ("token_embedding.weight", "positional_embedding", "pos_embed", "latent", "query")
"""Last parts of the names of all parameters with two or more axes that are looked up or added."""


def share_that_ran_quantized(vlm: VLM, scheme: QuantScheme) -> float:
    """Of the scope's matrix weights: those whose quantized layer, with these bits, really ran on an image and a text."""
    ran: set[str] = set()
    hooks = [
        layer.register_forward_hook(lambda module, args, out, name=name: ran.add(name))
        for name, layer in quantized_layers(vlm).items()
        if (layer.weight_fake_quant.bits, layer.act_fake_quant.bits) == (scheme.weight_bits, scheme.act_bits)
        and all(q.enabled == (q.bits < 16) for q in (layer.weight_fake_quant, layer.act_fake_quant))
    ]
    assert all(x.isfinite().all() for x in outputs(vlm))
    for hook in hooks:
        hook.remove()
    sizes = {
        name: parameter.numel()
        for name, parameter in vlm.named_parameters()
        if parameter.ndim > 1 and vlm.tower_of(name) in scheme.towers and not name.endswith(TABLES)
    }
    return sum(size for name, size in sizes.items() if name.removesuffix(".weight") in ran) / sum(sizes.values())


@torch.no_grad()
def outputs(vlm: VLM) -> list[Tensor]:
    batch = make_batches(vlm, (1,), seed=7)[0]
    given = [vlm.encode_image(batch["image"]), vlm.encode_text(batch["tokens"])]
    if vlm.has_decoder:
        given.append(vlm.caption_logits(vlm.image_tokens(batch["image"]), batch["tokens"]))
    return given


@pytest.mark.parametrize("method", INTEGER_METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_covers_every_family_in_both_scopes(family: str, method: str):
    fresh = shallow(build(f"{family}_clean"))
    place = FAMILIES.index(family) + INTEGER_METHODS.index(method)
    for turn, scope in enumerate(("vision", "vision_text")):
        for bits in (*EVERYWHERE, IN_TURN[(place + turn) % len(IN_TURN)]):
            vlm, scheme = twin(fresh), QuantScheme(*bits, scope=scope)
            report = quantize(vlm, method, scheme, make_batches(vlm, (1,))).coverage
            share = share_that_ran_quantized(vlm, scheme)
            assert share >= 0.95, (scope, bits)
            assert report.weight_share(scheme.towers) == pytest.approx(share), (scope, bits)


@pytest.mark.parametrize("weight_bits", [*range(2, 9), 16])
def test_min_max_takes_all_bits_there_are(weight_bits: int):
    fresh = shallow(build("vit_clean"))
    batches = make_batches(fresh, (2,))
    for act_bits in (4, 5, 6, 7, 8, 16):
        if weight_bits == act_bits == 16:
            continue
        vlm, scheme = twin(fresh), QuantScheme(weight_bits, act_bits, scope="vision_text")
        quantize(vlm, "minmax", scheme, batches)
        assert share_that_ran_quantized(vlm, scheme) == 1
        levels: dict[str, list[int]] = {"weight": [], "act": []}

        def count(module, args, out, seen=levels["act"]):
            seen.append(module.quantized_input(args[0]).unique().numel())

        for layer in quantized_layers(vlm).values():
            layer.register_forward_hook(count)
            levels["weight"] += [row.unique().numel() for row in layer.effective_weight().detach().flatten(1)]
        outputs(vlm)
        for side, bits in (("weight", weight_bits), ("act", act_bits)):
            # as many levels as the bits give, and more than a bit less would
            assert bits == 16 or 2 ** (bits - 1) < max(levels[side]) <= 2**bits, (side, bits)


def test_errors_fall_as_bits_rise():
    fresh = shallow(build("vit_clean"))
    batches = make_batches(fresh, (4,))
    reference = outputs(fresh)
    for side in (0, 1):
        errors = []
        for bits in (2, 4, 6, 8):
            vlm = twin(fresh)
            quantize(
                vlm, "minmax", QuantScheme(*((bits, 16) if side == 0 else (16, bits)), scope="vision_text"), batches
            )
            errors.append(sum((x - y).square().sum().item() for x, y in zip(outputs(vlm), reference)))
        assert all(more > 3 * less for more, less in itertools.pairwise(errors)), (side, errors)
