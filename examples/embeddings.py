"""Search by meaning, learned from text alone: `python examples/embeddings.py [--architecture NAME] [--text FILE...]`;
needs the extras `examples` and `search`.

Python's manual, or your files, are cut into passages. From each a sentence is taken out, to ask for the passage later;
from the other sentences, each with its passage, a small model learns (`hf_arch.inverse_cloze`). What is wrong are the
other passages of a batch, and then also those that it takes for right (`hf_arch.hard_negatives`): by our Trainer, and
by that of sentence-transformers from the same weights. Beside it: TF-IDF, which matches words, and both together.
"""

import argparse
import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import TrainingArguments

import hf_arch
from hf_arch.demo.text import Document, python_manual, read_files, without_repeats
from hf_arch.demo.tokens import train_tokenizer

QUESTIONS = [
    "Which exceptions does a try statement catch?",
    "How is the value of a default parameter computed?",
    "What is the order in which operands are evaluated?",
]
SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"hidden_dropout": 0.1}
LENGTH, VOCABULARY = 96, 4000  # tokens
# Where a row's default is not what is wanted here: HAT with one level, which pools what it reads by attention
ONE_LEVEL = {"layer_types": ["level_0", "pool_0"], "feed_forward_types": ["dense", "none"], "segment_lengths": []}
OWN = {"hat": ONE_LEVEL | {"document_pooling": "leader"}, "longformer": {"attention_window": 32}}

Pair = dict[str, str | int]
Vectors = tuple[torch.Tensor, torch.Tensor]  # of queries, and of passages


def build(architecture: str, texts: list[str]):
    """A model of any row, which reads a text as one vector, and the tokenizer or processor that tells it texts."""
    torch.manual_seed(0)
    row, tokenizer = hf_arch.find(architecture), train_tokenizer([Document("", text) for text in texts], VOCABULARY)
    head = "EncoderModel" if "EncoderModel" in row.heads else "Model"
    fields = SIZES | row.head_fields.get("ForMaskedLM", row.head_fields.get(head, {})) | OWN.get(row.name, {})
    fields |= {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "pad_token_id": tokenizer.pad_token_id}
    fields |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tokenizer.model_max_length = LENGTH
    if row.processor:
        tokenizer = row.load("Processor")(tokenizer, segment_length=LENGTH, max_segments=1)
    return row.load(head)(row.load("Config")(**fields)), tokenizer


def columns(pairs: list[Pair]) -> tuple[list[str], list[str]]:
    return tuple([pair[name] for pair in pairs] for name in ("query", "positive"))


def found_by(model, tokenizer, pairs: list[Pair]) -> Vectors:
    return tuple(hf_arch.embed_texts(model, tokenizer, texts) for texts in columns(pairs))


def arguments(folder: str, **options) -> dict:
    told = {"output_dir": folder, "per_device_train_batch_size": 64, "logging_steps": 20, "save_strategy": "no"}
    return told | {"learning_rate": 3e-3, "warmup_steps": 20, "report_to": []} | options


def train(model, tokenizer, pairs: list[Pair], folder: str, **options):
    """A copy of the model that learned from pairs, or from triplets."""
    told = TrainingArguments(**arguments(folder, remove_unused_columns=False, **options))
    collator = hf_arch.ContrastiveCollator(tokenizer)
    trainer = hf_arch.ContrastiveTrainer(copy.deepcopy(model), told, data_collator=collator, train_dataset=pairs)
    trainer.train()
    return trainer.model


