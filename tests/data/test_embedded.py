"""The embedded data: roles, disjointness, determinism, and what a bad file does."""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.data import EmbeddedData, EvalSet, TensorImages
from lightning_vlmq.data.embedded.captions import COLOURS, NOUNS, write_captions
from lightning_vlmq.data.embedded.compose import (
    CLASS_NAMES,
    HELD_OUT,
    TRAINED,
    common_colours,
    compose,
    draw_colours,
    trained_mask,
)
from lightning_vlmq.data.embedded.sets import DATASETS, FOLDER, build_sets
from lightning_vlmq.data.images.encoded import decode_images, encode_png

SMALL = {"per_class": 4, "per_class_shifted": 2, "n_far_ood": 9, "severities": [1, 5]}


@pytest.fixture(scope="module")
def data():
    module = EmbeddedData(**SMALL)
    module.setup("validate")
    return module


def test_every_role_is_there_with_valid_targets(data):
    assert {s.role for s in data.eval_sets} == set(ROLES)
    assert len({s.name for s in data.eval_sets}) == len(data.eval_sets)
    for s in data.eval_sets:
        assert s.images.images.dtype == torch.uint8 and s.images.images.shape[1:] == (3, 32, 32)
        target = s.images.columns["target"]
        if s.role in ("near_ood", "far_ood"):
            assert (target == -1).all()
        else:
            assert torch.equal(target.bincount(minlength=8), torch.full((8,), len(target) // 8))


def test_sizes_follow_the_arguments(data):
    sizes = {s.name: len(s.images) for s in data.eval_sets}
    assert sizes["garments"] == 32 and sizes["backgrounds_common"] == sizes["backgrounds_counter"] == 16
    assert sizes["gaussian_noise_5"] == sizes["inverted"] == 16
    assert sizes["digits"] == sizes["textures"] == 9 and sizes["held_out"] == 400


def test_same_seed_same_pixels_and_other_seed_other_pixels():
    def digests(seed):
        build_sets.cache_clear()
        module = EmbeddedData(**SMALL, data_seed=seed)
        module.setup()
        return {s.name: s.digest for s in module.eval_sets}

    first, again, other = digests(0), digests(0), digests(1)
    assert first == again
    assert not set(first.values()) & set(other.values())


def test_leaving_a_group_out_changes_no_other():
    whole, part = EmbeddedData(**SMALL), EmbeddedData(**SMALL, datasets=["garments", "renditions"])
    whole.setup()
    part.setup()
    kept = {s.name: s.digest for s in whole.eval_sets}
    assert part.eval_sets and all(kept[s.name] == s.digest for s in part.eval_sets)


def test_pairs_are_a_thousand_and_share_no_garment_with_evaluation(data):
    assert len(data.pairs) == 1000 and len(set(data.pairs.columns["caption"])) > 400
    evaluated = {hashlib.sha256(i.numpy().tobytes()).digest() for s in data.eval_sets for i in s.images.images}
    assert not evaluated & {hashlib.sha256(i.numpy().tobytes()).digest() for i in data.pairs.images}


def test_fewer_pairs_are_the_first_ones(data):
    few = EmbeddedData(**SMALL, calibration_pairs=30, train_batch_size=20)
    few.setup()
    assert torch.equal(few.pairs.images, data.pairs.images[:30])
    batches = few.calibration_batches()
    assert [len(b["image"]) for b in batches] == [20, 10]
    assert batches[1]["caption"] == data.pairs.columns["caption"][20:30]


def test_counter_backgrounds_differ_from_common_ones_only_in_colour(data):
    sets = {s.name: s.images for s in data.eval_sets}
    common, counter = sets["backgrounds_common"], sets["backgrounds_counter"]
    assert torch.equal(common.columns["target"], counter.columns["target"])
    corner = (common.images[:, :, 0, 0].int() - counter.images[:, :, 0, 0].int()).abs().sum(1)
    centre = (common.images[:, :, 16, 16].int() - counter.images[:, :, 16, 16].int()).abs().sum(1)
    assert (corner > 0).all() and centre.float().mean() < corner.float().mean() / 2


def test_colours_follow_the_requested_share():
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    labels = torch.tensor([CLASS_NAMES.index(n) for n in TRAINED]).repeat(2000)
    own = common_colours(labels)
    assert torch.equal(draw_colours(labels, 1.0, generator), own)
    assert not (draw_colours(labels, 0.0, generator) == own).any()
    share = (draw_colours(labels, 0.9, generator) == own).double().mean()
    assert abs(share - 0.9) < 0.02
    held_out = torch.tensor([CLASS_NAMES.index(n) for n in HELD_OUT]).repeat(2000)
    assert draw_colours(held_out, 1.0, generator).unique().numel() == len(COLOURS)
    assert not trained_mask(held_out).any() and trained_mask(labels).all()


def test_composition_keeps_the_garment_and_moves_it_by_at_most_the_jitter():
    garment = torch.zeros(64, 28, 28, dtype=torch.uint8)
    garment[:, 13:15, 13:15] = 255
    images = compose(garment, torch.zeros(64, dtype=torch.int64), torch.Generator().manual_seed(0), jitter=2)
    white = (images == 255).all(1)
    assert (white.sum((1, 2)) >= 4).all()
    rows, columns = white.float().amax(2).argmax(1), white.float().amax(1).argmax(1)
    assert rows.min() >= 13 and rows.max() <= 17 and columns.min() >= 13 and columns.max() <= 17
    assert rows.unique().numel() == 5


def test_captions_name_the_class_and_vary():
    names = list(NOUNS) * 50
    captions = write_captions(names, ["red"] * len(names), torch.rand(len(names)), torch.Generator().manual_seed(0))
    assert all(any(noun in caption for noun in NOUNS[name]) for name, caption in zip(names, captions))
    assert len(set(captions)) > 200 and not any(" a orange" in caption for caption in captions)


class TestBadInput:
    def build(self, **kwargs):
        with pytest.raises(VLMQError) as caught:
            module = EmbeddedData(**{**SMALL, **kwargs})
            module.setup()
            module.val_dataloader()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_more_pairs_than_there_are(self):
        message = self.build(calibration_pairs=1001)
        assert "holds 1000 image-caption pairs, 1001 are asked for" in message
        assert "at least 1" in self.build(calibration_pairs=0)

    def copy(self, tmp_path, **columns):
        for name in ("garments", "pairs"):
            table = pq.read_table(FOLDER / f"{name}.parquet")
            for column, values in columns.get(name, {}).items():
                table = table.set_column(table.column_names.index(column), column, [values(table[column].to_pylist())])
            pq.write_table(table, tmp_path / f"{name}.parquet")
        return str(tmp_path)

    def test_unknown_names(self):
        assert "garments" in self.build(datasets=["garment"])
        assert "defocus_blur" in self.build(corruptions=["defocus_blurr"])
        assert "inverted" in self.build(renditions=["invertd"])

    def test_no_id_data(self):
        assert "role id" in self.build(datasets=["digits"])

    def test_out_of_range(self):
        assert "per_class" in self.build(per_class=0)
        assert "batch_size" in self.build(batch_size=0)
        assert "severity" in self.build(severities=[6])

    def test_missing_and_damaged_files(self, tmp_path):
        assert "does not exist" in self.build(path=str(tmp_path))
        (tmp_path / "garments.parquet").write_bytes((FOLDER / "garments.parquet").read_bytes()[:1000])
        assert "damaged" in self.build(path=str(tmp_path))

    def test_missing_column(self, tmp_path):
        path = self.copy(tmp_path)
        pq.write_table(pa.table({"image": [b""]}), tmp_path / "garments.parquet")
        assert "label" in self.build(path=path)

    def test_labels_out_of_range(self, tmp_path):
        path = self.copy(tmp_path, garments={"label": lambda values: [10, *values[1:]]})
        assert "0..9" in self.build(path=path)

    def test_bad_image_is_named_and_counted_or_skipped(self, tmp_path, caplog):
        def damage(values):
            return [b"no image", values[1][:50], *values[2:]]

        path = self.copy(tmp_path, pairs={"image": damage})
        message = self.build(path=path)
        assert "2 of 1000" in message and "row 0, 1" in message and "on_bad_image: skip" in message
        module = EmbeddedData(**SMALL, path=path, on_bad_image="skip")
        module.setup()
        assert len(module.pairs) == 998 == len(module.pairs.columns["caption"])
        assert "2 of 1000" in caplog.text

    def test_empty_set_and_unknown_role(self):
        with pytest.raises(VLMQError, match="empty"):
            EvalSet("x", "id", TensorImages(torch.zeros(0, 3, 4, 4, dtype=torch.uint8)))
        with pytest.raises(VLMQError, match="role"):
            EvalSet("x", "ood", TensorImages(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)))


def test_png_round_trip():
    for mode, shape in (("L", (5, 7)), ("RGB", (3, 5, 7))):
        image = torch.randint(0, 256, shape, dtype=torch.uint8)
        decoded, rows = decode_images([encode_png(image)], FOLDER, mode, "error")
        assert torch.equal(decoded[0], image) and rows.tolist() == [0]


def test_batch_fetch_equals_single_fetch():
    images = TensorImages(
        torch.randint(0, 256, (6, 3, 2, 2), dtype=torch.uint8), target=torch.arange(6), caption=list("abcdef")
    )
    batch = images.__getitems__([4, 1])
    assert torch.equal(batch["image"][1], images[1]["image"]) and batch["caption"] == ["e", "b"]
    assert batch["index"].tolist() == [4, 1] and batch["target"].tolist() == [4, 1]


def test_every_group_is_in_the_default_list():
    assert set(EmbeddedData().datasets) == set(DATASETS)
