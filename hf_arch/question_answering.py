"""Answers that stand in a text: `pipeline("question-answering", ...)`, which transformers 5 dropped.

    run = pipeline("question-answering", model="path/or/hub-id")
    run(question="What does it return?", context=text)  # {"score": 0.9, "start": 17, "end": 29, "answer": "a list"}

A text longer than the model is read in windows that overlap, each behind the question, so that a decoder knows what is
asked when it reads. In a window p(start) and p(end) are softmaxes over the tokens of the text and the one that stands
for "no answer here" (Devlin et al., 2018, arXiv:1810.04805, section 4.3); an answer scores p(start) p(end), in the
window where it scores best.
"""

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase
from transformers.pipelines.base import ChunkPipeline

LENGTH = 384  # tokens of a window, where neither model nor tokenizer knows its longest
OVERLAP = 128  # tokens, where there is room
Place = tuple[int, int] | None  # of a token in the text, in characters; None for one of the question


def windows(
    tokenizer: PreTrainedTokenizerBase, question: str, context: str, length: int, overlap: int | None = None
) -> Iterator[tuple[dict[str, list[int]], list[Place]]]:
    """The question with one part of the text after another, at most `length` tokens in all: what a model reads, and the
    place in the text of each token. Parts share `overlap` tokens, by default 128 or half of the room.

    Raises ValueError for a tokenizer that does not know places, and where the question leaves no room.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not know where in a text its tokens stand: take a fast one.")
    asked = len(tokenizer(question, add_special_tokens=False)["input_ids"])
    room = length - asked - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 1:
        raise ValueError(
            f"The question takes {asked} of {length} tokens and leaves no room for the text: ask a shorter one, or "
            "give a greater max_seq_len."
        )
    if overlap is not None and overlap >= room:
        raise ValueError(f"Windows have room for {room} tokens of the text: doc_stride {overlap} must be less.")
    shared = min(OVERLAP, room // 2) if overlap is None else overlap
    told = {"truncation": "only_second", "max_length": length, "stride": shared, "padding": False}
    found = tokenizer(question, context, **told, return_overflowing_tokens=True, return_offsets_mapping=True)
    places = found.pop("offset_mapping")
    found.pop("overflow_to_sample_mapping", None)
    for i, of_window in enumerate(places):
        known = zip(of_window, found.sequence_ids(i), strict=True)
        yield (
            {name: column[i] for name, column in found.items()},
            [tuple(place) if part == 1 else None for place, part in known],
        )


def no_answer(tokenizer: PreTrainedTokenizerBase, input_ids: list[int]) -> int:
    """Which token of a window stands for "no answer here", as in transformers' run_qa.py: CLS, else BOS, else the
    first."""
    known = (token for token in (tokenizer.cls_token_id, tokenizer.bos_token_id) if token in input_ids)
    token = next(known, None)
    return 0 if token is None else input_ids.index(token)


def answer_features(
    tokenizer: PreTrainedTokenizerBase, examples: Iterable[Mapping], length: int, overlap: int | None = None
) -> list[dict[str, list[int] | int]]:
    """What a Trainer learns question answering from: each window with its `start_positions` and `end_positions`, those
    of "no answer here" where the answer is not in the window.

    examples: as in SQuAD, {"question", "context", "answers": {"text": [...], "answer_start": [...]}}, of whose answers
    the first counts; empty lists where there is none. `length`, `overlap`: as in `windows`.
    """
    features = []
    for example in examples:
        text, start = ([*example["answers"][name], None][0] for name in ("text", "answer_start"))
        if text is not None and example["context"][start : start + len(text)] != text:
            raise ValueError(f"The answer {text!r} does not stand in its context at character {start}.")
        for told, places in windows(tokenizer, example["question"], example["context"], length, overlap):
            first, last = (None, None) if text is None else tokens_of(places, start, start + len(text))
            if first is None:
                first = last = no_answer(tokenizer, told["input_ids"])
            features.append(told | {"start_positions": first, "end_positions": last})
    return features


def tokens_of(places: list[Place], start: int, end: int) -> tuple[int | None, int | None]:
    """The first and the last token of the characters start to end, if all of these are in the window."""
    inside = [i for i, place in enumerate(places) if place is not None and place[0] < end and place[1] > start]
    if not inside or places[inside[0]][0] > start or places[inside[-1]][1] < end:
        return None, None
    return inside[0], inside[-1]


def borders(places: list[Place], context: str) -> tuple[list[int], list[int]]:
    """Of each token, 1 + the character with which an answer starts that starts with the token, and 1 + the one before
    which it ends that ends with it; 0 where none does: in the question, in blanks, and inside a character."""
    starts, ends = [0] * len(places), [0] * len(places)
    for i, place in enumerate(places):
        said = context[slice(*place)] if place is not None else ""
        if said.strip():
            before, after = (places[j] if 0 <= j < len(places) else None for j in (i - 1, i + 1))
            if before is None or before[0] != place[0]:
                starts[i] = 1 + place[1] - len(said.lstrip())
            if after is None or after[1] != place[1]:
                ends[i] = 1 + place[0] + len(said.rstrip())
    return starts, ends


def best_spans(start: torch.Tensor, end: torch.Tensor, longest: int, count: int) -> list[tuple[float, int, int]]:
    """The `count` spans of at most `longest` tokens with the greatest start[i] + end[j], i <= j, best first; start and
    end [tokens] are -inf where no span starts or ends."""
    longest = min(longest, len(end))
    scores = start[:, None] + F.pad(end, (0, longest - 1), value=-torch.inf).unfold(0, longest, 1)
    found = scores.flatten().topk(min(count, int(scores.isfinite().sum())))
    first, further = found.indices // longest, found.indices % longest
    return list(zip(found.values.tolist(), first.tolist(), (first + further).tolist(), strict=True))


def pairs(question: str | Sequence[str] | None, context: str | Sequence[str] | None) -> dict | list[dict]:
    """The items of `question=` and `context=`: one text or several; many questions may have one context."""
    if isinstance(question, str) or question is None:
        return {"question": question, "context": context}
    contexts = [context] * len(question) if isinstance(context, str) else context or []
    if len(contexts) != len(question):
        raise ValueError(f"There are {len(question)} questions, but {len(contexts)} contexts.")
    return [{"question": one, "context": other} for one, other in zip(question, contexts, strict=True)]


class QuestionAnsweringPipeline(ChunkPipeline):
    """Finds answers with any model for question answering, of hf_arch or of transformers, and with adapters of PEFT
    around it. The tokenizer is a fast one.

    Call it with an item {"question": ..., "context": ...}, with a list, generator or Dataset of items, or with
    `question=` and `context=`. An answer is {"score", "start", "end", "answer"}, in characters of the context and
    without blanks around it; of several, best first, a list. Options, here or when the pipeline is made:

    top_k (`int`, defaults to 1):
        How many different answers, at most.
    max_answer_len (`int`, defaults to 15):
        Tokens of an answer, at most.
    max_seq_len (`int`, *optional*):
        Tokens of a window, by default as many as tokenizer and model say they know.
    doc_stride (`int`, *optional*):
        Tokens that neighbouring windows share; by default 128, or half of the room that the question leaves.
    handle_impossible_answer (`bool`, defaults to `False`):
        Whether "" is an answer. It scores what "no answer here" does in the window that believes it least.
    batch_size (`int`, defaults to 1):
        Windows that are read at once.
    """

    default_input_names = "question,context"
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if "ForQuestionAnswering" not in type(model).__name__:
            raise ValueError(
                f"{type(model).__name__} says nothing of starts and ends: load it with AutoModelForQuestionAnswering."
            )
        self.reads = inspect.signature(model.forward).parameters

    def __call__(self, inputs=None, *, question=None, context=None, **options):
        if inputs is None:
            inputs = pairs(question, context)
        elif question is not None or context is not None:
            raise ValueError("Give items, or question= and context=, not both.")
        if isinstance(inputs, list | tuple):
            inputs = list(inputs)
            if not inputs:
                return []
        return super().__call__(inputs, **options)

    def _sanitize_parameters(
        self, top_k=None, max_answer_len=None, max_seq_len=None, doc_stride=None, handle_impossible_answer=None
    ):
        read = {"max_seq_len": max_seq_len, "doc_stride": doc_stride}
        answer = {"top_k": top_k, "max_answer_len": max_answer_len}
        for name, value in (read | answer).items():
            least = 0 if name == "doc_stride" else 1
            if value is not None and value < least:
                raise ValueError(f"{name} {value} must be at least {least}.")
        answer["handle_impossible_answer"] = handle_impossible_answer
        given = [{name: value for name, value in of.items() if value is not None} for of in (read, answer)]
        return given[0], {}, given[1]

    def longest(self) -> int:
        """Tokens that model and tokenizer know."""
        known = (self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", None))
        return min((length for length in known if length and length < 10**9), default=LENGTH)

    def preprocess(self, item, max_seq_len=None, doc_stride=None):
        said = [item.get(name) if isinstance(item, Mapping) else None for name in ("question", "context")]
        if not all(isinstance(text, str) and text.strip() for text in said):
            raise ValueError(
                f'An item is {{"question": ..., "context": ...}}, two texts that are not empty; not {str(item)[:200]}.'
            )
        read = list(windows(self.tokenizer, *said, max_seq_len or self.longest(), doc_stride))
        for number, (told, places) in enumerate(read):
            starts, ends = borders(places, said[1])
            nowhere = no_answer(self.tokenizer, told["input_ids"])
            told = {name: ids for name, ids in told.items() if name in self.reads}
            told |= {"starts": starts, "ends": ends, "inside": [place is not None for place in places]}
            told["nowhere"] = [i == nowhere for i in range(len(places))]
            tensors = {name: torch.tensor([values]) for name, values in told.items()}
            yield tensors | {"context": said[1], "is_last": number == len(read) - 1}

    def _forward(self, inputs):
        kept = {name: inputs.pop(name) for name in ("starts", "ends", "inside", "nowhere", "context", "is_last")}
        outputs = self.model(**inputs)
        return {"start_logits": outputs.start_logits, "end_logits": outputs.end_logits} | kept

    def postprocess(self, read, top_k=1, max_answer_len=15, handle_impossible_answer=False):
        best: dict[tuple[int, int], float] = {}
        nowhere = []
        for window in read:
            starts, ends, none = window["starts"][0], window["ends"][0], window["nowhere"][0]
            counted = window["inside"][0] | none
            start, end = (
                window[name][0].float().masked_fill(~counted, -torch.inf).log_softmax(-1)
                for name in ("start_logits", "end_logits")
            )
            nowhere.append(float((start + end)[none].exp()))
            given = (start.masked_fill(starts == 0, -torch.inf), end.masked_fill(ends == 0, -torch.inf))
            for score, first, last in best_spans(*given, max_answer_len, top_k):
                span = int(starts[first]) - 1, int(ends[last]) - 1
                best[span] = max(best.get(span, -torch.inf), score)
        context = read[0]["context"]
        found = [
            {"score": math.exp(score), "start": start, "end": end, "answer": context[start:end]}
            for (start, end), score in best.items()
        ]
        if handle_impossible_answer or not best:
            found.append({"score": min(nowhere), "start": 0, "end": 0, "answer": ""})
        found = sorted(found, key=lambda answer: -answer["score"])[:top_k]
        return found if top_k > 1 else found[0]
