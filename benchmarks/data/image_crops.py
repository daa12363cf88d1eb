"""Decoding images, and which box of each to keep, as is usual for ImageNet."""

import io
import math

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]

KINDS = ("JPEG", "PNG", "WEBP")
# Of an image that is decoded, 192 MiB in RGB: more than any of ImageNet's has. What a
# file's first bytes say is compared with it before memory is taken.
MAX_PIXELS = 2**26
# Pillow's names of what it reads as bits and bytes, which it turns into RGB by scaling,
# looking up or subtracting; and as numbers of 16 bits, which it would cut off at 255.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
MODES_16_BIT = ("I;16", "I;16B", "I;16L")
# Share of the image's area, and ratio of the sides, of a random crop.
AREAS = (0.08, 1.0)
RATIOS = (3 / 4, 4 / 3)
CENTRE = 224 / 256  # of the shorter side, for evaluation


def decode(encoded: bytes | None) -> Image.Image | None:
  """Returns an image in RGB, or None if it is damaged, or has over `MAX_PIXELS`.

  Args:
    encoded: JPEG, PNG or WebP.
  """
  try:
    with Image.open(io.BytesIO(encoded or b""), formats=KINDS) as image:
      if not 0 < image.width * image.height <= MAX_PIXELS:
        return None
      return to_rgb(image)
  except Exception:  # a damaged image can raise anything
    return None


def to_rgb(image: Image.Image) -> Image.Image:
  """Returns an image in RGB, with eight bits a channel.

  Grey is repeated, palettes are looked up, and 16 bits are divided by 256, as pillow
  does with 16-bit colours. What is said of transparency is left out, as most readers of
  such data sets do.

  Args:
    image: As pillow opens it.

  Raises:
    ValueError: It is of floats, of 32-bit integers or in another colour space.
  """
  if image.mode in MODES_16_BIT:
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
  if image.mode not in MODES:
    raise ValueError(f"pixels of mode {image.mode}, expected one of {MODES}")
  # Or pillow warns that one colour cannot stand for several that are transparent; only
  # when all is read has all been said.
  image.load()
  image.info.pop("transparency", None)
  return image.convert("RGB")


def random_box(rng: np.random.Generator, width: int, height: int) -> Box:
  """Draws what a training image shows: a share of the area, stretched somewhat.

  Args:
    rng: Random generator.
    width: Of the image, in pixels.
    height: Of the image.

  Returns:
    Left, upper, right and lower edge.

  Reference:
    Szegedy et al., arXiv 1409.4842, section 6.
  """
  for _ in range(10):
    area = rng.uniform(*AREAS) * width * height
    ratio = math.exp(rng.uniform(*np.log(RATIOS)))
    wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < wide <= width and 0 < high <= height:
      left = int(rng.integers(width - wide + 1))
      upper = int(rng.integers(height - high + 1))
      return left, upper, left + wide, upper + high
  # The largest box in the middle of a very long image.
  wide, high = min(width, height * RATIOS[1]), min(height, width / RATIOS[0])
  left, upper = (width - wide) / 2, (height - high) / 2
  return left, upper, left + wide, upper + high


def centre_box(width: int, height: int) -> Box:
  """Returns the square in the middle that evaluation shows.

  Args:
    width: Of the image, in pixels.
    height: Of the image.

  Example:
    >>> centre_box(256, 320)
    (16.0, 48.0, 240.0, 272.0)
  """
  side = CENTRE * min(width, height)
  left, upper = (width - side) / 2, (height - side) / 2
  return left, upper, left + side, upper + side
