"""That training pays, on real embedded models: on pairs it never saw it ends below its start, and below round-to-nearest."""

import copy

import torch
from lightning import Trainer, seed_everything

from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.models import load_vlm
from lightning_vlmq.modules import QATModule, Quantization
from lightning_vlmq.quant import quantize
from lightning_vlmq.quant.training import contrastive_distillation

PAIRS = 320
FAMILIES = ("vit", "convnext", "siglip", "coca", "align")


def losses(family: str, bits: int) -> dict[str, float]:
    """Held-out losses of a short training with the default rates, before and after, and of two post-training methods."""
    seed_everything(0, verbose=False)
    data = EmbeddedData(datasets=["garments"], per_class=1, calibration_pairs=PAIRS, train_batch_size=32)
    module = QATModule(f"{family}_clean", quant=Quantization(method="lsq_contrastive", weight_bits=bits))
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data)
    found = {"start": module.held_out_losses[0], "end": min(module.held_out_losses)}
    full = load_vlm(f"{family}_clean")
    batches = [{"image": b["image"], "tokens": full.tokenize(b["caption"])} for b in data.calibration_batches()]
    rows = sorted(data.held_out)
    images, tokens = (torch.cat([b[name] for b in batches])[rows] for name in ("image", "tokens"))
    with torch.no_grad():
        teacher, text = full.encode_image(images), full.encode_text(tokens)
        for method in ("minmax", "gptq"):
            student = copy.deepcopy(full, {id(full._tokenize): full._tokenize})
            scheme = module.scheme
            assert scheme is not None
            quantize(student, method, scheme, batches)
            own = student.encode_image(images)
            found[method] = float(contrastive_distillation(own, text, teacher, text, full.logit_scale()))
    return found


def test_training_pays_at_three_bits_on_every_family():
    found = {family: losses(family, 3) for family in FAMILIES}
    for family, own in found.items():
        assert own["end"] <= own["start"] and own["end"] < own["minmax"], (family, own)
    assert sum(own["end"] < own["start"] for own in found.values()) >= len(FAMILIES) - 1, found
    assert sum(own["end"] < own["gptq"] for own in found.values()) > len(FAMILIES) / 2, found
