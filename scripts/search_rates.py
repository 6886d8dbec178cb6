"""Search the rates of quantization-aware training, and tell what the chosen ones come to on pairs that chose nothing; tables in Markdown.

Usage:
    python scripts/search_rates.py --models vit_clean --bits W4A8 --weight-lr 0.003 0.01 --step-lr 0.001 0.003
    python scripts/search_rates.py --models vit_clean convnext_clean siglip_clean coca_clean align_clean  # the default rates

The caption pairs are split four ways. Of every ten, one is kept to **select** rates by and one to **report**; of the other eight, which is
all that a fit sees, every tenth pair is held out and **decides** which of its states is kept, the rest are **trained** on (and all eight
calibrate, for post-training methods too). A line of the first table is one fit of ``configs/qat.yaml``'s length, its losses are those
on the pairs that select. For each number of bits the rates with the least geometric mean of end over start, over all models and methods,
are chosen; the second table has their losses on the pairs that report, which neither a fit nor the choice has seen.
Losses are contrastive distillation's, a divergence in nats.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import math
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.data.sets import TensorImages
from lightning_vlmq.models import VLM, load_vlm
from lightning_vlmq.modules import QATModule, Quantization
from lightning_vlmq.quant import QuantScheme, quantize
from lightning_vlmq.quant.training import contrastive_distillation

SPLIT = {"select": 4, "report": 7}
"""Which of every ten pairs."""
SEARCH = ("model", "method", "bits", "weights' rate", "steps' rate", "min-max", "GPTQ", "start", "end", "s")
REPORT = ("bits", "weights' rate", "steps' rate", "model", "method", "min-max", "GPTQ", "start", "end")


def rows_of(part: str, pairs: int) -> list[int]:
    """The rows of ``select``, ``report``, or of what a ``fit`` sees."""
    if part == "fit":
        return [row for row in range(pairs) if row % 10 not in SPLIT.values()]
    return list(range(SPLIT[part], pairs, 10))


def of_rows(pairs: TensorImages, rows: list[int]) -> TensorImages:
    """Some of the pairs."""
    captions = pairs.columns["caption"]
    return TensorImages(pairs.images[rows], caption=[captions[row] for row in rows])


class FitPairs(EmbeddedData):
    """The embedded data with its caption pairs, but for those that select and report."""

    def setup(self, stage: str | None = None) -> None:
        """Build the sets, and set pairs apart."""
        super().setup(stage)
        assert self.pairs is not None
        self.parts = {part: of_rows(self.pairs, rows_of(part, len(self.pairs))) for part in SPLIT}
        self.pairs = of_rows(self.pairs, rows_of("fit", len(self.pairs)))


def data_for(pairs: int) -> FitPairs:
    """The embedded data, set up."""
    data = FitPairs(datasets=["concepts"], n_concepts=8, n_id=8, calibration_pairs=pairs, train_batch_size=32)
    data.setup("fit")
    return data


@dataclass
class Judge(Callback):
    """Losses on the pairs that select and report, of the start and of what a fit leaves."""

    full: VLM
    data: FitPairs
    scheme: QuantScheme
    start: dict[str, float] = field(default_factory=dict)
    end: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def __post_init__(self) -> None:
        self._images = {part: pairs.images for part, pairs in self.data.parts.items()}
        self._tokens = {part: self.full.tokenize(pairs.columns["caption"]) for part, pairs in self.data.parts.items()}
        self._teacher: dict[str, tuple[Tensor, Tensor]] = {
            part: (self.full.encode_image(self._images[part]), self.full.encode_text(self._tokens[part]))
            for part in SPLIT
        }

    @torch.no_grad()
    def losses(self, student: VLM) -> dict[str, float]:
        """By part."""
        found = {}
        for part, (image, text) in self._teacher.items():
            own = student.encode_text(self._tokens[part]) if "text" in self.scheme.towers else text
            seen = student.eval().encode_image(self._images[part])
            found[part] = float(contrastive_distillation(seen, own, image, text, self.full.logit_scale()))
        return found

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first update."""
        self.start = self.losses(pl_module.vlm)  # type: ignore[arg-type]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last, with the state that is kept."""
        self.end = self.losses(pl_module.vlm)  # type: ignore[arg-type]


