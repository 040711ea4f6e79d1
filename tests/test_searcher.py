"""Our models as those of sentence-transformers: the same vectors, saved, loaded, trained by its losses."""

import builtins

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from test_contrastive import HARD, PAIRS
from test_hat_processor import tokenizer  # noqa: F401
from torch.testing import assert_close

from hf_arch import embed_texts, find, recall_at, sentence_transformer

TEXTS = ["a b c. d e", "f g", "h"]


@pytest.fixture
def processor(tokenizer):  # noqa: F811
    return find("hat").load("Processor")(tokenizer, segmentation="sentence", segment_length=6)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, pooling", [("hat", None), ("retnet", None), ("longformer", None), ("longformer", "first"), ("ssd", "mean")]
)
def test_vectors_are_the_same(name, pooling, processor, tokenizer, tmp_path):  # noqa: F811
    row = find(name)
    reader = processor if row.processor else tokenizer
    model = row.load("Model")(row.tiny_config(initializer_range=0.3)).eval()
    expected = embed_texts(model, reader, TEXTS, pooling, batch_size=2)
    made = sentence_transformer(model, reader, tmp_path / "searcher", pooling)
    for searcher in (made, SentenceTransformer(str(tmp_path / "searcher"))):
        assert_close(searcher.encode(TEXTS, convert_to_tensor=True), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["searcher"]
    with pytest.raises(ValueError, match="at least one text, in a list"):
        embed_texts(model, reader, "a b c")


def test_what_cannot_be_one(tokenizer, tmp_path, monkeypatch):  # noqa: F811
    row = find("encoder_decoder")
    model = row.load("EncoderModel")(row.tiny_config("EncoderModel"))
    with pytest.raises(ValueError, match="no ArchEncoderDecoderEncoderModel: take a bare decoder"):
        sentence_transformer(model, tokenizer, tmp_path / "searcher")
    assert not any(tmp_path.iterdir())
    imported = builtins.__import__

    def without(name, *told, **more):
        if name == "sentence_transformers":
            raise ImportError(name)
        return imported(name, *told, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"hf-arch\[search\]"):
        sentence_transformer(model, tokenizer, tmp_path / "searcher")


def test_its_loss_trains_document_embeddings(processor, tmp_path):
    torch.manual_seed(0)
    row = find("hat")
    searcher = sentence_transformer(row.load("Model")(row.tiny_config()), processor, tmp_path / "searcher")
    loss, columns = MultipleNegativesRankingLoss(searcher), [[pair[name] for pair in PAIRS] for name in PAIRS[0]]
    optimizer, values = torch.optim.AdamW(searcher.parameters(), lr=1e-2), []
    for _ in range(25):
        values.append(loss([searcher.preprocess(column) for column in columns], None))
        values[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert values[-1] < 0.3 * values[0]
    searcher.save(str(tmp_path / "trained"))
    trained = SentenceTransformer(str(tmp_path / "trained"))
    assert_close(trained.encode(TEXTS), searcher.encode(TEXTS))
    queries, positives = (trained.encode(column, convert_to_tensor=True) for column in columns)
    assert recall_at(F.normalize(queries, dim=-1), F.normalize(positives, dim=-1)) > 0.8


def test_its_trainer_takes_triplets(tokenizer, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    row = find("retnet")
    searcher = sentence_transformer(row.load("Model")(row.tiny_config()), tokenizer, tmp_path / "searcher")
    before = searcher.encode(TEXTS)
    told = {"max_steps": 3, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = SentenceTransformerTrainingArguments(str(tmp_path / "run"), learning_rate=1e-2, **told)
    loss = MultipleNegativesRankingLoss(searcher)
    SentenceTransformerTrainer(searcher, arguments, train_dataset=Dataset.from_list(HARD), loss=loss).train()
    assert abs(searcher.encode(TEXTS) - before).max() > 1e-3
