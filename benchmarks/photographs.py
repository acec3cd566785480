"""Crops of the photographs that ship with scikit-image and scikit-learn, for networks of ImageNet.

Crops for calibration come from other photographs than crops for evaluation.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

CALIBRATION = (
    "skimage:astronaut.png",
    "skimage:brick.png",
    "skimage:camera.png",
    "skimage:cell.png",
    "skimage:clock_motion.png",
    "skimage:coins.png",
    "skimage:grass.png",
    "skimage:hubble_deep_field.jpg",
    "skimage:ihc.png",
    "skimage:motorcycle_left.png",
    "skimage:page.png",
    "skimage:retina.jpg",
    "sklearn:china.jpg",
)
EVALUATION = (
    "skimage:chelsea.png",
    "skimage:coffee.png",
    "skimage:gravel.png",
    "skimage:moon.png",
    "skimage:rocket.jpg",
    "sklearn:flower.jpg",
)
SIZE = 224
MEAN = (0.485, 0.456, 0.406)
STANDARD_DEVIATION = (0.229, 0.224, 0.225)


def crops(photographs: tuple[str, ...], count: int, seed: int = 0) -> Tensor:
    """Random crops, the photographs in turn: (count, 3, 224, 224) with normalised colours.

    A crop is a square of half to all of the photograph's shorter side, mirrored half of the time.
    """
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    images = [Image.open(_path(name)).convert("RGB") for name in photographs]
    found = []
    for number in range(count):
        image = images[number % len(images)]
        share, across, down, mirrored = torch.rand(4, generator=generator).tolist()
        side = int(min(image.size) * (0.5 + 0.5 * share))
        left = int((image.width - side) * across)
        top = int((image.height - side) * down)
        box = (left, top, left + side, top + side)
        square = image.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
        colours = pixels.reshape(SIZE, SIZE, 3).permute(2, 0, 1) / 255
        found.append(colours.flip(2) if mirrored < 0.5 else colours)
    mean, deviation = (torch.tensor(c).reshape(3, 1, 1) for c in (MEAN, STANDARD_DEVIATION))
    return (torch.stack(found) - mean) / deviation


def _path(name: str) -> Path:
    library, file = name.split(":")
    if library == "skimage":
        import skimage

        return Path(skimage.__file__).parent / "data" / file
    import sklearn.datasets

    return Path(sklearn.datasets.__file__).parent / "images" / file
