"""The grid: what a study config spells out, what makes a run another run, and what is refused before anything runs."""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from lightning_vlmq.commands.look import PART
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import zoo
from lightning_vlmq.quant import METHODS
from lightning_vlmq.results.loose import LooseRuns
from lightning_vlmq.study.run.config import Study
from lightning_vlmq.study.run.grid import compose, every_vlm, say_unpinned
from lightning_vlmq.study.run.shards import shard_of

CONFIGS = Path(__file__).parents[3] / "configs"


@cache
def _composed(*overrides: str) -> dict:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = hydra_compose("sweep", overrides=list(overrides))
    return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)["study"]


def config(*overrides: str) -> dict:
    return copy.deepcopy(_composed(*overrides))


@pytest.fixture
def demo() -> dict:
    return config("study=demo")


def runs(plain: dict, seed: int = 0, folder: Path = CONFIGS, data: str = ""):
    return compose(Study.from_config(plain), [seed], folder, data)


def test_the_demo_is_two_vlms_in_twelve_settings_and_full_precision(demo):
    grid = runs(demo)
    assert len(grid) == 2 * (1 + 4 * 3)
    assert [run.kind for run in grid[:2]] == ["fp32"] * 2  # what all else is compared with
    assert len({run.run_id for run in grid}) == 26
    assert {run.bits for run in grid if run.kind != "fp32"} == {"W8A8", "W4A8", "W4A4"}
    assert {run.kind for run in grid if run.method == "lsq_contrastive"} == {"qat"}
    assert {run.kind for run in grid if run.method == "minmax"} == {"ptq"}


def test_argument_lists(demo):
    extra = demo["arguments"]["extra"]
    assert extra and all(word.startswith("--data.") for word in extra)
    full, quantized = runs(demo, seed=3)[0], runs(demo, seed=3)[-1]
    configs = str(CONFIGS)
    assert [word.replace(configs, "configs") for word in full.arguments] == [
        *("validate", "--config", "configs/eval.yaml"),
        *("--seed_everything=3", "--model.vlm=vit_clean", "--model.quant.method=fp32"),
        *extra,
        *("--results.root=logs/demo", f"--results.run_id={full.run_id}"),
        *(
            "--model.kept_features=reference",
            "--trainer.logger.init_args.save_dir=logs/demo/tensorboard",
            "--trainer.logger.init_args.name=vit_clean-fp32-s3",
        ),
    ]
    assert quantized.arguments[0] == "fit" and quantized.arguments[2].endswith("configs/qat.yaml")
    assert set(quantized.arguments[3 : 9 + len(extra)]) == {
        "--seed_everything=3",
        "--model.vlm=align_clean",
        "--model.quant.method=lsq_contrastive",
        "--model.quant.scope=vision_text",
        "--model.quant.weight_bits=4",
        "--model.quant.act_bits=4",
        *extra,
    }


@pytest.mark.parametrize(
    "path", sorted(p.stem for p in (CONFIGS / "study").glob("*.yaml") if PART not in p.read_text())
)
def test_committed_studies_are_complete(path):
    plain = config(f"study={path}", *(["study.data_root=/datasets"] if path in ("paper", "real") else []))
    unknown_methods = [name for name in plain["axes"]["method"] if name.partition("(")[0] not in METHODS]
    assert not unknown_methods
    grid = runs(plain)
    cells = len(plain["axes"]["method"]) * len(plain["axes"]["bits"]) * len(plain["axes"]["scope"])
    vlms = every_vlm(plain["axes"]["vlm"])
    assert len(grid) == len(vlms) * (1 + cells) and {run.vlm for run in grid} == set(vlms)
    assert plain["seeds"] is None or path == "embedded"


