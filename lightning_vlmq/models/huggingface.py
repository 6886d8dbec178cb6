"""Folders that transformers' ``save_pretrained`` wrote, as VLMs: CLIP, MetaCLIP 2, SigLIP, SigLIP 2 and ALIGN.

The modules are transformers' own. Images are framed as everywhere here; where a cut leaves an odd margin, transformers' newer image
processors take it one pixel further up or left than torchvision, and with it OpenAI's and open_clip's code, does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_vlmq.core.errors import VLMQError, first_line, unknown
from lightning_vlmq.core.identity import digest, tensors_digest
from lightning_vlmq.models.processors import preprocessing_of
from lightning_vlmq.models.provenance import Provenance
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.models.weights import no_floats, shards_of

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

TORCH_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Floating-point types of weights as safetensors calls them."""
ALIGN_LENGTH = 64
"""Tokens that ALIGN's processor pads and cuts texts to."""


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
    if config.get("quantization_config") is not None:
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
        seen = preprocessing_of(model.config, processor, folder)
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
    """Raise :class:`VLMQError` where the weights are integers or 8-bit floats, which transformers widens without their scales."""
    for path in _files_of_weights(folder):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            else:
                state = torch.load(path, map_location="meta", weights_only=True)
                kinds = {
                    name: TORCH_TYPES.get(t.dtype, str(t.dtype)) for name, t in state.items() if isinstance(t, Tensor)
                }
        except Exception:  # said by transformers, which raises nearly anything of a damaged file
            continue
        counts = ("position_ids", "num_batches_tracked")
        odd = [n for n, k in kinds.items() if k not in TORCH_TYPES.values() and not n.endswith(counts)]
        if odd:
            raise no_floats(f"'{path}'", odd[0], kinds[odd[0]])


def _files_of_weights(folder: Path) -> list[Path]:
    """Those that transformers reads: safetensors before pickled ones, one file before shards."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            try:
                return shards_of(index)
            except VLMQError:
                return []  # said by transformers
    return []


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
