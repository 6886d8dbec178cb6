"""The embedded zoo: small CLIP-like models of five families, pre-trained by this package, that need no download.

A name is ``<tower>_<captions>``: the tower is an open_clip model config beside this file (``vit.json``), the captions tell what it was
trained on (``clean``, or ``noisy``: 35 % of the captions are wrong or vague). Weights are safetensors files beside it, each with a
description: what trained it, and what was measured.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.core.preprocessing import Framing, Preprocessing
from lightning_vlmq.models.vlm import VLM, draw_missing_weights
from lightning_vlmq.models.zoo import towers  # registers the vision towers with timm

FOLDER = Path(__file__).parent
TOWERS = tuple(sorted(p.stem for p in FOLDER.glob("*.json") if "_" not in p.stem and p.stem != "words"))
CAPTIONS = ("clean", "noisy")
PIXEL_MEAN = (0.5, 0.5, 0.5)
PIXEL_STD = (0.25, 0.25, 0.25)


def split_words(text: str) -> list[str]:
    """A text's words and punctuation marks, in lower case."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?|[^\w\s]", text.lower())


class WordTokenizer:
    """Whole words as tokens: those that the embedded benchmark's captions, names and prompts use.

    Ids: 0 pads, 1 is a word outside the vocabulary, the last but one starts a text and the last, the largest, ends it, which is what
    CLIP's pooling looks for. A longer text is cut before its end token.

    Args:
        context_length: the number of ids a text is padded or cut to.
    """

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        words: list[str] = json.loads((FOLDER / "words.json").read_text(encoding="utf-8"))
        self._ids = {word: i for i, word in enumerate(words, start=2)}
        self.vocab_size = len(words) + 4

    def __call__(self, texts: list[str]) -> Tensor:
        """Token ids, int64 ``[n, context_length]``."""
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(ids, texts):
            words = [self._ids.get(word, 1) for word in split_words(text)][: self.context_length - 2]
            row[: len(words) + 2] = torch.tensor([self.vocab_size - 2, *words, self.vocab_size - 1])
        return ids


def names() -> list[str]:
    """The pre-trained models that are there: those whose description is in :data:`FOLDER`."""
    return [name for name in buildable() if (FOLDER / f"{name}.json").is_file()]


def buildable() -> list[str]:
    """Every model that can be built and trained, whether its weights are there or not."""
    return [f"{tower}_{captions}" for tower in TOWERS for captions in CAPTIONS]


def description(name: str) -> dict[str, Any]:
    """What the file beside a model's weights tells: command, settings, accuracies, and what was measured. Raises ``OSError``."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def build(name: str) -> VLM:
    """A zoo model with freshly initialised weights (torch's global generator), in training mode. Raises for an unknown name."""
    if name not in buildable():
        raise unknown("model", name, names())
    return assemble(json.loads((FOLDER / f"{name.rsplit('_', 1)[0]}.json").read_text(encoding="utf-8")), name)


def assemble(config: dict[str, Any], name: str) -> VLM:
    """The model that a config describes, with fresh weights and a word tokenizer, in training mode.

    Args:
        config: open_clip's, with the zoo's own ``custom_text`` (a text tower of its own class) and ``early_convolutions`` (see
            :func:`~lightning_vlmq.models.zoo.towers.early_convolutions`); not changed.
        name: what the model is called, ``<tower>_<captions>``.
    """
    config = copy.deepcopy(config)
    tokenizer = WordTokenizer(config["text_cfg"]["context_length"])
    config["text_cfg"]["vocab_size"] = tokenizer.vocab_size
    if "multimodal_cfg" in config:
        kind = open_clip.CoCa
    else:
        kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    early = config.pop("early_convolutions", False)
    model = kind(**config)
    if early:
        model.visual.conv1 = towers.early_convolutions(model.visual.conv1.out_channels)
    draw_missing_weights(model)
    seen = Preprocessing(Framing(config["vision_cfg"]["image_size"]), PIXEL_MEAN, PIXEL_STD)
    return VLM(model, tokenizer, name, name.rsplit("_", 1)[1], seen).train()


def load(name: str, checkpoint: str | None = None) -> VLM:
    """A zoo model with its committed weights, or with those of ``checkpoint``, a safetensors file.

    Raises:
        VLMQError: unknown name; a file that is missing, truncated or of another architecture.
    """
    vlm = build(name)
    path = FOLDER / f"{name}.safetensors" if checkpoint is None else Path(checkpoint)
    if not path.is_file():
        raise VLMQError(f"checkpoint '{path}' does not exist; pre-train it with: vlmq fit --config pretrain/{name}")
    try:
        vlm.load_state_dict(load_file(path))  # stored in half precision or in full, used in full
    except (SafetensorError, OSError) as error:
        raise VLMQError(
            f"checkpoint '{path}' is damaged or no safetensors file ({error}); fetch or train it again"
        ) from error
    except RuntimeError as error:
        raise VLMQError(
            f"checkpoint '{path}' does not fit model '{name}': {str(error).splitlines()[-1].strip()}"
        ) from error
    return vlm
