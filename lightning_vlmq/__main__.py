"""``python -m lightning_vlmq``: the same as ``vlmq``."""

from lightning_vlmq.cli import entry_point

if __name__ == "__main__":
    entry_point()
