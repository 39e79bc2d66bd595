"""Names of models and of the folders that keep their images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from asdm.digests import short_digest
from asdm.errors import AsdmError, one_line
from asdm.files import replacing_file, write_text
from asdm.images import to_images
from asdm.reading import read_json

IMAGE_TO_IMAGE = "image-to-image"  # the folder of images that start from images
LONGEST_NAME = 160  # bytes of a folder's name; file systems have 255, and what is added to it needs some
DISTANCES = "distances.json"  # beside a model's images: how far each is from the teacher's


def distinct_names(places: Sequence[str], *, shortest: bool = False) -> list[str]:
    """Name each model by its path, no name twice; a repeated path gets a number.

    Args:
        shortest: use the shortest end of the path that no other model has.
    """
    names: list[str] = []
    for place in places:
        plain = _distinct_end(place, places) if shortest else place
        name, number = plain, 1
        while name in names:
            number += 1
            name = f"{plain} ({number})"
        names.append(name)
    return names


def _distinct_end(place: str, places: Sequence[str]) -> str:
    parts = Path(place).parts
    others = {Path(other).parts for other in places} - {parts}
    for length in range(1, len(parts) + 1):
        if all(other[-length:] != parts[-length:] for other in others):
            return "/".join(parts[-length:])
    return place


def folder_names(names: Sequence[str]) -> dict[str, str]:
    """Return the folder's name for each model's name, none twice."""
    return dict(zip(names, distinct_names([folder_name(name) for name in names]), strict=True))


def folder_name(name: str) -> str:
    """Turn a model's name into a folder's name, without separators of a path. Of a long one its end stays, and a digest
    of all."""
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name).lstrip(".") or "model"
    if len(plain.encode()) <= LONGEST_NAME:
        return plain
    end = plain.encode()[-LONGEST_NAME // 2 :].decode(errors="ignore")
    return f"{short_digest(name)[:12]}_{end}"


def save_images(images: Tensor, folder: Path) -> None:
    """Write images (images, 3, h, w) in [-1, 1] as 0000.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(to_images(images)):
        with replacing_file(folder / image_name(index)) as partial:
            image.save(partial, "PNG")


def image_name(index: int) -> str:
    """Return the name of the file of a prompt's image."""
    return f"{index:04d}.png"


def save_distances(distances: Tensor, folder: Path) -> None:
    """Write how far each image is from the teacher's: 1 - cosine (images,) of the judge's features."""
    write_text(folder / DISTANCES, json.dumps([round(value, 6) for value in distances.tolist()]) + "\n")


def load_distances(folder: Path) -> list[float] | None:
    """Return what `save_distances` wrote; None in folders of earlier versions.

    Raises:
        AsdmError: the file is damaged.
    """
    path = folder / DISTANCES
    if not path.is_file():
        return None
    try:
        return [float(value) for value in read_json(path)]
    except (OSError, ValueError, TypeError) as error:
        raise AsdmError(f"{path}: damaged ({one_line(error)}); remove it, and evaluate again") from None