def train_elsewhere(model, tokenizer, triplets: list[Pair], folder: str, **options):
    """The same by the Trainer and the loss of sentence-transformers."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    searcher = hf_arch.sentence_transformer(model, tokenizer, Path(folder, "searcher"))
    told = SentenceTransformerTrainingArguments(**arguments(folder, **options))
    dataset = Dataset.from_list(triplets).select_columns(["query", "positive", "negative"])
    loss = MultipleNegativesRankingLoss(searcher)
    SentenceTransformerTrainer(searcher, told, train_dataset=dataset, loss=loss).train()
    return searcher


def with_hard_negatives(model, tokenizer, pairs: list[Pair], passages: list[str]) -> list[Pair]:
    """To each pair, the passage that the model takes for the right one."""
    queries, documents = (hf_arch.embed_texts(model, tokenizer, each) for each in (columns(pairs)[0], passages))
    found = hf_arch.hard_negatives(queries, documents, own=[pair["passage"] for pair in pairs])
    return [pair | {"negative": passages[place]} for pair, place in zip(pairs, found[:, 0].tolist(), strict=True)]


def learned(architecture: str, texts: list[str], epochs: float = 2, **options):
    """What each way to search makes of held-out pairs; these; and what reads questions by their words and meaning."""
    learn, held_out = hf_arch.inverse_cloze(texts)
    model, tokenizer = build(architecture, [pair["positive"] for pair in learn])
    found = {"untrained": found_by(model, tokenizer, held_out)}
    more = {"num_train_epochs": epochs / 2, "learning_rate": 1e-3} | options
    with TemporaryDirectory() as folder:
        model = train(model, tokenizer, learn, folder, **{"num_train_epochs": epochs} | options)
        found["trained"] = found_by(model, tokenizer, held_out)
        triplets = with_hard_negatives(model, tokenizer, learn, columns(held_out)[1])
        longer, harder = (train(model, tokenizer, pairs, folder, **more) for pairs in (learn, triplets))
        found["trained longer"] = found_by(longer, tokenizer, held_out)
        found["hard negatives"] = found_by(harder, tokenizer, held_out)
        if "EncoderModel" not in hf_arch.find(architecture).heads:  # AutoModel, and so the other, does not load that
            searcher = train_elsewhere(model, tokenizer, triplets, folder, **more)
            told = (searcher.encode(each, convert_to_tensor=True) for each in columns(held_out))
            found["by sentence-transformers"] = tuple(told)
    words = TfidfVectorizer(sublinear_tf=True).fit(columns(held_out)[1])

    def of_words(texts: list[str]) -> torch.Tensor:
        return torch.tensor(words.transform(texts).toarray()).float()

    def of_both(texts: list[str]) -> torch.Tensor:
        """Vectors whose products are those of words and half those of the model."""
        return torch.cat((of_words(texts), hf_arch.embed_texts(harder, tokenizer, texts) / 2**0.5), dim=1)

    found["TF-IDF"], found["both"] = (tuple(map(read, columns(held_out))) for read in (of_words, of_both))
    return found, held_out, of_both


def main(architecture: str, texts: list[str], picture: Path, questions: list[str], **options) -> dict[str, Vectors]:
    found, held_out, read = learned(architecture, texts, **options)
    hf_arch.draw_ranks(found, picture, maps=("untrained", "hard negatives"))
    print(f"{len(held_out)} held-out sentences, and their passages\n{'':26}recall at 1, 5 and 10      MRR")
    for name, each in found.items():
        shares = [hf_arch.recall_at(*each, k) for k in (1, 5, 10)] + [hf_arch.mean_reciprocal_rank(*each)]
        print(f"{name:26}", *(f"{share:7.1%}" for share in shares))
    for question, scores in zip(questions, read(questions) @ found["both"][1].T, strict=True):
        print(question)
        for score, place in zip(*scores.topk(3), strict=True):
            print(f"  {score:.2f} {held_out[place]['positive'][:100]}")
    print(f"A picture is in {picture}.")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("--architecture", default="hat", help="any row of hf-arch list")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--ask", nargs="+", default=QUESTIONS, metavar="QUESTION")
    parser.add_argument("--epochs", type=float, default=2, help="and half as many with hard negatives")
    parser.add_argument("--picture", type=Path, default=Path("hf_arch_embeddings.png"))
    told = parser.parse_args()
    documents = without_repeats(read_files(told.text) if told.text else python_manual())
    main(told.architecture, [each.text for each in documents], told.picture, told.ask, epochs=told.epochs)
