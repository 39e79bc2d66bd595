"""Data folders: what is read, what is skipped and named, what is refused."""

import json

import pytest
from PIL import Image

from asdm import AsdmError
from asdm.incubation.data import load_pixels, open_data


def picture(path, size=(20, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 200 if mode == "L" else (250, 10, 10, 128)[: len(mode)]).save(path)


def test_captions_from_text_files_beside_the_images(tmp_path):
    for name in ("b.png", "a.jpg", "deeper/c.webp"):
        picture(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f" caption of\n {name} ")
    data = open_data(tmp_path)
    assert [example.caption for example in data.examples] == [
        "caption of a.jpg",
        "caption of b.png",
        "caption of deeper/c.webp",
    ]
    assert data.skipped == {}


def test_a_corrupt_image_among_good_ones_is_named_and_skipped(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        picture(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    (tmp_path / "b.png").write_bytes(b"not an image")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    (tmp_path / "d.txt").write_text(" \n")
    data = open_data(tmp_path)
    assert [example.name for example in data.examples] == ["a.png"]
    assert set(data.skipped) == {"b.png", "c.png", "d.png"}
    assert "caption is empty" in data.skipped["d.png"]


def test_a_truncated_jpeg_is_found_when_it_is_decoded(tmp_path):
    picture(tmp_path / "a.jpg", size=(200, 200))
    (tmp_path / "a.txt").write_text("red")
    picture(tmp_path / "b.jpg", size=(200, 200))
    (tmp_path / "b.txt").write_text("red")
    whole = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) - 100])
    skipped = {}
    examples, pixels = load_pixels(open_data(tmp_path).examples, 16, skipped)
    assert [example.name for example in examples] == ["a.jpg"]
    assert len(pixels) == 1
    assert list(skipped) == ["b.jpg"]


def test_metadata_rows_split_and_label(data_folder):
    with (data_folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "absent.png", "text": "x"}\nnot json\n{"file_name": "0.png", "text": ""}\n')
    data = open_data(data_folder)
    assert len(data) == 5
    assert data.skipped["absent.png"] == "no such file"
    assert "metadata.jsonl:8" in data.skipped
    assert [example.caption for example in open_data(data_folder, "held_out").examples] == ["image 5"]
    assert len(open_data(data_folder, "all")) == 6


@pytest.mark.parametrize("kind", ["absent", "empty", "captionless", "only corrupt"])
def test_a_folder_without_a_usable_pair_is_refused(tmp_path, kind):
    folder = tmp_path / "data"
    if kind != "absent":
        folder.mkdir()
    if kind in ("captionless", "only corrupt"):
        picture(folder / "a.png")
    if kind == "only corrupt":
        (folder / "a.txt").write_text("a")
        (folder / "a.png").write_bytes(b"x")
    with pytest.raises(AsdmError, match=str(folder)) as error:
        open_data(folder)
    assert "DATA is a folder of images with captions" in str(error.value)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_pixels_are_square_and_in_range(tmp_path, mode):
    picture(tmp_path / "a.png", size=(40, 24), mode=mode)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a"}))
    pixels = open_data(tmp_path).examples[0].pixels(16)
    assert pixels.shape == (3, 16, 16)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    if mode == "RGBA":  # half transparent red on white
        assert pixels[1].mean() > -0.1
