"""What the benchmarks of decoding and inference compare is what they say it is; nothing here is timed."""

import runpy
from pathlib import Path

import pytest
import torch
from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch.nn import functional as F

from lightning_vlmq.models import load_vlm

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_readers_give_open_clips_pixels(tmp_path):
    script = runpy.run_path(str(FOLDER / "decoding.py"))
    script["generate"](tmp_path, 2, 300, 200)
    readers, n = script["contenders"](tmp_path, 64)
    assert n == 2
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    for k in range(n):
        expected = ((readers["open_clip"](k) * std + mean) * 255).round().to(torch.uint8)
        assert torch.equal(readers["ours"](k), expected)
        assert (readers["ours, fast"](k).int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("form", ["bf16", "int8 static", "int8 dynamic", "int4 weights"])
def test_forms_are_smaller_and_see_much_the_same(form):
    script = runpy.run_path(str(FOLDER / "inference.py"))
    vlm = load_vlm("vit_clean").requires_grad_(False)
    size = vlm.image_size
    images = torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    own = script["made"](vlm, script["FORMS"][form], images)
    with torch.no_grad():
        cosine = F.cosine_similarity(own.encode_image(images).float(), vlm.encode_image(images))
    assert 0.9 < cosine.min() < 1 - 1e-7
    assert script["parameter_bytes"](own) < 0.55 * script["parameter_bytes"](vlm)


def test_memory_of_a_call_is_what_it_took():
    script = runpy.run_path(str(FOLDER / "inference.py"))
    clock = script["Clock"](torch.device("cpu"))
    mebibytes = [clock.peak(lambda n=n: torch.ones(n, 2**18).sum()) / 2**20 for n in (40, 40, 8)]
    assert 35 < mebibytes[0] < 60 and 35 < mebibytes[1] < 60 and mebibytes[2] < 30
