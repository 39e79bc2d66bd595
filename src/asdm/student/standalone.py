"""The architecture of a student as one module file, which a saved student carries so that it loads without asdm.

The file joins the modules of this package that the student's class imports, in order of their imports, as they stand;
nothing in it needs more than torch and diffusers.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from asdm.edits.base import EDIT_KINDS

_PACKAGE = "asdm"
_HEAD = '''"""A pruned denoiser, made with asdm: all that it takes to load one. Apache-2.0.

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

What was pruned is the list of edits in config.json. This file joins modules of the package asdm.
"""

from __future__ import annotations
'''
_OWN = '''def module_source(_: str) -> str:
    """Return this file's text, for a student that is saved again."""
    return Path(__file__).read_text("utf-8")'''


@lru_cache(maxsize=4)
def module_source(home: str) -> str:
    """Return the text of the file for the student's class that the module `home` defines."""
    imports: dict[str, set[str]] = {"pathlib": {"Path"}}  # module -> the names imported from it, "" for the module
    kinds = [kind.__module__ for kind in EDIT_KINDS.values() if kind.__module__.startswith(f"{_PACKAGE}.")]
    bodies = []
    for module in _in_order([*kinds, home]):
        text = _text(module)
        tree, lines = ast.parse(text), text.splitlines()
        for node in tree.body:
            if isinstance(node, ast.Import):
                for name in node.names:
                    imports.setdefault(ast.unparse(name), set()).add("")
            elif isinstance(node, ast.ImportFrom) and not _is_ours(node) and node.module != "__future__":
                imports.setdefault(node.module or "", set()).update(ast.unparse(name) for name in node.names)
        body = [node for node in tree.body[1:] if not isinstance(node, ast.Import | ast.ImportFrom)]
        last_import = max(node.end_lineno or 0 for node in tree.body if node not in body)
        about = f"{module}: {ast.get_docstring(tree)}".splitlines()
        comment = "\n".join(f"# {line}".rstrip() for line in about)
        bodies.append(comment + "\n\n" + "\n".join(lines[last_import:]).strip())
    return "\n\n".join([_HEAD, "\n".join(_import_lines(imports))]) + "\n\n" + "\n\n\n".join([_OWN, *bodies]) + "\n"


def _in_order(modules: list[str]) -> list[str]:
    """Return these modules of the package and all that they import, each after what it imports."""
    order: list[str] = []

    def visit(module: str) -> None:
        if module in order or module == __name__:
            return
        for node in ast.parse(_text(module)).body:
            if isinstance(node, ast.ImportFrom) and _is_ours(node):
                visit(str(node.module))
        order.append(module)

    for module in modules:
        visit(module)
    return order


def _is_ours(node: ast.ImportFrom) -> bool:
    return (node.module or "").startswith(f"{_PACKAGE}.")


def _text(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text("utf-8")


def _import_lines(imports: dict[str, set[str]]) -> list[str]:
    """Sorted as a linter would, the standard library's first."""
    lines = []
    for module, names in imports.items():
        own = module.split(".")[0].split(" ")[0] in ("torch", "diffusers")
        if "" in names:
            lines.append((own, True, f"import {module}"))
        if taken := sorted(names - {""}):
            lines.append((own, False, f"from {module} import {', '.join(taken)}"))
    return [line for _, _, line in sorted(lines, key=lambda line: (line[0], not line[1], line[2]))]
