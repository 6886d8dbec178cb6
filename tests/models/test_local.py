"""Features of patches against what GL-MCM's definition gives by hand, tower by tower."""

import pytest
import torch
from cases.quant import build
from torch.nn import functional as F

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import load_vlm, zoo
from lightning_vlmq.models.local import encode_patches
from lightning_vlmq.quant import QuantScheme, quantize


def images(n=3, size=64):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


def patches(vlm, pixels):
    with torch.no_grad():
        return encode_patches(vlm, pixels)


def seen_by(module, vlm, pixels):
    """The input of a module while the tower runs as a whole."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        vlm.encode_image(pixels)
    handle.remove()
    return seen[0]


def test_vision_transformer_goes_the_value_path():
    """Miyai et al.'s path in float64: values instead of attention in the last block, then the rest of the tower."""
    vlm = load_vlm("vit_clean").double()
    pixels = images()
    visual = vlm.model.visual
    block = visual.transformer.resblocks[-1]
    tokens = seen_by(block, vlm, pixels)
    with torch.no_grad():
        values = tokens + block.attn.out_proj(block.attn.v_proj(block.ln_1(tokens)))
        values = values + block.mlp(block.ln_2(values))
        expected = F.normalize(visual.ln_post(values[:, 1:]) @ visual.proj.weight.T, dim=-1)
    torch.testing.assert_close(patches(vlm, pixels), expected, atol=1e-12, rtol=0)


def test_siglip_pools_one_patch_at_a_time():
    vlm = build("siglip_clean").double()
    pixels = images(size=vlm.image_size)
    pool = vlm.model.visual.trunk.attn_pool
    tokens = seen_by(pool, vlm, pixels)
    with torch.no_grad():
        attended = pool.proj(F.linear(tokens, *(part.chunk(2)[1] for part in (pool.kv.weight, pool.kv.bias))))
        expected = F.normalize(attended + pool.mlp(pool.norm(attended)), dim=-1)
    torch.testing.assert_close(patches(vlm, pixels), expected, atol=1e-12, rtol=0)


def test_coca_pools_one_patch_at_a_time():
    vlm = build("coca_clean").double()
    pixels = images(2, vlm.image_size)
    visual = vlm.model.visual
    tokens = seen_by(visual.attn_pool, vlm, pixels)[:, 1:]
    with torch.no_grad():
        each = [visual.proj(visual._pool(tokens[:, k : k + 1])[0]) for k in range(tokens.shape[1])]
    torch.testing.assert_close(patches(vlm, pixels), F.normalize(torch.stack(each, 1), dim=-1), atol=1e-12, rtol=0)


def test_pooling_by_the_mean_takes_each_place_of_the_map():
    vlm = load_vlm("align_clean").double()
    pixels = images()
    visual = vlm.model.visual
    with torch.no_grad():
        places = visual.trunk.forward_features(vlm.preprocess(pixels)).permute(0, 2, 3, 1).flatten(1, 2)
        expected = F.normalize(visual.head.proj(places), dim=-1)
        assert expected.shape[1] == 16
        # a linear projection: the patches' mean is the image's feature
        mean = F.normalize(visual.head.proj(places).mean(1), dim=-1)
        torch.testing.assert_close(vlm.encode_image(pixels), mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(patches(vlm, pixels), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["vit_clean", "convnext_clean", "siglip_clean", "coca_clean", "align_clean"])
@pytest.mark.parametrize("method", ["minmax", "quarot"])
def test_quantized_towers_have_patches_too(name, method):
    torch.manual_seed(0)
    vlm, pixels = zoo.build(name).eval(), images(8)
    full = patches(vlm, pixels)
    tokens = vlm.tokenize(["a drawing of a cat"] * 8)
    quantize(vlm, method, QuantScheme(8, 8), [{"image": pixels, "tokens": tokens}])
    assert (full * patches(vlm, pixels)).sum(-1).mean() > 0.95


def test_a_patch_that_is_changed_changes_most():
    vlm, pixels = load_vlm("vit_clean"), images(16)
    changed = pixels.clone()
    changed[:, :, 8:24, 24:40] = 255 - changed[:, :, 8:24, 24:40]  # what token 2 of row 1 of four is centred on
    distance = (patches(vlm, pixels) - patches(vlm, changed)).norm(dim=-1).mean(0)
    assert distance.argmax() == 6


def test_towers_without_patches_are_named():
    vlm = load_vlm("RN50", "none")
    with pytest.raises(VLMQError, match=r"'RN50' have no features of their own \(ModifiedResNet\); leave out"):
        encode_patches(vlm, torch.zeros(1, 3, vlm.image_size, vlm.image_size))
