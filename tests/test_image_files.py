"""Images that are generated into a folder: what is saved, and under which names."""

import numpy as np
import pytest
from asdm.diffusion.image_files import generate_files, open_inputs
from PIL import Image

from asdm import AsdmError, generate
from asdm.diffusion import image_files
from asdm.images import to_images


def test_images_do_not_depend_on_when_they_are_saved(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "IMAGES_PER_SAVE", 2)
    prompts, done = ["pear", "a tree, green", "pear"], []
    paths = generate_files(
        pipeline, prompts, tmp_path / "out", steps=2, seed=5, progress=lambda *counts: done.append(counts)
    )
    assert [path.name for path in paths] == ["pear.png", "a_tree__green.png", "pear-1.png"]
    assert done[-1] == (3, 3)
    for path, expected in zip(paths, to_images(generate(pipeline, prompts, steps=2, seed=5)), strict=True):
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_an_image_and_its_mask_are_cropped_to_squares(pipeline, tmp_path):
    Image.new("RGB", (24, 16), "red").save(tmp_path / "image.png")
    Image.new("L", (24, 16), 255).save(tmp_path / "mask.png")
    inputs = open_inputs(tmp_path / "image.png", tmp_path / "mask.png")
    (path,) = generate_files(pipeline, ["pear"], tmp_path / "out", inputs=inputs, steps=2, strength=0.5)
    with Image.open(path) as image:
        assert image.size == (16, 16)
    Image.new("L", (8, 8)).save(tmp_path / "mask.png")
    with pytest.raises(AsdmError, match=r"mask.png: \(8, 8\) pixels; it must be of the size"):
        open_inputs(tmp_path / "image.png", tmp_path / "mask.png")
