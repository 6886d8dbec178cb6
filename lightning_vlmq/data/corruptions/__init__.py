"""The 15 + 4 corruption families of ImageNet-C and CIFAR-10-C at 5 severities, seeded per image."""

# Each module files its corruptions in the registry when it is imported.
from lightning_vlmq.data.corruptions import blur, digital, noise, weather
from lightning_vlmq.data.corruptions.core import CORRUPTIONS, Corruption, corrupt

__all__ = ["CORRUPTIONS", "Corruption", "blur", "corrupt", "digital", "noise", "weather"]
