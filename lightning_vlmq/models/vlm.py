"""One interface over CLIP-like models: encode an image, encode a text, compare them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.preprocessing import Preprocessing
from lightning_vlmq.models.attention import make_layers_explicit
from lightning_vlmq.models.provenance import Provenance

TOWERS = ("vision", "text")
PROBES = ("a photo of a cat", "Two DOGS, naïvely running: 3 kites & a 'boat'...", "")
"""Texts whose token ids tell one tokenizer from another."""


class VLM(nn.Module):
    """A vision-language model behind one small interface.

    Attention and projections are rewritten into explicit linear layers on construction, so that a quantizer reaches every matrix weight.

    Args:
        model: an open_clip model (``CLIP``, ``CustomTextCLIP`` or ``CoCa``).
        tokenize: maps a list of texts to token ids, int64 ``[n, context_length]``.
        name: the architecture or zoo name, as reported in results.
        pretrained: the weights' source, as reported in results; ``"none"`` for random weights.
        preprocessing: what the model was trained to see: size, resize mode, interpolation, mean and standard deviation. Data modules
            decode images by it.

    Attributes:
        provenance: where the weights come from and their content's hash; ``None`` for a model that no loader made.
        activation: ``gelu`` or ``quick_gelu`` where a tag or the user decided it; ``None`` where the config does.
    """

    model: Any  # one of open_clip's classes, whose attributes differ
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        tokenize: Callable[[list[str]], Tensor],
        name: str,
        pretrained: str,
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__()
        make_layers_explicit(model)
        self.model = model
        self._tokenize = tokenize
        modules = model.named_modules()
        words = (m for name, m in modules if isinstance(m, nn.Embedding) and not name.startswith(("visual", "vision")))
        self._vocabulary = getattr(next(words, None), "num_embeddings", 0)
        self.name = name
        self.pretrained = pretrained
        self.preprocessing = preprocessing
        self.activation: str | None = None
        self.provenance: Provenance | None = None
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)

    @property
    def image_size(self) -> int:
        """Height and width that the model takes, in pixels."""
        return self.preprocessing.framing.size

    def identity(self) -> dict[str, Any]:
        """What decides the full-precision model's features: name, architecture, weights' content, preprocessing and tokenizer.

        Raises:
            VLMQError: the model was not loaded by :func:`~lightning_vlmq.models.load_vlm`, so nobody knows its weights.
        """
        if self.provenance is None:
            raise VLMQError(f"model '{self.name}' does not know where its weights come from; load it with load_vlm")
        tokens = self.tokenize(list(PROBES))
        return {
            "name": self.name,
            "provenance": self.provenance,
            "preprocessing": self.preprocessing,
            "tokenizer": hashlib.sha256(f"{tokens.tolist()}".encode()).hexdigest(),
        }

    def preprocess(self, pixels: Tensor) -> Tensor:
        """What the open_clip model takes for images.

        Args:
            pixels: ``[batch, 3, height, width]``, uint8 in 0..255 or float in 0..1. Images of another size than the model's are
                framed as the model's preprocessing says.

        Returns:
            Pixels less the model's mean, over its standard deviation, float32 ``[batch, 3, image_size, image_size]``.
        """
        x = pixels.to(self.mean.dtype) / 255 if pixels.dtype == torch.uint8 else pixels.to(self.mean.dtype)
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = self.preprocessing.framing(x).clamp(0, 1)
        return (x - self.mean) / self.std

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed images.

        Args:
            pixels: as :meth:`preprocess` takes them.

        Returns:
            Unit-norm features, float32 ``[batch, dim]``.
        """
        return F.normalize(self.model.encode_image(self.preprocess(pixels)), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed token ids, int64 ``[batch, length]``, as unit-norm features, float32 ``[batch, dim]``."""
        return F.normalize(self.model.encode_text(tokens), dim=-1)

    @property
    def has_decoder(self) -> bool:
        """Whether the model also writes captions: CoCa's text decoder, part of the text tower that :meth:`encode_text` does not run."""
        return isinstance(self.model, open_clip.CoCa)

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """What a decoder reads of images.

        Args:
            pixels: as :meth:`preprocess` takes them.

        Returns:
            Pooled tokens, float32 ``[batch, n, width]``; only a model with a decoder has them.
        """
        image: dict[str, Tensor] = self.model(self.preprocess(pixels))
        return image["image_embs"]

    def caption_logits(self, image_tokens: Tensor, tokens: Tensor) -> Tensor:
        """The decoder's prediction of each caption's next token; runs the text encoder on the way.

        Args:
            image_tokens: from :meth:`image_tokens`, ``[batch, n, width]``.
            tokens: ids, int64 ``[batch, length]``.

        Returns:
            Logits, float32 ``[batch, length, vocabulary]``; those at position ``i`` are of token ``i + 1``.
        """
        outputs: dict[str, Tensor] = self.model(
            None, tokens, image_latent=image_tokens, image_embs=image_tokens, output_labels=False
        )  # the latent is only handed through
        return outputs["logits"]

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids of a list of texts, int64 ``[n, context_length]``, on the CPU."""
        tokens = self._tokenize(texts)
        if tokens.numel() and self._vocabulary and int(tokens.max()) >= self._vocabulary:
            raise VLMQError(
                f"the tokenizer of '{self.name}' is another model's: it makes the token {int(tokens.max())}, the text tower knows "
                f"{self._vocabulary}; put the model's own tokenizer beside its weights"
            )
        return tokens

    def logit_scale(self) -> Tensor:
        """The factor on cosine similarities (already exponentiated), scalar tensor."""
        return self.model.logit_scale.exp()

    def logit_bias(self) -> Tensor:
        """The additive bias of sigmoid-trained models (SigLIP), scalar tensor; zero where the model has none."""
        bias = getattr(self.model, "logit_bias", None)
        return torch.zeros_like(self.model.logit_scale) if bias is None else bias

    @property
    def is_sigmoid(self) -> bool:
        """Whether the model was trained with SigLIP's pairwise sigmoid loss, which a bias tells."""
        return getattr(self.model, "logit_bias", None) is not None

    def zero_shot_logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` = scale * cosine + bias, from unit-norm features ``[batch, dim]`` and ``[classes, dim]``."""
        return self.logit_scale() * image_features @ class_features.T + self.logit_bias()

    def class_features(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Zero-shot classifier weights: per class, the normalised mean over prompts (Radford et al. 2021, section 3.1.4).

        Args:
            class_names: one name per class.
            templates: prompts with one ``{}`` for the class name.

        Returns:
            Unit-norm class features, float32 ``[classes, dim]``.
        """
        tokens = self.tokenize([t.format(c) for c in class_names for t in templates]).to(self.mean.device)
        features = torch.cat([self.encode_text(chunk) for chunk in tokens.split(1024)])
        return F.normalize(features.view(len(class_names), len(templates), -1).mean(1), dim=-1)

    def tower_of(self, qualified_name: str) -> str | None:
        """The tower (``"vision"`` or ``"text"``) that a module or parameter, named relative to this object, belongs to; else ``None``."""
        head, _, tail = qualified_name.partition(".")
        first = tail.split(".")[0]
        if head != "model" or not first or first in ("logit_scale", "logit_bias"):
            return None
        return "vision" if first == "visual" else "text"

    def in_decoder(self, qualified_name: str) -> bool:
        """Whether a module or parameter, named relative to this object, belongs to the text decoder (see :attr:`has_decoder`)."""
        return qualified_name.startswith("model.text_decoder.")


LARGEST_WEIGHT = 1e10
"""Beyond this a weight is damage: sums of squares of activations overflow float32, and normalisation turns them into constants."""


def require_finite(vlm: nn.Module, unused: Collection[str] = ()) -> None:
    """Raise :class:`VLMQError` naming the first parameter that holds a NaN, an infinity, or a number beyond :data:`LARGEST_WEIGHT`.

    Args:
        vlm: the model.
        unused: names of parameters that nothing is computed with, whatever they hold.
    """
    for name, parameter in vlm.named_parameters():
        if name in unused:
            continue
        if not torch.isfinite(parameter).all():
            raise VLMQError(
                f"weight '{name}' holds non-finite values; the checkpoint is damaged or training diverged, use another"
            )
        if parameter.numel() and (largest := float(parameter.detach().abs().max())) > LARGEST_WEIGHT:
            raise VLMQError(
                f"weight '{name}' holds values up to {largest:.0e}, with which activations overflow; the checkpoint is damaged or "
                "training diverged, use another"
            )


def draw_missing_weights(model: nn.Module) -> None:
    """Initialise, in place, the one matrix of a fresh ``open_clip.CoCa`` that open_clip leaves as uninitialised memory.

    ``text_decoder.text_projection``, as open_clip draws its other text projections: normal, standard deviation ``width ** -0.5``.
    """
    if isinstance(model, open_clip.CoCa):
        projection = model.text_decoder.text_projection
        nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
