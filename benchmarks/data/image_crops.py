"""Decoding images, and which box of each to keep, as is usual for ImageNet."""

import io
import math

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]

KINDS = ("JPEG", "PNG", "WEBP")
# Share of the image's area, and ratio of the sides, of a random crop.
AREAS = (0.08, 1.0)
RATIOS = (3 / 4, 4 / 3)
CENTRE = 224 / 256  # of the shorter side, for evaluation


def decode(encoded: bytes | None) -> Image.Image | None:
  """Returns an image in RGB, or None if it is damaged.

  Args:
    encoded: JPEG, PNG or WebP.
  """
  try:
    with Image.open(io.BytesIO(encoded or b""), formats=KINDS) as image:
      return image.convert("RGB")
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
    return None


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
