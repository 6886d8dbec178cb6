"""Readers of data sets on disk: one published layout, or one layout of your own, per file."""

from lightning_vlmq.data.readers.base import Reader, Reading
from lightning_vlmq.data.readers.cifar import CIFAR, CIFARC
from lightning_vlmq.data.readers.imagenet import (
    ImageNet,
    ImageNetA,
    ImageNetC,
    ImageNetR,
    ImageNetSketch,
    ImageNetV2,
    ObjectNet,
)
from lightning_vlmq.data.readers.openood import OpenOOD
from lightning_vlmq.data.readers.own import Folder, ImageList, Parquet
from lightning_vlmq.data.readers.pairs import FolderPairs, PairReader, ShardPairs, TablePairs
from lightning_vlmq.data.readers.spurious import CelebA, CounterAnimal, Waterbirds

__all__ = [
    "CIFAR",
    "CIFARC",
    "CelebA",
    "CounterAnimal",
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
    "Reader",
    "Reading",
    "ShardPairs",
    "TablePairs",
    "Waterbirds",
]
