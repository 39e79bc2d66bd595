"""Damaged and hostile files: bytes, JSON, YAML, safetensors, images and archives, made from valid ones."""

from __future__ import annotations

import copy
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st
from PIL import Image

HOSTILE_TEXTS = [
    "", "../../escaped", "/tmp/escaped", "..", ".", "~", "a\nb", "\x1b[2J", "\0", "\u202e", "\ud800", "x" * 5000,
    "__import__('os').system('id')", "!!python/object/apply:os.system [id]", "os", "asdm.cli", "NaN", "{}", "%s%n",
    "mid_block", "down_blocks.0.resnets.0", "torch.load", "AutoModel", "unet", "https://127.0.0.1:9/x", "-1", "é" * 300,
]  # fmt: skip
HOSTILE_NUMBERS = [
    0, -1, 1, 2, 3, 7, 255, 2**16, 10**6, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400,
    0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(HOSTILE_NUMBERS),
    st.integers(),
    st.floats(),
    st.sampled_from(HOSTILE_TEXTS),
    st.text(max_size=20),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(HOSTILE_TEXTS), st.text(max_size=8)), inner, max_size=4),
    ),
    max_leaves=6,
)


def _places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        yield from _places(value, (*path, key))


def _set(content: Any, path: tuple[Any, ...], change: Any) -> Any:
    """Return the content with `change(value)` at a place; `...` removes it."""
    if not path:
        return change(content)
    copied = copy.copy(content)
    value = _set(content[path[0]], path[1:], change)
    if value is ...:
        del copied[path[0]]
    else:
        copied[path[0]] = value
    return copied


@st.composite
def mutated(draw: st.DrawFn, valid: Any) -> Any:
    """Plain data near `valid`: up to three values are replaced, removed, repeated, wrapped or renamed."""
    content = valid
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(content))
        place = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "wrap", "repeat", "rename"]))
        if kind == "replace":
            new = draw(values)
            content = _set(content, place, lambda _, new=new: new)
        elif kind == "remove" and place:
            content = _set(content, place, lambda _: ...)
        elif kind == "wrap":
            content = _set(content, place, lambda value: [value])
        elif kind == "repeat":
            count = draw(st.sampled_from([2, 50]))
            content = _set(
                content,
                place,
                lambda value, n=count: (
                    value * n if isinstance(value, list | str) and len(str(value)) < 2000 else [value]
                ),
            )
        elif kind == "rename":
            name = draw(st.one_of(st.sampled_from(HOSTILE_TEXTS), st.text(max_size=8)))
            content = _set(
                content,
                place,
                lambda value, n=name: (
                    {**dict(list(value.items())[1:]), n: next(iter(value.values()))}
                    if isinstance(value, dict) and value
                    else {n: value}
                ),
            )
    return content


def dumped(content: Any) -> bytes:
    """JSON with all that Python writes; half an emoji stays an escape."""
    return json.dumps(content, default=str).encode()


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Bytes near `valid`: cut short, with bytes changed, chunks lost, repeated or foreign."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["cut", "flip", "flip", "lose", "repeat", "insert", "zero"]))
        start = draw(st.integers(0, len(content)))
        length = draw(st.integers(1, 16))
        if kind == "cut":
            del content[start:]
        elif kind == "flip" and content:
            content[min(start, len(content) - 1)] = draw(st.integers(0, 255))
        elif kind == "lose":
            del content[start : start + length]
        elif kind == "repeat":
            content[start:start] = bytes(content[start : start + length]) * draw(st.sampled_from([1, 100]))
        elif kind == "insert":
            content[start:start] = draw(st.binary(max_size=16))
        elif kind == "zero":
            content[start : start + length] = bytes(len(content[start : start + length]))
    return bytes(content)


def json_files(valid: Any) -> st.SearchStrategy[bytes]:
    """Files of JSON near a valid one."""
    return st.one_of(
        mutated(valid).map(dumped),
        mutated(valid).map(dumped),
        damaged(dumped(valid)),
        values.map(dumped),
        st.binary(max_size=40),
        st.sampled_from(
            [b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 5_000, b"[" * 500 + b"]" * 500, b"9" * 5_000, b"null", b"NaN",
             b"\xef\xbb\xbf{}", dumped(valid).decode().encode("utf-16"), b"[]", b"{}", b'"x"']
        ),
    )  # fmt: skip


_BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
)
HOSTILE_YAML = [
    _BOMB, "- &a [*a]", "&a {a: *a}", "- 2001-99-99", "- !!int ''", "- !!float x", "- !!timestamp x", "- 0b",
    "- 1:99:99", "- !!python/object/apply:os.system [id]", "- !!python/name:os.system", "- !!binary x",
    "? [a]\n: b", "- 0o9", "---\n---", "- {name: x, steps: 2001-01-01}", "- {name: !!set {a}, steps: 1}",
    "[" * 3000, "- " * 3000, "%YAML 9.9\n--- 1", "- =", "<<: 1", "prediction_type: [a]", "- !!omap [a]", "- 0x", "- ._",
    "model: {params: {parameterization: 2001-01-01}}", "- 9" + "9" * 5000,
]  # fmt: skip


def yaml_files(valid: Any) -> st.SearchStrategy[bytes]:
    """Files of YAML near a valid one; JSON is YAML too."""
    return st.one_of(
        json_files(valid),
        st.sampled_from([text.encode() for text in HOSTILE_YAML]),
        st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace")),
    )


# -- safetensors ------------------------------------------------------------------------------------------

DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "U64",
    "C64",
    "",
]


MARKERS = [
    "v_pred", "ztsnr", "edm_mean", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "global_step", "scaled_fp8",
    "a.lora_A.weight", "lora_unet_x.alpha", "0.exp_avg", "x.y", "99.step",
]  # fmt: skip
METADATA = [
    "modelspec.prediction_type", "modelspec.architecture", "ss_v_parameterization", "zsnr", "asdm.unet_config",
    "asdm.edits", "lora_adapter_metadata", "format", "global_step",
]  # fmt: skip


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_safetensors(header: Any, body: bytes) -> bytes:
    text = dumped(header)
    return struct.pack("<Q", len(text)) + text + body


def _sized(dtype: str, shape: list[int]) -> int:
    bits = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "U64": 64, "C64": 64}.get(
        dtype, 8
    )
    count = 1
    for side in shape:
        count *= side
    return count * bits // 8


