"""Data folders: what is read, what is skipped and named, what is refused."""

import io
import json
import struct
import tarfile
import zipfile

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from asdm import AsdmError
from asdm.data import sources as data_module
from asdm.data.examples import Example, example_of, load_pixels
from asdm.data.sources import AT_HAND, open_data, open_source
from asdm.distillation.caption_only import read_captions
from asdm.images import open_image, to_tensor


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


def test_images_are_turned_as_their_exif_says(tmp_path):
    image = Image.new("RGB", (8, 8), "blue")
    image.paste("red", (0, 0, 8, 4))
    turned = image.getexif()
    turned[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=turned)
    (tmp_path / "a.txt").write_text("a")
    pixels = open_data(tmp_path).examples[0].pixels(8)
    assert pixels[2, 0].mean() == 1 and pixels[0, -1].mean() == 1
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (0, 0, 255)


def test_what_is_odd_is_named_and_never_fatal(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # a bomb has twice as many
    picture(tmp_path / "large.png", size=(20, 20))
    picture(tmp_path / "good.png", size=(8, 8))
    rows = [
        {"file_name": "good.png", "text": "half a smile \ud83d"},
        {"file_name": "large.png", "text": "large"},
        {"file_name": 7, "text": "a number"},
        {"file_name": 300 * "long", "text": "long"},
        {"file_name": "good.png", "text": {"not": "text"}, "concept": ["x"]},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = open_data(tmp_path)
    assert [example.caption for example in data.examples] == ["half a smile ?"]
    assert "decompression bomb" in data.skipped["large.png"]
    assert "no text" in data.skipped["good.png"] and len(data.skipped) == 4


def test_the_first_of_several_captions(tmp_path):
    rows = {"image": [Image.new("RGB", (16, 16), "red")] * 2, "caption": [["one", "two"], []]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(tmp_path / "set")
    data = open_data(f"hf:{tmp_path / 'set'}")
    assert [example.caption for example in data.examples] == ["one"] and len(data.skipped) == 1


def test_a_dataset_on_disk_that_refers_to_places_outside_its_file_is_refused(tmp_path):
    """Reading those places ended the process."""
    rows = {"image": [Image.new("RGB", (16, 16), "red")] * 2, "caption": ["a cat", "a small dog"]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    lengths, beyond = (struct.pack("<3i", 0, 5, end) for end in (16, 2**30))
    assert file.read_bytes().count(lengths) == 1
    file.write_bytes(file.read_bytes().replace(lengths, beyond))
    with pytest.raises(AsdmError, match=r"\.arrow: damaged .*; save the dataset again"):
        open_data(f"hf:{tmp_path / 'set'}")


def test_a_dataset_whose_images_lie_elsewhere(tmp_path, monkeypatch):
    """As those of image folders on the Hub do: the rows hold an address, not bytes."""
    picture(tmp_path / "a.png", size=(16, 16))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    address = f"zip://a.png::{tmp_path / 'images.zip'}"
    rows = {"image": [{"path": address, "bytes": None}, {"path": address + ".gone", "bytes": None}], "text": ["a", "b"]}
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    streamed = datasets.Dataset.from_dict(rows, features=features).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: streamed)
    data = open_data("hf:owner/images")
    assert torch.equal(data.examples[0].pixels(16), to_tensor(Image.open(tmp_path / "a.png"), 16))
    assert "cannot be read" in data.skipped["0/1"]


def test_of_what_comes_from_afar_little_is_read(monkeypatch):
    class Afar:
        remote, identity, read_so_far = True, "afar", 0

        def __len__(self):
            return 1000

        def read(self, piece):
            for number in range(1000):
                self.read_so_far += 1
                yield Example(f"{piece}/{number}", "a caption", b"")

    source = Afar()
    monkeypatch.setattr(data_module, "open_source", lambda *_: source)
    assert open_data("https://host/{000..999}.tar", "held_out").examples == []
    assert source.read_so_far == AT_HAND


def test_pixels_of_16_bits_and_of_any_transparency(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.new("L", (8, 8), 0).save(tmp_path / "gray.png", transparency=0)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    deep = to_tensor(Image.open(tmp_path / "deep.png"), 8)
    assert deep.min() == -1 and deep.max() == 1 and deep.mean().abs() < 0.01
    for name in ("gray", "clear"):
        assert to_tensor(Image.open(tmp_path / f"{name}.png"), 8).min() == 1
        assert open_image(tmp_path / f"{name}.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("F", (8, 8), 3.0).save(tmp_path / "float.tiff")
    with pytest.raises(AsdmError, match="floating-point numbers"):
        open_image(tmp_path / "float.tiff")


def test_captions_as_editors_write_them(tmp_path):
    (tmp_path / "far").mkdir()
    for name, text in (("a", "\ufeffa cat\r\n".encode()), ("b", "a dog".encode("utf-16"))):
        picture(tmp_path / "far" / f"{name}.png")
        (tmp_path / "far" / f"{name}.txt").write_bytes(text)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "set" / "itself").symlink_to(tmp_path / "set")
    data = open_data(tmp_path / "set")
    assert [(example.name, example.caption) for example in data.examples] == [("linked/a.png", "a cat")]
    assert data.skipped == {"linked/b.png": "its caption is not text in UTF-8"}
    (tmp_path / "captions.txt").write_bytes("a dog\na cat".encode("utf-16"))
    with pytest.raises(AsdmError, match="not text in UTF-8"):
        open_data(tmp_path / "captions.txt")
    rows = [{"file_name": "a.png", "text": "one\u2028line"}, {"file_name": "b.png", "text": "two"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "far" / "metadata.jsonl").write_text("\ufeff" + lines, "utf-8")
    (tmp_path / "far" / "backup.tar").write_bytes(b"not of the data")
    assert [example.caption for example in open_data(tmp_path / "far").examples] == ["one line", "two"]


def test_captions_that_are_no_utf_8_are_named_whatever_holds_them(tmp_path):
    latin = "café".encode("latin-1")
    folder = tmp_path / "beside"
    picture(folder / "a.png")
    (folder / "a.txt").write_bytes(latin)
    picture(folder / "b.png")
    (folder / "b.txt").write_text("café", "utf-8")
    table = tmp_path / "table"
    picture(table / "a.png")
    picture(table / "b.png")
    rows = b'{"file_name": "a.png", "text": "' + latin + '"}\n{"file_name": "b.png", "text": "café"}'.encode()
    (table / "metadata.jsonl").write_bytes(rows)
    (tmp_path / "lines.txt").write_bytes(latin + "\ncafé\n".encode())
    for source, name in ((folder, "a.png"), (table, "a.png"), (tmp_path / "lines.txt", "lines.txt:1")):
        data = open_data(source)
        assert [example.caption for example in data.examples] == ["café"]
        assert data.skipped == {name: "its caption is not text in UTF-8"}


def test_a_caption_is_that_of_the_field_that_says_something(tmp_path):
    rows = [
        {"file_name": "a.png", "text": None, "caption": "a cat"},
        {"file_name": "b.png", "text": " ", "prompt": "a dog"},
        {"file_name": "c.png", "caption": ["", None], "prompt": ["", "a fish"]},
        {"file_name": "d.png", "caption": None},
    ]
    for row in rows:
        picture(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = open_data(tmp_path)
    assert [example.caption for example in data.examples] == ["a cat", "a dog", "a fish"]
    assert data.skipped == {"d.png": "its caption is empty"}


def test_suffixes_of_captions_in_capitals(tmp_path):
    picture(tmp_path / "set" / "A.PNG")
    (tmp_path / "set" / "A.TXT").write_text("a cat")
    (tmp_path / "CAPTIONS.TXT").write_text("a dog\n")
    assert [example.caption for example in open_data(tmp_path / "set").examples] == ["a cat"]
    assert [example.caption for example in open_data(tmp_path / "CAPTIONS.TXT").examples] == ["a dog"]


def test_a_shard_beside_captioned_images_does_not_replace_them(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "backup.tar").write_bytes(b"")
    data = open_data(tmp_path)
    assert [example.caption for example in data.examples] == ["a cat"]
    assert data.skipped == {"backup.tar": "a shard among images is not read; name it by its own path"}


def test_where_all_rows_are_held_out_the_error_says_so(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a cat", "held_out": true}\n')
    with pytest.raises(AsdmError, match="all of its usable rows are held_out"):
        open_data(tmp_path)
    assert len(open_data(tmp_path, "held_out")) == 1


def test_a_file_of_captions_without_a_usable_one_says_why(tmp_path):
    (tmp_path / "captions.txt").write_text("x" * 10_001)
    for read in (open_data, read_captions):
        with pytest.raises(AsdmError, match=r"has no caption \(1 skipped, .*more than 10,000 characters"):
            read(tmp_path / "captions.txt")
    (tmp_path / "captions.tsv").write_text("a cat")
    with pytest.raises(AsdmError, match=r"captions.tsv: a file that is no DATA"):
        open_data(tmp_path / "captions.tsv")


def test_shards_that_were_written_anew_are_other_data(tmp_path, monkeypatch):
    (tmp_path / "0.tar").write_bytes(b"x" * 1024)
    monkeypatch.chdir(tmp_path)
    before = open_source("0.tar").identity
    assert open_source(tmp_path / "0.tar").identity == before
    (tmp_path / "0.tar").write_bytes(b"x" * 2048)
    assert open_source("0.tar").identity != before


CAPTIONED = {
    "0.png": "PNG",
    "1.avif": "AVIF",
    "2.gif": "GIF",
    "3.tiff": "TIFF",
    "4.jfif": "JPEG",
    "5.jp2": "JPEG2000",
    "6.ppm": "PPM",
    "7.TGA": "TGA",
}


def in_format(kind, color="red"):
    content = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(content, kind)
    return content.getvalue()


def test_a_folder_has_all_that_pillow_reads_and_names_what_it_does_not(tmp_path):
    for name, kind in CAPTIONED.items():
        (tmp_path / name).write_bytes(in_format(kind))
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}")
    data = open_data(tmp_path)
    assert [example.name for example in data.examples] == list(CAPTIONED)
    assert data.skipped == {}
    assert all(example.pixels(8)[0].mean() > 0.9 for example in data.examples)
    for name in ("8.heic", "9.JXL", "a.svg", "b.eps", "c.png"):
        (tmp_path / name).write_bytes(b"not for Pillow")
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    (tmp_path / "d.txt").write_text("an image that is not there")
    (tmp_path / "e.mp4").write_bytes(b"a film")
    (tmp_path / "e.txt").write_text("a film")
    (tmp_path / "f.bmp").write_bytes(in_format("BMP"))
    data = open_data(tmp_path)
    assert len(data) == 8
    assert data.skipped == {
        "8.heic": "this Pillow does not read .heic; convert it to PNG or JPEG",
        "9.JXL": "this Pillow does not read .jxl; convert it to PNG or JPEG",
        "a.svg": "this Pillow does not read .svg; convert it to PNG or JPEG",
        "b.eps": "this Pillow does not read .eps; convert it to PNG or JPEG",
        "c.png": "not a readable image: not an image that Pillow knows",
        "d.txt": "no image of its name is beside it",
        "e.txt": "no image of its name is beside it, only e.mp4",
        "f.bmp": "it has no caption: neither f.txt nor metadata.jsonl, .csv or .parquet is there",
    }


def test_a_postscript_named_png_is_not_run(tmp_path):
    (tmp_path / "a.png").write_bytes(in_format("EPS"))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(AsdmError, match="not an image that Pillow knows"):
        open_data(tmp_path)


def shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))


def test_a_shard_has_all_that_pillow_reads_and_says_what_its_other_samples_have(tmp_path):
    members = {}
    for name, kind in CAPTIONED.items():
        members |= {name: in_format(kind), f"{name[0]}.txt": b"a caption"}
    members |= {"8.heic": b"x", "8.txt": b"a"} | {"9.txt": b"a"} | {"a.jpg": in_format("JPEG"), "a.cls": b"1"}
    members |= {"b.jpg": in_format("JPEG"), "b.json": b'{"url": "u"}'} | {"c.1.jpg": in_format("JPEG"), "c.1.txt": b"a"}
    members |= {"d.jpg": in_format("JPEG"), "d.txt": b" "}
    shard(tmp_path / "0.tar", members)
    data = open_data(tmp_path)
    assert [example.name for example in data.examples] == [f"0.tar/{key}" for key in "01234567"]
    assert all(example.pixels(8)[0].mean() > 0.9 for example in data.examples)
    no_caption = "it has no caption, as .txt or as caption, text or prompt in .json: its members are"
    assert data.skipped == {
        "0.tar/8": "it has no image: its members are .heic, .txt; this Pillow does not read .heic, convert it to PNG "
        "or JPEG",
        "0.tar/9": "it has no image: its members are .txt",
        "0.tar/a": f"{no_caption} .cls, .jpg",
        "0.tar/b": f"{no_caption} .jpg, .json, its .json's fields url",
        "0.tar/c": "it has no image: its members are .1.jpg, .1.txt; its name has a dot too many",
        "0.tar/d": "its caption is empty",
    }


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for name in ("a.gif", "b.webp", "c.png", "d.tiff"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        (tmp_path / name).with_suffix(".txt").write_text(name)
    examples = open_data(tmp_path).examples
    assert len(examples) == 4
    assert all(example.pixels(8)[0].mean() > 0.9 for example in examples)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [(kind, fault) for kind in ("PNG", "WEBP", "JPEG") for fault in ("bytes", "all", "length")][:-1],
)  # by the length of a segment a JPEG's pixels are found
def test_damaged_metadata_is_no_fault_of_the_pixels(tmp_path, kind, fault):
    about = Image.Exif()
    about[0x0112], about[0x010E] = 3, "a description"
    image, content = Image.new("RGB", (16, 16), "blue"), io.BytesIO()
    image.paste("red", (0, 0, 16, 8))
    image.save(content, kind, exif=about, lossless=True, quality=95)
    whole = bytearray(content.getvalue())
    start = whole.index(b"MM\0*")
    if fault == "length":
        whole[start - 8 if kind == "PNG" else start - 4] += 3
    else:
        size = 4 if fault == "bytes" else len(about.tobytes()) - 6
        whole[start : start + size] = b"\xff" * size
    (tmp_path / "a.png").write_bytes(whole)
    (tmp_path / "a.txt").write_text("a")
    shard(tmp_path / "0.tar", {"a.png": bytes(whole), "a.txt": b"a"})
    (tmp_path / "shards").mkdir()
    (tmp_path / "0.tar").rename(tmp_path / "shards" / "0.tar")
    for found in (open_data(tmp_path), open_data(tmp_path / "shards")):
        pixels = found.examples[0].pixels(16)
        assert pixels[0, :7].mean() > 0.9 and pixels[2, -7:].mean() > 0.9  # not turned: nothing readable says so
    assert open_image(tmp_path / "a.png").getpixel((0, 0))[0] > 240


def test_a_bomb_and_what_breaks_off_are_skipped_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    noise = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    for name, size in {"good.png": 24, "bomb.webp": 64, "cut.png": 24, "cut.webp": 24}.items():
        Image.fromarray(np.resize(noise, (size, size, 3))).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    for name in ("cut.png", "cut.webp"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
    data = open_data(tmp_path)
    skipped = dict(data.skipped)
    kept, _ = load_pixels(data.examples, 8, skipped)
    assert [example.name for example in kept] == ["good.png"]
    assert "decompression bomb" in skipped["bomb.webp"]
    assert set(skipped) == {"bomb.webp", "cut.png", "cut.webp"}


CSV = """\ufefffile_name,text,held_out,concept
a.png,"a cat, asleep",,cat
deep/b.png,"a ""dog""
that barks",true,
c.png,,no,
gone.png,gone,0,
d.png,a cat, awake,0,
"""


@pytest.mark.parametrize("inside", [False, True])
def test_a_folder_with_a_table_as_the_datasets_library_reads_it(tmp_path, inside):
    folder = tmp_path / "träin" if inside else tmp_path
    for name in ("a.png", "deep/b.png", "c.png", "d.png", "e.png"):
        picture(folder / name)
    (folder / "metadata.csv").write_text(CSV, "utf-8")
    data = open_data(tmp_path, "all")
    start = "träin/" if inside else ""
    assert [(each.name, each.caption, each.held_out, each.concept) for each in data.examples] == [
        (f"{start}a.png", "a cat, asleep", False, "cat"),
        (f"{start}deep/b.png", 'a "dog" that barks', True, None),
    ]
    assert data.skipped == {
        f"{start}c.png": "its caption is empty",
        f"{start}gone.png": "no such file",
        f"{start}metadata.csv:7": "has more values than columns; put texts with commas between quotes",
        f"{start}d.png": "no row of the metadata names it",
        f"{start}e.png": "no row of the metadata names it",
    }


def test_held_out_is_read_as_tables_write_it(tmp_path):
    texts = {
        "yes": ["1", "1.0", "true", "True ", "yes", "x"],
        "no": ["", "0", "0.0", " false", "N", "off", "None", "nan"],
    }
    values = {"yes": [True, 1, 2.5], "no": [False, 0, 0.0, None, float("nan")]}
    for answer in ("yes", "no"):
        for value in (*texts[answer], *values[answer]):
            assert example_of("a", "a cat", b"", {"held_out": value}).held_out is (answer == "yes"), value


def test_tables_as_other_programs_write_them(tmp_path):
    picture(tmp_path / "a.png")
    rows = [",file_name,text", "0,a.png,a cat", "", '1,a.png,"a dog', "2,a.png,a bird"]
    (tmp_path / "metadata.csv").write_text("\r\n".join(rows))
    data = open_data(tmp_path)
    assert [example.caption for example in data.examples] == ["a cat"]
    assert data.skipped == {"metadata.csv:5": "not a row: unexpected end of data"}
    (tmp_path / "metadata.jsonl").write_text('"a.png"\n[1]\n{"file_name": "a.png", "caption": "a cat"}')
    data = open_data(tmp_path)
    assert [example.caption for example in data.examples] == ["a cat"]
    assert set(data.skipped) == {"metadata.jsonl:1", "metadata.jsonl:2"}
    assert "its fields are none" in data.skipped["metadata.jsonl:1"]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").rename(tmp_path / "metadata.parquet")
    with pytest.raises(AsdmError, match="cannot be read"):
        open_data(tmp_path)


def test_a_table_of_parquet_and_other_names_of_the_caption(tmp_path):
    picture(tmp_path / "a.png")
    table = pyarrow.table({"file_name": ["a.png", None], "prompt": ["a cat", "none"]})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    data = open_data(tmp_path)
    assert [example.caption for example in data.examples] == ["a cat"]
    assert "its fields are file_name, prompt" in data.skipped["metadata.parquet:2"]
    (tmp_path / "metadata.csv").write_text("file;text\na.png;a cat\n")
    with pytest.raises(AsdmError, match="its fields are file;text"):
        open_data(tmp_path)


@pytest.mark.parametrize("source", ["", None, 7, "a\0b"])
def test_no_data_folder_is_refused(source):
    with pytest.raises(AsdmError, match="data="):
        open_data(source)


def test_the_embedded_images_are_all_read():
    assert open_data("demo", "all").skipped == {}
