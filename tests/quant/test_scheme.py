import pytest

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.quant import QuantScheme


@pytest.mark.parametrize("bits", [0, 1, 9, 17, -4, 4.0, "8", True])
@pytest.mark.parametrize("side", ["weight_bits", "act_bits"])
def test_impossible_bits_are_refused(side: str, bits: object):
    with pytest.raises(VLMQError, match=f"{side} must be 2 to 8") as error:
        QuantScheme(**{side: bits})
    assert "\n" not in str(error.value)


def test_unknown_choices_name_the_nearest():
    with pytest.raises(VLMQError, match=r"did you mean .*per_channel"):
        QuantScheme(weight_granularity="per_chanel")
    with pytest.raises(VLMQError, match=r"did you mean .*per_token"):
        QuantScheme(act_granularity="per_tokn")
    with pytest.raises(VLMQError, match="did you mean vision"):
        QuantScheme(scope="visoin")


def test_contradictions_are_refused():
    with pytest.raises(VLMQError, match="act_dynamic"):
        QuantScheme(act_granularity="per_token")
    with pytest.raises(VLMQError, match="nothing would be quantized"):
        QuantScheme(weight_bits=16, act_bits=16)
    with pytest.raises(VLMQError, match="group_size"):
        QuantScheme(group_size=0)


def test_derived_values():
    scheme = QuantScheme(weight_bits=4, scope="vision_text")
    assert scheme.weight_range == (-8, 7)
    assert scheme.act_range == (0, 255)
    assert scheme.towers == ("vision", "text")
    assert QuantScheme(weight_symmetric=False, weight_bits=2).weight_range == (0, 3)
    assert QuantScheme().towers == ("vision",)
