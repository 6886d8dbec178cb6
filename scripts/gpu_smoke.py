"""Runs what a GPU does differently, each against its result on the CPU, and prints one line per check; exit code 1 if any fails.

    python scripts/gpu_smoke.py [--device cuda] [--vlm vit_clean]

Every method, every OOD score, conversion to integers, torch.export, torch.compile, bfloat16, deterministic algorithms, and
training on one device and on two, whose losses are to be those of one process on the CPU.
``--device cpu`` runs the same checks without a GPU, which shows that the script works.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic matrix products on CUDA ask for

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from lightning_vlmq.lowbit.convert import Conversion, convert_layers
from lightning_vlmq.lowbit.export import export_encoder
from lightning_vlmq.metrics import OOD_SCORES, ScoreInputs
from lightning_vlmq.models import VLM, load_vlm
from lightning_vlmq.models.local import encode_patches
from lightning_vlmq.quant import METHODS, QATMethod, QuantScheme, quantize
from lightning_vlmq.results.store import ResultsStore

SCHEME = QuantScheme(8, 8, scope="vision_text")
CLASSES = [f"a photo of a {name}" for name in ("coat", "bag", "dress", "shirt", "boot")]

Check = tuple[str, Callable[[], float], float]
"""A name, what measures the disagreement, and how much of it is allowed."""


def pixels(vlm: VLM, n: int = 64) -> Tensor:
    """Random images, the same in every call."""
    size = vlm.image_size
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batches(vlm: VLM, device: str) -> list[dict[str, Tensor]]:
    """Calibration data on a device."""
    tokens = vlm.tokenize((CLASSES * 13)[:64])
    return [{"image": pixels(vlm).to(device), "tokens": tokens.to(device)}]


def features(vlm: VLM, device: str) -> Tensor:
    """Image features, on the CPU."""
    with torch.no_grad():
        return vlm.encode_image(pixels(vlm, 16).to(device)).float().cpu()


def distance(a: Tensor, b: Tensor) -> float:
    """One less the smallest cosine similarity of rows."""
    return 1 - F.cosine_similarity(a.double(), b.double(), dim=-1).min().item()


def checks(name: str, device: str, folder: Path) -> Iterator[Check]:
    """Everything to check of a model on a device."""
    vlm = load_vlm(name).requires_grad_(False)
    there = copy.deepcopy(vlm).to(device)
    yield "full precision", lambda: distance(features(there, device), features(vlm, "cpu")), 1e-4

    def method(key: str) -> float:
        """Of what it makes of the model, and of the gradients that a trained one then has."""
        results, gradients = [], []
        for target in ("cpu", device):
            model = copy.deepcopy(vlm).requires_grad_(True).to(target)
            quantize(model, key, SCHEME, batches(vlm, target))
            if isinstance(trained := METHODS[key], QATMethod):
                batch = batches(vlm, target)[0]
                image, text = model.encode_image(batch["image"]), model.encode_text(batch["tokens"])
                teacher = vlm.to(target).encode_image(batch["image"]), vlm.encode_text(batch["tokens"])
                trained.loss(image, text, *teacher, vlm.logit_scale()).backward()
                gradients.append(
                    torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])[None]
                )
                vlm.cpu()
            results.append(features(model.eval(), target))
        return max(distance(*results), distance(*gradients) if gradients else 0.0)

    for key in METHODS:
        yield f"method {key}", lambda key=key: method(key), 1e-2  # type: ignore[misc]

    def score(key: str) -> float:
        results = []
        for target in ("cpu", device):
            model = vlm.to(target)
            with torch.no_grad():
                classes = model.encode_text(model.tokenize(CLASSES).to(target))
                own, local = model.encode_image(pixels(vlm).to(target)), encode_patches(model, pixels(vlm).to(target))
            cosine = own @ classes.T
            inputs = ScoreInputs(cosine, model.logit_scale() * cosine, own, local @ classes.T, calibration_features=own)
            results.append(OOD_SCORES[key](inputs).double().cpu())
        vlm.cpu()
        return ((results[0] - results[1]).abs().max() / results[0].abs().max().clamp_min(1e-6)).item()

    for key in OOD_SCORES:
        yield f"score {key}", lambda key=key: score(key), 1e-2  # type: ignore[misc]

    def converted(activations: str, kernels: str) -> VLM:
        model = copy.deepcopy(there)
        quantize(model, "minmax", SCHEME, batches(vlm, device))
        convert_layers(model, Conversion(activations, kernels), SCHEME, batches(vlm, device))  # type: ignore[arg-type]
        return model

    for kernels in ("torchao", "own"):
        for activations in ("keep", "dynamic", "none"):
            label = f"converted, {kernels}, {activations}"
            yield (
                label,
                lambda a=activations, k=kernels: distance(features(converted(a, k), device), features(vlm, "cpu")),
                0.02,
            )  # type: ignore[misc]

    def exported() -> float:
        program = export_encoder(there, "vision", folder / "encoder.pt2").module()
        return distance(program(pixels(vlm, 16).to(device)).float().cpu(), features(vlm, "cpu"))

    yield "torch.export", exported, 1e-4
    compiled = torch.compile(there.encode_image)
    yield (
        "torch.compile",
        lambda: distance(compiled(pixels(vlm, 16).to(device)).float().cpu(), features(vlm, "cpu")),
        1e-4,
    )

    def half() -> float:
        with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16):
            found = there.encode_image(pixels(vlm, 16).to(device)).float().cpu()
        return distance(found, features(vlm, "cpu"))

    yield "bfloat16", half, 0.02
    kind = "cpu" if device == "cpu" else "gpu"
    if kind == "cpu" or torch.cuda.device_count() > 1:
        yield "two devices", lambda: fit_distance(kind, 2, folder), 0.05
    yield "a fit, deterministic", lambda: fit_distance(kind, 1, folder), 0.05


def fit_distance(kind: str, devices: int, folder: Path) -> float:
    """The largest relative difference of a fit's held-out losses and learned steps from those of one process on the CPU."""
    expected, found = fitted("cpu", 1, devices, folder), fitted(kind, devices, devices, folder)
    assert expected[1] < expected[0], "the fit on the CPU lowers no loss: nothing is compared"
    return ((found - expected) / expected).abs().max().item()


