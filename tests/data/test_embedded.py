"""The embedded data: roles, disjointness, determinism, and what a bad file does."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.data import EmbeddedData, EvalSet, TensorImages
from lightning_vlmq.data.embedded.concepts import FOLDER, class_names, concepts, read_drawings
from lightning_vlmq.data.embedded.sets import DATASETS, HOUSES, build_sets, read_pairs
from lightning_vlmq.data.images.encoded import decode_images, encode_png

FILE = str(FOLDER / "drawings.parquet")
SMALL = {
    "n_concepts": 16,
    "n_shifted": 12,
    "n_ood": 9,
    "corruptions": ["contrast"],
    "severities": [1, 5],
    "calibration_pairs": 60,
}


@pytest.fixture(scope="module")
def data():
    module = EmbeddedData(**SMALL)
    module.setup("validate")
    return module


def by_name(data):
    return {s.name: s for s in data.eval_sets}


def test_there_are_enough_concepts_and_the_cells_are_apart():
    assert len(class_names()) >= 900 and len(class_names(trained=False)) >= 120
    assert len({c.name for c in concepts()}) == len(concepts())
    parts = {part: read_drawings(FILE, part) for part in ("id", "unseen", "pairs", "house", "pictogram")}
    assert torch.bincount(parts["id"].concept, minlength=len(class_names())).min() >= 2
    assert parts["unseen"].concept.min() >= len(class_names())
    assert len(parts["pairs"]) == 1000 and not parts["pairs"].cells() & parts["id"].cells()
    trained_houses = set(parts["pairs"].house)
    assert not trained_houses & set(parts["house"].house) and set(parts["id"].house) <= trained_houses
    attribution = (FOLDER / "ATTRIBUTION.md").read_text()
    assert all(f"@iconify-json/{h}`" in attribution for p in parts.values() for h in set(p.house))


def test_every_role_is_there_with_labels_that_fit(data):
    sets = by_name(data)
    assert {s.role for s in data.eval_sets} == set(ROLES) and len(sets) == len(data.eval_sets)
    for s in data.eval_sets:
        target = s.images.columns["target"]
        assert s.images.images.dtype == torch.uint8 and s.images.images.shape[1:] == (3, 64, 64)
        n = len(s.class_names or data.class_names)
        assert (target == -1).all() if "ood" in s.role else ((target >= 0) & (target < n)).all()
    assert torch.equal(sets["novel"].images.images, sets["unseen"].images.images)
    assert torch.equal(sets["corruptions_clean"].images.columns["target"], sets["contrast_5"].images.columns["target"])
    assert sets["corruptions_clean"].severity == 0
    assert torch.equal(sets["concepts"].images.columns["target"].bincount(), torch.full((16,), 2))


def test_sizes_follow_the_arguments(data):
    sizes = {name: len(s.images) for name, s in by_name(data).items()}
    assert sizes["concepts"] == 32 and len(data.pairs) == 60
    assert {sizes[n] for n in ("backgrounds_common", "backgrounds_counter", "contrast_5", "inverted", *HOUSES)} == {12}
    assert {sizes[n] for n in ("digits", "textures", "pictograms", "novel", "unseen")} == {9}


def test_fewer_concepts_are_classes_of_their_own_that_show_what_they_are_called(data):
    """The names of both parts, and under each label the drawings of that name."""
    assert len(data.class_names) == 16 and set(data.class_names) < set(class_names())
    whole = read_drawings(FILE, "id")
    for part, trained, s in (("id", True, by_name(data)["concepts"]), ("unseen", False, by_name(data)["unseen"])):
        names = data.recipe.class_names(trained)
        assert len(names) == 16 and names == tuple(s.class_names or data.class_names)
        drawings = data.recipe.drawings(part, None if trained else SMALL["n_ood"])
        assert [names[t] for t in s.images.columns["target"]] == [concepts()[c].name for c in drawings.concept]
    assert data.recipe.drawings("id").cells() < whole.cells()
    everything = EmbeddedData(n_concepts=10_000)
    assert tuple(everything.class_names) == class_names() == tuple(EmbeddedData().class_names)


def test_spurious_sets_show_the_same_drawings_on_other_colours(data):
    """Sample by sample, which is what pairs them in the analysis: one group, equal labels, equal opaque pixels."""
    first, second = (by_name(data)[f"backgrounds_{k}"] for k in ("common", "counter"))
    common, counter = first.images, second.images
    assert first.group == second.group != "" and torch.equal(common.columns["target"], counter.columns["target"])
    same = (common.images == counter.images).all(1).float().mean((1, 2))
    assert (same > 0.02).all() and (same < 0.98).all()  # opaque drawings agree, grounds do not


def test_same_seed_same_pixels_and_other_seed_other_pixels():
    def digests(seed):
        build_sets.cache_clear()
        read_pairs.cache_clear()
        module = EmbeddedData(**SMALL, data_seed=seed)
        module.setup()
        return {**{s.name: s.digest for s in module.eval_sets}, "pairs": module.pairs.digest()}

    first, again, other = digests(0), digests(0), digests(1)
    assert first == again
    assert not set(first.values()) & set(other.values())


def test_leaving_a_group_out_changes_no_other(data):
    part = EmbeddedData(**SMALL, datasets=["concepts", "renditions"])
    part.setup()
    kept = {s.name: s.digest for s in data.eval_sets}
    assert part.eval_sets and all(kept[s.name] == s.digest for s in part.eval_sets)


def test_fewer_pairs_are_the_first_ones(data):
    few = EmbeddedData(**{**SMALL, "calibration_pairs": 30}, train_batch_size=20)
    few.setup()
    assert torch.equal(few.pairs.images, data.pairs.images[:30])
    batches = few.calibration_batches()
    assert [len(b["image"]) for b in batches] == [20, 10]
    assert batches[1]["caption"] == data.pairs.columns["caption"][20:30]
    assert len(set(data.pairs.columns["caption"])) == 60


class TestBadInput:
    def build(self, **kwargs):
        with pytest.raises(VLMQError) as caught:
            module = EmbeddedData(**{**SMALL, **kwargs})
            module.setup()
            module.val_dataloader()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def copy(self, tmp_path, **columns):
        """The committed file with some columns changed, by functions of their values."""
        table = pq.read_table(FILE)
        for column, change in columns.items():
            table = table.set_column(table.column_names.index(column), column, [change(table[column].to_pylist())])
        pq.write_table(table, tmp_path / "drawings.parquet")
        return str(tmp_path / "drawings.parquet")

    def test_more_pairs_than_there_are(self):
        message = self.build(calibration_pairs=1001)
        assert "holds 1000 image-caption pairs, 1001 are asked for" in message

    def test_unknown_names(self):
        assert "concepts" in self.build(datasets=["concept"])
        assert "defocus_blur" in self.build(corruptions=["defocus_blurr"])
        assert "inverted" in self.build(renditions=["invertd"])

    def test_no_id_data(self):
        assert "role id" in self.build(datasets=["digits"])

    @pytest.mark.parametrize("name", ["n_concepts", "n_id", "n_shifted", "n_ood", "calibration_pairs", "batch_size"])
    def test_out_of_range(self, name):
        assert f"{name} must be at least 1, got 0" in self.build(**{name: 0})

    def test_no_severity(self):
        assert "severity" in self.build(severities=[6])

    def test_missing_and_damaged_files(self, tmp_path):
        path = tmp_path / "drawings.parquet"
        assert "does not exist" in self.build(path=str(path))
        path.write_bytes((FOLDER / "drawings.parquet").read_bytes()[:1000])
        assert "damaged" in self.build(path=str(path))

    def test_missing_column_and_missing_part(self, tmp_path):
        pq.write_table(pa.table({"image": [b""]}), tmp_path / "drawings.parquet")
        assert "lacks the column part" in self.build(path=str(tmp_path / "drawings.parquet"))
        path = self.copy(tmp_path, part=lambda values: [v.replace("unseen", "pictogram") for v in values])
        assert "no drawings of the part 'unseen'" in self.build(path=path, datasets=["concepts", "unseen"])

    def test_a_drawing_of_no_known_concept(self, tmp_path):
        path = self.copy(tmp_path, concept=lambda values: ["a thing", *values[1:]])
        message = self.build(path=path, datasets=["concepts"], n_concepts=None, n_id=5)
        assert "1 of 1928 drawings of the part 'id'" in message and "number 0" in message

    def test_bad_image_is_named_and_counted_or_skipped(self, tmp_path, caplog):
        first = pq.read_table(FILE)["part"].to_pylist().index("pairs")

        def damage(values):
            return [*values[:first], b"no image", values[first + 1][:50], *values[first + 2 :]]

        path = self.copy(tmp_path, image=damage)
        message = self.build(path=path, datasets=["concepts"])
        assert "2 of 1000" in message and "row 0, 1" in message and "on_bad_image: skip" in message
        module = EmbeddedData(datasets=["concepts"], n_concepts=8, path=path, on_bad_image="skip")
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
