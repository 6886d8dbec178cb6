"""Image-caption pairs to calibrate and train on: from a folder, a table, or webdataset shards."""

from __future__ import annotations

import os
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pyarrow.types
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.images.archives import ParquetRows, TarMembers
from lightning_vlmq.data.images.encoded import read_parquet
from lightning_vlmq.data.images.files import FileImages
from lightning_vlmq.data.images.sources import EncodedSource, FileTree, is_litter
from lightning_vlmq.data.readers.base import Reading, drawn_rows, files_in
from lightning_vlmq.data.text import decode_text, read_table, read_text


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
        if len(set(texts)) < n:
            twice = next(text for text, k in Counter(texts).items() if k > 1)
            raise VLMQError(f"several images in '{folder}' share the caption '{twice}'; keep one image of each name")
        return reading.images(source, rows=rows, caption=_captions([read_text(text) for text in texts], texts))


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
            places = [f"{path}, row {row}" for row in rows.tolist()]
        else:
            images, captions, where = self._table(path)
            rows = draw(len(captions), n, seed, path)
            folder = path.parent if self.images is None else reading.folder(self.images)
            names = [images[row] for row in rows.tolist()]
            places = [where[row] for row in rows.tolist()]
            if odd := [k for k, name in enumerate(names) if not isinstance(name, str) or not name]:
                raise VLMQError(f"'{places[odd[0]]}' names no image in column {self.image}; leave it out")
            chosen, source = torch.arange(n), FileTree.of(folder, names, path)
        return reading.images(source, rows=chosen, caption=_captions([captions[row] for row in rows.tolist()], places))

    def _holds_paths(self, path: Path) -> bool:
        kind = read_parquet_schema(path)
        return self.image in kind.names and (
            pyarrow.types.is_string(kind.field(self.image).type)
            or pyarrow.types.is_large_string(kind.field(self.image).type)
        )

    def _table(self, path: Path) -> tuple[list[str], list[str], list[str]]:
        """Images' names and captions, and where each stands."""
        if path.suffix == ".parquet":
            table = read_parquet(path, [self.image, self.caption])
            rows = [f"{path}, row {row}" for row in range(len(table))]
            return table[self.image].to_pylist(), table[self.caption].to_pylist(), rows
        text = read_table(path, [self.image, self.caption], "\t" if path.suffix == ".tsv" else ",")
        return text.columns[self.image], text.columns[self.caption], [f"{path}, line {line}" for line in text.lines]


@dataclass(frozen=True)
class ShardPairs(PairReader):
    """Webdataset shards: tar files of ``<key>.jpg`` and ``<key>.txt``, as img2dataset writes CC3M, YFCC and SBU.

    A key may hold dots, and the two members of a pair may lie apart in their shard. The first pairs come from the first shards. A
    draw looks into ``max_shards`` shards, drawn too, because each has to be read through to know what it holds.

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
        if self.caption.lower().rpartition(".")[2] == "json":
            raise VLMQError(
                "captions are texts; JSON would be taken as it stands: name the captions' own suffix, such as txt"
            )
        folder = reading.folder(self.path)
        shards = files_in(folder, self.shards)
        if not shards:
            raise VLMQError(f"no shards '{self.shards}' in '{folder}'; name the folder that img2dataset wrote")
        if seed is not None:
            shards = [shards[k] for k in drawn_rows(len(shards), self.max_shards, seed).tolist()]
        found: list[_Pair] = []
        alone: list[str] = []
        for shard in shards:
            for pair in _pairs(shard, self.caption, alone):
                found.append(pair)
                if seed is None and len(found) == n:
                    break
            if seed is None and len(found) == n:
                break
        if len(found) < n and alone:
            raise VLMQError(
                f"'{folder}' holds {len(found)} image-caption pairs in {len(shards)} shards, {n} are asked for; {len(alone)} members "
                f"are no part of one, as '{alone[0]}': a pair is <key>.jpg and <key>.{self.caption} in one shard; set caption to the "
                "captions' suffix, or lower calibration_pairs"
            )
        rows = draw(len(found), n, seed, folder).tolist()
        captions = _captions([found[row].caption for row in rows], [found[row].place for row in rows])
        return reading.images(TarMembers([found[row].image for row in rows]), caption=captions)


@dataclass(frozen=True)
class _Pair:
    image: tuple[Path, str, int, int]  # as TarMembers takes it
    caption: str
    place: str  # of the caption


def _pairs(shard: Path, caption: str, alone: list[str]) -> Iterator[_Pair]:
    """The pairs of a shard, each as soon as both of its members were met; names of what is left over are added to ``alone``."""
    images: dict[str, tuple[Path, str, int, int]] = {}
    captions: dict[str, tuple[str, str]] = {}
    others: list[str] = []
    met: set[tuple[str, bool]] = set()
    try:
        with tarfile.open(shard, "r:") as tar:  # uncompressed, so that members can be read in place
            for member in tar:
                if member.isdir() or any(map(is_litter, member.name.split("/"))):
                    continue
                place = f"{shard}:{member.name}"
                if not member.isreg() or member.issparse():  # its bytes are not in the file as they are
                    alone.append(f"{place} ({'a link' if member.issym() or member.islnk() else 'no plain file'})")
                    continue
                stem, suffix = os.path.splitext(member.name)
                is_caption = member.name.lower().endswith(f".{caption.lower()}")
                if not is_caption and suffix.lower() not in IMG_EXTENSIONS:
                    others.append(place)
                    continue
                key = member.name[: -len(caption) - 1] if is_caption else stem
                if (key, is_caption) in met:
                    what = "caption" if is_caption else "image"
                    raise VLMQError(f"'{place}' is a second {what} of the key '{key}'; write each key once")
                met.add((key, is_caption))
                if is_caption:
                    file = tar.extractfile(member)
                    captions[key] = ("" if file is None else decode_text(file.read(), place), place)
                else:
                    images[key] = (shard, member.name, member.offset_data, member.size)
                if key in images and key in captions:
                    yield _Pair(images.pop(key), *captions.pop(key))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise VLMQError(f"shard '{shard}' is damaged or no plain tar file; fetch it again") from error
    alone += [f"{shard}:{name}" for _, name, _, _ in images.values()] + [place for _, place in captions.values()]
    if not met:
        alone += others


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


def _captions(texts: Sequence[object], places: Sequence[object]) -> list[str]:
    """The texts without white space around them; raises :class:`VLMQError` for an empty one, or one that is no text, by its place."""
    for text, place in zip(texts, places):
        if text is not None and not isinstance(text, str):
            raise VLMQError(f"the caption of '{place}' is a {type(text).__name__}, not a text; write one text a row")
    captions = [text.strip() if isinstance(text, str) else "" for text in texts]
    if empty := captions.count(""):
        first = places[captions.index("")]
        raise VLMQError(f"{empty} of {len(captions)} captions are empty, the first is '{first}'; leave these pairs out")
    return captions
