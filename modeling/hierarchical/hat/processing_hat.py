"""Text for HAT: a tokenizer, and where segments begin."""

import re

from transformers import BatchEncoding
from transformers.processing_utils import ProcessorMixin

BOUNDARIES = {  # each piece of text keeps the space before it, which a tokenizer may need
    "fixed": None,
    "sentence": re.compile(r"(?<=[.!?。！？])(?=\s)|(?=\n\s*\n)"),
    "paragraph": re.compile(r"(?=\n\s*\n)"),
}


class ArchHatProcessor(ProcessorMixin):
    """Tokens, with a leader (the tokenizer's [CLS]) at the beginning of each segment, and `segment_starts`.

    segmentation: `"fixed"`, segments as long as they may be; `"sentence"` or `"paragraph"`, as many whole sentences, or
        paragraphs, as fit; one that is longer than a segment is cut. Paragraphs are parted by empty lines, sentences by
        their marks: for other rules hand over each text as the list of its segments.
    segment_length, max_segments: the most tokens of a segment, its leader included, and segments of a text.
    """

    def __init__(
        self,
        tokenizer=None,
        segmentation: str = "fixed",
        segment_length: int = 128,
        max_segments: int = 32,
        chat_template: str | None = None,
    ):
        if segmentation not in BOUNDARIES:
            raise ValueError(f"segmentation {segmentation!r} is unknown; there are {', '.join(BOUNDARIES)}.")
        if segment_length < 2:
            raise ValueError(f"segment_length is {segment_length}; a leader and a token are two.")
        super().__init__(tokenizer, chat_template=chat_template)
        if self.leader is None:
            raise ValueError("The tokenizer has no cls_token, and no bos_token, to begin segments with.")
        self.segmentation, self.segment_length, self.max_segments = segmentation, segment_length, max_segments

    @property
    def leader(self) -> int | None:
        found = self.tokenizer.cls_token_id
        return self.tokenizer.bos_token_id if found is None else found

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "segment_starts"]

    def __call__(
        self,
        text: str | list[str] | list[list[str]],
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """A text, texts, or texts as lists of their segments -> `input_ids`, `attention_mask`, `segment_starts`.

        With `truncation`, a text keeps its first `max_segments` segments; without, a text that has more raises
        ValueError. `padding` and `max_length` are a tokenizer's.
        """
        if isinstance(text, str):
            row = self.marked(self.segments(text, truncation))
            if return_tensors is None and not padding:
                return BatchEncoding(row)
            rows = [row]
        else:
            rows = [self.marked(self.segments(one, truncation)) for one in text]
        if not padding:
            return BatchEncoding({name: [row[name] for row in rows] for name in rows[0]}, tensor_type=return_tensors)
        return self.pad(rows, padding, max_length, pad_to_multiple_of, return_tensors)

    def segments(self, text: str | list[str], truncation: bool = False) -> list[list[int]]:
        """The tokens of each segment, without leaders."""
        room = self.segment_length - 1
        found: list[list[int]] = []
        for piece in self.pieces(text):
            ids = self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            joins = isinstance(text, str) and found and len(found[-1]) + len(ids) <= room
            if joins:
                found[-1] += ids
            else:
                found += [ids[start : start + room] for start in range(0, len(ids), room)]
        found = found or [[]]  # a text of nothing is a leader
        if len(found) > self.max_segments and not truncation:
            raise ValueError(
                f"The text has {len(found)} segments of {self.segment_length} tokens, the model takes "
                f"{self.max_segments}: say truncation=True, or cut it."
            )
        return found[: self.max_segments]

    def pieces(self, text: str | list[str]) -> list[str]:
        boundary = BOUNDARIES[self.segmentation]
        if not isinstance(text, str):
            return text
        return [text] if boundary is None else boundary.split(text)

    def marked(self, segments: list[list[int]]) -> dict[str, list[int]]:
        ids = [token for segment in segments for token in (self.leader, *segment)]
        starts = [int(place == 0) for segment in segments for place in range(len(segment) + 1)]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "segment_starts": starts}

    def pad(
        self,
        encoded: list[dict] | dict,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchEncoding:
        """As the tokenizer's, for rows with `segment_starts`: what a data collator calls."""
        if not isinstance(encoded, dict | BatchEncoding):
            encoded = {name: [row[name] for row in encoded] for name in encoded[0]}
        others = {name: values for name, values in encoded.items() if name != "segment_starts"}
        padded = self.tokenizer.pad(others, padding, max_length, pad_to_multiple_of=pad_to_multiple_of, **kwargs)
        filled = []
        for starts, ids in zip(encoded["segment_starts"], padded["input_ids"], strict=True):
            missing = [0] * (len(ids) - len(starts))
            filled.append(missing + starts if self.tokenizer.padding_side == "left" else starts + missing)
        return BatchEncoding(dict(padded) | {"segment_starts": filled}, tensor_type=return_tensors)
