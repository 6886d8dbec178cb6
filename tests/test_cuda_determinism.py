"""No product code calls what CUDA has no deterministic kernel for, by torch's own list; read off the source, as no GPU is at hand."""

import ast
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[1] / "lightning_vlmq"
ON_THE_CPU = ("data", "study", "plotting", "commands", "results", "statistics")
"""Packages whose tensors never are on a GPU: loaders' images, and what is made of files."""

# torch.use_deterministic_algorithms, of torch 2.11 to 2.14: what raises on CUDA, in the forward pass or on the way back
ALWAYS = {
    "histc",
    "kthvalue",
    "put_",
    "cumsum",
    "cumsum_",
    "cumprod",
    "grid_sample",
    "ctc_loss",
    "embedding_bag",
    "resize_",
    "histogram",
}
MODULES = {"AvgPool3d", "MaxPool3d", "CTCLoss", "NLLLoss", "EmbeddingBag"}
PREFIXES = ("AdaptiveAvgPool", "AdaptiveMaxPool", "FractionalMaxPool", "MaxUnpool", "ReflectionPad", "ReplicationPad")
FUNCTIONS = (
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "fractional_max_pool",
    "max_unpool",
    "avg_pool3d",
    "interpolate",
    "upsample",
)

ALLOWED = {
    ("core/deterministic.py", "cumsum"): "on the CPU, or of whole numbers, which CUDA adds up the same way every time",
    ("metrics/functional/ties.py", "cumsum"): "of whole numbers",
    ("modules/pretraining.py", "interpolate"): "of images, which no gradient flows back to",
}


def calls(tree):
    """Names of called functions and methods, with the call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            yield name, owner, node


def is_refused(name, owner, call):
    """Whether CUDA may refuse a call, as far as its text tells."""
    given = {k.arg for k in call.keywords}
    if owner in ("np", "statistics"):
        return False
    if name in ALWAYS | MODULES or name.startswith(PREFIXES + FUNCTIONS):
        return True
    if name in ("median", "nanmedian") and isinstance(call.func, ast.Attribute):  # with indices
        return "dim" in given or len(call.args) > (1 if owner == "torch" else 0)
    if name == "bincount":
        return "weights" in given or any(
            not isinstance(a, ast.Constant) for a in call.args[1 if owner == "torch" else 0 :]
        )
    if name in ("scatter_reduce", "scatter_reduce_"):
        return not any(isinstance(a, ast.Constant) and a.value in ("amax", "amin", "sum", "mean") for a in call.args)
    return False


def found():
    refused = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        if place.split("/")[0] not in ON_THE_CPU:
            for name, owner, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
                if is_refused(name, owner, call):
                    refused.setdefault((place, name), []).append(call.lineno)
    return refused


def test_every_call_that_cuda_may_refuse_has_a_reason():
    assert {place: lines for place, lines in found().items() if place not in ALLOWED} == {}


def test_no_reason_is_left_over():
    assert ALLOWED.keys() - found().keys() == set()


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("torch.histc(x, 4)", True), ("x.kthvalue(3)", True), ("x.median(dim=1)", True), ("torch.median(x, 1)", True),
        ("x.median()", False), ("torch.median(x)", False), ("x.bincount(minlength=3)", False), ("x.bincount(w)", True),
        ("torch.bincount(x, weights=w)", True), ("np.cumsum(x)", False), ("x.cumsum(0)", True), ("nn.ReflectionPad2d(1)", True),
        ("F.interpolate(x, 3)", True), ("F.adaptive_avg_pool2d(x, 1)", True), ("x.scatter_reduce(0, i, y, 'amax')", False),
        ("x.scatter_reduce(0, i, y, 'prod')", True), ("x.scatter_add(0, i, y)", False), ("x.sort()", False),
    ],
)  # fmt: skip
def test_the_reader_knows_them(text, refused):
    (found,) = (is_refused(*call) for call in calls(ast.parse(text)))
    assert found == refused


def test_whole_numbers_are_added_up_where_they_are():
    from lightning_vlmq.core.deterministic import running_sum

    for x in (torch.arange(6).reshape(2, 3), torch.rand(2, 3, dtype=torch.float64)):
        assert torch.equal(running_sum(x, 1), x.cumsum(1)) and running_sum(x).dtype == x.dtype
