"""The example of search, in small: any row reads texts as vectors, and each way to search is measured."""

import pytest
import torch

from examples import embeddings
from hf_arch import ARCHITECTURES, embed_texts
from hf_arch.demo.text import python_manual

SHORT = {"max_steps": 2, "disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 4}


@pytest.fixture
def tiny(monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2}
    monkeypatch.setattr(embeddings, "SIZES", embeddings.SIZES | sizes)
    monkeypatch.setattr(embeddings, "VOCABULARY", 300)


@pytest.mark.parametrize("architecture", ["hat", "encoder_decoder"])
def test_every_way_to_search_is_measured(architecture, tiny, tmp_path, capsys):
    texts, picture = [document.text for document in python_manual()[:6]], tmp_path / "search.png"
    found = embeddings.main(architecture, texts, picture, ["What is asked?"], **SHORT)
    ways = ["untrained", "trained", "trained longer", "hard negatives", "by sentence-transformers", "TF-IDF", "both"]
    assert list(found) == [way for way in ways if architecture != "encoder_decoder" or "by" not in way]
    for queries, passages in found.values():
        assert queries.shape == passages.shape
        assert (passages.norm(dim=1) - 1).abs().max() < 1e-3 or passages.shape[1] > 300  # "both" has those of two
    said = capsys.readouterr().out
    assert "What is asked?" in said and all(f"\n{way} " in said for way in found)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_any_row_reads_texts(tiny):
    texts = ["One is told here.", "And another one, which is longer than the first."]
    for row in ARCHITECTURES:
        model, tokenizer = embeddings.build(row.name, texts * 20)
        found = embed_texts(model, tokenizer, texts)
        assert model.training and (found.norm(dim=1) - 1).abs().max() < 1e-5, row.name
        alone = embed_texts(model, tokenizer, texts[:1])
        torch.testing.assert_close(found[:1], alone, atol=1e-4, rtol=1e-4, msg=f"{row.name} looks at batch mates")
