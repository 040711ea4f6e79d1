"""Images and videos of a processor, beside its tokenizer: parts that it may have or not, and pixels of many rows."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoImageProcessor, AutoTokenizer, AutoVideoProcessor
from transformers.processing_utils import ProcessorMixin

from ..layers.pixel_inputs import MODALITIES

LOADS = {"tokenizer": AutoTokenizer, "image_processor": AutoImageProcessor, "video_processor": AutoVideoProcessor}


class OwnParts:
    """A processor's `get_attributes`: transformers' parts of the class, of an instance those that it has. To
    transformers a part is never missing."""

    def __get__(self, processor: ProcessorMixin | None, owner: type[ProcessorMixin]) -> Callable[[], list[str]]:
        return functools.partial(self.parts, processor, owner)

    @staticmethod
    def parts(processor: ProcessorMixin | None, owner: type[ProcessorMixin]) -> list[str]:
        may_be = ProcessorMixin.get_attributes.__func__(owner)
        if processor is None:
            return may_be
        return [name for name in may_be if name == "tokenizer" or getattr(processor, name) is not None]


class Picture(NamedTuple):
    """An image or a video among texts."""

    modality: str
    content: Any  # what an image processor reads, or a list of it: frames


def is_image(content: Any) -> bool:
    """Whether it is one: a PIL image, an array of three dimensions, an address."""
    return not isinstance(content, list | tuple) and len(getattr(content, "shape", ())) < 4


def is_video(content: Any) -> bool:
    """Whether it is one: a list of images, an array of four dimensions, an address."""
    frames = content if isinstance(content, list | tuple) else ()
    images = len(frames) > 0 and all(is_image(frame) and not isinstance(frame, str) for frame in frames)
    return images or len(getattr(content, "shape", ())) == 4 or isinstance(content, str)


def listed(given: Any, is_one: Callable[[Any], bool]) -> Iterator[Any]:
    """All of them in order, of one, a list, lists of lists, or an array."""
    if given is None:
        return
    if is_one(given):
        yield given
    else:
        for part in given:
            yield from listed(part, is_one)


def in_parts(text: Any, words: dict[str, str], given: dict[str, Iterator[Any]]) -> Iterator[str | Picture]:
    """A string in parts, with what is `given` of each modality where its word of `words` stands; a picture as it is."""
    if not isinstance(text, str):
        yield Picture("video" if is_video(text) else "image", text)
        return
    modalities = {word: modality for modality, word in words.items()}
    for part in re.split(f"({'|'.join(map(re.escape, modalities))})", text) if words else [text]:
        content = next(given[modalities[part]], None) if part in modalities else part
        if content is None:
            raise ValueError(f"Texts say {part} more often than there are {modalities[part]}s.")
        yield Picture(modalities[part], content) if part in modalities else part


def processed(pictures: list[Picture], image_processor, video_processor, **options) -> Iterator[list[np.ndarray]]:
    """The frames of each picture (one of an image), [channels, height, width]. Where there is no `video_processor`,
    frames are images. `options`: `images_kwargs` and `videos_kwargs`, of the processors."""
    whole = {"video"} if video_processor is not None else set()  # what is not read image by image
    images = [
        frame
        for modality, content in pictures
        if modality not in whole
        for frame in ([content] if modality == "image" else frames_of(content))
    ]
    videos = [content for modality, content in pictures if modality in whole]
    if images and image_processor is None:
        raise ValueError("The processor has no image_processor to read images with.")
    images = image_processor(images, **options["images_kwargs"])["pixel_values"] if images else []
    videos = video_processor(videos, **options["videos_kwargs"])["pixel_values_videos"] if videos else []
    images, videos = iter(images), iter(videos)
    for modality, content in pictures:
        if modality in whole:
            yield [as_array(frame) for frame in next(videos)]
        else:
            yield [as_array(next(images)) for _ in range(1 if modality == "image" else len(content))]


def frames_of(video: Any) -> Any:
    if isinstance(video, str):
        raise ValueError(f"{video} is an address: the processor has no video_processor to read videos from files with.")
    return video


def as_array(pixels: Any) -> np.ndarray:
    return np.asarray(pixels, dtype=np.float32)


def one_after_another(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Images [..., channels, height, width] of several rows; videos of different lengths as frames."""
    arrays = [as_array(array) for array in arrays]
    if len({array.shape[1:] for array in arrays}) > 1:
        arrays = [array.reshape(-1, *array.shape[-3:]) for array in arrays]
    if len({array.shape[1:] for array in arrays}) > 1:
        sizes = sorted({array.shape[-3:] for array in arrays})
        raise ValueError(f"Images have the sizes {sizes}: let the image processor make them one.")
    return np.concatenate(arrays)


def pixels_of(rows: Iterable[dict]) -> dict[str, np.ndarray]:
    """Those of all rows; what no row has is left out."""
    told = {name: [row[name] for row in rows if row.get(name) is not None] for name in MODALITIES.values()}
    return {name: one_after_another(arrays) for name, arrays in told.items() if arrays}
