"""Identities: the same for the same settings, another for each changed one, and a refusal for what does not say what it is."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.identity import describe, digest, statements_digest


@dataclass(frozen=True)
class Settings:
    n_bins: int = 15
    rate: float = 0.1
    names: tuple[str, ...] = ("a", "b")
    where: Path = Path("x")
    cache: str = field(default="folder", compare=False)


@dataclass(frozen=True)
class OtherSettings(Settings):
    pass


class Described:
    def __init__(self, weights: str) -> None:
        self.weights = weights

    def identity(self) -> dict[str, str]:
        return {"weights": self.weights}


def test_each_field_counts_but_those_that_decide_no_number():
    plain = Settings()
    changed = [replace(plain, n_bins=5), replace(plain, rate=0.2), replace(plain, names=("b", "a"))]
    changed += [replace(plain, where=Path("y")), OtherSettings()]
    assert len({digest(settings) for settings in [plain, *changed]}) == 6
    assert digest(plain) == digest(replace(plain, cache="elsewhere"))


def test_order_of_keys_and_sets_does_not_count_and_that_of_lists_does():
    assert digest({"a": 1, "b": {3, 1, 2}}) == digest({"b": {2, 3, 1}, "a": 1})
    assert digest([1, 2]) != digest([2, 1])


@pytest.mark.parametrize(
    ("one", "other"),
    [(True, 1), (None, "None"), (1, "1"), (0.1, 0.1 + 1e-17 + 1e-16), (float("nan"), None), ("", None), ([], {})],
)
def test_values_that_look_alike_differ(one: object, other: object):
    assert digest(one) != digest(other)


def test_numbers_of_numpy_are_numbers():
    assert digest([np.int64(3), np.float64(0.5), np.float32(0.5)]) == digest([3, 0.5, 0.5])
    assert describe([torch.bfloat16, torch.device("cpu")]) == ["torch.bfloat16", "cpu"]


def test_objects_say_what_they_are_or_are_refused():
    assert digest(Described("a")) != digest(Described("b"))
    assert digest(Described("a")) == digest(Described("a"))
    for stranger in (object(), lambda: 0, b"bytes", torch.ones(2), {1: 2}):
        with pytest.raises(VLMQError, match="cannot be part of"):
            digest({"inside": [stranger]})


def test_same_in_another_process_whatever_the_hash_seed():
    code = "from lightning_vlmq.core.identity import digest; print(digest({'b': {'x', 'y', 'z'}, 'a': 0.1}))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7", "PYTHONPATH": "."}
    )
    assert ran.stdout.strip() == digest({"a": 0.1, "b": {"z", "y", "x"}}), ran.stderr


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (
            '"""Another text."""\nRATE = 2  # why\n\n\ndef f(x: int = 1) -> int:\n    """Other words."""\n    return (x * RATE)\n',
            True,
        ),
        ('"""Text."""\nRATE = 2\ndef f(x: int = 1) -> int:\n    return x * RATE\n', True),
        ('RATE = 2\n"""Of all."""\ndef f(x: int = 1) -> int:\n    """Words."""\n    return x * RATE\n', True),
        ('"""Text."""\nRATE = 2.0\ndef f(x: int = 1) -> int:\n    """Words."""\n    return x * RATE\n', False),
        ('"""Text."""\nRATE = 2\ndef f(x: int = 2) -> int:\n    """Words."""\n    return x * RATE\n', False),
        ('"""Text."""\nRATE = 2\ndef f(x: int = 1) -> int:\n    """Words."""\n    return RATE * x\n', False),
    ],
)
def test_code_that_differs_in_comments_alone_is_the_same(tmp_path: Path, other: str, same: bool):
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text('"""Text."""\nRATE = 2\ndef f(x: int = 1) -> int:\n    """Words."""\n    return x * RATE\n')
    second.write_text(other)
    assert (statements_digest(first) == statements_digest(second)) is same
