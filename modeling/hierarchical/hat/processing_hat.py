"""Text and dialogues for HAT: a tokenizer, and where segments begin."""

import re

from transformers import BatchEncoding
from transformers.processing_utils import ProcessorMixin

BOUNDARIES = {  # each piece of text keeps the space before it, which a tokenizer may need
    "fixed": None,
    "sentence": re.compile(r"(?<=[.!?。！？])(?=\s)|(?=\n\s*\n)"),
    "paragraph": re.compile(r"(?=\n\s*\n)"),
}
ROLES = ("system", "user", "assistant", "tool")  # by their number in `token_type_ids`
TURN = 2  # levels that begin a segment where a turn does: that of tokens, and that of segments, if there is one more
KINDS = ("common_kwargs", "text_kwargs")
UNSEEN = {"segment_starts": 0, "labels": -100}  # what a tokenizer does not pad, and what ends its rows


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
        segment_labels: list[list] | None = None,
        **by_kind: dict,
    ) -> BatchEncoding:
        """A text, texts, or texts as lists of their segments -> `input_ids`, `attention_mask`, `segment_starts`.

        With `truncation`, a text keeps its first `max_segments` segments; without, a text that has more raises
        ValueError. `padding` and `max_length` are a tokenizer's. `segment_labels`, for each text as many as the
        segments that it is given as, become `labels`: where a segment is longer than segments may be, those that go on
        with it have -100. `text_kwargs` and `common_kwargs` may hold these arguments: transformers' way to say which
        are for which kind of input.
        """
        if by_kind:
            return self(text, **{name: value for kind in KINDS for name, value in (by_kind.get(kind) or {}).items()})
        padding = {"padding": padding, "max_length": max_length, "pad_to_multiple_of": pad_to_multiple_of}
        if isinstance(text, str):
            row = self.marked(self.segments(text, truncation))
            if return_tensors is None and not padding["padding"]:
                return BatchEncoding(row)
            return self.batch([row], return_tensors, **padding)
        rows = [self.marked(self.segments(one, truncation)) for one in text]
        for row, one, labels in zip(rows, text, segment_labels or (), strict=bool(segment_labels)):
            row["labels"] = self.spread(one, labels)
        return self.batch(rows, return_tensors, **padding)

    def dialogue(
        self,
        messages: list[dict] | list[list[dict]],
        since: int = 0,
        padding: bool | str = False,
        truncation: bool = False,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """A dialogue, or several, as chat templates have them, [{"role": ..., "content": ...}, ...] -> the same, a turn
        a segment (several, if it is longer), and as `token_type_ids` the number of each token's role in `ROLES`.

        A turn is what the chat template adds for its message, or its content where there is no template. `since`: the
        first turn that is wanted, for `read_turn`, which has read those before.
        """
        single = isinstance(messages[0], dict)
        rows = [self.turns(one, since, truncation) for one in ([messages] if single else messages)]
        if single and return_tensors is None and not padding:
            return BatchEncoding(rows[0])
        return self.batch(rows, return_tensors, padding=padding)

    def turns(self, messages: list[dict], since: int, truncation: bool) -> dict[str, list[int]]:
        row: dict[str, list[int]] = {"input_ids": [], "attention_mask": [], "segment_starts": [], "token_type_ids": []}
        for number, message in enumerate(messages):
            if message["role"] not in ROLES:
                raise ValueError(f"Message {number} is of {message['role']!r}; roles are {', '.join(ROLES)}.")
            if number >= since:
                turn = self.marked(self.segments(self.said(messages, number), truncation))
                turn["segment_starts"][0] = TURN
                turn["token_type_ids"] = [ROLES.index(message["role"])] * len(turn["input_ids"])
                row = {name: row[name] + turn[name] for name in row}
        return row

    def said(self, messages: list[dict], number: int) -> str:
        """The text of a turn."""
        template = self.chat_template or getattr(self.tokenizer, "chat_template", None)
        if template is None:
            return messages[number]["content"]
        before, after = (
            self.tokenizer.apply_chat_template(messages[:end], chat_template=template, tokenize=False) if end else ""
            for end in (number, number + 1)
        )
        if not after.startswith(before):
            raise ValueError("The chat template changes old turns when one is added: turns cannot be read one by one.")
        return after[len(before) :]

    def batch(self, rows: list[dict], return_tensors: str | None, padding: bool | str, **options) -> BatchEncoding:
        if not padding:
            return BatchEncoding({name: [row[name] for row in rows] for name in rows[0]}, tensor_type=return_tensors)
        return self.pad(rows, padding, return_tensors=return_tensors, **options)

    def spread(self, segments: list[str], labels: list) -> list:
        """Of each segment that a text's own segments become, the label."""
        if isinstance(segments, str) or len(segments) != len(labels):
            raise ValueError("segment_labels are for texts that are lists of segments, one for each.")
        counts = [len(self.segments([segment])) for segment in segments]
        spread = [one for label, count in zip(labels, counts, strict=True) for one in [label] + [-100] * (count - 1)]
        return spread[: self.max_segments]

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
        unseen = [name for name in UNSEEN if name in encoded and isinstance(encoded[name][0], list)]
        others = {name: values for name, values in encoded.items() if name not in unseen}
        padded = dict(self.tokenizer.pad(others, padding, max_length, pad_to_multiple_of=pad_to_multiple_of, **kwargs))
        left, length = self.tokenizer.padding_side == "left", len(padded["input_ids"][0])
        for name in unseen:
            rows, side = encoded[name], left
            if name == "labels" and rows and [*map(len, rows)] != [*map(len, encoded["input_ids"])]:
                length, side = max(map(len, rows)), False  # those of segments, which are left-aligned
            missing = [[UNSEEN[name]] * (length - len(row)) for row in rows]
            pairs = zip(missing, rows, strict=True)
            padded[name] = [more + row if side else row + more for more, row in pairs]
        return BatchEncoding(padded, tensor_type=return_tensors)
