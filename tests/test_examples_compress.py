"""The example of compression, in small: every variant is in its table."""

from examples import compress


def test_compress(monkeypatch, capsys):
    manual = [document for document in compress.python_manual() if len(document.text) < 3000][:40]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    small = {"SIZES": sizes, "VOCABULARY": 300, "LENGTH": 32, "python_manual": lambda: manual}
    for name, value in small.items():
        monkeypatch.setattr(compress, name, value)
    found = compress.main(["--steps", "8"])
    kinds = ["original", "int8", "nf4", "int4, bfloat16", "pruned", "pruned, trained", "pruned, distilled"]
    assert [*found] == [*kinds, "distilled into RetNet", "ONNX"]
    assert found["nf4"][0] < found["int8"][0] < found["original"][0] > found["pruned"][0]
    assert abs(found["ONNX"][1] - found["original"][1]) < 1e-4 and all(rate > 0 for _, _, rate in found.values())
    assert "3-grams" in capsys.readouterr().out