def test_every_beginning_is_a_balanced_study():
    """Seed by seed; inside a seed every VLM and method as often as any other, up to the group that is being worked on."""
    plain = config("study=embedded")
    study = Study.from_config(plain)
    grid = compose(study, study.seeds_or(0), CONFIGS)
    methods, n_vlms, n_scopes = plain["axes"]["method"], len(zoo.names()), len(plain["axes"]["scope"])
    one_seed = n_vlms * (1 + len(methods) * len(plain["axes"]["bits"]) * n_scopes)
    assert [run.seed for run in grid] == [seed for seed in (0, 1, 2) for _ in range(one_seed)]
    for end in range(n_vlms, one_seed + 1, n_vlms * n_scopes):
        begun = grid[:end]
        assert {sum(run.vlm == vlm for run in begun) for vlm in zoo.names()} == {end // n_vlms}
        counts = [sum(run.method == method for run in begun) for method in methods]
        assert max(counts) - min(counts) <= n_vlms * n_scopes
        widths = [sum(run.bits == bits for run in begun) for bits in plain["axes"]["bits"]]
        assert max(widths) - min(widths) <= n_vlms * n_scopes
    half = 8 * n_vlms * n_scopes  # eight methods: each bit-width once with training and once without
    for start in range(n_vlms, one_seed, half):
        kinds = {(run.method, run.bits, run.kind) for run in grid[start : start + half]}
        assert sorted((bits, kind) for _, bits, kind in kinds) == sorted(
            itertools.product(plain["axes"]["bits"], ("ptq", "qat"))
        )
    assert sorted(methods) == sorted(config("study=methods")["axes"]["method"])
    pairs = grid[n_vlms:one_seed]
    assert all(a.scope == "vision" and b.scope == "vision_text" for a, b in zip(pairs[::2], pairs[1::2]))
    assert all((a.vlm, a.method, a.bits) == (b.vlm, b.method, b.bits) for a, b in zip(pairs[::2], pairs[1::2]))


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_shards_are_disjoint_and_together_the_grid(demo, n):
    grid = runs(demo)
    parts = [shard_of(grid, f"{i}/{n}") for i in range(1, n + 1)]
    assert sorted(run.run_id for part in parts for run in part) == sorted(run.run_id for run in grid)
    home = {}
    for number, part in enumerate(parts):
        for run in part:  # scopes that differ in nothing else stay together
            assert home.setdefault((run.seed, run.vlm, run.method, run.bits), number) == number
        assert part == [run for run in grid if run in part]
    assert max(map(len, parts)) - min(map(len, parts)) <= 2 + len(grid) // n // 2
    assert shard_of(grid, None) == grid


@pytest.mark.parametrize("n", [2, 3, 5, 8, 10, 11, 30])
def test_every_beginning_of_a_shard_is_balanced_over_vlms_and_methods(n):
    grid = _embedded()
    vlms, first = sorted({run.vlm for run in grid}), [run for run in grid if run.scope != "vision_text"]
    shards = {run: number for number in range(1, n + 1) for run in shard_of(grid, f"{number}/{n}")}
    assert len(vlms) == 10 and set(shards) == set(grid)
    counts = np.zeros((n, len(vlms)), int)
    for start in range(0, len(first), len(vlms)):
        row = first[start : start + len(vlms)]
        assert len({(run.method, run.bits, run.seed) for run in row}) == 1  # one method, every VLM
        for run in row:
            counts[shards[run] - 1, vlms.index(run.vlm)] += 1
        assert np.ptp(counts) <= 1, (start, counts)
        each = Counter(shards[run] for run in row)  # so methods are balanced too
        assert len(each) == min(n, len(vlms)) and max(each.values()) - min(each.values()) <= 1
    assert np.ptp(counts.sum(1)) <= 1


@pytest.mark.parametrize("n", [1, 2, 6])
def test_shards_of_one_vlm(demo, n):
    grid = runs(demo | {"axes": demo["axes"] | {"vlm": ["vit_clean"]}})
    sizes = [len(shard_of(grid, f"{number}/{n}")) for number in range(1, n + 1)]
    assert sum(sizes) == len(grid) and max(sizes) - min(sizes) <= 1


@cache
def _embedded() -> list:
    study = Study.from_config(config("study=embedded"))
    return compose(study, study.seeds_or(0), CONFIGS)


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3", "-1/2"])
def test_what_is_no_shard_is_refused(demo, shard):
    with pytest.raises(VLMQError, match=r"is not of the form 2/8"):
        shard_of(runs(demo), shard)


def test_seeds_of_a_study_and_of_the_command_line(demo):
    study = Study.from_config(demo | {"seeds": [4, 4, 2]})
    assert study.seeds_or(0) == [4, 2] and Study.from_config(demo).seeds_or(7) == [7]
    with pytest.raises(VLMQError, match=r"give study\.seeds=\[3\] alone"):
        study.seeds_or(3)
    for bad in ([], [-1], ["a"], [True], 3):
        with pytest.raises(VLMQError, match=r"study\.seeds must be a list"):
            Study.from_config(demo | {"seeds": bad})


def test_other_data_make_other_runs(demo):
    """What lies below the folder decides, not where it lies."""
    plain = config("study=demo", "study.data=[imagenet,cc3m]", "study.data_root=/a")
    first = [run.run_id for run in runs(plain, data="1")]
    assert first == [run.run_id for run in runs({**plain, "data_root": "/b"}, data="1")]
    assert set(first).isdisjoint(run.run_id for run in runs(plain, data="2"))


def test_where_output_goes_does_not_change_what_a_run_is(demo):
    elsewhere = config("study=demo", "study.name=other", "study.root=/somewhere/else")
    assert [run.run_id for run in runs(elsewhere)] == [run.run_id for run in runs(demo)]
    assert "--results.root=/somewhere/else" in runs(elsewhere)[0].arguments


def test_what_decides_a_result_changes_what_a_run_is(demo):
    first = runs(demo)[0].run_id
    assert runs(demo, seed=1)[0].run_id != first
    longer = copy.deepcopy(demo)
    longer["arguments"]["extra"] = ["--data.n_concepts=20"]
    assert runs(longer)[0].run_id != first


def test_config_files_count_by_what_they_say(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs"
    folder.mkdir()
    files = {"eval.yaml": "data: nested.yaml\nseed: 1\n", "qat.yaml": "seed: 1\n", "nested.yaml": "n: 5\n"}
    for name, text in files.items():
        (folder / name).write_text(text)

    def ids() -> list[str]:
        return [run.run_id for run in runs(demo, folder=folder)]

    before = ids()
    (folder / "eval.yaml").write_text("# a remark\nseed:   1\ndata: nested.yaml\n")
    assert ids() == before
    (folder / "nested.yaml").write_text("n: 6\n")
    after = ids()
    assert after[0] != before[0]
    assert [run for run, old in zip(after, before) if "lsq" in run and run != old] == []
    (folder / "qat.yaml").write_text("seed: [\n")
    with pytest.raises(VLMQError, match=r"qat\.yaml is not valid YAML"):
        ids()
    (folder / "qat.yaml").unlink()  # the package's then
    assert ids()[-1] not in (before[-1], after[-1])


def test_weights_after_an_at_sign(demo):
    demo["axes"]["vlm"] = ["ViT-B-32@laion2b_s34b_b79k"]
    full = runs(demo)[0]
    assert "--model.vlm=ViT-B-32" in full.arguments and "--model.pretrained=laion2b_s34b_b79k" in full.arguments
    assert full.run_id.startswith("ViT_B_32_laion2b_s34b_b79k-fp32-s0-")
    assert not any("pretrained" in word for word in runs(config("study=demo"))[0].arguments)


def test_entries_named_twice_count_once(demo):
    demo["axes"]["vlm"] = ["vit_clean", "vit_clean"]
    demo["axes"]["method"] = ["minmax", "fp32", "minmax"]
    assert len(runs(demo)) == 1 + 3


def test_bits_are_known_however_they_are_spelled(demo):
    demo["axes"]["bits"] = ["W4A8", "W8A8"]
    plain = runs(demo)
    demo["axes"]["bits"] = ["w4a8", "W08A8", "W4A8"]
    assert runs(demo) == plain and [run.run_id for run in runs(demo)] == [run.run_id for run in plain]
    demo["outermost"] = "bits"
    order = [run.bits for run in runs(demo) if run.kind != "fp32"]
    assert order == ["W4A8"] * (len(order) // 2) + ["W8A8"] * (len(order) // 2)


def test_a_long_name_is_still_a_file_s(demo, tmp_path):
    """With what is filed as part of the run behind it; two that differ where the name is cut stay two."""
    folders = [tmp_path / part / ("models_of_many_words_" * 6) / "clip" for part in ("one", "two")]
    for folder in folders:
        folder.mkdir(parents=True)
    demo["axes"]["vlm"] = [f"local-dir:{folder}" for folder in folders]
    found = [run.run_id for run in runs(demo)]
    assert len(set(found)) == len(found) and all(LooseRuns.is_name(f"{run_id}.hurt_64-512") for run_id in found)


def test_an_outermost_axis_changes_last(demo):
    axes = {"vlm": ["vit_clean", "siglip_clean"], "method": ["minmax"], "bits": ["W4A8", "W8A8"], "scope": ["vision"]}
    demo["axes"] |= axes
    before = runs(demo)
    demo["outermost"] = "bits"
    order = [(run.vlm, run.method, run.bits) for run in runs(demo)]
    stages = [("fp32", "W32A32"), ("minmax", "W4A8"), ("minmax", "W8A8")]
    assert order == [(vlm, *rest) for rest in stages for vlm in demo["axes"]["vlm"]]
    assert {run.run_id for run in runs(demo)} == {run.run_id for run in before}
    demo["outermost"] = "bit"
    with pytest.raises(VLMQError, match="outermost"):
        runs(demo)


def test_planted_outliers_make_another_model_of_each(demo):
    before = runs(demo)
    demo["axes"]["outliers"] = ["1", "50"]
    grid = runs(demo)
    assert len(grid) == 2 * len(before) and [run.run_id for run in grid if "+outliers" not in run.vlm] == [
        r.run_id for r in before
    ]
    planted = [run for run in grid if run.vlm.endswith("+outliers50")]
    assert len(planted) == len(before) == len({run.run_id for run in planted}) and planted[0].kind == "fp32"
    assert all("--model.outliers=50" in run.arguments for run in planted)
    assert not any(word.startswith("--model.outliers") for run in before for word in run.arguments)


@pytest.mark.parametrize(
    ("axis", "entries", "message"),
    [
        ("vlm", ["vit_cleen"], "unknown VLM 'vit_cleen'; did you mean vit_clean"),
        (
            "vlm",
            ["ViT-B-32@laion2b_s34b_b79"],
            "unknown weights of ViT-B-32 'laion2b_s34b_b79'; did you mean laion2b_s34b_b79k",
        ),
        ("method", ["minmx"], "unknown method 'minmx'; did you mean minmax"),
        ("scope", ["text_vision"], "unknown scope 'text_vision'; did you mean"),
        ("outliers", ["0.5"], "outliers '0.5' is no factor"),
        ("bits", ["W4"], "bits 'W4' are not of the form W4A8"),
        ("bits", ["W9A8"], "weight_bits must be 2 to 8"),
        ("bits", ["W16A16"], "nothing would be quantized"),
        ("bits", [], "study.axes.bits is empty"),
        ("method", "minmax", "study.axes.method must be a list of words"),
        ("method", [4], "study.axes.method must be a list of words"),
    ],
)
def test_bad_axes_are_refused_in_one_line(demo, axis, entries, message):
    demo["axes"][axis] = entries
    with pytest.raises(VLMQError) as error:
        runs(demo)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("axes"), "the study config lacks axes"),
        (lambda c: c["axes"].pop("vlm"), "study.axes lacks vlm"),
        (lambda c: c["axes"].update(vlms=["vit_clean"]), "unknown entry of study.axes 'vlms'; did you mean vlm"),
        (lambda c: c.update(comand=1), "unknown entry of the study config 'comand'; did you mean commands"),
        (lambda c: c.update(root=None), "study.root must be a folder, e.g. study.root=logs/mine; got None"),
        (lambda c: c.update(axes=5), "study.axes must be a table"),
        (lambda c: c["arguments"].update(extras=[]), "unknown entry of study.arguments 'extras'; did you mean extra"),
        (lambda c: c.update(name="a/b"), "study.name 'a/b' is no folder name"),
        (
            lambda c: c["arguments"].update(extra=["--model.x={vln}"]),
            "'--model.x={vln}' asks for {vln}, which no run has",
        ),
        (lambda c: c["arguments"].update(extra=["{"]), "'{' is no template"),
    ],
)
def test_bad_configs_are_refused_in_one_line(demo, change, message):
    change(demo)
    with pytest.raises(VLMQError) as error:
        runs(demo)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_data_sets_in_files_join_every_run():
    """What the data are counts for a run, in the order given; where they lie does not."""
    plain = config("study=demo", "study.data=[imagenet,cc3m]", "study.data_root=/a")
    grid, elsewhere = runs(plain), runs({**plain, "data_root": "/b"})
    for run, other in zip(grid, elsewhere):
        words = [word.replace(str(CONFIGS), "configs") for word in run.arguments]
        assert words[3:7] == ["--config", "configs/data/imagenet.yaml", "--config", "configs/data/cc3m.yaml"]
        assert words[-1] == "--data.root=/a" and other.arguments[-1] == "--data.root=/b"
        assert run.run_id == other.run_id
    assert {run.run_id for run in grid}.isdisjoint(run.run_id for run in runs({**plain, "data": ["imagenet"]}))
    assert {run.run_id for run in grid}.isdisjoint(run.run_id for run in runs(config("study=demo")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ["imagenet"]}, "study.data_root=/datasets"),
        ({"data_root": "/a"}, "no data"),
        ({"data": "imagenet", "data_root": "/a"}, "list of data configs"),
        ({"data": ["imagenette"], "data_root": "/a"}, "imagenet"),
    ],
)
def test_data_that_are_not_there_are_refused(change, message):
    with pytest.raises(VLMQError, match=message):
        runs(config("study=demo") | change)


