"""Examples of WebDataset shards, on disk or from afar."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from asdm.data.examples import Example, Split, Unread, Unusable, caption_of, example_of, in_split, state_of
from asdm.data.metadata import text_in
from asdm.data.names import data_help
from asdm.errors import AsdmError, needs_extra, one_line
from asdm.images import UNREAD_SUFFIXES, readable_suffixes
from asdm.reading import parse_json

SUFFIX = ".tar"
MAX_SAMPLE = 256 * 2**20  # bytes of a sample's files
_ABOUT_SHARD = re.compile("__[^/]*__($|/)")  # names of what says something of a whole shard


class ShardSource:
    """WebDataset shards, as img2dataset writes them: an image, and its caption as `.txt` or in the `.json`.

    Args:
        urls: paths or URLs, or one pattern such as `https://host/{00000..00099}.tar`.
    """

    def __init__(self, urls: str | list[str], split: Split):
        with needs_extra("data", "WebDataset shards"):
            from webdataset import shardlists
        self.urls = shardlists.expand_urls(urls) if isinstance(urls, str) else urls
        commands = [url for url in self.urls if url.startswith("pipe:")] if isinstance(urls, str) else []
        if commands:
            raise AsdmError(f"{commands[0]}: a command, which is not run; DATA is {data_help()}")
        self.split = split
        names = [url.rpartition("/")[2] for url in self.urls]
        self.names = names if len(set(names)) == len(names) else self.urls  # keys may be the same in every shard
        self.remote = any("://" in url for url in self.urls)
        absent = [url for url in self.urls if "://" not in url and not Path(url).is_file()]
        if absent:
            raise AsdmError(f"{absent[0]}: no such shard ({len(absent)} of {len(self.urls)}); DATA is {data_help()}")
        self.identity = json.dumps([url if "://" in url else state_of(Path(url)) for url in self.urls])

    def __len__(self) -> int:
        return len(self.urls)

    def read(self, piece: int) -> Iterator[Example | Unusable]:
        from webdataset.tariterators import group_by_keys, url_opener

        url = self.urls[piece]
        faults: list[Unusable] = []

        def note(error: Exception) -> bool:
            kind = Unread if "://" in url else Unusable
            faults.append(kind(url, f"not read to its end: {one_line(error)}"))
            return False

        def opened() -> Iterator[Any]:
            if "://" in url:
                yield from (shard["stream"] for shard in url_opener([{"url": url}], handler=note))
                return
            try:  # a file is one, whatever its name has before a colon
                with Path(url).open("rb") as file:
                    yield file
            except OSError as error:
                note(error)

        members = (member for stream in opened() for member in _members(stream, url, note))
        for sample in group_by_keys(members, handler=note):
            row = _from_sample(f"{self.names[piece]}/{sample['__key__']}", sample)
            if isinstance(row, Unusable) or in_split(row, self.split):
                yield row
        yield from faults


def _members(stream: Any, url: str, note: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """Yield a shard's files with their contents, then the mark of its end; links and folders are passed over. Nothing
    is unpacked to the disk, and a sample of more than `MAX_SAMPLE` bytes ends the shard."""
    key, size = None, 0
    try:
        # What is compressed could be of any size, and tells itself by its name.
        with tarfile.open(fileobj=stream, mode="r|" if url.lower().endswith(SUFFIX) else "r|*") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # which would keep all headers
                if not member.isreg() or _ABOUT_SHARD.match(member.name):
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem = folder + slash + name.partition(".")[0]
                key, size = stem, member.size + (size if stem == key else 0)
                if size > MAX_SAMPLE or member.issparse():
                    raise ValueError(f"{member.name}: more than {MAX_SAMPLE >> 20} MB in a sample")
                content = archive.extractfile(member)
                yield {"fname": member.name, "data": b"" if content is None else content.read(), "__url__": url}
            if not archive.fileobj.read(tarfile.BLOCKSIZE):  # type: ignore[union-attr]
                raise ValueError("it has no mark of its end")
    except Exception as error:  # of tarfile and of what streams from afar
        note(error)
    yield {}


def _from_sample(name: str, sample: dict[str, Any]) -> Example | Unusable:
    """Return a sample of a shard."""
    members = sorted(key for key in sample if not key.startswith("__"))
    found = f"its members are {', '.join(f'.{member}' for member in members)}"
    try:
        about = parse_json(sample.get("json") or b"{}")
    except ValueError:
        return Unusable(name, "its .json is damaged")
    if not isinstance(about, dict):
        return Unusable(name, "its .json has no fields")
    suffixes = readable_suffixes()
    images = [member for member in members if f".{member}" in suffixes]
    if not images:
        unread = next((member for member in members if f".{member}" in UNREAD_SUFFIXES), None)
        why = "" if unread is None else f"; this Pillow does not read .{unread}, convert it to PNG or JPEG"
        # WebDataset takes everything behind the first dot of a name for the suffix
        why = why or ("; its name has a dot too many" if any("." in member for member in members) else "")
        return Unusable(name, f"it has no image: {found}{why}")
    text = text_in(sample["txt"]) if "txt" in sample else None
    caption = text if text is not None and text.strip() else caption_of(about)
    if caption is None and text is None:
        fields = f", its .json's fields {', '.join(map(str, about)) or 'none'}" if "json" in sample else ""
        return Unusable(name, f"it has no caption, as .txt or as caption, text or prompt in .json: {found}{fields}")
    return example_of(name, caption, sample[next(key for key in sample if key in images)], about)