def fit(
    vlm: str, quant: Quantization, rates: tuple[float | None, float | None], epochs: int, judge: Judge
) -> QATModule:
    """One fit without evaluation."""
    seed_everything(0, verbose=False)
    module = QATModule(vlm, quant=quant, weight_lr=rates[0], step_lr=rates[1])
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_val_batches=0,
        logger=False,
        callbacks=[judge],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, judge.data)
    return module


def without_training(judge: Judge, method: str) -> dict[str, float]:
    """Losses of a post-training method, by part."""
    full = judge.full
    calibration = [
        {"image": b["image"], "tokens": full.tokenize(b["caption"])} for b in judge.data.calibration_batches()
    ]
    student = copy.deepcopy(full, {id(full._tokenize): full._tokenize})
    quantize(student, method, judge.scheme, calibration)
    return judge.losses(student)


def chosen_rates(ratios: dict[tuple[float, float], list[float]]) -> tuple[float, float]:
    """The rates whose ratios of end over start have the least geometric mean; of equal ones the lowest."""
    return min(sorted(ratios), key=lambda rates: sum(map(math.log, ratios[rates])) / len(ratios[rates]))


def line(cells: tuple[object, ...]) -> str:
    """A table's line; losses with three digits."""
    return f"| {' | '.join(f'{cell:.2e}' if isinstance(cell, float) else str(cell) for cell in cells)} |"


def head(names: tuple[str, ...]) -> str:
    """A table's first two lines."""
    return f"{line(names)}\n{'|---' * len(names)}|"


def main() -> None:
    """Command line."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["vit_clean"])
    parser.add_argument("--methods", nargs="+", default=["lsq_contrastive"])
    parser.add_argument("--bits", nargs="+", default=["W8A8", "W4A8", "W3A8", "W4A4"])
    parser.add_argument("--scope", default="vision")
    parser.add_argument("--weight-lr", nargs="+", type=float, default=[None])
    parser.add_argument("--step-lr", nargs="+", type=float, default=[None])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(head(SEARCH), flush=True)
    ratios: dict[str, dict[tuple[float, float], list[float]]] = defaultdict(lambda: defaultdict(list))
    reports: dict[tuple[str, tuple[float, float]], list[tuple[object, ...]]] = defaultdict(list)
    for name, bits in itertools.product(options.models, options.bits):
        weight_bits, act_bits = map(int, bits[1:].split("A"))
        bits_and_scope = {"weight_bits": weight_bits, "act_bits": act_bits, "scope": options.scope}
        scheme = QuantScheme(**bits_and_scope)
        judge = Judge(load_vlm(name), data_for(options.pairs), scheme)
        before = [without_training(judge, method) for method in ("minmax", "gptq")]
        for method, *given in itertools.product(options.methods, options.weight_lr, options.step_lr):
            began = time.perf_counter()
            quant = Quantization(method=method, **bits_and_scope)
            module = fit(name, quant, (given[0], given[1]), options.epochs, judge)
            rates = (module.weight_lr, module.step_lr)
            told = {part: (*(found[part] for found in before), judge.start[part], judge.end[part]) for part in SPLIT}
            seconds = f"{time.perf_counter() - began:.0f}"
            print(line((name, method, bits, *(f"{rate:g}" for rate in rates), *told["select"], seconds)), flush=True)
            ratios[bits][rates].append(judge.end["select"] / judge.start["select"])
            reports[bits, rates].append((name, method, *told["report"]))
    print(f"\n{head(REPORT)}")
    for bits, found in ratios.items():
        rates = chosen_rates(found)
        for cells in reports[bits, rates]:
            print(line((bits, *(f"{rate:g}" for rate in rates), *cells)))


if __name__ == "__main__":
    main()
