"""The example of uptraining, in small: it runs with the Llama that it trains, and its table says what it should."""

import pytest

from examples import uptrain
from hf_arch.demo.text import python_manual

SHORT = [
    "--steps",
    "3",
    "--fit-steps",
    "2",
    "--lora-steps",
    "2",
    "--length",
    "24",
    "--window",
    "8",
    "--vocabulary",
    "300",
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "manual.txt"
    path.write_text("\n\n".join(document.text for document in python_manual())[:24000])
    return str(path)


def test_a_llama_becomes_each_kind(text, monkeypatch, capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    monkeypatch.setattr(uptrain, "SIZES", uptrain.SIZES | sizes)
    told = uptrain.arguments(["--text", text, *SHORT, "--kinds", "sink_attention", "ssd"])
    uptrain.main(told)
    *_, columns, sinks, ssd = capsys.readouterr().out.strip().splitlines()
    assert columns.split()[:3] == ["replaced", "fitted", "adapted"]
    for row, kind in ((sinks, "sink_attention"), (ssd, "ssd")):
        name, *losses = row.split()[:5]
        assert name == kind and all(4 < float(loss) < 7 for loss in losses)
        assert row.split()[6] == row.split()[8]  # the state is as large after 32k tokens


def test_the_recovered_share():
    row = uptrain.line("ssd", 3.0, 5.0, 4.0, 3.5, 4.5, 2048, 2048)
    assert row.split() == ["ssd", "5.000", "4.000", "3.500", "4.500", "67%", "2", "KiB", "2", "KiB"]
