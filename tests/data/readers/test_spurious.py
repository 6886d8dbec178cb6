"""CounterAnimal, Waterbirds and CelebA: pairs of a common and a counter set."""

import numpy as np
import pytest
from cases.files import names_and_targets, reading, refused, write_tree

from lightning_vlmq.data.readers import CelebA, CounterAnimal, Waterbirds


@pytest.fixture
def rng():
    return np.random.default_rng()


class TestCounterAnimal:
    FILES = (
        "10 salamander/common-grass/a.jpg",
        "10 salamander/counter-snow/b.jpg",
        "296 ice bear/common-snow/c.jpeg",
        "296 ice bear/common-snow/d.jpeg",
        "296 ice bear/counter-grass/e.jpeg",
    )

    def test_backgrounds_make_the_pair_and_folders_the_labels(self, tmp_path, rng):
        write_tree(tmp_path / "LAION-final", rng, self.FILES)
        (tmp_path / "LAION-final" / "imagenet_names.txt").write_text("0\ttench\n")
        common, counter = CounterAnimal(expected=(3, 2)).read(reading(tmp_path))
        assert (common.name, counter.name) == ("counteranimal_common", "counteranimal_counter")
        assert common.role == counter.role == "spurious" and len(common.class_names) == 1000
        assert names_and_targets(common) == (["a.jpg", "c.jpeg", "d.jpeg"], [10, 296, 296])
        assert names_and_targets(counter) == (["b.jpg", "e.jpeg"], [10, 296])
        assert common.class_names[296] == "polar bear"

    def test_gone_wrong(self, tmp_path, rng):
        refused(lambda: CounterAnimal().read(reading(tmp_path)), "LAION-final")
        write_tree(tmp_path / "LAION-final", rng, self.FILES)
        refused(lambda: CounterAnimal().read(reading(tmp_path)), "has 3 images", "7174")
        (tmp_path / "LAION-final/10 salamander/counter-snow/b.jpg").unlink()
        refused(lambda: CounterAnimal(expected=None).read(reading(tmp_path)), "10 salamander", "counter")
        (tmp_path / "LAION-final/salamander").mkdir()
        refused(lambda: CounterAnimal(expected=None).read(reading(tmp_path)), "'salamander'")


class TestWaterbirds:
    def write(self, root, rng):
        folder = root / "waterbird_complete95_forest2water2"
        rows = [  # y, split, place: split 2 is the test part
            ("001.A/l_on_l.jpg", 0, 2, 0),
            ("001.A/l_on_w.jpg", 0, 2, 1),
            ("002.B/w_on_l.jpg", 1, 2, 0),
            ("002.B/w_on_w.jpg", 1, 2, 1),
            ("002.B/train.jpg", 1, 0, 1),
        ]
        write_tree(folder, rng, [row[0] for row in rows])
        lines = [f"{k},{name},{y},{split},{place},/x/y.jpg" for k, (name, y, split, place) in enumerate(rows)]
        (folder / "metadata.csv").write_text("\n".join(["img_id,img_filename,y,split,place,place_filename", *lines]))
        return folder

    def test_place_equal_to_class_is_common(self, tmp_path, rng):
        self.write(tmp_path, rng)
        common, counter = Waterbirds(expected=4).read(reading(tmp_path))
        assert (common.name, counter.name) == ("waterbirds_common", "waterbirds_counter")
        assert common.class_names == ("landbird", "waterbird") and common.templates
        assert names_and_targets(common) == (["l_on_l.jpg", "w_on_w.jpg"], [0, 1])
        assert names_and_targets(counter) == (["l_on_w.jpg", "w_on_l.jpg"], [0, 1])

    def test_gone_wrong(self, tmp_path, rng):
        folder = self.write(tmp_path, rng)
        refused(lambda: Waterbirds().read(reading(tmp_path)), "has 4 images", "5794")
        refused(lambda: Waterbirds(split=1, expected=None).read(reading(tmp_path)), "has 0 images")
        (folder / "001.A/l_on_w.jpg").unlink()
        refused(lambda: Waterbirds(expected=None).read(reading(tmp_path)), "001.A/l_on_w.jpg")
        (folder / "metadata.csv").write_text("img_filename,y\n")
        refused(lambda: Waterbirds().read(reading(tmp_path)), "metadata.csv", "place")


