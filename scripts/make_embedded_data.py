"""Write the committed Parquet files of the embedded data set from Fashion-MNIST: ``python scripts/make_embedded_data.py data``."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lightning_vlmq.data.embedded import N_PAIRS, calibration_rows
from lightning_vlmq.data.embedded.captions import COLOURS, write_captions
from lightning_vlmq.data.embedded.compose import CLASS_NAMES, compose, draw_colours, load_fashion_mnist, trained_mask
from lightning_vlmq.data.embedded.sets import FOLDER
from lightning_vlmq.data.images.encoded import encode_png

PER_CLASS = 200


def main(root: str) -> None:
    """Evaluation images come from Fashion-MNIST's test part, caption pairs from its training part, so they cannot overlap."""
    test = load_fashion_mnist(root, train=False)
    rows = (
        torch.cat([(test.labels == c).nonzero().flatten()[:PER_CLASS] for c in range(len(CLASS_NAMES))]).sort().values
    )
    write("garments", image=[encode_png(i) for i in test.images[rows]], label=test.labels[rows].tolist())

    train = load_fashion_mnist(root, train=True)
    train = train.select(trained_mask(train.labels))
    train = train.select(calibration_rows(len(train.labels)))
    generator = torch.Generator().manual_seed(1)
    colours = draw_colours(train.labels, 0.9, generator)
    images = compose(train.images, colours, generator, jitter=2)
    names = [CLASS_NAMES[i] for i in train.labels]
    captions = write_captions(names, [list(COLOURS)[i] for i in colours], train.brightness(), generator)
    assert len(captions) == N_PAIRS
    write("pairs", image=[encode_png(i) for i in images], caption=captions)


def write(name: str, **columns: list) -> None:
    """Write one Parquet file into the package."""
    path = Path(FOLDER) / f"{name}.parquet"
    pq.write_table(pa.table(columns), path, compression="zstd")
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1])
