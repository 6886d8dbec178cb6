"""Pre-training of the zoo: the loss of each family, and a run of each in a real Trainer."""

import math
import types

import pytest
import torch
from cases.small_data import SMALL_DATA
from lightning import Trainer, seed_everything
from torch import nn

from lightning_vlmq.callbacks import ZooExport
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.models import load_vlm, zoo
from lightning_vlmq.modules import PretrainingModule, QATModule, Quantization
from lightning_vlmq.modules.pretraining import family_loss

CAPTIONS = ["a drawing of a cat", "handbag on a red background", "clip art of dress, clothing", "a"]


def outputs_and_loss(name, seed):
    torch.manual_seed(seed)
    vlm = zoo.build(name)
    vlm.model.output_dict = True
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        outputs = vlm.model(vlm.preprocess(pixels), vlm.tokenize(CAPTIONS))
        parts = family_loss(vlm.model)(**outputs, output_dict=True)
    return outputs, {key: value.item() for key, value in parts.items()}


def contrast(outputs):
    """CLIP's loss, written out: the mean negative log-probability of the partner, over images and over captions."""
    logits = (outputs["logit_scale"] * outputs["image_features"] @ outputs["text_features"].T).double()
    return -sum((logits.log_softmax(axis).diagonal().mean() / 2).item() for axis in (0, 1))


@pytest.mark.parametrize("seed", [0, 1])
class TestFamilyLoss:
    @pytest.mark.parametrize("name", ["vit_clean", "convnext_clean", "align_clean"])
    def test_contrast(self, name, seed):
        outputs, parts = outputs_and_loss(name, seed)
        assert parts == {"contrastive_loss": pytest.approx(contrast(outputs), rel=1e-5)}

    def test_captions_of_coca(self, seed):
        outputs, parts = outputs_and_loss("coca_clean", seed)
        log_probabilities = outputs["logits"].double().log_softmax(-1)
        picked = [
            -log_probabilities[i, j, outputs["labels"][i, j]].item()
            for i, j in (outputs["labels"] != 0).nonzero().tolist()
        ]
        assert parts["contrastive_loss"] == pytest.approx(contrast(outputs), rel=1e-5)
        assert parts["caption_loss"] == pytest.approx(2 * sum(picked) / len(picked), rel=1e-5)

    def test_every_pair_of_siglip(self, seed):
        outputs, parts = outputs_and_loss("siglip_clean", seed)
        logits = outputs["logit_scale"] * outputs["image_features"] @ outputs["text_features"].T + outputs["logit_bias"]
        each = [math.log1p(math.exp(-logits[i, j].item() * (1 if i == j else -1))) for i in range(4) for j in range(4)]
        assert parts == {"contrastive_loss": pytest.approx(sum(each) / 4, rel=1e-4)}


def run(module, **kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="cpu", logger=False, use_distributed_sampler=False, num_sanity_val_steps=0, **quiet, **kwargs
    )
    trainer.fit(module, EmbeddedData(**SMALL_DATA))
    return trainer


@pytest.mark.parametrize("name", [f"{tower}_clean" for tower in zoo.TOWERS])
def test_a_run_moves_every_parameter_and_its_export_is_loaded(name, tmp_path):
    seed_everything(0, verbose=False)
    module = PretrainingModule(name, lr=1e-3, warmup=0.5)
    before = {key: value.detach().clone() for key, value in module.vlm.named_parameters()}
    trainer = run(module, max_steps=2, callbacks=[ZooExport(str(tmp_path))], check_val_every_n_epoch=99)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    # one that does not move would fail in DDP; the bias of keys cancels in every softmax
    still = {key for key, value in module.vlm.named_parameters() if torch.equal(value, before[key])}
    assert not {key for key in still if not key.endswith("k_proj.bias")}
    exported = load_vlm(name, str(tmp_path / f"{name}.safetensors"))
    state = module.vlm.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in exported.state_dict().items())


def test_a_teacher_draws_both_towers_to_its_own():
    """Of the teacher's own features the loss is nothing; of others it is the two mean distances, over every second pair."""
    teacher = load_vlm("vit_clean")
    images = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    module = PretrainingModule("convnext_clean", teacher="vit_clean")
    with torch.no_grad():
        own = {
            "image_features": teacher.encode_image(images),
            "text_features": teacher.encode_text(teacher.tokenize(CAPTIONS)),
        }
        other = {key: nn.functional.normalize(torch.randn_like(value), dim=-1) for key, value in own.items()}
        expected = sum(1 - (own[key] * other[key]).sum(-1)[::2].mean().item() for key in own)
        assert module._to_teacher(teacher, own, images, CAPTIONS).item() == pytest.approx(0, abs=1e-5)
        assert module._to_teacher(teacher, other, images, CAPTIONS).item() == pytest.approx(expected, abs=1e-5)


def test_fixed_dimensions_of_prototypes_stay_as_drawn_and_keep_their_share():
    for fixed, scale in ((0, 16), (16, 16), (16, None)):
        module = PretrainingModule(
            "vit_clean", prototype_weight=1.0, n_prototypes=3, fixed_dims=fixed, prototype_scale=scale
        )
        dim = module.vlm.encode_text(module.vlm.tokenize(["a"])).shape[-1]
        trained = {id(p) for group in _groups(module) for p in group["params"]}
        assert id(module.prototypes) in trained and all(id(p) in trained for p in module.vlm.parameters())
        assert module.prototypes.shape == (3, dim - fixed) and not module.fixed_code.requires_grad
        torch.testing.assert_close(module.fixed_code.square().sum(-1), torch.full((3,), fixed / dim))
        features = nn.functional.normalize(torch.randn(2, dim), dim=-1)
        outputs = {"image_features": features, "text_features": features}
        loss = module._to_prototypes(outputs, torch.tensor([2, -1]))
        whole = nn.functional.normalize(module.prototypes, dim=-1) * (1 - fixed / dim) ** 0.5
        logits = (scale or module.vlm.logit_scale()) * features @ torch.cat([module.fixed_code, whole], dim=1).T
        torch.testing.assert_close(loss, 2 * -logits.log_softmax(-1)[0, 2])
    with pytest.raises(VLMQError, match="fixed_dims"):
        PretrainingModule("vit_clean", prototype_weight=1.0, n_prototypes=3, fixed_dims=dim)


def _groups(module):
    module._trainer = types.SimpleNamespace(estimated_stepping_batches=2)
    return module.configure_optimizers()["optimizer"].param_groups


def test_quantization_aware_training_keeps_batch_statistics():
    seed_everything(0, verbose=False)
    module = QATModule(
        "align_clean", quant=Quantization(method="ste_contrastive", scope="vision", weight_bits=4), held_out=0
    )
    norms = [m for m in module.vlm.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m.running_mean.clone(), m.running_var.clone(), m.weight.detach().clone()) for m in norms]
    run(module, max_steps=2, limit_val_batches=0)
    for norm, (mean, variance, weight) in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, variance)
        assert not torch.equal(norm.weight, weight)
