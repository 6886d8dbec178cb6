"""All comparisons of a study as columns: hundreds of thousands take what their numbers take, and are corrected and tested at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lightning_vlmq.evaluation.estimates import Array
from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.statistics import Z95, Interval, benjamini_hochberg
from lightning_vlmq.study.analysis.change import Comparison
from lightning_vlmq.study.analysis.setting import Setting

Key = tuple[str, Setting, Measure]
"""A VLM, a setting and a measure."""

_VALUES = ("value", "stderr", "reference", "n_seeds")
_CHANGES = ("change", "change_stderr", "effect", "effect_stderr", "p_value", "q_value")
NUMBERS = _VALUES + _CHANGES
"""Columns of :class:`Comparisons`; changes and effects are normal, so that two numbers say their intervals."""


@dataclass(frozen=True, eq=False)
class Comparisons(Mapping[Key, Comparison]):
    """Comparisons by VLM, setting and measure. A :class:`~.change.Comparison` is made when it is asked for, and once.

    Attributes:
        axes: the VLMs, settings and measures that ``place`` counts, measures in display order.
        place: int32 ``[n, 3]``, which of each a comparison is of.
        numbers: float64 ``[n]`` by name, see :data:`NUMBERS`.
        is_compared: bool ``[n]``, whether there is a change: not of full precision itself.
        effects: replicates of the effect, ``[R]`` each or empty, by row; a row without any is missing.
    """

    axes: tuple[Sequence[str], Sequence[Setting], Sequence[Measure]]
    place: NDArray[np.int32]
    numbers: Mapping[str, Array]
    is_compared: NDArray[np.bool_]
    effects: Mapping[int, Array]

    @classmethod
    def gathered(cls, comparisons: Mapping[Key, Comparison]) -> Comparisons:
        """Those of a dictionary, in its order."""
        numbered = [{item: n for n, item in enumerate(dict.fromkeys(part))} for part in zip(*comparisons)] or [{}] * 3
        place = np.array([[number[item] for number, item in zip(numbered, key)] for key in comparisons], dtype=np.int32)
        numbers = {name: np.empty(len(comparisons)) for name in NUMBERS}
        for row, c in enumerate(comparisons.values()):
            for name in ("value", "stderr", "reference", "n_seeds", "p_value", "q_value"):
                numbers[name][row] = getattr(c, name)
            for name, interval in (("change", c.change), ("effect", c.effect)):
                found = (np.nan, np.nan) if interval is None else interval[:2]
                numbers[name][row], numbers[f"{name}_stderr"][row] = found
        is_compared = np.array([c.change is not None for c in comparisons.values()], dtype=bool)
        effects = {row: c.effects for row, c in enumerate(comparisons.values()) if len(c.effects)}
        axes = (list(numbered[0]), list(numbered[1]), list(numbered[2]))
        return cls(axes, place.reshape(-1, 3), numbers, is_compared, effects)

    def __len__(self) -> int:
        return len(self.place)

    def __iter__(self) -> Iterator[Key]:
        vlms, settings, measures = self.axes
        for vlm, setting, measure in self.place.tolist():
            yield vlms[vlm], settings[setting], measures[measure]

    def __getitem__(self, key: Key) -> Comparison:
        row = self._row_of(key)
        if row < 0:
            raise KeyError(key)
        return self._at(row)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and self._row_of(key) >= 0

    def of(self, measure: Measure) -> list[tuple[str, Setting, Comparison]]:
        """Comparisons of a measure that have an effect, with VLM and setting."""
        if measure not in self._of:
            number = self._numbered[2].get(measure, -1)
            rows = np.flatnonzero(
                (self.place[:, 2] == number) & self.is_compared & ~np.isnan(self.numbers["effect"])
            ).tolist()
            vlms, settings, _ = self.axes
            self._of[measure] = [
                (vlms[self.place[row, 0]], settings[self.place[row, 1]], self._at(row)) for row in rows
            ]
        return self._of[measure]

    def cells(self, settings: Collection[Setting]) -> int:
        """In how many (VLM, setting) pairs there is anything to compare, of these settings."""
        wanted = [number for number, setting in enumerate(self.axes[1]) if setting in set(settings)]
        return len(np.unique(self.place[np.isin(self.place[:, 1], wanted), :2], axis=0))

    @cached_property
    def measures(self) -> list[Measure]:
        """Every measure that some comparison is of, in display order."""
        return [self.axes[2][number] for number in np.unique(self.place[:, 2]).tolist()]

    @cached_property
    def stands_for_itself(self) -> NDArray[np.bool_]:
        """Bool ``[n]``: whether a comparison's measure is the one that it is tested by."""
        return np.array([m.tested_by == m for m in self.axes[2]], dtype=bool)[self.place[:, 2]]

    def corrected(self) -> Comparisons:
        """With p-values adjusted over what is tested by itself: a test that stands for another measure too counts once."""
        own = torch.from_numpy(np.where(self.stands_for_itself, self.numbers["p_value"], np.nan))
        return replace(self, numbers={**self.numbers, "q_value": benjamini_hochberg(own).numpy()})

    def with_tested_changes(self) -> Comparisons:
        """Measures that another one is tested for get that one's change, and p-value: an error's debiased change, in its own unit.

        The effect of a relative measure is that change over the full-precision value as it is shown, which is taken as known.
        """
        found = {name: column.copy() for name, column in self.numbers.items()}
        tested_by = np.array([self._numbered[2].get(m.tested_by, -1) for m in self.axes[2]], dtype=np.int64)
        is_relative = np.array([m.info.is_relative for m in self.axes[2]], dtype=bool)[self.place[:, 2]]
        rows = np.flatnonzero(~self.stands_for_itself & self.is_compared)
        vlms, settings, measures = self.place[rows].T
        standing = self._rows[vlms, settings, tested_by[measures]]
        standing = np.where(tested_by[measures] < 0, -1, standing)
        known = (standing >= 0) & self.is_compared[standing]
        for name in ("change_stderr", "effect_stderr", "p_value"):
            found[name][rows[~known]] = np.nan
        found["effect"][rows[~known]] = found["change"][rows[~known]]
        rows, standing = rows[known], standing[known]
        for name in _CHANGES:
            found[name][rows] = self.numbers[name][standing]
        scaled = rows[is_relative[rows]]
        full = self.numbers["reference"][scaled]
        full = np.where(full == 0, np.nan, full)
        found["effect"][scaled] = -found["change"][scaled] / full
        found["effect_stderr"][scaled] = found["change_stderr"][scaled] / np.abs(full)
        effects, divisor = dict(self.effects), dict(zip(scaled.tolist(), full.tolist()))
        for row, other in zip(rows.tolist(), standing.tolist()):
            if other in self.effects:
                effects[row] = -self.effects[other] / divisor[row] if row in divisor else self.effects[other]
        return replace(self, numbers=found, effects=effects)

    def table(self) -> pd.DataFrame:
        """One row of plain numbers and words per comparison."""
        vlms, settings, measures = (self.place[:, axis] for axis in range(3))

        def text(codes: NDArray[np.int32], values: Sequence[str]) -> NDArray[np.object_]:
            return np.array([*values, ""], dtype=object)[codes]

        def plain(codes: NDArray[np.int32], values: Sequence[int]) -> NDArray[np.int_]:
            return np.array(values, dtype=int)[codes]

        own, of = self.axes[1], self.axes[2]
        columns: dict[str, object] = {"vlm": text(vlms, self.axes[0])}
        columns |= {"method": text(settings, [s.method for s in own])}
        columns |= {name: plain(settings, [getattr(s, name) for s in own]) for name in ("weight_bits", "act_bits")}
        columns |= {name: text(settings, [getattr(s, name) for s in own]) for name in ("scope", "variant")}
        columns |= {"is_tuned": np.array([s.is_tuned for s in own], dtype=bool)[settings]}
        for name in ("role", "dataset", "score", "metric"):
            columns |= {name: text(measures, [getattr(m, name) for m in of])}
        n = self.numbers
        columns |= {"value": n["value"], "stderr": n["stderr"], "full_precision": n["reference"]}
        columns |= {"n_seeds": n["n_seeds"].astype(int)}
        for name in ("change", "effect"):
            estimate, stderr = n[name], n[f"{name}_stderr"]
            columns |= {name: estimate, f"{name}_stderr": stderr}
            columns |= {f"{name}_low": estimate - Z95 * stderr, f"{name}_high": estimate + Z95 * stderr}
        columns |= {"p_value": n["p_value"], "q_value": n["q_value"]}
        columns |= {"tested_by": text(measures, [m.tested_by.metric for m in of])}
        columns |= {"convention": text(measures, [m.info.convention for m in of])}
        return pd.DataFrame(columns)

    def _row_of(self, key: tuple[object, ...]) -> int:
        codes = [numbered.get(item, -1) for numbered, item in zip(self._numbered, key)]  # type: ignore[attr-defined]
        return -1 if min(codes) < 0 else int(self._rows[tuple(codes)])

    def _at(self, row: int) -> Comparison:
        if row not in self._made:
            n = {name: float(column[row]) for name, column in self.numbers.items()}
            change = effect = None
            if self.is_compared[row]:
                change, effect = (Interval.normal(n[name], n[f"{name}_stderr"]) for name in ("change", "effect"))
            plain = (
                n["value"],
                n["stderr"],
                n["reference"],
                int(n["n_seeds"]),
                change,
                effect,
                n["p_value"],
                n["q_value"],
            )
            self._made[row] = Comparison(*plain, self.effects.get(row, np.empty(0)))
        return self._made[row]

    @cached_property
    def _numbered(self) -> tuple[dict[str, int], dict[Setting, int], dict[Measure, int]]:
        vlms, settings, measures = ({item: n for n, item in enumerate(axis)} for axis in self.axes)
        return vlms, settings, measures  # type: ignore[return-value]

    @cached_property
    def _rows(self) -> NDArray[np.int32]:
        """Row by VLM, setting and measure, -1 where there is none."""
        rows = np.full([len(axis) for axis in self.axes], -1, dtype=np.int32)
        rows[tuple(self.place.T)] = np.arange(len(self), dtype=np.int32)
        return rows

    @cached_property
    def _made(self) -> dict[int, Comparison]:
        return {}

    @cached_property
    def _of(self) -> dict[Measure, list[tuple[str, Setting, Comparison]]]:
        return {}
