"""Data sets on disk: readers of published layouts and of one's own, decoded when a batch is asked for."""

from lightning_vlmq.data.files.cifar import CIFAR, CIFARC
from lightning_vlmq.data.files.imagenet import (
    ImageNet,
    ImageNetA,
    ImageNetC,
    ImageNetR,
    ImageNetSketch,
    ImageNetV2,
    ObjectNet,
)
from lightning_vlmq.data.files.images import DecodedImages, FileImages
from lightning_vlmq.data.files.module import FileData
from lightning_vlmq.data.files.openood import OpenOOD
from lightning_vlmq.data.files.own import Folder, ImageList, Parquet
from lightning_vlmq.data.files.pairs import FolderPairs, PairReader, ShardPairs, TablePairs
from lightning_vlmq.data.files.pixels import Preprocess, UnreadableImage
from lightning_vlmq.data.files.reading import Reader, Reading
from lightning_vlmq.data.files.spurious import CelebA, CounterAnimal, Waterbirds

__all__ = [
    "CIFAR",
    "CIFARC",
    "CelebA",
    "CounterAnimal",
    "DecodedImages",
    "FileData",
    "FileImages",
    "Folder",
    "FolderPairs",
    "ImageList",
    "ImageNet",
    "ImageNetA",
    "ImageNetC",
    "ImageNetR",
    "ImageNetSketch",
    "ImageNetV2",
    "ObjectNet",
    "OpenOOD",
    "PairReader",
    "Parquet",
    "Preprocess",
    "Reader",
    "Reading",
    "ShardPairs",
    "TablePairs",
    "UnreadableImage",
    "Waterbirds",
]
