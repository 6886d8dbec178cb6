"""Images: decoding, sources (folders, archives, tables), fingerprints."""

from lightning_vlmq.data.images.files import DecodedImages, FileImages
from lightning_vlmq.data.images.pixels import Preprocess, UnreadableImage

__all__ = ["DecodedImages", "FileImages", "Preprocess", "UnreadableImage"]
