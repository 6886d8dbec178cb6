"""Folders that transformers' ``save_pretrained`` wrote, as VLMs: CLIP, MetaCLIP 2, SigLIP, SigLIP 2 and ALIGN.

The modules are transformers' own. Images are framed as everywhere here; where a cut leaves an odd margin, transformers' newer image
processors take it one pixel further up or left than torchvision, and with it OpenAI's and open_clip's code, does.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_vlmq.core.errors import VLMQError, first_line, unknown
from lightning_vlmq.core.identity import digest, tensors_digest
from lightning_vlmq.core.preprocessing import Framing, Interpolation, Preprocessing, ResizeMode
from lightning_vlmq.models.provenance import Provenance
from lightning_vlmq.models.vlm import VLM

log = logging.getLogger(__name__)

CONFIG = "config.json"
CLASSES = {
    "clip": "CLIPModel",
    "metaclip_2": "MetaClip2Model",
    "siglip": "SiglipModel",
    "siglip2": "Siglip2Model",
    "align": "AlignModel",
}
"""transformers' model types that are known here, and their classes. SigLIP 2 of one resolution is of type ``siglip``."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)

ALIGN_LENGTH = 64
"""Tokens that ALIGN's processor pads and cuts texts to."""

INTERPOLATIONS: dict[int, Interpolation] = {
    int(Image.Resampling.NEAREST): "nearest",
    int(Image.Resampling.BILINEAR): "bilinear",
    int(Image.Resampling.BICUBIC): "bicubic",
}


class Vision(nn.Module):
    """A vision tower of transformers with its projection: images ``[batch, 3, size, size]`` to features ``[batch, dim]``.

    Args:
        tower: transformers' vision model.
        projection: what follows its pooled output.
    """

    def __init__(self, tower: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.tower, self.projection = tower, projection

    def forward(self, x: Tensor) -> Tensor:
        """Features, not normalised."""
        return self.projection(self.tower(pixel_values=x).pooler_output)


class PatchVision(Vision):
    """SigLIP 2's tower for any ratio (NaFlex), which takes patches; here of square images.

    Args:
        tower: transformers' vision model.
        patch_size: side of a patch, in pixels.
    """

    def __init__(self, tower: nn.Module, patch_size: int) -> None:
        super().__init__(tower, nn.Identity())
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        """Features, not normalised."""
        grid = x.shape[-1] // self.patch_size
        patches = x.unflatten(2, (grid, -1)).unflatten(4, (grid, -1)).permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2)
        seen = torch.ones(patches.shape[:2], dtype=torch.int64, device=x.device)
        shapes = torch.full((len(x), 2), grid, dtype=torch.int64, device=x.device)
        return self.tower(pixel_values=patches, pixel_attention_mask=seen, spatial_shapes=shapes).pooler_output


class TransformersModel(nn.Module):
    """A CLIP-like model of transformers behind the attributes and methods of open_clip's.

    Args:
        model: of one of :data:`CLASSES`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.kind = str(model.config.model_type)
        if self.kind == "siglip2":
            self.visual: Vision = PatchVision(model.vision_model, model.config.vision_config.patch_size)
        else:
            self.visual = Vision(model.vision_model, getattr(model, "visual_projection", nn.Identity()))
        self.text_model = model.text_model
        self.text_projection = getattr(model, "text_projection", nn.Identity())
        self.pad_id = model.config.text_config.pad_token_id
        # ALIGN divides by a temperature
        scale = -model.temperature.detach().log() if self.kind == "align" else model.logit_scale.detach()
        self.logit_scale = nn.Parameter(scale.reshape(()).clone())
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = None if bias is None else nn.Parameter(bias.detach().reshape(()).clone())

    def encode_image(self, x: Tensor) -> Tensor:
        """Features ``[batch, dim]`` of preprocessed images, not normalised."""
        return self.visual(x)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Features ``[batch, dim]`` of token ids, not normalised. Only ALIGN looks away from padding; the others were trained with it."""
        if self.kind == "align":
            out = self.text_model(input_ids=tokens, attention_mask=(tokens != self.pad_id).long())
            return self.text_projection(out.last_hidden_state[:, 0])
        return self.text_projection(self.text_model(input_ids=tokens).pooler_output)


