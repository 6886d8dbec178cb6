"""The published claims held against a study: the same query on anyone's store, its effect over VLMs, and a verdict.

Published: *Less Precise Can Be More Reliable: A Systematic Evaluation of Quantization's Impact on VLMs Beyond Accuracy* (ICML 2026,
arXiv 2509.21173), and its neighbours where a claim names one, on other models, data and scales than a study here; agreement is not
expected of any line. Not queried: how much faster real INT8 encoders are, for a store holds fake-quantized models, see docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.study.analysis.change import FULL
from lightning_vlmq.study.analysis.claims import Claim, Expectation
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.groups import Cell, architecture_of, source_of
from lightning_vlmq.study.analysis.queries import (
    GRID,
    Cells,
    Query,
    count,
    difference,
    in_grid,
    joint_share,
    largest_growth,
    mean,
    mean_share,
    share_of_groups,
    shares_by_vlm,
    tested_gains,
)
from lightning_vlmq.study.analysis.recorded import (
    BLOCK,
    OUTPUT,
    Recorded,
    beside,
    block_noise,
    falls_over,
    shift_growth,
    stable_rank_growth,
)
from lightning_vlmq.study.analysis.runs import SHIFT_SETS

ECE = Measure("ece", "id")
SIGN = Measure("signed_calibration_error", "id")
CORRUPTION = Measure("top1", "corruption")
SHIFT = Measure("top1", "shift")
RSG = Measure("rsg", "spurious")
VULNERABILITY = Measure("vuln_add", "spurious")

Line = tuple[str, str, Expectation, Query | Recorded]
"""A claim, its published figure, what would agree, and the numbers whose mean over VLMs is held against it."""


def _where(**fields: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(fields.items())


_W8A8, _W4A8 = {"weight_bits": 8, "act_bits": 8}, {"weight_bits": 4, "act_bits": 8}
_BOTH, _TRAINED = _where(scope="vision_text"), _where(is_trained=True)
_INT8 = _where(method="minmax", **_W8A8)

_CALIBRATION: list[Line] = [
    ("share of W8A8 models whose calibration improves", "about 40 %", 0.4, Query(ECE, "better", _where(**_W8A8))),
    (
        "ECE, both towers quantized and logit scale tuned, against full precision",
        "1.1 % against 6.9 %",
        "falls",
        Query(ECE, "growth", _BOTH, is_tuned=True),
    ),
    ("– ECE of these models", "1.1 %", None, Query(ECE, "value", _BOTH, is_tuned=True)),
    ("– ECE of their full precision", "6.9 %", None, Query(ECE, "reference", _BOTH, is_tuned=True)),
    ("confidence minus accuracy", "overconfident when quantized (arXiv 2602.13289)", "rises", Query(SIGN, "change")),
]
_GAPS: tuple[tuple[str, str, dict[str, int], str, str, Expectation], ...] = (
    ("simple PTQ, W8A8", "minmax", _W8A8, "+2.6", "+3.0", "rises"),
    ("QAT contrastive, W8A8", "lsq_contrastive", _W8A8, "+1.6", "+1.9", "rises"),
    ("Rot+LSQ, W8A8", "rot_lsq_contrastive", _W8A8, "−0.1 (n.s.)", "−0.2 (n.s.)", "stays"),
    ("simple PTQ, W4A8", "minmax", _W4A8, "+12.5", "+10.3", "rises"),
    ("Rot+LSQ, W4A8", "rot_lsq_contrastive", _W4A8, "+4.0", "+4.4", "rises"),
)
_SPURIOUS: list[Line] = [
    (f"{name}, {title}", figure, expects, Query(measure, "change", _where(method=method, **bits)))
    for title, method, bits, gap, vulnerability, expects in _GAPS
    for name, measure, figure in (("ΔRSG", RSG, gap), ("added vulnerability", VULNERABILITY, vulnerability))
]
_BANDS = ("0-8", "8-64", "64+")
_OWN, _FULL = "top1_keep_own_zero_{}", "top1_keep_full_zero_{}_full"


def _in_band(band: str) -> Recorded:
    """Accuracy inside a band of each model's own ranks, around zero as in the published study."""
    own, full = _OWN.format(band), _FULL.format(band)
    return Recorded(f"{own} minus {full}", (own, full), beside(own, full, OUTPUT), where=_TRAINED)


