"""Measure the embedded models in full precision, and write docs/embedded.md.

Usage:
    python scripts/measure_zoo.py align_clean             # measures it: adds "measured" to its description in the zoo
    python scripts/measure_zoo.py --page docs/embedded.md   # measures none, writes the page of those that are measured
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.data.corruptions import CORRUPTIONS
from lightning_vlmq.data.embedded.concepts import class_names
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.metrics.functional import (
    calibration_error,
    per_sample,
    relative_spurious_gap,
    signed_calibration_error,
)
from lightning_vlmq.models import VLM, load_vlm, zoo
from lightning_vlmq.spectral import PUBLISHED_BANDS, band_name, effective_rank, own_band_accuracy

SEVERITY = 3
SHIFTS = ("openmoji", "line", "silhouette")
HEAD = """# The embedded benchmark and its models

About a thousand concepts of Unicode's emoji, as a dozen houses of artists draw them, on coloured and often textured backgrounds of
64 x 64 pixels. Who drew what, and under which licence: `lightning_vlmq/data/embedded/ATTRIBUTION.md`. Everything comes with the
package; `lightning_vlmq.data.EmbeddedData` makes the scenes from the drawings and a seed.

| role | sets | what they show |
|---|---|---|
| in distribution | `concepts` | two drawings of each of {n_trained} trained concepts, by houses never trained on with it |
| near OOD | `novel` | {n_unseen} concepts that are never trained |
| far OOD | `digits`, `textures`, `pictograms` | handwritten digits, photographs of textures, pictograms of a game's interface |
| corruptions | `corruptions_clean`, then family and severity | images uncorrupted, and under 19 families of corruptions |
| semantic shift | `openmoji`, `line`, `silhouette` | houses never trained on: one in colour, two without |
| | `inverted`, `outline`, `rotated`, `posterised` | renditions of the same images |
| | `unseen` | the concepts of `novel` among their own names: true zero-shot classification |
| spurious cue | `backgrounds_common`, `backgrounds_counter` | the same drawings on their group's colour and on another's |

In 90 % of the training images, and in distribution, the background has the colour of the concept's group. Corruptions follow
ImageNet-C. `n_concepts`, `n_id`, `n_shifted` and `n_ood` take a part of it. A dozen drawings of the houses without colour are the
same for two or three concepts (the hearts, the diamonds), which no model can tell apart.

![Concepts by house, then corruptions, shifts and backgrounds](images/concepts.jpg)

```console
.venv/bin/python scripts/draw_concepts.py docs/images/concepts.jpg
```

The models are real open_clip classes with small configs and an embedding of 256 dimensions, pre-trained by `vlmq fit`. `vit` is a
vision transformer after early convolutions, `convnext` a ConvNeXt; `siglip` is a vision transformer pooled by attention, trained with
the sigmoid loss and its bias on the logits; `coca` has an attentional pooler and a caption decoder, trained with the contrastive and the
caption loss (scope `vision_text` quantizes the decoder too); `align` pairs an EfficientNet (batch norm, squeeze-excite) with a
bidirectional text encoder. `clean` ones learned from captions that are true, `noisy` ones with 35 % of them wrong or vague, as alt texts
are. All but `align` learned from `align` of the same captions as well (CONTRIBUTING.md, "Embedded models and data").

## The models in full precision

All in percent, but ranks and ratios. Training of each: `configs/pretrain`, command and settings in its description in
`lightning_vlmq/models/zoo`.

```console
.venv/bin/python scripts/measure_zoo.py {models}
.venv/bin/python scripts/measure_zoo.py --page docs/embedded.md
```

"""

TRIED = """
## Ranks and outliers: what was tried

How many ranks carry accuracy is the loss's doing, not the embedding's: a thousand concepts fit into sixty dimensions. `align_clean`
was trained in three ways. With prototypes that are all learned (`vlmq fit --config pretrain/align_clean --model.fixed_dims 0
--model.prototype_scale null`) its features had rank 64, and ranks from 64 on classified by chance. With half of a prototype's
dimensions fixed at random, at the scale that contrast learns (`--model.prototype_scale null`), it ignored them. At a scale of 12, as
committed, its text spreads over rank 125 with 15 % of the energy from rank 64 on, its images hardly (0.4 %): around the mean these
ranks still classify by chance, around zero they do not.

