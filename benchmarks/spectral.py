"""Spectra of a whole model's weights beside WeightWatcher (pip install weightwatcher). Run by hand.

    python benchmarks/spectral.py                    # ViT-B-32, minutes
    python benchmarks/spectral.py --model ViT-L-14

Both decompose the weights of one open_clip model with random weights and fit a power law to each spectrum's tail, each in
a process of its own, on one thread, in turns; of --repeat runs the median. Ours also computes stable and effective rank.

kernel     processor seconds of the singular values alone: ours, and WeightWatcher's own function on the same matrices
analyze    processor seconds of everything: WeightWatcher(model).analyze(), matrix_weights and weight_spectra with all scalars
error      largest relative error of a singular value against LAPACK's float64 SVD, where above 1e-7 of the layer's largest,
           on --checked layers spread over the model (the same ones; the SVD takes longest of all)
share      of the model's matrix weights (embedding tables apart) in layers that are seen. WeightWatcher skips packed
           attention and raw projections
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

import numpy as np
import torch
from cells import CellError, run_cell

CONTENDERS = ("ours", "weightwatcher")
NAMES = ("model", "checked")


def models(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model as open_clip makes it, and as this package rewrites it; equal weights."""
    import open_clip

    from lightning_vlmq.models import load_vlm

    torch.manual_seed(0)
    plain = open_clip.create_model(name)
    torch.manual_seed(0)
    return plain, load_vlm(name, "none")


def measure(contender: str, args: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    plain, vlm = models(args.model)
    from lightning_vlmq.spectral import as_matrix, matrix_weights, power_law_tail, singular_values, weight_spectra

    weights = matrix_weights(vlm)
    total = sum(weight.numel() for weight in weights.values())
    checked = list(weights.values())[:: max(1, len(weights) // args.checked)]
    if contender == "ours":
        start = time.process_time()
        spectra = weight_spectra(weights)
        kernel = time.process_time() - start
        start = time.process_time()
        for spectrum in weight_spectra(matrix_weights(vlm)).values():
            _ = spectrum.stable_rank, spectrum.effective_rank, power_law_tail(spectrum.singular_values.square())
        whole, seen = time.process_time() - start, sum(weights[name].numel() for name in spectra)
        decompose = singular_values
    else:
        import weightwatcher
        from weightwatcher.RMT_Util import svd_vals

        start = time.process_time()
        for weight in weights.values():
            svd_vals(as_matrix(weight).numpy())
        kernel = time.process_time() - start
        watcher = weightwatcher.WeightWatcher(model=plain)
        start = time.process_time()
        details = watcher.analyze()
        whole = time.process_time() - start
        modules = dict(plain.named_modules())
        found = [modules.get(str(name)) for name in details["longname"]]
        matrices = [
            m for m in found if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
        ]  # it lists embedding tables too
        seen = sum(m.weight.numel() for m in matrices)

        def decompose(weight: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(np.asarray(svd_vals(as_matrix(weight).numpy()))).double()

    errors = []
    for weight in checked:
        exact = np.linalg.svd(as_matrix(weight).double().numpy(), compute_uv=False)
        kept = exact > 1e-7 * exact[0]
        errors.append(np.abs(decompose(weight).numpy()[kept] / exact[kept] - 1).max())
    return {"kernel": kernel, "analyze": whole, "error": float(max(errors)), "share": seen / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--checked", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        found = measure(args.cell, args)
        print(json.dumps(found))
        return
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    try:
        for _ in range(args.repeat):
            for name in CONTENDERS:
                results[name].append(run_cell(__file__, [name], args, NAMES, **threads))
    except CellError as error:
        sys.exit(f"{error}")
    print(f"{args.model}, {os.cpu_count()} cores, one thread used, torch {torch.__version__}")
    print(f"{'':14}{'kernel':>9}{'analyze':>9}{'error':>10}{'share':>8}")
    median = {
        name: {key: statistics.median(cell[key] for cell in cells) for key in cells[0]}
        for name, cells in results.items()
    }
    for name, m in median.items():
        print(f"{name:14}{m['kernel']:8.1f}s{m['analyze']:8.1f}s{m['error']:10.1e}{m['share']:8.1%}")
    ours, theirs = median["ours"], median["weightwatcher"]
    print(f"{'ratio':14}{ours['kernel'] / theirs['kernel']:9.2f}{ours['analyze'] / theirs['analyze']:9.2f}")


if __name__ == "__main__":
    main()
