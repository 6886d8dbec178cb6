import pytest
from cases.quant import build

from lightning_vlmq.models import VLM


@pytest.fixture(params=["vit_clean", "convnext_clean"])
def vlm(request: pytest.FixtureRequest) -> VLM:
    return build(request.param)


@pytest.fixture
def vit() -> VLM:
    return build("vit_clean")