def load_saved(name: str, folder: Path, revision: str = "") -> VLM:
    """A model from a folder in transformers' layout: config, weights (one file or shards), tokenizer and image processor.

    Args:
        name: what it is called in results, with its schema.
        folder: where it lies; nothing is fetched.
        revision: commit of the repository that it comes from.

    Raises:
        VLMQError: transformers is not installed; a model of another type; files that are missing or do not go together.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise VLMQError(
            f"'{name}' is a model of transformers, which is not installed; pip install 'lightning_vlmq[hf]'"
        ) from error
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VLMQError(
            f"'{folder / CONFIG}' is no config of a model of transformers ({type(error).__name__}: {first_line(error)})"
        ) from error
    if "quantization_config" in config:
        raise VLMQError(f"'{folder}' holds quantized weights (quantization_config); give the model as it was before")
    if str(kind) not in CLASSES:
        raise unknown(f"model type of transformers in '{folder / CONFIG}':", str(kind), CLASSES)
    model = _weights(getattr(transformers, CLASSES[kind]), folder)
    if not any(
        (folder / file).is_file() for file in TOKENIZER_FILES
    ):  # without, transformers makes one that knows no word
        raise VLMQError(
            f"folder '{folder}' holds no tokenizer; put tokenizer.json and tokenizer_config.json beside config.json"
        )
    tokenizer = _from_folder(
        "tokenizer", transformers.AutoTokenizer, folder, "tokenizer.json and tokenizer_config.json"
    )
    processor = _from_folder("image processor", transformers.AutoImageProcessor, folder, "preprocessor_config.json")
    length = ALIGN_LENGTH if kind == "align" else model.config.text_config.max_position_embeddings
    if tokenizer.pad_token_id is None:
        raise VLMQError(f"the tokenizer in '{folder}' has no padding token; set pad_token in its tokenizer_config.json")
    if kind == "align" and tokenizer.pad_token_id != model.config.text_config.pad_token_id:
        raise VLMQError(
            f"the tokenizer in '{folder}' pads with token {tokenizer.pad_token_id}, its model looks away from "
            f"{model.config.text_config.pad_token_id}; correct pad_token in its tokenizer_config.json"
        )

    def tokenize(texts: list[str]) -> Tensor:
        ids = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return ids["input_ids"]

    try:
        seen = _preprocessing(model.config, processor, folder)
    except TypeError as error:  # null, or a number in place of a list
        raise VLMQError(
            f"the image processor in '{folder}' is incomplete ({first_line(error)}); correct its preprocessor_config.json"
        ) from error
    vlm = VLM(TransformersModel(model), tokenize, name, folder.name if not revision else name, seen)
    vlm.provenance = Provenance(vlm.pretrained, tensors_digest(vlm.state_dict(), 64), digest(config), revision)
    return vlm


def _weights(cls: Any, folder: Path) -> Any:
    """The model with all of its weights from the folder, in float32."""
    _require_floats(folder)
    try:
        model, loading = cls.from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with their names
            trust_remote_code=False,
        )
    except Exception as error:  # OSError without weights, SafetensorError, RuntimeError of another shape, and more
        raise VLMQError(
            f"the weights in '{folder}' do not load as {cls.__name__} ({type(error).__name__}: {first_line(error)}); "
            "put model.safetensors, or all shards "
            "with their index, beside config.json"
        ) from error
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, loading.get(problem) or ())):
            raise VLMQError(
                f"the weights in '{folder}' do not fit its config: {len(names)} {problem.replace('_', ' ')} "
                f"({', '.join(names[:3])}{', …' if len(names) > 3 else ''}); fetch the folder again"
            )
    return model.eval()


def _require_floats(folder: Path) -> None:
    """Raise :class:`VLMQError` where a file of weights holds integers or 8-bit floats, which transformers widens without their scales."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return  # said by transformers
        counts = ("position_ids", "num_batches_tracked")
        odd = [n for n, k in kinds.items() if k not in ("F64", "F32", "F16", "BF16") and not n.endswith(counts)]
        if odd:
            raise VLMQError(
                f"'{path}' holds '{odd[0]}' as {kinds[odd[0]]}; give weights in floating point of 16 bits or more, not quantized ones"
            )


