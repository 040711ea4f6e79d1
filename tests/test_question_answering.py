"""The pipeline that finds answers: against a slow definition, over long texts, in batches, for every row."""

import math

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForQuestionAnswering, ByT5Tokenizer, PreTrainedTokenizerFast, pipeline

import hf_arch
from hf_arch.question_answering import answer_features, best_spans, no_answer, windows
from promises import HEADS

ANSWERING = [case for case in HEADS if case.head == "ForQuestionAnswering"]
TEXT = "one two three, four five six.  seven eight nine ten eleven twelve thirteen"
LONG = " ".join(f"{'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10 % 10]}" for i in range(100))


def words(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """<s> question </s> text </s>"""
    letters = "abcdefghijklmnopqrstuvwxyz"
    signs = ["<pad>", "<s>", "</s>", "<unk>", *letters, *(f"##{letter}" for letter in letters), *",.?"]
    model = Tokenizer(models.WordPiece({sign: i for i, sign in enumerate(signs)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pair = {"single": "<s> $A", "pair": "<s> $A </s> $B </s>", "special_tokens": [("<s>", 1), ("</s>", 2)]}
    model.post_processor = processors.TemplateProcessing(**pair)
    special = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, padding_side=padding_side, **special)


def answering(name: str, padding_side: str = "right", **options):
    case = next(case for case in ANSWERING if case.row.name == name)
    return pipeline("question-answering", model=case.build(sep_token_id=2), tokenizer=words(padding_side), **options)


@pytest.fixture(scope="module")
def decoder():
    return answering("transformer")


def brute_force(run, question: str, context: str, most: int) -> dict:
    """One window, one pair of tokens after another."""
    told = run.tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    places, of = told.pop("offset_mapping")[0].tolist(), told.sequence_ids(0)
    with torch.no_grad():
        said = run.model(told["input_ids"])
    counted = [i for i, part in enumerate(of) if part == 1 or i == 0]
    start, end = (
        dict(zip(counted, x[0, counted].float().softmax(-1).tolist(), strict=True))
        for x in (said.start_logits, said.end_logits)
    )
    scores = {
        (first, last): start[first] * end[last]
        for first in counted[1:]
        for last in counted[1:]
        if first <= last < first + most
    }
    first, last = max(scores, key=scores.get)
    found = {"score": scores[first, last], "start": places[first][0], "end": places[last][1]}
    return found | {"answer": context[found["start"] : found["end"]], "nowhere": start[0] * end[0]}


@pytest.mark.parametrize("most", [1, 4, 1000])
def test_the_answer_of_one_window_is_the_best_pair_of_all(decoder, most):
    slow = brute_force(decoder, "which?", TEXT, most)
    nowhere = slow.pop("nowhere")
    found = decoder(question="which?", context=TEXT, max_answer_len=most)
    assert found == slow | {"score": pytest.approx(slow["score"], rel=1e-5)}
    told = {"max_answer_len": most, "top_k": 4000, "handle_impossible_answer": True}
    every = decoder(question="which?", context=TEXT, **told)
    assert [answer["score"] for answer in every] == sorted((answer["score"] for answer in every), reverse=True)
    assert len({(answer["start"], answer["end"]) for answer in every}) == len(every)
    assert found in every
    (none,) = [answer for answer in every if answer["answer"] == ""]
    assert none["score"] == pytest.approx(nowhere, rel=1e-5)


@pytest.mark.parametrize(("side", "batch_size"), [("left", 3), ("right", 3), ("right", 1)])
def test_an_answer_far_into_a_text_is_found_where_it_stands(side, batch_size, monkeypatch):
    run = answering("retnet", side, max_seq_len=24)
    z = run.tokenizer.convert_tokens_to_ids("z")
    forward = type(run.model).forward

    def marking(self, input_ids, **told):
        """As the model, and sure of each z."""
        said = forward(self, input_ids, **told)
        marks = 30 * (input_ids == z)
        said.start_logits, said.end_logits = said.start_logits + marks, said.end_logits + marks
        return said

    monkeypatch.setattr(type(run.model), "forward", marking)
    context = f"{LONG} z {LONG[:40]}"
    found = run(question="where is it?", context=context, batch_size=batch_size)
    assert found["answer"] == "z" and found["start"] == context.index("z") and found["score"] > 0.9
    assert run(question="where is it?", context=context, doc_stride=0)["start"] == found["start"]
    second = run([{"question": "where?", "context": "a z b"}] * 2, batch_size=batch_size)
    assert [answer["start"] for answer in second] == [2, 2]


@pytest.mark.parametrize("case", ANSWERING, ids=str)
def test_batches_and_padding_change_nothing(case):
    run = answering(case.row.name, "left", max_seq_len=20, doc_stride=4, top_k=3)
    items = [{"question": q, "context": c} for q, c in (("what?", LONG[:60]), ("which one?", TEXT), ("a", "b c"))]
    alone, together = [run(item) for item in items], run(items, batch_size=4)
    for one, other in zip(alone, together, strict=True):
        assert [answer["answer"] for answer in one] == [answer["answer"] for answer in other]
        assert [a["score"] for a in one] == pytest.approx([a["score"] for a in other], rel=1e-5)
    for item, answers in zip(items, alone, strict=True):
        for answer in answers:
            assert item["context"][answer["start"] : answer["end"]] == answer["answer"] == answer["answer"].strip()


def test_items_come_in_many_forms(decoder):
    item = {"question": "which?", "context": TEXT}
    found = decoder(item)
    assert decoder(**item) == found and decoder([item, item]) == [found, found] and decoder([]) == []
    assert decoder(question=["which?"] * 2, context=TEXT) == decoder(question=["which?"] * 2, context=[TEXT] * 2)
    assert list(decoder(each for each in [item])) == [found]
    assert len(decoder(item, top_k=3)) == 3 and len(decoder(question="a", context="b", top_k=3)) == 1


def test_bytes_are_answers_of_whole_characters():
    case = next(case for case in ANSWERING if case.row.name == "hnet")
    model = case.build(vocab_size=256, pad_token_id=255)
    run = pipeline("question-answering", model=model, tokenizer=hf_arch.byte_tokenizer())
    context = "naïve  café – 日本語 text"
    found = run(question="Où?", context=context, top_k=10**4, max_answer_len=100)
    assert {answer["answer"] for answer in found} >= {"ï", "日本語", "café – 日本語", context}
    places = {(answer["start"], answer["end"]) for answer in found}
    blank = [i for i, sign in enumerate(context) if sign == " "]
    ends = set(range(len(context))) - set(blank)
    assert places == {(i, j + 1) for i in ends for j in ends if i <= j}


def test_models_of_transformers_and_adapters_have_it_too(tmp_path, caplog):
    sizes = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    bert = BertForQuestionAnswering(BertConfig(intermediate_size=16, **sizes)).eval()
    run = pipeline("question-answering", model=bert, tokenizer=words())
    item = {"question": "which?", "context": TEXT}
    run.save_pretrained(tmp_path)
    assert pipeline("question-answering", model=str(tmp_path))(item) == run(item)

    model = next(case for case in ANSWERING if case.row.name == "retnet").build()
    adapted = get_peft_model(model, hf_arch.lora_config(model, r=2, init_lora_weights=False)).eval()
    run = pipeline("question-answering", model=adapted, tokenizer=words())
    with_adapter = run(item)
    with adapted.disable_adapter():
        assert run(item)["score"] != with_adapter["score"]
    assert "not supported" not in caplog.text


@pytest.mark.parametrize(
    ("item", "options", "words"),
    [
        ({"question": "", "context": "a"}, {}, "two texts that are not empty"),
        ({"question": "a", "context": "  "}, {}, "two texts that are not empty"),
        ({"question": "a"}, {}, "two texts that are not empty"),
        ("a", {}, "two texts that are not empty"),
        (None, {}, "two texts that are not empty"),
        (
            {"question": "a b c d e f g h", "context": "a"},
            {"max_seq_len": 11},
            "takes 8 of 11 tokens and leaves no room",
        ),
        ({"question": "a", "context": "a"}, {"max_seq_len": 9, "doc_stride": 5}, "room for 5 tokens"),
        ({"question": "a", "context": "a"}, {"top_k": 0}, "top_k 0 must be at least 1"),
        ({"question": "a", "context": "a"}, {"question": "b"}, "not both"),
    ],
)
def test_what_cannot_be_answered_is_said(decoder, item, options, words):
    with pytest.raises(ValueError, match=words):
        decoder(item, **options)


def test_lists_that_do_not_fit_and_wrong_models_and_tokenizers_are_refused(decoder):
    with pytest.raises(ValueError, match="2 questions, but 1 contexts"):
        decoder(question=["a", "b"], context=["a"])
    case = next(case for case in HEADS if str(case) == "retnet-ForCausalLM")
    with pytest.raises(ValueError, match="AutoModelForQuestionAnswering"):
        pipeline("question-answering", model=case.build(), tokenizer=words())
    slow = pipeline("question-answering", model=decoder.model, tokenizer=ByT5Tokenizer())
    with pytest.raises(ValueError, match="take a fast one"):
        slow(question="a", context="b")


def test_features_say_where_the_answer_is_in_each_window():
    tokenizer, context = words(), f"{LONG} z, y"
    answers = {"text": ["z, y"], "answer_start": [context.index("z")]}
    example = {"question": "where?", "context": context, "answers": answers}
    features = answer_features(tokenizer, [example], length=40, overlap=10)
    assert len(features) > 5
    for told in features[:-1]:
        assert told["start_positions"] == told["end_positions"] == no_answer(tokenizer, told["input_ids"]) == 0
    ids = features[-1]["input_ids"][features[-1]["start_positions"] : features[-1]["end_positions"] + 1]
    assert tokenizer.decode(ids).replace(" ", "") == "z,y"
    (none,) = answer_features(tokenizer, [example | {"context": "a", "answers": {"text": [], "answer_start": []}}], 40)
    assert none["start_positions"] == 0
    with pytest.raises(ValueError, match="does not stand in its context at character 0"):
        answer_features(tokenizer, [example | {"answers": {"text": ["z"], "answer_start": [0]}}], 40)


def test_windows_cover_the_text_and_overlap():
    tokenizer = words()
    parts = [[place for place in places if place] for _, places in windows(tokenizer, "a", LONG, 24, 7)]
    whole = tokenizer(LONG, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    assert sum((part[7:] for part in parts[1:]), parts[0]) == whole
    assert all(one[-7:] == other[:7] for one, other in zip(parts, parts[1:], strict=False))


def test_best_spans_are_those_of_a_search():
    start, end = torch.randn(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start[3] = end[5] = -math.inf
    every = {(i, j): float(start[i] + end[j]) for i in range(12) for j in range(i, min(i + 4, 12))}
    best = sorted((score, *span) for span, score in every.items() if score > -math.inf)[::-1]
    found = best_spans(start, end, 4, 100)
    assert found == [pytest.approx(each) for each in best]
    assert found[:3] == best_spans(start, end, 4, 3)