@cache
def fitted(kind: str, devices: int, parts: int, folder: Path) -> Tensor:
    """Held-out losses before and after a short training by the command line, then the mean learned step of weights, float64 ``[3]``.

    With the deterministic algorithms of the committed config. An epoch is one update on the same pairs, in so many parts, whatever the
    number of devices that share them.
    """
    name = f"{kind}-{devices}-{parts}"
    options = f"""
        --data.n_concepts=8 --data.datasets=[concepts] --data.calibration_pairs=30 --data.train_batch_size={24 // parts}
        --model.quant.weight_bits=3 --model.lst=false --results.run_id={name} --trainer.logger=false --trainer.callbacks=[]
        --trainer.accelerator={kind} --trainer.devices={devices} --trainer.accumulate_grad_batches={parts // devices}
    """
    command = [sys.executable, "-m", "lightning_vlmq", "fit", "--config", "qat", *options.split()]
    command += [f"--results.root={folder / 'runs'}", *(["--trainer.strategy=ddp"] if devices > 1 else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the fit ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    rows = ResultsStore(folder / "runs").rows([name]).set_index("metric")["value"]
    saved = load_file(folder / "runs" / "models" / name / "model.safetensors")
    steps = torch.cat([value.flatten() for key, value in saved.items() if key.endswith("weight_fake_quant.scale")])
    return torch.tensor(
        [rows["held_out_loss_start"], rows["held_out_loss"], steps.double().mean()], dtype=torch.float64
    )


def main() -> int:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--vlm", default="vit_clean")
    parser.add_argument("--only", default="", help="checks whose names hold this text")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu runs the checks without one")
        return 2
    torch.use_deterministic_algorithms(True)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, measure, allowed in checks(args.vlm, args.device, Path(folder)):
            if args.only not in name:
                continue
            try:
                found = measure()
                passes = found <= allowed
                print(f"{'ok  ' if passes else 'FAIL'} {name}: {found:.2e} (at most {allowed:g})", flush=True)
            except Exception as error:  # one check's crash must not hide the others'
                passes = False
                print(f"FAIL {name}: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}", flush=True)
                traceback.print_exc(limit=-3)
            failed += not passes
    print(f"{failed} failed on {args.device}, torch {torch.__version__}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