def test_weights_of_ones_own_count_by_their_content(demo, tmp_path, monkeypatch):
    """Folders, files named without a folder, and shards: what lies there now decides, not what it is called."""
    monkeypatch.chdir(tmp_path)
    shards = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    for folder in ("clip", "shards"):
        (tmp_path / folder).mkdir()
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"1")
    (tmp_path / "w.pt").write_bytes(b"1")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(shards))
    for name in ("one", "two"):
        (tmp_path / "shards" / f"{name}.safetensors").write_bytes(b"1")
    demo["axes"]["vlm"] = [
        *(f"local-dir:{tmp_path / 'clip'}", "ViT-B-32@w.pt", "ViT-B-32@shards/model.safetensors.index.json"),
        *("vit_clean", "ViT-B-32@openai"),
    ]

    def ids() -> list[str]:
        return [run.run_id for run in runs(demo)[:5]]

    before = ids()
    changed = ("clip/model.safetensors", "w.pt", "shards/two.safetensors")
    for place, file in enumerate(changed):
        (tmp_path / file).write_bytes(b"2")
        after = ids()
        assert [k for k in range(5) if after[k] != before[k]] == [place]
        before = after


def test_a_folder_that_is_not_there_is_refused_before_anything_runs(demo, tmp_path):
    demo["axes"]["vlm"] = ["vit_clean", f"local-dir:{tmp_path / 'no'}"]
    with pytest.raises(VLMQError, match=r"no' of 'local-dir:.*does not exist"):
        runs(demo)