def _noise(which: str) -> Recorded:
    unit = "points" if "minus" in which else "%"
    return Recorded(f"noise / signal of vision blocks, {which}", ("mean_sqnr_db",), block_noise(which), unit, _INT8)


_LOW = ("low_frequency_share", "low_frequency_share_full")
_SQNR = tuple(f"sqnr_db_{band}" for band in _BANDS)
_SPECTRA: list[Line] = [
    (
        "share of models whose SQNR falls with rank, from band to band",
        "falls monotonically",
        "almost all",
        Recorded(f"share with falling {', '.join(_SQNR)}", _SQNR, falls_over(*_SQNR), "%", is_share=True),
    ),
    ("accuracy of trained models inside ranks 0–8", "better than full precision", "rises", _in_band("0-8")),
    ("accuracy of trained models inside ranks 64+", "worse than full precision", "falls", _in_band("64+")),
    (
        "share of low spatial frequencies in features, trained models",
        "rises",
        "rises",
        Recorded("change of low_frequency_share, mean over vision blocks", _LOW, beside(*_LOW, BLOCK), where=_TRAINED),
    ),
    (
        "stable rank of quantized weights",
        "rises (arXiv 2602.00969)",
        "rises",
        Recorded("growth of stable_rank, mean over layer groups", ("stable_rank",), stable_rank_growth, "%"),
    ),
    (
        "noise over signal, last vision block against the first half's, simple PTQ W8A8",
        "grows with depth (INT8 ViT-B/32, arXiv 2605.26415)",
        "rises",
        _noise("last minus first half"),
    ),
    ("– in the first half of blocks", "below 10 % (shallow)", None, _noise("first half")),
    ("– in the last block", "52 % (layer 11)", None, _noise("last")),
]


def held_against(analysis: StudyAnalysis) -> list[Claim]:
    """Every published claim that the study has numbers for: calibration, robustness, spurious cues, OOD detection, spectra."""
    return [
        *_means(analysis, _CALIBRATION),
        *_worst_text_tower(analysis),
        *_sources(analysis),
        *_signs(analysis),
        *_robustness(analysis),
        *_means(analysis, _SPURIOUS),
        *_architectures(analysis),
        *_joint(analysis),
        *_means(analysis, _SPECTRA),
    ]


def _means(analysis: StudyAnalysis, lines: Sequence[Line]) -> Iterator[Claim]:
    for claim, published, expects, query in lines:
        if cells := query.cells(analysis):
            found = mean_share(cells) if query.is_share else mean(cells)
            yield Claim(claim, published, expects, found, query.unit, count(cells), str(query))


def _worst_text_tower(analysis: StudyAnalysis) -> Iterator[Claim]:
    query = Query(ECE, "growth", _BOTH)
    compared = list(query.compared(analysis))
    if compared:
        found, vlm = largest_growth(compared)
        title = f"largest growth of ECE with the text tower quantized: here {vlm}'s; interval over samples, for the largest of all"
        yield Claim(title, "up to +98 %", "rises", found, "%", len(compared), f"largest {query}")


def _contrast(
    title: str, figure: str, groups: Sequence[tuple[str, str, Expectation, Cells]], unit: str, query: str
) -> Iterator[Claim]:
    """Two groups of VLMs, each by itself and the first minus the second."""
    for name, published, expects, cells in groups:
        if cells:
            yield Claim(f"{title}: {name}", published, expects, mean(cells), unit, count(cells), query)
    (first, _, _, ours), (second, _, _, theirs) = groups
    if ours and theirs:
        found = difference(ours, theirs)
        yield Claim(f"{title}: {first}, minus {second}", figure, "rises", found, "points", count(ours, theirs), query)


def _sources(analysis: StudyAnalysis) -> Iterator[Claim]:
    """Noisy and clean pre-training, where VLMs' names (or weights) say so."""
    query = Query(ECE)
    cells = query.cells(analysis)
    noisy, clean = ({v: own for v, own in cells.items() if source_of(analysis, v) == s} for s in ("noisy", "clean"))
    groups: list[tuple[str, str, Expectation, Cells]] = [
        ("VLMs from noisy captions, LAION", "+49 %", "rises", noisy),
        ("those from clean ones, WIT or DFN", "falls", "falls", clean),
    ]
    yield from _contrast("growth of ECE", "rises on LAION, falls on clean sources", groups, "%", str(query))


