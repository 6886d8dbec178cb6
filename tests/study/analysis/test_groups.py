"""Effects over the grid are means over VLMs of means over settings."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from cases.study import grid, write_study
from scipy import stats

from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.groups import architecture_of, group_effects, source_of
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.report.tradeoffs import group_table

VLMS = ["vit_clean", "convnext_noisy", "siglip_clean"]


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    write_study(root, grid(VLMS, ["minmax", "lsq_contrastive"], [(8, 8), (4, 8)], ["vision"]), size=0.05)
    return analyse(StudyResults.load(root))


def test_means_are_those_of_the_table(analysis):
    table = analysis.comparisons.table()
    own = table[(table["metric"] == "top1") & (table["role"] == "id") & (table["dataset"] == "") & ~table["is_tuned"]]
    own = own[own["method"] != "fp32"]
    found = {(e.grouping, e.group): e for e in group_effects(analysis) if e.dimension.title == "Accuracy"}
    chosen = {
        ("", "all"): own["vlm"].notna(),
        ("methods", "trained"): own["method"] == "lsq_contrastive",
        ("bits", "W4A8"): own["weight_bits"] == 4,
        ("architecture", "vit"): own["vlm"] == "vit_clean",
        ("pre-training", "clean"): own["vlm"].isin(["vit_clean", "siglip_clean"]),
    }
    for key, which in chosen.items():
        points = own[which].groupby("vlm")["effect"].mean().to_numpy()
        assert found[key].found.estimate == pytest.approx(points.mean()), key
        assert found[key].n_cells == which.sum() and found[key].found.n_clusters == len(points)
    everything = found["", "all"].found
    points = own.groupby("vlm")["effect"].mean().to_numpy()
    least = stats.t.ppf(0.975, len(points) - 1) * stats.sem(points)  # the common images come on top
    assert everything.high - everything.estimate >= least * (1 - 1e-9)
    assert ("scope", "vision") not in found  # one scope divides nothing
    html = group_table(group_effects(analysis))
    assert html.count("<tr>") == 1 + len(found) and "W4A8 <small>bits</small>" in html


def test_a_name_says_the_family():
    names = {
        "ViT-B-16-SigLIP2@webli": "siglip",
        "coca_ViT-B-32": "coca",
        "convnext_base_w": "convnext",
        "ViT-B-32": "vit",
    }
    assert {name: architecture_of(name) for name in names} == names
    assert architecture_of("RN50") == ""


@pytest.mark.parametrize(
    ("vlm", "pretrained", "source"),
    [
        ("ViT-B-32", "laion2b_s34b_b79k", "noisy"),
        ("hf-hub:laion/CLIP-ViT-B-32", "", "noisy"),
        ("vit_noisy", "noisy", "noisy"),
        ("ViT-B-32", "openai", "clean"),
        ("ViT-L-14", "dfn2b", "clean"),
        ("ViT-B-16", "metaclip_400m", "clean"),
        ("ViT-B-16", "datacomp_xl_s13b_b90k", ""),
        ("switch_base", "with_text", ""),  # neither is WIT
        ("twitter", "unclean", ""),
    ],
)
def test_a_whole_part_of_a_name_says_the_source(vlm, pretrained, source):
    run = SimpleNamespace(key=SimpleNamespace(pretrained=pretrained))
    assert source_of(SimpleNamespace(results=SimpleNamespace(runs_of=lambda _: ([run], []))), vlm) == source
