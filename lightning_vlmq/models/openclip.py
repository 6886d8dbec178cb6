"""open_clip's models as VLMs: by name and tag, by name and file, or from a folder or repository with its own config."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip
from torch import nn

from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.core.identity import digest, tensors_digest
from lightning_vlmq.core.preprocessing import Framing, Preprocessing
from lightning_vlmq.models.provenance import RANDOM, Provenance
from lightning_vlmq.models.vlm import VLM, draw_missing_weights
from lightning_vlmq.models.weights import fit, is_script

log = logging.getLogger(__name__)

Activation = Literal["gelu", "quick_gelu"]

ARCHITECTURE = "architecture"
"""In place of a tag: a file's weights were trained as the architecture's own config says."""

CONFIG = "open_clip_config.json"
SCHEMAS = ("hf-hub:", "local-dir:")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".npz")


@dataclass(frozen=True)
class Recipe:
    """What weights were trained with that their tensors do not show.

    Attributes:
        quick_gelu: whether the towers' activation is OpenAI's QuickGELU, x * sigmoid(1.702 x).
        preprocess: entries of open_clip's preprocessing config: mean, std, interpolation, resize_mode, fill_color.
    """

    quick_gelu: bool
    preprocess: Mapping[str, Any]


def load_named(name: str, pretrained: str | None, trained_like: str | None, activation: Activation | None) -> VLM:
    """An architecture of open_clip's list with the weights of a tag or a file, or with random ones.

    Args:
        name: the architecture.
        pretrained: tag, file, or ``none``.
        trained_like: for a file, the tag that it shares activation and preprocessing with, or ``architecture``.
        activation: what the weights were trained with, where the tag is wrong or unknown.

    Raises:
        VLMQError: no weights are named, or unknown ones; the activation is not known; the file does not fit.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        offered = f"a tag ({', '.join(tags)}), " if tags else ""
        raise VLMQError(
            f"model '{name}' needs weights: set pretrained to {offered}a file, or {RANDOM} for random weights"
        )
    is_file = "/" in pretrained or Path(pretrained).suffix != "" or Path(pretrained).is_file()
    if trained_like is not None and not is_file:
        raise VLMQError(
            f"trained_like is for files of weights; '{pretrained}' says itself how it was trained, leave it out"
        )
    config = open_clip.get_model_config(name)
    path: Path | None = None
    if pretrained == RANDOM:
        recipe = Recipe(_is_quick(config), {})
    elif is_file:
        path = Path(pretrained)
        if not path.is_file():
            raise VLMQError(
                f"checkpoint '{path}' does not exist; give the path of a file or one of the tags {', '.join(tags)}"
            )
        recipe = _recipe_of_file(name, path, config, trained_like, activation)
    else:
        recipe = _recipe_of_tag(name, pretrained, config, activation)
    if activation is not None:
        recipe = Recipe(activation == "quick_gelu", recipe.preprocess)
    config["quick_gelu"] = recipe.quick_gelu
    tokenize = tokenizer_of(name)
    model = build(name, config)
    if pretrained == RANDOM:
        draw_missing_weights(model)
    else:
        fit(model, path or _download(name, pretrained))
    vlm = _finish(model, tokenize, name, pretrained, recipe.preprocess, config)
    vlm.activation = "quick_gelu" if recipe.quick_gelu else "gelu"
    return vlm


