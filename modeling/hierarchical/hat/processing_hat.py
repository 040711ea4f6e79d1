"""Text, pictures and dialogues for HAT: a tokenizer, processors of images and videos, and where segments begin."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import BatchEncoding
from transformers.processing_utils import ProcessorMixin

from ...layers.pixel_inputs import MODALITIES
from ..processing_pixels import LOADS, OwnParts, Picture, in_parts, is_image, is_video, listed, pixels_of, processed
from ..processing_segments import BOUNDARIES, TURN, Segment, filled, patch_count, pictured, row_of, spread

ROLES = ("system", "user", "assistant", "tool")  # by their number in `token_type_ids`
KINDS = ("common_kwargs", "text_kwargs")
UNSEEN = {"segment_starts": 0, "labels": -100}  # what a tokenizer does not pad, and what ends its rows


class ArchHatProcessor(ProcessorMixin):
    """Tokens, with a leader (the tokenizer's [CLS]) at the beginning of each segment, and `segment_starts`; of images
    and videos their pixels, and a placeholder token for each patch.

    image_processor, video_processor: transformers' own, *optional*. Without a `video_processor` frames are read by the
        `image_processor`: those of transformers need torchvision.
    segmentation: `"fixed"`, segments as long as they may be; `"sentence"` or `"paragraph"`, as many whole sentences, or
        paragraphs, as fit; one that is longer than a segment is cut. Paragraphs are parted by empty lines, sentences by
        their marks: for other rules hand over each text as the list of its segments.
    segment_length, max_segments: the most tokens of a segment, its leader included, and segments of a text.
    patch_size: height and width of a patch in pixels, as the model has it.
    image_token, video_token: what a text says where an image or a video goes, a token of the vocabulary; by default the
        tokenizer's own `image_token` and `video_token`, or `<image>` and `<video>`.
    """

    image_processor = None
    video_processor = None
    get_attributes = OwnParts()

    def __init__(
        self,
        tokenizer=None,
        image_processor=None,
        video_processor=None,
        segmentation: str = "fixed",
        segment_length: int = 128,
        max_segments: int = 32,
        patch_size: int = 32,
        image_token: str | None = None,
        video_token: str | None = None,
        chat_template: str | None = None,
    ):
        if segmentation not in BOUNDARIES:
            raise ValueError(f"segmentation {segmentation!r} is unknown; there are {', '.join(BOUNDARIES)}.")
        if segment_length < 2:
            raise ValueError(f"segment_length is {segment_length}; a leader and a token are two.")
        own = {"image_processor": image_processor, "video_processor": video_processor}
        own = {name: part for name, part in own.items() if part is not None}
        vars(self).update(own)
        super().__init__(tokenizer, **own, chat_template=chat_template)
        if self.leader is None:
            raise ValueError("The tokenizer has no cls_token, and no bos_token, to begin segments with.")
        self.segmentation, self.segment_length, self.max_segments = segmentation, segment_length, max_segments
        self.patch_size = patch_size
        self.image_token = image_token or getattr(tokenizer, "image_token", None) or "<image>"
        self.video_token = video_token or getattr(tokenizer, "video_token", None) or "<video>"

    @classmethod
    def _get_arguments_from_pretrained(cls, source, processor_dict=None, **options) -> list:
        """As in transformers; a part that was not saved is None."""
        saved = {"tokenizer", *(processor_dict or {})}
        return [
            LOADS[name].from_pretrained(source, **options) if name in saved else None for name in cls.get_attributes()
        ]

    @property
    def leader(self) -> int | None:
        found = self.tokenizer.cls_token_id
        return self.tokenizer.bos_token_id if found is None else found

    @property
    def words(self) -> dict[str, str]:
        """What texts say where pictures go."""
        return {"image": self.image_token, "video": self.video_token}

    @property
    def placeholders(self) -> dict[str, int]:
        """Of each modality that the processor can read, the token that stands for a patch."""
        if len(self.get_attributes()) == 1:
            return {}
        known = {modality: self.tokenizer.convert_tokens_to_ids(word) for modality, word in self.words.items()}
        return {
            modality: token for modality, token in known.items() if token not in (None, self.tokenizer.unk_token_id)
        }

    @property
    def model_input_names(self) -> list[str]:
        pixels = [MODALITIES[modality] for modality in self.placeholders]
        return ["input_ids", "attention_mask", "segment_starts", *pixels]

    def __call__(
        self,
        text: str | list | None = None,
        images: Any = None,
        videos: Any = None,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        segment_labels: list[list] | None = None,
        images_kwargs: dict | None = None,
        videos_kwargs: dict | None = None,
        **by_kind: dict,
    ) -> BatchEncoding:
        """A text, or texts -> `input_ids`, `attention_mask`, `segment_starts`, and of the batch `pixel_values` [images,
        channels, height, width] and `pixel_values_videos` [videos, frames, ...] ([frames, ...] of different lengths).

        Of texts each is a string, or the list of its segments: strings, images (PIL, or arrays of three dimensions) and
        videos (lists of such, or arrays of four); or an image alone, or a video that is an array. In a string
        `image_token` and `video_token` say where one goes of `images` and `videos`, in order; without `text` each of
        these is a text. An image is a segment, and so is a frame; a video, and what follows it, begins a segment of
        level 1.

        With `truncation`, a text keeps its first `max_segments` segments; without, a text that has more raises
        ValueError. `padding` and `max_length` are a tokenizer's. `segment_labels`, for each text as many as the
        segments that it is given as, become `labels`: where a segment is longer than segments may be, those that go on
        with it have -100. `images_kwargs` and `videos_kwargs` are for the processors of these; `text_kwargs` and
        `common_kwargs` may hold the other arguments: transformers' way to say which are for which kind of input.
        """
        of_pixels = {"images_kwargs": images_kwargs or {}, "videos_kwargs": videos_kwargs or {}}
        if by_kind:
            told = {name: value for kind in KINDS for name, value in (by_kind.get(kind) or {}).items()}
            return self(text, images, videos, **of_pixels, **told)
        padding = {"padding": padding, "max_length": max_length, "pad_to_multiple_of": pad_to_multiple_of}
        texts = [text] if isinstance(text, str) else text
        if text is None:
            texts = [*listed(images, is_image), *([video] for video in listed(videos, is_video))]
            images = videos = None
        found = self.read(texts, images, videos, **of_pixels)
        rows = [self.marked(pieces, truncation) for pieces in found]
        for row, one, pieces, labels in zip(rows, texts, found, segment_labels or (), strict=bool(segment_labels)):
            if isinstance(one, str) or len(one) != len(labels):
                raise ValueError("segment_labels are for texts that are lists of segments, one for each.")
            row["labels"] = spread(labels, pieces)[: self.max_segments]
        if isinstance(text, str) and return_tensors is None and not padding["padding"]:
            return BatchEncoding(rows[0])
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

        A turn is what the chat template adds for its message, or its content where there is no template. A content may
        be a list, of {"type": "text", "text": ...}, {"type": "image", "image": ...} and so of videos. `since`: the
        first turn that is wanted, for `read_turn`, which has read those before.
        """
        single = isinstance(messages[0], dict)
        rows = [self.turns(one, since, truncation) for one in ([messages] if single else messages)]
        if single and return_tensors is None and not padding:
            return BatchEncoding(rows[0])
        return self.batch(rows, return_tensors, padding=padding)

    def turns(self, messages: list[dict], since: int, truncation: bool) -> dict[str, list[int]]:
        turns = []
        for number, message in enumerate(messages):
            if message["role"] not in ROLES:
                raise ValueError(f"Message {number} is of {message['role']!r}; roles are {', '.join(ROLES)}.")
            if number >= since:
                content = [] if isinstance(message["content"], str) else message["content"]
                pictures = ([part[kind] for part in content if part["type"] == kind] for kind in MODALITIES)
                (pieces,) = self.read([self.said(messages, number)], *pictures, images_kwargs={}, videos_kwargs={})
                turn = self.marked(pieces, truncation)
                turn["segment_starts"][0] = TURN
                turn["token_type_ids"] = [ROLES.index(message["role"])] * len(turn["input_ids"])
                turns.append(turn)
        names = ("input_ids", "attention_mask", "segment_starts", "token_type_ids")
        return {name: [value for turn in turns for value in turn[name]] for name in names} | pixels_of(turns)

    def said(self, messages: list[dict], number: int) -> str:
        """The text of a turn."""
        template = self.chat_template or getattr(self.tokenizer, "chat_template", None)
        if template is None:
            content = messages[number]["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            return "".join(part["text"] if part["type"] == "text" else self.words[part["type"]] for part in parts)
        before, after = (
            self.tokenizer.apply_chat_template(messages[:end], chat_template=template, tokenize=False) if end else ""
            for end in (number, number + 1)
        )
        if not after.startswith(before):
            raise ValueError("The chat template changes old turns when one is added: turns cannot be read one by one.")
        return after[len(before) :]

    def batch(self, rows: list[dict], return_tensors: str | None, padding: bool | str, **options) -> BatchEncoding:
        if not padding:
            names = [name for name in rows[0] if name not in MODALITIES.values()]
            told = {name: [row[name] for row in rows] for name in names} | pixels_of(rows)
            return BatchEncoding(told, tensor_type=return_tensors)
        return self.pad(rows, padding, return_tensors=return_tensors, **options)

    def read(self, texts: list, images: Any, videos: Any, **options) -> list[list[list[Segment]]]:
        """The segments of each text, by the segments that it is given as: one, of a string."""
        given = {"image": listed(images, is_image), "video": listed(videos, is_video)}
        own = [text if isinstance(text, list | tuple) else [text] for text in texts]
        words = {modality: self.words[modality] for modality in self.placeholders}
        rows = [[[*in_parts(piece, words, given)] for piece in row] for row in own]
        for modality, rest in given.items():
            if more := len([*rest]):
                raise ValueError(f"There are {more} more {modality}s than texts say {self.words[modality]}.")
        pictures = [part for row in rows for piece in row for part in piece if isinstance(part, Picture)]
        seen = processed(pictures, self.image_processor, self.video_processor, **options)
        found = []
        for text, row in zip(texts, rows, strict=True):
            joined = isinstance(text, str)
            cut = [[self.cut(part, joined, seen) for part in piece] for piece in row]
            pieces = [[segment for segments in piece for segment in segments] for piece in cut]
            found.append(pieces if any(pieces) else [[Segment([])]])  # a text of nothing is a leader
        return found

    def cut(self, part: str | Picture, joined: bool, seen: Iterator[list[np.ndarray]]) -> list[Segment]:
        """Text in segments by the rule, or, if not `joined`, as one (more if it is longer than segments may be); of a
        picture the frames that are next of those `seen`."""
        if isinstance(part, Picture):
            return self.shown(part.modality, next(seen))
        boundary = BOUNDARIES[self.segmentation] if joined else None
        pieces = [part] if boundary is None else boundary.split(part)
        ids = (self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] for piece in pieces)
        return filled(ids, self.segment_length - 1)

    def shown(self, modality: str, frames: list[np.ndarray]) -> list[Segment]:
        """An image, or the frames of a video, as segments of placeholders."""
        if modality not in self.placeholders:
            raise ValueError(
                f"{self.words[modality]} is no token of the tokenizer: add it as a special one, and resize the model's "
                "embeddings."
            )
        count = patch_count(frames[0], self.patch_size, self.segment_length)
        return pictured(modality, frames, [self.placeholders[modality]] * count)

    def marked(self, pieces: list[list[Segment]], truncation: bool) -> dict[str, Any]:
        segments = [segment for piece in pieces for segment in piece]
        if len(segments) > self.max_segments and not truncation:
            raise ValueError(
                f"The text has {len(segments)} segments of {self.segment_length} tokens, the model takes "
                f"{self.max_segments}: say truncation=True, or cut it."
            )
        return row_of(segments[: self.max_segments], self.leader)

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
            pixels = pixels_of(encoded)
            encoded = {name: [row[name] for row in encoded] for name in encoded[0] if name not in MODALITIES.values()}
        else:
            pixels = {name: encoded[name] for name in MODALITIES.values() if name in encoded}
        unseen = [name for name in UNSEEN if name in encoded and isinstance(encoded[name][0], list)]
        others = {name: values for name, values in encoded.items() if name not in (*unseen, *pixels)}
        padded = dict(self.tokenizer.pad(others, padding, max_length, pad_to_multiple_of=pad_to_multiple_of, **kwargs))
        left, length = self.tokenizer.padding_side == "left", len(padded["input_ids"][0])
        for name in unseen:
            rows, side = encoded[name], left
            if name == "labels" and rows and [*map(len, rows)] != [*map(len, encoded["input_ids"])]:
                length, side = max(map(len, rows)), False  # those of segments, which are left-aligned
            missing = [[UNSEEN[name]] * (length - len(row)) for row in rows]
            pairs = zip(missing, rows, strict=True)
            padded[name] = [more + row if side else row + more for more, row in pairs]
        return BatchEncoding(padded | pixels, tensor_type=return_tensors)
