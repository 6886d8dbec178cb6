"""Put Fashion-MNIST where pre-training looks for it: ``python scripts/fetch_fashion_mnist.py data``.

Takes the files of Debian's package ``dataset-fashion-mnist`` where it is installed, else downloads them with torchvision.
"""

import gzip
import sys
from pathlib import Path

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.embedded.compose import load_fashion_mnist

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def main(root: str) -> None:
    """Unpack or download all four files, then read them as a check."""
    raw = Path(root) / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for packed in DEBIAN.glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    for train in (True, False):
        print(f"{raw}: {len(load_fashion_mnist(root, train).labels)} images ({'training' if train else 'test'} part)")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2] or ["data"])
    except VLMQError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