def load_folder(name: str, folder: Path, revision: str = "") -> VLM:
    """A model from a folder in open_clip's layout: its config, weights and, where its text tower needs them, tokenizer files.

    Args:
        name: what it is called in results, with its schema.
        folder: where it lies.
        revision: commit of the repository that it comes from.

    Raises:
        VLMQError: the folder lacks its config or weights, or they do not go together.
    """
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config = dict(content["model_cfg"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VLMQError(f"'{folder / CONFIG}' is no config of an open_clip model ({_reason(error)})") from error
    path = _weights_in(folder)
    tokenize = tokenizer_of(f"local-dir:{folder}")
    model = build(name, config)
    fit(model, path)
    return _finish(model, tokenize, name, path.name, content.get("preprocess_cfg") or {}, config, revision)


def fetch_repository(place: str) -> tuple[Path, str]:
    """The files of a Hugging Face repository, ``owner/name`` or ``owner/name@revision``, as a folder, and their commit.

    Raises:
        VLMQError: they can be neither fetched nor found among those fetched before.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = place.partition("@")
    files = ["*.json", "*.txt", "*.model"]
    with _one_line_errors(f"cannot fetch 'hf-hub:{place}'"):
        folder = Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=[*files, "*.safetensors"])
        )
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=[*files, "*.bin"]))
    return folder, folder.name


def _finish(
    model: nn.Module,
    tokenize: Any,
    name: str,
    source: str,
    preprocess: Mapping[str, Any],
    config: Mapping[str, Any],
    revision: str = "",
) -> VLM:
    vlm = VLM(model, tokenize, name, source, preprocessing(model, preprocess, name))
    vlm.provenance = Provenance(source, tensors_digest(vlm.state_dict(), 64), digest(config), revision)
    return vlm


def preprocessing(model: Any, preprocess: Mapping[str, Any], name: str) -> Preprocessing:
    """What open_clip's own transform does to an image for a model.

    Args:
        model: an open_clip model, which knows its size.
        preprocess: entries of open_clip's preprocessing config; the rest is open_clip's default.
        name: the model, for messages.

    Raises:
        VLMQError: the model takes images that are not square, or an entry is unknown.
    """
    sizes = model.visual.image_size
    height, width = sizes if isinstance(sizes, (tuple, list)) else (sizes, sizes)
    if height != width:
        raise VLMQError(f"model '{name}' takes images of {height} x {width} pixels; only square ones are supported")
    config = open_clip.transform.merge_preprocess_dict(open_clip.transform.PreprocessCfg(), dict(preprocess))
    mean, std = (v if isinstance(v, (tuple, list)) else (v,) * 3 for v in (config["mean"], config["std"]))
    interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"  # "random" is for training
    framing = Framing(int(height), config["resize_mode"], interpolation, config["fill_color"])  # type: ignore[arg-type]
    return Preprocessing(framing, tuple(mean), tuple(std))


def _recipe_of_tag(name: str, tag: str, config: Mapping[str, Any], activation: Activation | None) -> Recipe:
    """What open_clip says of a tag. An architecture that says QuickGELU itself, of a tag that does not, is refused."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not open_clip.is_pretrained_cfg(name, tag):
        raise unknown(f"pretrained tag for {name}", tag, tags)
    said = open_clip.get_pretrained_cfg(name, tag)
    quick = bool(said.get("quick_gelu", False))
    if _is_quick(config) and not quick and activation is None:
        raise VLMQError(
            f"'{name}' is built with QuickGELU, but open_clip lists '{tag}' as trained with GELU; take an architecture without "
            "QuickGELU, or say which is right by activation: gelu or quick_gelu"
        )
    if quick != _is_quick(config) and activation is None:
        log.info("'%s' is built with QuickGELU, as '%s' was trained", name, tag)
    return Recipe(quick, said)


def _recipe_of_file(
    name: str, path: Path, config: Mapping[str, Any], trained_like: str | None, activation: Activation | None
) -> Recipe:
    """Of a file: as it is told, as OpenAI's archives always are, or as all tags of the architecture agree."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    own = Recipe(_is_quick(config), {})
    if trained_like == ARCHITECTURE:
        return own
    if trained_like is not None:
        return _recipe_of_tag(name, trained_like, config, activation)
    if "openai" in tags and is_script(path):
        return _recipe_of_tag(name, "openai", config, activation)
    recipes = [
        Recipe(bool(c.get("quick_gelu", False)), c) for c in (open_clip.get_pretrained_cfg(name, t) for t in tags)
    ]
    known = {digest({"quick_gelu": r.quick_gelu, **_decisive(r.preprocess)}) for r in recipes}
    if len(known) > 1:
        raise VLMQError(
            f"'{path}' does not say how it was trained, and the weights known for '{name}' differ in activation or "
            f"preprocessing; set trained_like to one of {', '.join(tags)}, or to {ARCHITECTURE}"
        )
    if recipes:
        return recipes[0]
    log.warning("no weights are known for '%s': '%s' is taken to be trained with open_clip's defaults", name, path)
    return own


def _decisive(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    return {key: preprocess.get(key) for key in ("mean", "std", "interpolation", "resize_mode", "fill_color")}


def _is_quick(config: Mapping[str, Any]) -> bool:
    return bool(config.get("quick_gelu", False))


def build(name: str, config: Mapping[str, Any]) -> nn.Module:
    """The architecture of a config, freshly drawn; no weights of towers are fetched."""
    entries = json.loads(json.dumps(config))
    custom = entries.pop("custom_text", False) or "hf_model_name" in entries["text_cfg"]
    if "timm_model_name" in entries["vision_cfg"]:
        entries["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in entries["text_cfg"]:
        entries["text_cfg"]["hf_model_pretrained"] = False
    kind = open_clip.CLIP if not custom else open_clip.CoCa if "multimodal_cfg" in entries else open_clip.CustomTextCLIP
    try:
        with _one_line_errors(f"cannot build model '{name}'"):
            return kind(**entries)
    except TypeError as error:
        raise VLMQError(f"cannot build model '{name}': its config has an entry too many ({_reason(error)})") from error


def tokenizer_of(name: str) -> Any:
    """open_clip's tokenizer of an architecture or ``local-dir:`` folder. Raises :class:`VLMQError` where its files lack."""
    with _one_line_errors(f"cannot make the tokenizer of '{name}'"):
        return open_clip.get_tokenizer(name)


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


def _download(name: str, tag: str) -> Path:
    from huggingface_hub import is_offline_mode

    config = open_clip.get_pretrained_cfg(name, tag)
    if is_offline_mode() and config.get("url") and not config.get("hf_hub"):
        path = Path("~/.cache/clip").expanduser() / Path(config["url"]).name  # where open_clip puts what it fetches
        if not path.is_file():
            raise NotHere(f"the weights '{tag}' of '{name}' are not on this machine; fetch them first")
    with _one_line_errors(f"cannot fetch the weights '{tag}' of '{name}'"):
        return Path(open_clip.download_pretrained(config))


@contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Whatever open_clip, transformers or a download raise, in one line, with what to do."""
    try:
        yield
    except VLMQError:
        raise
    except ModuleNotFoundError as error:
        package = "transformers" if "transformers" in str(error) else error.name
        raise VLMQError(f"{what}: {package} is not installed; pip install {package}") from error
    except Exception as error:
        said = _reason(error)
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


def _weights_in(folder: Path) -> Path:
    """The one file of weights in a folder, or the index of its shards."""
    preferred = (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    for name in preferred:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    if not found:
        raise VLMQError(f"folder '{folder}' holds no weights; put {preferred[0]} there")
    if len(found) > 1:
        raise VLMQError(
            f"folder '{folder}' holds several files of weights ({', '.join(p.name for p in found[:3])}); "
            f"call the one that is meant {preferred[0]}"
        )
    return found[0]


def _reason(error: BaseException) -> str:
    """The last informative line of what an exception says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
