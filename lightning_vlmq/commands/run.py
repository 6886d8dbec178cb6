"""``vlmq validate | fit | test | predict``: one experiment, see :mod:`lightning_vlmq.experiment`."""

from __future__ import annotations

from lightning_vlmq.commands import command
from lightning_vlmq.core.configs import with_config_files

_GROUP = "Run one model"


@command("validate", _GROUP)
def validate(args: list[str]) -> None:
    """Judge a model, full precision or quantized after training, on every reliability dimension."""
    _run("validate", args)


@command("fit", _GROUP)
def fit(args: list[str]) -> None:
    """Train a quantized model (QAT), then judge it likewise; or pre-train an embedded model."""
    _run("fit", args)


@command("test", _GROUP)
def test(args: list[str]) -> None:
    """As validate, for a saved model (--model.checkpoint)."""
    _run("test", args)


@command("predict", _GROUP)
def predict(args: list[str]) -> None:
    """Write what a model predicts for every image."""
    _run("predict", args)


def _run(name: str, args: list[str]) -> None:
    from lightning_vlmq.experiment import run  # torch and Lightning come with it

    run(name, with_config_files(args))
