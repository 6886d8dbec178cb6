"""Weights, repositories and tokenizers from elsewhere: fetched, or found among those fetched before, or told in one line that they lack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import open_clip

from lightning_vlmq.core.errors import VLMQError, first_line


def fetch_repository(place: str) -> tuple[Path, str]:
    """The files of a Hugging Face repository, ``owner/name`` or ``owner/name@revision``, as a folder, and their commit.

    Raises:
        VLMQError: they can be neither fetched nor found among those fetched before.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = place.partition("@")
    files = ["*.json", "*.txt", "*.model"]
    with one_line_errors(f"cannot fetch 'hf-hub:{place}'"):
        folder = Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=[*files, "*.safetensors"])
        )
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=[*files, "*.bin"]))
    return folder, folder.name


def cached_commit(repository: str) -> str:
    """Commit of a repository's ``main`` among those fetched before; empty where there is none."""
    from huggingface_hub import constants

    reference = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "refs" / "main"
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""


class NotHere(VLMQError):
    """What is asked for would have to be fetched, and may not be."""


@contextmanager
def nothing_fetched() -> Iterator[None]:
    """While it lasts, models, weights and tokenizers are taken from this machine or are :class:`NotHere`."""
    from huggingface_hub import constants

    kept = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except VLMQError as error:
        causes = [error.__cause__, getattr(error.__cause__, "__cause__", None)]
        if kept or not any(_is_offline(cause) for cause in causes):
            raise
        raise NotHere(str(error)) from error
    finally:
        constants.HF_HUB_OFFLINE = kept


def _is_offline(error: BaseException | None) -> bool:
    said = f"{type(error).__name__} {error}".lower()
    return error is not None and any(
        word in said for word in ("offline", "localentrynotfound", "cached files", "not on this machine")
    )


def download(name: str, tag: str) -> Path:
    """The file of a tag's weights. Raises :class:`VLMQError` where it can be neither fetched nor found."""
    from huggingface_hub import is_offline_mode

    config = open_clip.get_pretrained_cfg(name, tag)
    if is_offline_mode() and config.get("url") and not config.get("hf_hub"):
        path = Path("~/.cache/clip").expanduser() / Path(config["url"]).name  # where open_clip puts what it fetches
        if not path.is_file():
            raise NotHere(f"the weights '{tag}' of '{name}' are not on this machine; fetch them first")
    with one_line_errors(f"cannot fetch the weights '{tag}' of '{name}'"):
        return Path(open_clip.download_pretrained(config))


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Whatever open_clip, transformers or a download raise, in one line, with what to do."""
    try:
        yield
    except VLMQError:
        raise
    except ModuleNotFoundError as error:
        package = "transformers" if "transformers" in str(error) else error.name
        raise VLMQError(f"{what}: {package} is not installed; pip install {package}") from error
    except Exception as error:
        said = first_line(error)
        if "transformers" in said.lower() and "install" in said.lower():
            advice = "pip install 'lightning_vlmq[hf]'"
        elif any(
            word in f"{type(error).__name__} {error}".lower()
            for word in ("connect", "offline", "hub", "resolve", "download")
        ):
            advice = "without a connection, put the model's files in a folder and give local-dir:<folder>"
        else:
            advice = "check the name, the config and the files"
        raise VLMQError(f"{what}: {said}; {advice}") from error
