"""Image-caption pairs to calibrate and train on: from a folder, a table, or webdataset shards."""

from __future__ import annotations

import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pyarrow.types
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.images.archives import ParquetRows, TarMembers
from lightning_vlmq.data.images.encoded import read_parquet
from lightning_vlmq.data.images.files import FileImages
from lightning_vlmq.data.images.sources import EncodedSource, FileTree
from lightning_vlmq.data.readers.base import Reading, drawn_rows


class PairReader(ABC):
    """A source of image-caption pairs. A subclass is a frozen dataclass whose fields are its settings."""

    @abstractmethod
    def read(self, reading: Reading, n: int, seed: int | None) -> FileImages:
        """``n`` pairs, listed but not decoded.

        Args:
            reading: how to read.
            n: number of pairs.
            seed: ``None`` takes the first ``n``, a seed draws them.

        Returns:
            The images, with the column ``caption``.

        Raises:
            VLMQError: something is missing or damaged, or there are fewer pairs.
        """


@dataclass(frozen=True)
class FolderPairs(PairReader):
    """Images below a folder, each with its caption beside it: ``x.jpg`` and ``x.txt``.

    Attributes:
        path: the folder.
    """

    path: str

    def read(self, reading: Reading, n: int, seed: int | None) -> FileImages:
        """``n`` pairs in the order of the paths."""
        folder = reading.folder(self.path)
        source = FileTree.scan(folder)
        rows = draw(len(source), n, seed, folder)
        texts = [(folder / source.path(row)).with_suffix(".txt") for row in rows.tolist()]
        if missing := [text for text in texts if not text.is_file()]:
            raise VLMQError(
                f"{len(missing)} of {n} images in '{folder}' have no caption, '{missing[0]}' is missing; add them"
            )
        return reading.images(
            source, rows=rows, caption=_captions([t.read_text(errors="replace") for t in texts], folder)
        )


@dataclass(frozen=True)
class TablePairs(PairReader):
    """A table of image-caption pairs: CSV, TSV (``.tsv``) or Parquet.

    Attributes:
        path: the table.
        image: column of the images: paths, or in Parquet the files' bytes.
        caption: column of the captions.
        images: folder that the paths start from; by default the table's own.
    """

    path: str
    image: str = "image"
    caption: str = "caption"
    images: str | None = None

    def read(self, reading: Reading, n: int, seed: int | None) -> FileImages:
        """``n`` pairs in the order of the table."""
        path = reading.file(self.path)
        source: EncodedSource
        if path.suffix == ".parquet" and not self._holds_paths(path):
            captions = read_parquet(path, [self.caption])[self.caption].to_pylist()
            rows = draw(len(captions), n, seed, path)
            chosen, source = rows, ParquetRows([path], self.image)
        else:
            table = self._table(path)
            captions = table[self.caption].tolist()
            rows = draw(len(captions), n, seed, path)
            folder = path.parent if self.images is None else reading.folder(self.images)
            names = [str(name) for name in table[self.image].iloc[rows.numpy()]]
            chosen, source = torch.arange(n), FileTree.of(folder, names, path)
        return reading.images(source, rows=chosen, caption=_captions([captions[row] for row in rows.tolist()], path))

    def _holds_paths(self, path: Path) -> bool:
        kind = read_parquet_schema(path)
        return self.image in kind.names and (
            pyarrow.types.is_string(kind.field(self.image).type)
            or pyarrow.types.is_large_string(kind.field(self.image).type)
        )

    def _table(self, path: Path) -> pd.DataFrame:
        columns = [self.image, self.caption]
        if path.suffix == ".parquet":
            return read_parquet(path, columns).to_pandas()
        try:
            return pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", usecols=columns)
        except (ValueError, OSError) as error:
            raise VLMQError(f"'{path}' is no table with the columns {', '.join(columns)}; name its columns") from error


@dataclass(frozen=True)
class ShardPairs(PairReader):
    """Webdataset shards: tar files of ``<key>.jpg`` and ``<key>.txt``, as img2dataset writes CC3M, YFCC and SBU.

    The first pairs come from the first shards. A draw looks into ``max_shards`` shards, drawn too, because each has to be read
    through to know what it holds.

    Attributes:
        path: the folder of the shards.
        shards: pattern of their names.
        caption: suffix of the captions, without the dot.
        max_shards: how many shards a draw looks into; ``None`` looks into all.
    """

    path: str
    shards: str = "*.tar"
    caption: str = "txt"
    max_shards: int | None = 8

    def read(self, reading: Reading, n: int, seed: int | None) -> FileImages:
        """``n`` pairs, in the order of the shards."""
        folder = reading.folder(self.path)
        shards = sorted(folder.glob(self.shards))
        if not shards:
            raise VLMQError(f"no shards '{self.shards}' in '{folder}'; name the folder that img2dataset wrote")
        if seed is not None:
            shards = [shards[k] for k in drawn_rows(len(shards), self.max_shards, seed).tolist()]
        found: list[tuple[tuple[Path, str, int, int], str]] = []
        for shard in shards:
            for pair in self._pairs(shard):
                found.append(pair)
                if seed is None and len(found) == n:
                    break
            if seed is None and len(found) == n:
                break
        rows = draw(len(found), n, seed, folder).tolist()
        captions = _captions([found[row][1] for row in rows], folder)
        return reading.images(TarMembers([found[row][0] for row in rows]), caption=captions)

    def _pairs(self, shard: Path) -> Iterator[tuple[tuple[Path, str, int, int], str]]:
        """The complete pairs of a shard: members that follow each other and share their name up to its first dot."""
        try:
            with tarfile.open(shard, "r:") as tar:  # uncompressed, so that members can be read in place
                key, image, text = "", None, None
                for member in tar:
                    name, _, suffix = member.name.rpartition("/")[2].partition(".")
                    name = f"{member.name.rpartition('/')[0]}/{name}"
                    if name != key:
                        key, image, text = name, None, None
                    if suffix.lower() == self.caption:
                        file = tar.extractfile(member)
                        text = "" if file is None else file.read().decode(errors="replace")
                    elif f".{suffix.lower()}" in IMG_EXTENSIONS:
                        image = (shard, member.name, member.offset_data, member.size)
                    if image is not None and text is not None:
                        yield image, text
                        image = text = None
        except (tarfile.TarError, OSError, EOFError) as error:
            raise VLMQError(f"shard '{shard}' is damaged or no plain tar file; fetch it again") from error


def draw(n_there: int, n: int, seed: int | None, where: Path) -> torch.Tensor:
    """The first ``n`` rows of ``n_there``, or ``n`` drawn with a seed, in ascending order, int64 ``[n]``.

    Raises:
        VLMQError: there are fewer.
    """
    if n_there < n:
        raise VLMQError(f"'{where}' holds {n_there} image-caption pairs, {n} are asked for; lower calibration_pairs")
    if seed is None:
        return torch.arange(n)
    return drawn_rows(n_there, n, seed)


def read_parquet_schema(path: Path) -> pyarrow.Schema:
    """The schema of a Parquet file. Raises :class:`VLMQError` for a damaged file."""
    try:
        return pq.read_schema(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise VLMQError(f"data file '{path}' is damaged or no Parquet file; fetch or make it again") from error


def _captions(texts: Sequence[object], where: Path) -> list[str]:
    """The texts without white space around them; raises :class:`VLMQError` for an empty one."""
    captions = [text.strip() if isinstance(text, str) else "" for text in texts]
    if empty := captions.count(""):
        raise VLMQError(f"{empty} of {len(captions)} captions in '{where}' are empty; leave these pairs out")
    return captions
