"""``vlmq compare``: two stored runs side by side, from their samples."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from lightning_vlmq.commands import WordParser, command
from lightning_vlmq.core.errors import VLMQError, unknown

if TYPE_CHECKING:
    from lightning_vlmq.evaluation.headline import HeadlineLine
    from lightning_vlmq.evaluation.records import Columns, EvaluationSet
    from lightning_vlmq.results.store import ResultsStore
    from lightning_vlmq.statistics import Statistics


@command("compare", "Read results")
def run(args: list[str]) -> None:
    """Put two stored runs side by side: every dimension, the change and its interval."""
    parser = WordParser(prog="vlmq compare", description=run.__doc__)
    parser.add_argument(
        "runs",
        nargs=2,
        metavar="RUN",
        help="names in the store, or <folder>:<name>; the first is what is compared with",
    )
    parser.add_argument("--root", default="logs/runs", help="the store's folder (default: %(default)s)")
    given = parser.parse_args(args)
    from rich import print as rich_print
    from rich.markup import escape

    from lightning_vlmq.callbacks.printing import headline_table
    from lightning_vlmq.models.provenance import EMBEDDED

    lines, left_out = compared(given.runs, given.root)
    for where in left_out:
        rich_print(escape(f"only one of them has '{where}': left out"))
    table = headline_table(lines, given.runs, has_change=True)
    table.title = f"{table.title}{randomness(given.runs, given.root)}"
    rich_print(table)
    for name in given.runs:
        if (source := source_of(name, given.root)) not in ("", EMBEDDED):
            rich_print(escape(f"weights of {name}: {source}"))


def compared(names: list[str], root: str) -> tuple[list[HeadlineLine], list[str]]:
    """The headline of two stored runs, and the names of the sets that only one of them has.

    Args:
        names: two runs, as :func:`samples` takes them.
        root: the store's folder.

    Raises:
        VLMQError: a run is not there, or they cannot be compared.
    """
    from lightning_vlmq.evaluation.headline import headline, side_by_side

    loaded = [samples(name, root) for name in names]
    require_same_samples(loaded, names)
    lines = headline(side_by_side(loaded), settings_of(names, root))
    if not lines:
        raise VLMQError(f"{' and '.join(names)} share no data sets to compare on")
    return lines, sorted({where.dataset for where in set(loaded[0]) ^ set(loaded[1])})


def samples(name: str, root: str) -> dict[EvaluationSet, Columns]:
    """A stored run's samples by data set.

    Args:
        name: the run's, or ``<folder>:<name>``.
        root: the store's folder, where the name does not say.

    Raises:
        VLMQError: there is no such run, it is damaged, or it has no samples.
    """
    from lightning_vlmq.results.schema import RunKey
    from lightning_vlmq.study.analysis.runs import StoredRun

    store, run_id = located(name, root)
    if run_id not in store.run_ids():
        raise unknown(f"run of '{store.root}'", run_id, store.run_ids())
    first = store.rows([run_id]).iloc[0]
    found = StoredRun(RunKey(**{field.name: first[field.name] for field in fields(RunKey)}), run_id, store).samples()
    if not found:
        raise VLMQError(f"run '{run_id}' of '{store.root}' has no samples to compare; run it again")
    return found


def located(name: str, root: str) -> tuple[ResultsStore, str]:
    """The store that a run is in, and what it is called there; ``name`` and ``root`` as :func:`samples` takes them."""
    from lightning_vlmq.results.store import ResultsStore

    folder, colon, run_id = name.rpartition(":")
    return ResultsStore(folder if colon else root), run_id


def randomness(names: list[str], root: str) -> str:
    """What the title of a table adds where weights of stored runs are drawn, not trained: of all, or of those it names."""
    from rich.markup import escape

    from lightning_vlmq.models.provenance import RANDOM

    stores = {name: located(name, root) for name in names}
    drawn = [n for n, (store, run) in stores.items() if store.rows([run])["pretrained"].iloc[0] == RANDOM]
    if not drawn:
        return ""
    return " (random weights)" if len(drawn) == len(stores) else f" (random weights: {escape(', '.join(drawn))})"


def settings_of(names: list[str], root: str) -> Statistics:
    """The statistics' settings of stored runs; raises :class:`VLMQError` where they differ: one cannot be read by the other's."""
    found = []
    for name in names:
        store, run_id = located(name, root)
        found.append(store.statistics(run_id))
    if found[0] != found[-1]:
        raise VLMQError(
            f"{' and '.join(names)} were evaluated with different statistics; run one of them again with the other's"
        )
    return found[0]


def source_of(name: str, root: str) -> str:
    """Where the weights of a stored run came from; empty where it does not say."""
    store, run_id = located(name, root)
    return store.source(run_id)


def require_same_samples(loaded: list[dict[EvaluationSet, Columns]], names: list[str]) -> None:
    """Raise :class:`VLMQError` where two runs saw other samples of a data set: their changes would not be paired."""
    first, second = loaded
    for where in set(first) & set(second):
        for column in ("index", "target"):
            ours, theirs = first[where][column], second[where][column]
            if ours.shape != theirs.shape or (ours != theirs).any():
                raise VLMQError(
                    f"{names[0]} and {names[1]} saw other samples of '{where.dataset}'; evaluate both on the same data"
                )
