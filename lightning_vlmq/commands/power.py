"""``vlmq power``: how many images a comparison like this one takes."""

from __future__ import annotations

import math

from lightning_vlmq.commands import WordParser, command
from lightning_vlmq.core.errors import VLMQError


@command("power", "Read results")
def run(args: list[str]) -> None:
    """Say how many images it takes to see a change of a given size between two models like these two stored runs."""
    parser = WordParser(prog="vlmq power", description=run.__doc__)
    parser.add_argument("runs", nargs=2, metavar="RUN", help="names in the store, or <folder>:<name>")
    parser.add_argument("--root", default="logs/runs", help="the store's folder (default: %(default)s)")
    parser.add_argument(
        "--change",
        type=float,
        nargs="+",
        default=[0.5, 1.0, 2.0],
        metavar="POINTS",
        help="changes to be seen, in points (default: 0.5 1 2)",
    )
    parser.add_argument("--power", type=float, default=0.8, help="chance to find such a change (default: %(default)s)")
    given = parser.parse_args(args)
    from rich import box
    from rich import print as rich_print
    from rich.table import Table

    from lightning_vlmq.commands.compare import compared, randomness
    from lightning_vlmq.statistics import Z95, samples_needed

    if any(not points > 0 or math.isinf(points) for points in given.change):
        raise VLMQError(f"--change is in points above 0, got {' '.join(map(str, given.change))}")
    lines, _ = compared(given.runs, given.root)
    title = f"Images needed{randomness(given.runs, given.root)}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("dimension", "measure"):
        table.add_column(title, no_wrap=True)
    for title in ("images", "± points", *(f"{points:g} points" for points in given.change)):
        table.add_column(title, justify="right", no_wrap=True)
    for line in lines:
        stderr = line.half_width / Z95
        is_known = stderr > 0  # 0: no sample tells the two models apart, which says nothing of how many would
        needed = [
            samples_needed(100 * stderr, line.n, points, given.power) if is_known else math.nan
            for points in given.change
        ]
        table.add_row(
            line.dimension.title,
            line.dimension.measure.info.title,
            f"{line.n:,}",
            f"{100 * line.half_width:.2f}" if is_known else "–",
            *(f"{count:,.0f}" if not math.isnan(count) else "–" for count in needed),
        )
    table.caption = (
        f"found at 5 % with a chance of {100 * given.power:g} %, both models on the same images, all sets growing alike; "
        "images: seen now; ±: half a 95 % interval now; –: not one image tells the models apart, or nothing can be tested"
    )
    rich_print(table)
