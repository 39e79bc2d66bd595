"""Captions without images: the teacher generates the images that it teaches by."""

from __future__ import annotations

from collections.abc import Iterator

from asdm.data.examples import Example, Split, Unusable, caption_fault, count_of_pieces, digest, rows_of_piece


class CaptionSource:
    """Captions, one a line."""

    remote = False

    def __init__(self, name: str, captions: list[str], split: Split):
        self.split = split
        captions = [] if split == "held_out" else captions
        self.rows = [_row(f"{name}:{n}", caption) for n, caption in enumerate(captions, 1) if caption.strip()]
        self.identity = digest([getattr(row, "caption", None)] for row in self.rows)

    def __len__(self) -> int:
        return count_of_pieces(len(self.rows))

    def read(self, piece: int) -> Iterator[Example | Unusable]:
        yield from (self.rows[index] for index in rows_of_piece(piece, len(self.rows)))


def _row(name: str, caption: str) -> Example | Unusable:
    fault = caption_fault(caption)
    return Example(name, " ".join(caption.split())) if fault is None else Unusable(name, f"its caption {fault}")