@st.composite
def other_tensors(draw: st.DrawFn, valid: bytes) -> bytes:
    """Whole safetensors files with other tensors: lost, renamed, of other shapes or dtypes, and other metadata."""
    header, _ = split_safetensors(valid)
    metadata = dict(header.pop("__metadata__", {}))
    tensors = {name: (each["dtype"], each["shape"]) for name, each in header.items()}
    for _ in range(draw(st.integers(1, 4))):
        if not tensors:
            break
        name = draw(st.sampled_from(sorted(tensors)))
        dtype, shape = tensors[name]
        kind = draw(st.sampled_from(["lose", "rename", "reshape", "dtype", "lose many", "metadata", "add"]))
        if kind == "lose":
            del tensors[name]
        elif kind == "rename":
            tensors[draw(st.one_of(st.sampled_from(HOSTILE_TEXTS[:-1]), st.text(max_size=20)))] = tensors.pop(name)
        elif kind == "reshape":
            tensors[name] = (
                dtype,
                draw(st.lists(st.integers(0, 40), max_size=5).filter(lambda sides: _sized("F64", sides) < 2**20)),
            )
        elif kind == "dtype":
            tensors[name] = (draw(st.sampled_from(DTYPES[:12])), shape)
        elif kind == "lose many":
            part = draw(st.sampled_from(name.split(".")))
            tensors = {key: value for key, value in tensors.items() if part not in key}
        elif kind == "add":
            new = draw(st.sampled_from(MARKERS))
            tensors[new] = (draw(st.sampled_from(["F32", "F16", "I64"])), draw(st.sampled_from([[], [0], [1], [2, 3]])))
        else:
            key = draw(st.sampled_from(METADATA))
            metadata[key] = draw(
                st.one_of(
                    st.sampled_from([*HOSTILE_TEXTS[:-6], "null", "[]", "[" * 3000, "1" * 5000]),
                    values.map(lambda v: dumped(v).decode()),
                )
            )
    entries, place = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = _sized(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    fill = draw(st.sampled_from([b"\0", b"\x7f", b"\xff"]))
    return join_safetensors({"__metadata__": metadata, **entries} if metadata else entries, fill * place)


def tensor_files(valid: bytes) -> st.SearchStrategy[bytes]:
    """Safetensors files near a valid one, whole or broken."""
    header, body = split_safetensors(valid)
    start = len(valid) - len(body)
    lengths = st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1, 10**8])
    return st.one_of(
        other_tensors(valid),
        other_tensors(valid),
        mutated(header).map(lambda changed: join_safetensors(changed, body)),
        damaged(valid[:start]).map(lambda changed: changed + body),
        st.integers(0, len(valid)).map(lambda length: valid[:length]),
        lengths.map(lambda length: struct.pack("<Q", length) + valid[8:]),
        st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02cos\nsystem\n(S'id'\ntR.", struct.pack("<Q", 2) + b"{}"]),
    )


# -- images -----------------------------------------------------------------------------------------------


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes = b"", *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says it is of these sides, with these compressed pixels and other chunks."""
    about = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    inside = [(b"IHDR", about), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*each) for each in inside)


def _bombs() -> list[bytes]:
    much = zlib.compress(bytes(20_000_000), 9)
    return [
        png(60_000, 60_000, much),
        png(2**31 - 1, 2**31 - 1, much),
        png(9_000, 9_000, much),  # fewer than Pillow refuses
        png(16, 16, much),
        png(0, 0),
        png(16, 16, zlib.compress(bytes(16 * 49)), (b"zTXt", b"asdm\0\0" + much)),
        png(16, 16, zlib.compress(bytes(16 * 49)), (b"iCCP", b"x\0\0" + much)),
        png(16, 16, zlib.compress(bytes(16 * 49)), (b"tEXt", b"asdm\0" + b"[" * 5000)),
        png(16, 16, zlib.compress(bytes(16 * 49)), (b"iTXt", b"asdm\0\1\0\0\0" + much)),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n",
        b"GIF89a"
        + struct.pack("<HH", 65535, 65535)
        + b"\x80\0\0"
        + b"\0" * 6
        + b",\0\0\0\0"
        + struct.pack("<HH", 65535, 65535)
        + b"\0\x08\x02\x00;",
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
        b"P6 99999 99999 255\n",
        b"P5 0 1 255\n",
    ]


def _pictures() -> list[bytes]:
    found = []
    picture = Image.linear_gradient("L").resize((16, 12)).convert("RGB")
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "JPEG2000", "PCX", "SGI", "DDS"):
        content = io.BytesIO()
        picture.save(content, format=kind)
        found.append(content.getvalue())
    return found


def image_files() -> st.SearchStrategy[bytes]:
    """Images of many formats, damaged; and what decompresses to far more than its size."""
    return st.one_of(
        st.sampled_from(_pictures()).flatmap(damaged),
        st.sampled_from(_pictures()).flatmap(damaged),
        st.sampled_from(_bombs()),
        st.binary(max_size=60),
    )


# -- archives ---------------------------------------------------------------------------------------------

MEMBERS = [
    "0.png", "0.txt", "0.json", "1.jpg", "1.txt", "../../escaped.png", "/tmp/escaped.txt", "a/../../escaped.txt",
    "0.pyd", "0.pkl", "0.pickle", "0.pth", "0.npy", "0.cls", "x", "", ".", "0.tar", "\udc80.png", "0.PNG", "é.png",
    "n" * 300 + ".png",
]  # fmt: skip
KINDS = [
    tarfile.REGTYPE, tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE,
    tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE,
]  # fmt: skip


def tarred(members: list[tuple[str, bytes, bytes]]) -> bytes:
    """A tar of (name, kind, content)."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, kind, inside in members:
            about = tarfile.TarInfo(name)
            about.type, about.size = kind, len(inside) if kind == tarfile.REGTYPE else 0
            about.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            archive.addfile(about, io.BytesIO(inside))
    return content.getvalue()


def archives() -> st.SearchStrategy[bytes]:
    """WebDataset shards with members that leave the folder, links, pickles, bombs and damage."""
    inside = st.one_of(
        st.sampled_from(_pictures()[:3]),
        st.sampled_from([b"a cat", b"\xff", b"\x80\x02cos\nsystem\n(S'id'\ntR.", b""]),
        json_files({"caption": "a cat", "held_out": False}),
        image_files(),
    )
    member = st.tuples(st.sampled_from(MEMBERS), st.sampled_from(KINDS), inside)
    whole = st.lists(member, max_size=5).map(tarred)
    good = tarred([("0.png", tarfile.REGTYPE, _pictures()[0]), ("0.txt", tarfile.REGTYPE, b"a cat")])
    return st.one_of(whole, whole, damaged(good), st.binary(max_size=600))
