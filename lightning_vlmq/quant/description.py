"""What ``quant.json`` says of a quantized model, checked field by field before anything is built from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.identity import digest
from lightning_vlmq.core.names import one_line
from lightning_vlmq.core.preprocessing import Preprocessing
from lightning_vlmq.models.provenance import Provenance
from lightning_vlmq.quant.coverage import CoverageReport
from lightning_vlmq.quant.scheme import QuantScheme


@dataclass(frozen=True)
class LayerState:
    """What a layer has beyond what its scheme says.

    Attributes:
        input_transform: its kind, ``None`` for none.
        weight_dynamic: whether the weight's range is taken anew each time.
        weight_offset: whether the weight's grid has an offset.
        act_offset: whether the input's grid has one.
    """

    input_transform: str | None
    weight_dynamic: bool
    weight_offset: bool
    act_offset: bool


@dataclass(frozen=True)
class Origin:
    """What the full-precision model was, as :func:`lightning_vlmq.models.origin` says it."""

    name: str
    pretrained: str
    activation: str | None
    preprocessing: Preprocessing
    provenance: Provenance


@dataclass(frozen=True)
class Description:
    """The content of ``quant.json``.

    Attributes:
        format: of the folder.
        model: the VLM's name.
        pretrained: its weights' source.
        origin: what it was made from.
        method: quantization method's name.
        options: all its options.
        scheme: bits, granularities and scope.
        rotated_streams: towers whose residual stream is rotated.
        layers: state by qualified name.
        coverage: what is quantized.
        tensors: hash of the tensors beside it.
        extra: whatever the writer added.
        digest: hash of all of this.
    """

    format: int
    model: str
    pretrained: str
    origin: Origin
    method: str
    options: dict[str, Any]
    scheme: QuantScheme
    rotated_streams: list[str]
    layers: dict[str, LayerState]
    coverage: CoverageReport
    tensors: str
    extra: dict[str, Any]
    digest: str


@cache
def _reader() -> TypeAdapter[Description]:
    return TypeAdapter(Description)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON content with its ``digest`` added, as :func:`described` asks for it."""
    plain = json.loads(json.dumps(content))
    return {**plain, "digest": digest(plain, 32)}


def described(content: Mapping[str, Any], path: Path) -> Description:
    """Check the content of a ``quant.json``.

    Args:
        content: that.
        path: where it comes from, for messages.

    Raises:
        VLMQError: a field is missing, left over or of the wrong type, or something was changed since it was saved; the field is named.
    """
    try:
        found = _reader().validate_json(json.dumps(content), strict=True, extra="forbid")
        whole = digest({name: value for name, value in content.items() if name != "digest"}, 32)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        reason = one_line(f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}")
        raise VLMQError(f"'{path}' is not a quantized model's description ({reason[:300]}); save it again") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise VLMQError(
            f"'{path}' is not a quantized model's description ({one_line(str(error))[:200]}); save it again"
        ) from error
    if found.digest != whole:
        raise VLMQError(f"'{path}' was changed since it was saved, or is damaged; save the quantized model again")
    return found
