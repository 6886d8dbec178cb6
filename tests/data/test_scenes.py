"""What the embedded benchmark is made of: scenes, captions, and what is trained on."""

import pytest
import torch

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data import EmbeddedPretraining
from lightning_vlmq.data.embedded.concepts import FOLDER, class_names, group_of, groups, read_drawings
from lightning_vlmq.data.embedded.pretraining import VAGUE, ConceptBatches, Scenes, told_concepts
from lightning_vlmq.data.embedded.scenes import COLOURS, compose, draw_colours, place, place_freely, textures
from lightning_vlmq.data.embedded.wording import Writer, all_phrases
from lightning_vlmq.models import zoo

FILE = str(FOLDER / "drawings.parquet")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_colours_follow_the_group_as_often_as_asked():
    group = torch.randint(len(groups()), (20_000,), generator=generator())
    drawn = draw_colours(group, 0.9, generator(1))
    assert (drawn == group).double().mean().item() == pytest.approx(0.9, abs=0.01)
    others = (drawn[drawn != group] - group[drawn != group]) % len(COLOURS)
    assert torch.bincount(others, minlength=8)[1:].double().std() / len(others) < 0.02
    assert (draw_colours(group, 0.0, generator(2)) != group).all()
    assert len(set(draw_colours(torch.full((200,), -1), 0.9, generator(3)).tolist())) == len(COLOURS)
    assert len(groups()) == len(COLOURS)


def test_placing_keeps_the_drawing_and_composing_follows_alpha():
    drawing = torch.randint(256, (1, 4, 48, 48), dtype=torch.uint8, generator=generator())
    placed = place(drawing, generator(1), jitter=0)[0]
    alpha = drawing[0, 3:].double() / 255
    ground = torch.full((1, 3, 64, 64), 100.0)
    expected = (drawing[0, :3].double() * alpha + (1 - alpha) * 100).round()
    scene = compose(placed[None], ground)[0].double()
    assert (scene[:, 8:56, 8:56] - expected).abs().max() <= 1
    assert (scene[:, :8] == 100).all()
    moved = place_freely(torch.full((6, 4, 64, 64), 255, dtype=torch.uint8), generator(2))
    area = moved[:, 3].sum((1, 2)).sqrt()
    assert ((area > 30) & (area < 64)).all()


def test_textures_are_normalised():
    noise = textures(12, generator())
    assert noise.abs().max() <= 2.5 and noise.mean((1, 2, 3)).abs().max() < 0.1
    grey = (noise[:, 0] == noise[:, 1]).all(-1).all(-1)
    assert grey.any() and not grey.all()


def test_captions_vary_tell_the_truth_and_are_covered_by_the_vocabulary():
    writer = Writer(0)
    captions = [writer.caption(7, "red") for _ in range(300)]
    assert len(set(captions)) > 60 and not any(c in caption for caption in captions for c in COLOURS if c != "red")
    assert Writer(5).caption(3, "blue") == Writer(5).caption(3, "blue")
    tokenizer = zoo.WordTokenizer(16)
    ids = tokenizer([*all_phrases(), *captions, writer.vague("pink")])
    assert not (ids == 1).any() and (ids.max(1).values == tokenizer.vocab_size - 1).all()
    assert tokenizer(["zzzz " * 40])[0].tolist()[1:] == [1] * 14 + [tokenizer.vocab_size - 1]
    names = tokenizer(list(class_names()))
    assert len(names.unique(dim=0)) == len(names)


def test_noise_is_as_much_as_asked_and_half_of_it_vague():
    concept = torch.randint(900, (20_000,), generator=generator())
    told = told_concepts(concept, 0.35, generator(1))
    assert (told == VAGUE).double().mean().item() == pytest.approx(0.175, abs=0.01)
    assert (told != concept).double().mean().item() == pytest.approx(0.35, abs=0.01)
    assert torch.equal(told_concepts(concept, 0.0, generator(1)), concept)


def test_batches_never_hold_a_concept_twice_and_every_second_round_keeps_groups_together():
    concept = torch.arange(len(class_names())).repeat(3)
    batches = list(ConceptBatches(concept, 200, 2, generator()))
    assert len(batches) == len(ConceptBatches(concept, 200, 2, generator())) == 8
    assert all(len(concept[b].unique()) == 200 for b in batches)
    largest = [torch.bincount(group_of(concept[b])).max().item() for b in batches]
    assert min(largest[4:]) > max(largest[:4])
    with pytest.raises(VLMQError, match="number of trained concepts"):
        ConceptBatches(concept, 5000, 1, generator())


def test_training_scenes_are_anew_each_time_and_tell_what_they_are_told():
    drawings = read_drawings(FILE, "pairs").select(torch.arange(6))
    told = drawings.concept.clone()
    told[0] = VAGUE
    batches = [Scenes(drawings, told, textures(4, generator()), 0.9, generator(k)) for k in (1, 1, 2)]
    first, again, other = (s.__getitems__([0, 1, 5]) for s in batches)
    assert torch.equal(first["image"], again["image"]) and first["caption"] == again["caption"]
    assert not torch.equal(first["image"], other["image"])
    assert first["image"].shape == (3, 3, 64, 64) and first["concept"].tolist() == told[[0, 1, 5]].tolist()


def flat_rows(scenes):
    """The share of rows whose outermost pixels, which no drawing covers, are all of one colour."""
    edge = torch.cat([scenes[..., :2], scenes[..., -2:]], -1).float()
    return (edge.amax(-1) == edge.amin(-1)).all(1).float().mean().item()


def test_early_epochs_show_flat_grounds_of_any_colour_and_later_ones_the_groups_with_textures():
    drawings = read_drawings(FILE, "pairs").select(torch.arange(200))
    plain, full = (
        Scenes(drawings, drawings.concept, textures(8, generator()), share, generator(1), is_plain)
        for share, is_plain in ((1 / len(COLOURS), True), (0.9, False))
    )
    flat = [flat_rows(scenes.__getitems__(list(range(200)))["image"]) for scenes in (plain, full)]
    assert flat[0] > 0.8 and flat[1] < flat[0] - 0.3
    for setting in ({"plain_until": 1.5}, {"noise_rate": 1.0}):
        with pytest.raises(VLMQError, match=next(iter(setting))):
            EmbeddedPretraining(**setting)


@pytest.mark.parametrize("name", zoo.buildable())
def test_every_embedded_model_can_be_built_and_takes_the_vocabulary(name):
    vlm = zoo.build(name).eval()
    with torch.no_grad():
        image = vlm.encode_image(torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator()))
        text = vlm.encode_text(vlm.tokenize(["a drawing of a cat", "violin"]))
    assert image.shape == text.shape == (2, 256)
    assert sum(p.numel() for p in vlm.parameters()) < 5e6  # ten of them in half precision: about 60 MB