def test_a_repository_without_a_revision_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    say_unpinned(["vit_clean", "hf-hub:a/b@c0ffee", "hf-hub:owner/name"])
    assert [record.getMessage() for record in caplog.records] == [
        "'hf-hub:owner/name' names no revision, and a stored run counts whatever the repository holds later; "
        "write hf-hub:owner/name@<commit>"
    ]
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc123")
    say_unpinned(["hf-hub:owner/name"])
    assert caplog.records[-1].getMessage().endswith("hf-hub:owner/name@abc123")


def test_files_in_the_working_folder_count_by_their_content(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo["arguments"]["extra"] = ["--data.class_names=names.txt"]
    without = runs(demo)[0].run_id
    (tmp_path / "names.txt").write_text("bag\ncoat\n")
    first = runs(demo)[0].run_id
    (tmp_path / "names.txt").write_text("satchel\ncoat\n")
    assert len({without, first, runs(demo)[0].run_id}) == 3
    (tmp_path / "minmax").write_text("a file that happens to be called as a method is")
    assert runs(demo)[2].run_id == runs(demo)[2].run_id


def test_a_long_path_makes_no_name_that_is_too_long(demo, tmp_path):
    folders = [tmp_path / ("a" * 120) / ("b" * 120) / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir(parents=True)
    demo["axes"]["vlm"] = [f"local-dir:{folder}" for folder in folders]
    names = {run.run_id for run in runs(demo)}
    assert len(names) == 26 and max(map(len, names)) < 200
    assert any("one" in name for name in names)


@pytest.mark.parametrize("way", [["--config", "data/folder"], ["--config=data/folder"]])
def test_configs_among_a_studys_own_arguments_count_by_what_they_say(demo, tmp_path, way):
    (tmp_path / "data").mkdir()
    ids = set()
    for pairs in (5, 6):
        (tmp_path / "data" / "folder.yaml").write_text(f"data: {{init_args: {{calibration_pairs: {pairs}}}}}")
        demo["arguments"]["extra"] = way
        run = runs(demo, folder=tmp_path)[0]
        ids.add(run.run_id)
        assert str(tmp_path / "data" / "folder.yaml") in run.arguments
    assert len(ids) == 2
