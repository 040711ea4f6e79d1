"""What models are said to cost is what is known of them."""

import re

import pytest

import hf_arch
from hf_arch import cli
from hf_arch.description import RELEASED
from hf_arch.modeling.layers.chosen_cache import ChosenCacheLayer
from promises import ROWS, new_cache


def test_the_released_models_have_their_known_numbers(capsys):
    """8.03 B and 405 B parameters as their makers say; 671 B of which 37 B are active (arXiv:2412.19437)."""
    assert cli.main(["describe"]) == 0
    table = capsys.readouterr().out.strip()
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}
    assert re.findall(r"[\d.]+(?= B)", lines["parameters"]) == ["8.03", "405.85", "671.03"]
    assert [round(float(n)) for n in re.findall(r"[\d.]+(?= B)", lines["active for a token"])][2] == 37
    cache = [float(n) for n in re.findall(r"[\d.]+(?= KiB)", lines["cache for a token, bfloat16"])]
    expected = [
        2 * 2 * 8 * 128 * 32,
        2 * 2 * 8 * 128 * 126,
        2 * (512 + 64) * 61,
    ]  # bytes, of keys and values or latents
    assert cache == [round(number / 1024, 1) for number in expected]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_every_decoder_is_described(case):
    if case.answers:
        with pytest.raises(ValueError, match="only decoders are described|is a decoder alone"):
            hf_arch.describe(case.config())
        return
    model = case.build()
    found = hf_arch.describe(model, context=40)
    assert found.parameters == model.num_parameters() and 0 < found.active <= found.parameters
    chooses = any(isinstance(layer, ChosenCacheLayer) for layer in new_cache(model).layers)
    assert found.cache_bytes is None if chooses else found.cache_bytes > 0
    assert found.read_operations > 0 and found.step_operations > 0


def test_a_saved_config_is_described_beside_the_others(tmp_path, capsys, monkeypatch):
    for name in ("Llama 3.1 405B", "DeepSeek-V3"):
        monkeypatch.delitem(RELEASED, name)
    hf_arch.find("deepseek").tiny_config().save_pretrained(tmp_path / "mine")
    assert cli.main(["describe", str(tmp_path / "mine"), "--context", "64"]) == 0
    assert "| Llama 3.1 8B | mine |" in capsys.readouterr().out