Outlier channels: gains are never decayed. Training the ViT for 36 epochs instead of 20 (`--trainer.max_epochs 20`) raised its largest
activation over the median from 31 to 42 and top-1 from 37.6 to 52.8 %; the convolutional towers have the largest without any
help. `--model.outliers` plants stronger ones (docs/experiments.md).
"""


@torch.no_grad()
def measure(vlm: VLM, data: EmbeddedData) -> dict[str, Any]:
    """Everything that the page tells of one model; fractions, ranks and ratios as numbers."""
    classifiers: dict[tuple[str, ...], Tensor] = {}
    accuracy: dict[str, float] = {}
    found: dict[str, Any] = {}
    for s in data.eval_sets:
        names = tuple(s.class_names or data.class_names)
        if names not in classifiers:
            classifiers[names] = vlm.class_features(names, data.templates)
        features, target = _features(vlm, s), s.images.columns["target"]
        records = per_sample(vlm.zero_shot_logits(features, classifiers[names]), target)
        accuracy[s.name] = records["correct"].double().mean().item()
        if s.role == "id":
            found |= _of_id(features, classifiers[names], target, records, data)
        if s.name == "unseen":
            found["unseen_top5"] = records["correct_top5"].double().mean().item()
    noise = {name: accuracy.pop(f"{name}_{SEVERITY}") for name in CORRUPTIONS}
    found["accuracy"] = accuracy
    found["corruptions"] = noise
    found["corruption_ratio"] = sum(noise.values()) / len(noise) / max(accuracy["corruptions_clean"], 1e-9)
    found["rsg"] = relative_spurious_gap(accuracy["backgrounds_common"], accuracy["backgrounds_counter"]).item()
    found["largest_over_median"] = outliers(vlm, data.eval_sets[0].images.images[:200])
    return found


def _of_id(
    features: Tensor, classifier: Tensor, target: Tensor, records: dict[str, Tensor], data: EmbeddedData
) -> dict[str, Any]:
    confidence, correct = records["confidence"], records["correct"]
    values = torch.linalg.svdvals((features - features.mean(0)).double())
    bands = own_band_accuracy(features, classifier, target)
    to_zero = own_band_accuracy(features, classifier, target, around="zero")
    houses = data.recipe.drawings("id", data.recipe.n_id).house
    by_house: dict[str, list[float]] = {}
    for house, right in zip(houses, correct.tolist()):
        by_house.setdefault(house, []).append(float(right))
    return {
        "n": len(target),
        "top5": records["correct_top5"].double().mean().item(),
        "ece": calibration_error(confidence, correct).item(),
        "signed_ece": signed_calibration_error(confidence, correct).item(),
        "effective_rank_singular": effective_rank(values),
        "bands": dict(zip(map(band_name, PUBLISHED_BANDS), bands)),
        "bands_to_zero": dict(zip(map(band_name, PUBLISHED_BANDS), to_zero)),
        "houses": {house: sum(right) / len(right) for house, right in sorted(by_house.items())},
    }


@torch.no_grad()
def outliers(vlm: VLM, images: Tensor) -> dict[str, float]:
    """Each vision layer's largest input over the median of those that are not zero, in absolute values."""
    ratios: dict[str, float] = {}

    def hook(name: str) -> Any:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].abs().flatten()
            x = x[x > 0]
            ratios[name] = (x.max() / x.median()).item()

        return see

    layers = {n: m for n, m in vlm.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    handles = [m.register_forward_pre_hook(hook(n)) for n, m in layers.items() if vlm.tower_of(n) == "vision"]
    vlm.encode_image(images)
    for handle in handles:
        handle.remove()
    return ratios


def _features(vlm: VLM, s: EvalSet) -> Tensor:
    return torch.cat([vlm.encode_image(part) for part in s.images.images.split(400)])


def benchmark() -> EmbeddedData:
    """The evaluation sets that are measured: all 19 families of corruption, at one severity."""
    data = EmbeddedData(
        datasets=("concepts", "unseen", "corruptions", "houses", "renditions", "backgrounds"),
        corruptions=tuple(CORRUPTIONS),
        severities=(SEVERITY,),
    )
    data.setup()
    data.eval_sets = [s for s in data.eval_sets if s.role != "near_ood"]
    return data


def page(measured: dict[str, dict[str, Any]]) -> str:
    """The Markdown page, from what :func:`measure` found by model."""
    text = HEAD.format(
        models=" ".join(measured), n_trained=len(class_names()), n_unseen=len(class_names(trained=False))
    )
    rows = {name: _cells(m) for name, m in measured.items()}
    text += _table(["model", *next(iter(rows.values()))], [[f"`{n}`", *cells.values()] for n, cells in rows.items()])
    text += f"""
Unseen: top-1 and top-5 among the names of the concepts that are never trained. Renditions: mean over the four.
Noise ratio: mean accuracy over the 19 families at severity {SEVERITY}, over that on the same images uncorrupted. RSG: share of
accuracy lost off the group's own background colour. Rank: exponential of the entropy of the centred features' singular
values. Bands: accuracy with all but those ranks of the centred features set to their mean. To zero: the same bands on the
features' own singular vectors, around zero, with the rest set to zero, as in the published study; the mean, which is the same
for all images but not for all classes, then no longer outweighs the ranks that are left. Largest activation: over the layers of
the vision tower, the largest input of one over the median of its inputs (zeros apart); then the median over layers.
{_above_chance(measured, "bands", "around the mean")}
{_above_chance(measured, "bands_to_zero", "around zero")}

## By house, in distribution

"""
    houses = sorted({h for m in measured.values() for h in m["houses"]})
    text += _table(
        ["model", *houses], [[f"`{n}`", *(_percent(m["houses"][h]) for h in houses)] for n, m in measured.items()]
    )
    text += "\n## By corruption family, severity 3\n\n"
    text += _table(
        ["family", *(f"`{n}`" for n in measured)],
        [[family, *(_percent(m["corruptions"][family]) for m in measured.values())] for family in CORRUPTIONS],
    )
    return text + TRIED


def _above_chance(measured: dict[str, dict[str, Any]], key: str, basis: str) -> str:
    """How many models every band alone classifies with, told by the standard error of guessing."""
    chance, found = 1 / len(class_names()), []
    for band in next(iter(measured.values()))[key]:
        error = [(chance * (1 - chance) / m["n"]) ** 0.5 for m in measured.values()]
        above = sum(m[key][band] > chance + 3 * e for m, e in zip(measured.values(), error))
        found.append(f"{band} in {above}")
    return f"Bands {basis} above chance ({_percent(chance)}) by three standard errors: {', '.join(found)} of {len(measured)} models."


def _cells(m: dict[str, Any]) -> dict[str, str]:
    ratios, accuracy = torch.tensor(list(m["largest_over_median"].values())), m["accuracy"]
    renditions = [accuracy[name] for name in ("inverted", "outline", "rotated", "posterised") if name in accuracy]
    return {
        "top-1": _percent(accuracy["concepts"]),
        "top-5": _percent(m["top5"]),
        "unseen": f"{_percent(accuracy['unseen'])} / {_percent(m['unseen_top5'])}",
        **{name: _percent(accuracy[name]) for name in SHIFTS},
        "renditions": _percent(sum(renditions) / max(len(renditions), 1)),
        "noise ratio": f"{m['corruption_ratio']:.2f}",
        "RSG": _percent(m["rsg"]),
        "ECE": _percent(m["ece"]),
        "signed CE": f"{100 * m['signed_ece']:+.1f}",
        "rank": f"{m['effective_rank_singular']:.0f}",
        "bands " + " / ".join(m["bands"]): " / ".join(_percent(v) for v in m["bands"].values()),
        "to zero": " / ".join(_percent(v) for v in m["bands_to_zero"].values()),
        "largest activation": f"{ratios.max():.0f}; {ratios.median():.0f}",
    }


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return round(value, 5) if isinstance(value, float) else value


def main() -> None:
    """Command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", help="names of models of the zoo, e.g. align_clean")
    parser.add_argument("--page", type=Path, help="the Markdown file to write, e.g. docs/embedded.md")
    options = parser.parse_args()
    try:
        data = benchmark() if options.models else None
        for name in options.models:
            assert data is not None
            found = _rounded(measure(load_vlm(name), data))
            file = zoo.FOLDER / f"{name}.json"
            description = zoo.description(name)
            description["accuracy"] = {  # of the last weights; training validates every few epochs
                f"val/{name}/top1": found["accuracy"][name]
                for name in ("backgrounds_common", "backgrounds_counter", "concepts", "unseen")
            } | {"val/concepts/top5": found["top5"]}
            file.write_text(json.dumps(description | {"measured": found}, indent=1) + "\n")
            print(name, json.dumps(_cells(found)))
        if options.page:
            found = {name: zoo.description(name).get("measured") for name in zoo.names()}
            measured = {name: m for name, m in found.items() if m}
            if not measured:
                raise VLMQError("no model is measured yet; name one")
            options.page.write_text(page(measured))
    except VLMQError as error:
        print(f"measure_zoo: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