class TestCelebA:
    def write(self, root, rng):
        people = [  # Blond_Hair, Male, split
            ("000001.jpg", 1, -1, 2),
            ("000002.jpg", -1, 1, 2),
            ("000003.jpg", 1, 1, 2),
            ("000004.jpg", -1, -1, 2),
            ("000005.jpg", -1, -1, 0),
        ]
        write_tree(root / "celeba" / "img_align_celeba", rng, [p[0] for p in people])
        lines = [f"{name} {-1:2d} {blond:2d} {male:2d}" for name, blond, male, _ in people]
        header = [str(len(people)), "Bald Blond_Hair Male "]
        (root / "celeba/list_attr_celeba.txt").write_text("\n".join([*header, *lines]) + "\n")
        (root / "celeba/list_eval_partition.txt").write_text("".join(f"{p[0]} {p[3]}\n" for p in people))

    def test_blond_women_and_dark_haired_men_are_common(self, tmp_path, rng):
        self.write(tmp_path, rng)
        common, counter = CelebA(expected=4).read(reading(tmp_path))
        assert common.class_names == ("dark hair", "blond hair")
        assert names_and_targets(common) == (["000001.jpg", "000002.jpg"], [1, 0])
        assert names_and_targets(counter) == (["000003.jpg", "000004.jpg"], [1, 0])

    def test_gone_wrong(self, tmp_path, rng):
        self.write(tmp_path, rng)
        refused(lambda: CelebA().read(reading(tmp_path)), "has 4 images", "19962")
        (tmp_path / "celeba/img_align_celeba/000003.jpg").unlink()
        refused(lambda: CelebA(expected=None).read(reading(tmp_path)), "000003.jpg")
        (tmp_path / "celeba/list_eval_partition.txt").write_text("000001.jpg 2\n")
        refused(lambda: CelebA(expected=None).read(reading(tmp_path)), "different images")
        (tmp_path / "celeba/list_attr_celeba.txt").write_text("1\nBald\n000001.jpg 1\n")
        refused(lambda: CelebA(expected=None).read(reading(tmp_path)), "Blond_Hair")

    @pytest.mark.parametrize(
        ("file", "old", "new"),
        [
            ("list_attr_celeba.txt", "000002.jpg -1 -1", "000002.jpg -1  0"),
            ("list_attr_celeba.txt", "000002.jpg -1 -1", "000002.jpg -1 nan"),
            ("list_attr_celeba.txt", "000002.jpg -1 -1", "000002.jpg -1 no"),
            ("list_eval_partition.txt", "000002.jpg 2", "000002.jpg 3"),
            ("list_eval_partition.txt", "000002.jpg 2", "000002.jpg test"),
            ("list_eval_partition.txt", "000002.jpg 2", "000002.jpg"),
        ],
    )
    def test_values_that_mean_nothing(self, tmp_path, rng, file, old, new):
        self.write(tmp_path, rng)
        path = tmp_path / "celeba" / file
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))
        refused(
            lambda: CelebA(expected=None).read(reading(tmp_path)),
            path,
            "than -1 and 1",
            "than 0, 1, 2",
            "fetch them again",
        )

    @pytest.mark.parametrize(("split", "n"), [(0, 1), (2, 4)])
    def test_other_columns_and_splits_are_of_no_concern(self, tmp_path, rng, split, n):
        self.write(tmp_path, rng)
        path = tmp_path / "celeba" / "list_attr_celeba.txt"
        path.write_text(path.read_text().replace("000002.jpg -1", "000002.jpg 77"))  # Bald
        sets = CelebA(split=split, expected=None)
        if split == 0:  # of the one image there, no counter-example
            refused(lambda: sets.read(reading(tmp_path)), "celeba")
            return
        assert sum(len(s.images) for s in sets.read(reading(tmp_path))) == n
