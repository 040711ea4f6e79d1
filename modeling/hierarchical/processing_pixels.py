"""Images and videos of a processor, beside its tokenizer: parts that it may have or not, and pixels of many rows."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoImageProcessor, AutoTokenizer, AutoVideoProcessor
from transformers.processing_utils import ProcessorMixin

LOADS = {"tokenizer": AutoTokenizer, "image_processor": AutoImageProcessor, "video_processor": AutoVideoProcessor}
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}  # as they are called among a model's inputs


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


def picture(content: Any) -> Picture:
    return Picture("video" if is_video(content) else "image", content)


def is_image(content: Any) -> bool:
    """Whether it is one: a PIL image, an array of three dimensions, an address."""
    return not isinstance(content, list | tuple) and len(getattr(content, "shape", ())) < 4


def is_video(content: Any) -> bool:
    """Whether it is one: a list of images, or an array of four dimensions."""
    frames = content if isinstance(content, list | tuple) else ()
    return len(getattr(content, "shape", ())) == 4 or (len(frames) > 0 and all(map(is_image, frames)))


def listed(given: Any, is_one: Callable[[Any], bool]) -> Iterator[Any]:
    """All of them in order, of one, a list, lists of lists, or an array."""
    if given is None:
        return
    if is_one(given):
        yield given
    else:
        for part in given:
            yield from listed(part, is_one)


def processed(pictures: list[Picture], image_processor, video_processor, **options) -> Iterator[list[np.ndarray]]:
    """The frames of each picture (one of an image), [channels, height, width]. Where there is no `video_processor`,
    frames are images. `options`: `images_kwargs` and `videos_kwargs`, of the processors."""
    videos = video_processor is not None
    images = [part for part in pictures if not (videos and part.modality == "video")]
    frames = [frame for part in images for frame in ([part.content] if part.modality == "image" else part.content)]
    if frames and image_processor is None:
        raise ValueError("The processor has no image_processor to read images with.")
    read = image_processor(frames, **options["images_kwargs"])["pixel_values"] if frames else ()
    rest = [part.content for part in pictures if videos and part.modality == "video"]
    seen = video_processor(rest, **options["videos_kwargs"])["pixel_values_videos"] if rest else ()
    read, seen = iter(read), iter(seen)
    for part in pictures:
        if part.modality == "video" and videos:
            yield [as_array(frame) for frame in next(seen)]
        else:
            count = 1 if part.modality == "image" else len(part.content)
            yield [as_array(next(read)) for _ in range(count)]


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
    told = {name: [row[name] for row in rows if row.get(name) is not None] for name in PIXELS.values()}
    return {name: one_after_another(arrays) for name, arrays in told.items() if arrays}