def _from_folder(what: str, cls: Any, folder: Path, files: str) -> Any:
    try:
        return cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError where files lack, ImportError for a package, ValueError for an unknown class
        advice = f"put {files} beside config.json"
        if isinstance(error, ImportError):
            advice = "install what it names"
        raise VLMQError(
            f"cannot make the {what} of '{folder}' ({type(error).__name__}: {first_line(error)}); {advice}"
        ) from error


def _preprocessing(config: Any, processor: Any, folder: Path) -> Preprocessing:
    """What an image processor of transformers does, in this package's terms."""

    def get(key: str, default: Any = None) -> Any:
        return getattr(processor, key, default)

    def refuse(reason: str) -> VLMQError:
        return VLMQError(
            f"the image processor in '{folder}' {reason}, which is not supported; correct its preprocessor_config.json"
        )

    if not get("do_resize", True) or not get("do_rescale", True):
        raise refuse("does not resize or rescale")
    resample = get("resample")
    if resample not in INTERPOLATIONS:
        raise refuse(f"resizes by Pillow's method {resample}")
    how = INTERPOLATIONS[resample]
    if config.model_type == "siglip2":
        size = math.isqrt(int(get("max_num_patches"))) * int(config.vision_config.patch_size)
        log.warning("'%s' takes images of any ratio; here each is squashed to %d x %d pixels", folder, size, size)
        framing = Framing(size, "squash", how, rgb_first=True)
    else:
        crop = dict(get("crop_size") or {}) if get("do_center_crop") else {}
        framing = _framing(dict(get("size") or {}), crop, how, refuse)
        wanted = config.vision_config.image_size
        if framing.size != wanted:
            raise refuse(f"makes images of {framing.size} pixels for a model of {wanted}")
    mean, std = [0.0] * 3, [1.0] * 3
    if get("do_normalize", True):
        mean, std = list(get("image_mean")), list(get("image_std"))
    # p in 0..1 becomes (255 * factor * p - offset - mean) / std
    factor, offset = 255 * float(get("rescale_factor")), 1.0 if get("rescale_offset", False) else 0.0
    again = (
        list(get("image_std")) if get("include_top", False) else [1.0] * 3
    )  # EfficientNet's classifiers divide once more
    centre = tuple((m + offset) / factor for m in mean)
    spread = tuple(s * a / factor for s, a in zip(std, again))
    return Preprocessing(framing, centre, spread)  # type: ignore[arg-type]


def _framing(size: dict[str, Any], crop: dict[str, Any], how: Interpolation, refuse: Any) -> Framing:
    """From a processor's sizes: a square is squashed to, or the shortest edge resized to and a square cut out."""
    size, crop = ({key: value for key, value in sides.items() if value is not None} for sides in (size, crop))
    shortest = set(size) == {"shortest_edge"}
    if not shortest and (set(size) != {"height", "width"} or size["height"] != size["width"]):
        raise refuse(f"resizes to {size or 'no size'}")
    if crop and (set(crop) != {"height", "width"} or crop["height"] != crop["width"]):
        raise refuse(f"cuts out {crop}")
    if shortest and not crop:
        raise refuse("keeps the ratio and cuts nothing out")
    side = int(next(iter(size.values())))
    final = int(crop["height"]) if crop else side
    mode: ResizeMode = "shortest" if shortest else "squash"
    if final > side:
        raise refuse(f"cuts {final} pixels out of {side}")
    return Framing(final, mode, how, resize_to=side if side != final else None, rgb_first=True)
