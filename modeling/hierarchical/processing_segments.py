"""Texts as rows of segments of level 0: of tokens, of an image, or of a frame of a video."""

import itertools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ..layers.pixel_inputs import MODALITIES
from .processing_pixels import one_after_another

BOUNDARIES = {  # each piece of text keeps the space before it, which a tokenizer may need
    "fixed": None,
    "sentence": re.compile(r"(?<=[.!?。！？])(?=\s)|(?=\n\s*\n)"),
    "paragraph": re.compile(r"(?=\n\s*\n)"),
}
TURN = 2  # levels that begin a segment where a turn or a video does: of tokens, and of segments if there are such


class Segment(NamedTuple):
    """A segment, with its pixels where it is an image or a frame."""

    ids: list[int]  # without its leader
    levels: int = 1  # that begin a segment with it
    modality: str | None = None
    pixels: np.ndarray | None = None  # [channels, height, width]


def filled(pieces: Iterable[list[int]], room: int) -> list[Segment]:
    """Segments of as many whole pieces as fit; one that is longer than the `room` is cut."""
    found: list[list[int]] = []
    for ids in pieces:
        if found and len(found[-1]) + len(ids) <= room:
            found[-1] = found[-1] + ids
        else:
            found += [ids[start : start + room] for start in range(0, len(ids), room)]
    return [Segment(ids) for ids in found]


def patch_count(frame: np.ndarray, size: int, segment_length: int) -> int:
    """The patches of [channels, height, width], each `size` x `size`, which are a segment with its leader."""
    height, width = frame.shape[-2:]
    count = (height // size) * (width // size)
    if height % size or width % size or count >= segment_length:
        raise ValueError(
            f"Images of {height} x {width} pixels are not patches of {size} x {size} that fit into a segment of "
            f"{segment_length} with its leader: let the image processor give them another size."
        )
    return count


def pictured(modality: str, frames: list[np.ndarray], ids: list[int]) -> list[Segment]:
    """An image, or the frames of a video; `ids` are the placeholders of each."""
    levels = [TURN if modality == "video" else 1] + [1] * (len(frames) - 1)
    return [Segment(ids, level, modality, frame) for level, frame in zip(levels, frames, strict=True)]


def row_of(segments: list[Segment], leader: int) -> dict[str, Any]:
    """What a model is told of a text."""
    ids, starts, before = [], [], None
    for segment in segments:
        ids += [leader, *segment.ids]
        levels = TURN if before == "video" != segment.modality else segment.levels
        starts += [levels] + [0] * len(segment.ids)
        before = segment.modality
    row = {"input_ids": ids, "attention_mask": [1] * len(ids), "segment_starts": starts}
    images = [segment.pixels for segment in segments if segment.modality == "image"]
    frames = [segment for segment in segments if segment.modality == "video"]
    if images:
        row[MODALITIES["image"]] = np.stack(images)
    if frames:
        number = itertools.accumulate(frame.levels == TURN for frame in frames)
        videos = itertools.groupby(frames, key=lambda frame: next(number))
        row[MODALITIES["video"]] = one_after_another(np.stack([frame.pixels for frame in of])[None] for _, of in videos)
    return row


def spread(labels: list, pieces: list[list[Segment]]) -> list:
    """Of each segment that a text's own segments become, the label: -100 of those that go on with one."""
    pairs = zip(labels, pieces, strict=True)
    return [label if first else -100 for label, own in pairs for first in (True, *[False] * len(own))[: len(own)]]
