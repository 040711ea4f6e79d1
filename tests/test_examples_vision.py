"""The examples of images and videos, with a few steps each."""

import numpy as np

from examples import image_captions, moving_digits


def test_captions_are_chosen():
    ours, pixels = image_captions.main(epochs=0.2)
    assert 0 <= ours <= 1 and pixels > 0.9


def test_videos_are_what_they_say():
    image = np.full((8, 8), 255, dtype=np.uint8)
    right, left, down = (moving_digits.moving(image, direction, aside=1) for direction in (0, 1, 2))
    assert right.shape == (5, 1, 16, 16) and np.array_equal(left, right[::-1])
    assert (
        np.array_equal(down, right.transpose(0, 1, 3, 2)) and right[0, 0, 2:10, :8].all() and not right[0, 0, :2].any()
    )


def test_motion_is_named():
    found = moving_digits.main(steps=8, count=40)
    assert set(found) == {"HAT", "logistic regression on mean frames"}
    assert all(0 <= both <= min(digit, way) <= 1 for digit, way, both in found.values())
