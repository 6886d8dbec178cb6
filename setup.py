"""What pyproject.toml cannot say: the folder ``configs`` is installed as ``lightning_vlmq/configs``, from where it lies."""

from pathlib import Path

from setuptools import find_packages, setup

folders = sorted(path for path in Path("configs").rglob("*") if path.is_dir())
setup(
    packages=[
        *find_packages(include=["lightning_vlmq*"]),
        "lightning_vlmq.configs",
        *(f"lightning_vlmq.{'.'.join(folder.parts)}" for folder in folders),
    ],
    package_dir={"lightning_vlmq.configs": "configs"},
)