def _signs(analysis: StudyAnalysis) -> Iterator[Claim]:
    """The driver that version 3's abstract names: underconfident models improve, overconfident ones degrade."""
    query = Query(ECE, "change")
    cells = query.cells(analysis)
    signs = {vlm: analysis.comparisons.get((vlm, FULL, SIGN)) for vlm in cells}
    over, under = ({v: cells[v] for v, s in signs.items() if s is not None and way * s.value > 0} for way in (1, -1))
    groups: list[tuple[str, str, Expectation, Cells]] = [
        ("VLMs overconfident in full precision", "they often degrade", "rises", over),
        ("underconfident ones", "they improve", "falls", under),
    ]
    yield from _contrast("change of ECE", "the sign is the driver", groups, "points", str(query))


def _robustness(analysis: StudyAnalysis) -> Iterator[Claim]:
    """Synthetic corruption, and semantic shift: the published sets where there are any of them, else all of the role's."""
    query = Query(CORRUPTION)
    if cells := query.cells(analysis):
        title = "accuracy under synthetic corruption"
        yield Claim(title, "+8.9 %", "rises", mean(cells), "%", count(cells), str(query))
        found, families = share_of_groups(cells, architecture_of)
        title = f"share of architectures ({', '.join(families)}) whose accuracy under synthetic corruption rises"
        if families:
            yield Claim(title, "almost all", "almost all", found, "%", count(cells), f"share of positive {query}")
    rows = analysis.results.about("top1")
    sets = sorted(rows.loc[rows["role"] == "shift", "dataset"].unique())
    own = [name for name in sets if name in SHIFT_SETS]
    which = f"{', '.join(own) if own else 'all sets of the role: ' + ', '.join(filter(None, sets))}"
    recorded = Recorded("growth of top1 on these sets of shift", ("top1",), shift_growth, "%")
    line = ("accuracy under semantic shift", "falls (ImageNet-A/R/Sketch)", recorded if own else Query(SHIFT))
    yield from _means(analysis, [(f"{line[0]} ({which})", line[1], "falls", line[2])])


def _architectures(analysis: StudyAnalysis) -> Iterator[Claim]:
    groups: dict[str, dict[str, list[Cell]]] = {"convnext": {}, "vit": {}}
    for role in ("near_ood", "far_ood"):
        for vlm, own in Query(Measure("auroc", role)).cells(analysis).items():
            if architecture_of(vlm) in groups:
                groups[architecture_of(vlm)].setdefault(vlm, []).extend(own)
    ours, theirs = groups.values()
    if ours and theirs:
        found, query = difference(ours, theirs), f"growth of auroc on near_ood and far_ood, by architecture; {GRID}"
        title = "growth of AUROC (near and far OOD), ConvNeXt minus ViT"
        yield Claim(title, "ConvNeXt gains more", "rises", found, "points", count(ours, theirs), query)


def _joint(analysis: StudyAnalysis) -> Iterator[Claim]:
    """What improves and worsens together: significantly where something is claimed, and by signs as they are."""
    gains = tested_gains(analysis)
    trained = {key: own for key, own in gains.items() if key[1].is_trained}
    named = (
        ("models whose AUROC rises while their ECE worsens", "it happens", gains, {"auroc": 1, "ece": -1}),
        (
            "trained models that gain in accuracy, calibration and OOD detection at once",
            "some do",
            trained,
            {"top1": 1, "ece": 1, "auroc": 1},
        ),
    )
    for title, published, own, signs in named:
        if own:
            parts = ", ".join(f"{name} {'better' if sign > 0 else 'worse'}" for name, sign in signs.items())
            query = f"share with {parts}: from those that surely are to those that may be; {GRID}"
            yield Claim(
                f"share of {title}, significantly", published, "some", joint_share(own, signs), "%", len(own), query
            )
    raw = {key: own for key, own in analysis.joint_gains().items() if in_grid(*key)}
    for ece in (True, False):
        for auroc in (True, False):
            shares = shares_by_vlm({k: float((g["ece"] > 0, g["auroc"] > 0) == (ece, auroc)) for k, g in raw.items()})
            if shares:
                title = f"– ECE {'better' if ece else 'not better'}, AUROC {'better' if auroc else 'not better'}"
                query = f"share by the signs of gains in ece and auroc (mean of near and far), noise included; {GRID}"
                yield Claim(title, "no figure", None, mean_share(shares), "%", len(raw), query)
