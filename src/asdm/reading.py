"""Reading of JSON and YAML that a stranger may have written.

Every fault of such a text is a ValueError of one line. What is returned is bounded: how deep it is nested, how large
its whole numbers are, and how much the aliases of YAML repeat.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from asdm.errors import one_line

MAX_DEPTH = 64  # of lists and objects in each other; Python's stack ends at about a thousand
MAX_YAML_VALUES = 100_000  # aliases written out, which can otherwise repeat a kilobyte to gigabytes
MAX_WHOLE = 2**63 - 1  # what tensors and arrays can hold


def read_json(path: Path, largest: float = MAX_WHOLE) -> Any:
    """Read a file of JSON in UTF-8, with or without a mark at its beginning.

    Args:
        largest: of its whole numbers.

    Raises:
        OSError: it cannot be read.
        ValueError: as `parse_json`.
    """
    return parse_json(path.read_text("utf-8-sig"), largest)


def parse_json(text: str | bytes, largest: float = MAX_WHOLE) -> Any:
    """Parse JSON.

    Args:
        largest: of its whole numbers.

    Raises:
        ValueError: it is no JSON, nested too deeply, or has a whole number of more than 64 bits.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _require_bounded(content, largest=largest)
    return content


def parse_yaml(text: str) -> Any:
    """Parse YAML, its plain types alone. Keys become texts, as in JSON: fields of records have names.

    Raises:
        ValueError: it is no YAML, nested too deeply, or its aliases repeat too much.
    """
    try:
        content = yaml.safe_load(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except Exception as error:  # PyYAML's constructors of numbers and dates raise many kinds
        raise ValueError(one_line(error)) from None
    _require_bounded(content, MAX_YAML_VALUES)
    return _with_text_keys(content)


def _with_text_keys(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _with_text_keys(value) for key, value in content.items()}
    return [_with_text_keys(value) for value in content] if isinstance(content, list) else content


_TOO_DEEP = f"nested more than {MAX_DEPTH} deep"


def _require_bounded(content: Any, most: float = float("inf"), largest: float = MAX_WHOLE) -> None:
    """Raise a ValueError where plain data is too deep, too much, or holds a whole number that is too large."""
    level: list[Any] = [content]
    count = 1
    for _ in range(MAX_DEPTH):
        for value in level:
            if isinstance(value, int) and abs(value) > largest:
                raise ValueError(f"a whole number of {value.bit_length()} bits, more than 64")
        inside = [value for value in level if isinstance(value, list | dict)]
        count += sum(map(len, inside))  # before the next level is made
        if count > most:
            raise ValueError(f"more than {most} values, aliases written out")
        level = [each for value in inside for each in (value.values() if isinstance(value, dict) else value)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)
