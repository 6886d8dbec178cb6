"""How many images per second one core decodes: this package's reader beside open_clip's own transform. Run by hand.

    python benchmarks/decoding.py                       # 500 x 375 JPEGs, for models of 224 pixels
    python benchmarks/decoding.py --images folder --size 384

Generated JPEGs (or a folder's) are read from files, decoded, resized and cut, one after the other on one thread; the contenders
take turns, image by image, so that what else the machine does meets all. Seconds are processor time. open_clip's transform
also normalises, which the models of this package do on their device.

open_clip     PIL.Image.open and open_clip.image_transform: what its scripts do.
ours          the reader of every data set on disk, the same pixels.
ours, fast    with data.decoder: torchvision, within two grey levels of them.
simplejpeg    its decoder in place of Pillow's, then Pillow's resize; where it is installed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

from lightning_vlmq.core.preprocessing import Framing
from lightning_vlmq.data.images import FileImages, Preprocess
from lightning_vlmq.data.images.sources import FileTree

Read = Callable[[int], object]


def generate(folder: Path, n: int, width: int, height: int) -> None:
    """JPEGs whose detail is about a photograph's: smooth shapes and noise, 60 to 80 kB at 500 x 375."""
    rng = np.random.default_rng(0)
    for k in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
        noisy = smooth + rng.normal(0, 8, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{k:05}.jpg", quality=90)


def contenders(folder: Path, size: int) -> tuple[dict[str, Read], int]:
    """What reads an image by its number, and how many images there are."""
    tree = FileTree.scan(folder)
    rows = torch.arange(len(tree))
    exact = FileImages(tree, Preprocess(size), rows)
    fast = FileImages(tree, Preprocess(size, decoder="torchvision"), rows)
    transform = open_clip.image_transform(size, is_train=False)

    def by_open_clip(k: int) -> object:
        with Image.open(tree.name(k)) as image:
            return transform(image)

    found: dict[str, Read] = {"open_clip": by_open_clip, "ours": exact.decode, "ours, fast": fast.decode}
    try:
        import simplejpeg
    except ImportError:
        return found, len(tree)
    framing = Framing(size)

    def by_simplejpeg(k: int) -> object:
        pixels = simplejpeg.decode_jpeg(Path(tree.name(k)).read_bytes())
        return torch.from_numpy(np.array(framing(Image.fromarray(pixels)))).permute(2, 0, 1)

    found["simplejpeg"] = by_simplejpeg
    return found, len(tree)


def seconds(read: Read, k: int) -> float:
    """Processor time of one call."""
    began = time.process_time()
    read(k)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of images; generated JPEGs if not given")
    parser.add_argument("--n", type=int, default=200, help="how many to generate")
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--size", type=int, default=224, help="pixels a side that the model wants")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.images or Path(temporary)
        if args.images is None:
            generate(folder, args.n, args.width, args.height)
        readers, n = contenders(folder, args.size)
        for read in readers.values():
            read(0)
        times: dict[str, list[float]] = {name: [] for name in readers}
        for k in range(n):
            for name, read in readers.items():
                times[name].append(seconds(read, k))
    what = f"of {args.images}" if args.images else f"of {args.width} x {args.height}"
    print(f"{n} images {what} to {args.size} pixels, one thread, Pillow {Image.__version__}, medians")
    print(f"{'':16}{'ms an image':>12}{'images/s/core':>15}{'x open_clip':>13}")
    usual = statistics.median(times["open_clip"])
    for name, spent in times.items():
        typical = statistics.median(spent)
        print(f"{name:16}{typical * 1e3:12.2f}{1 / typical:15.0f}{usual / typical:13.2f}")


if __name__ == "__main__":
    main()
