"""The architecture of a student as one module file, which a saved student carries so that it loads without asdm.

The file is put together from the modules of this package that a student needs to be built and loaded, as they
stand; nothing in it needs more than torch and diffusers.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

MODULE_NAME = "asdm_unet"
_ROOMS = (
    "asdm.errors",
    "asdm.old_names",
    "asdm.families.base",
    "asdm.families.unet_structure",
    "asdm.edits.base",
    "asdm.edits.maps",
    "asdm.edits.cond_conv",
    "asdm.edits.regional_attention",
    "asdm.edits.surgery",
    "asdm.student.adapters",
    "asdm.student.unet",
)
_HEAD = '''"""A pruned Stable Diffusion UNet, made with asdm: all that it takes to load one. Apache-2.0.

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

What was pruned is the list of edits in config.json. This file is put together from the package's own modules.
"""

from __future__ import annotations
'''
_OWN = '''MODULE_NAME = "asdm_unet"


def module_source() -> str:
    """This file's text, for a student that is saved again."""
    return Path(__file__).read_text("utf-8")'''


@lru_cache(maxsize=1)
def module_source() -> str:
    """The text of the file."""
    imports: dict[str, set[str]] = {"pathlib": {"Path"}}  # module -> what is taken from it, "" for itself
    bodies = []
    for room in _ROOMS:
        spec = find_spec(room)
        assert spec is not None and spec.origin is not None
        text = Path(spec.origin).read_text("utf-8")
        tree, lines = ast.parse(text), text.splitlines()
        for node in tree.body:
            if isinstance(node, ast.Import):
                for name in node.names:
                    imports.setdefault(ast.unparse(name), set()).add("")
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("asdm", "__future__")):
                imports.setdefault(node.module or "", set()).update(ast.unparse(name) for name in node.names)
        body = [node for node in tree.body[1:] if not isinstance(node, ast.Import | ast.ImportFrom)]
        last_import = max(node.end_lineno or 0 for node in tree.body if node not in body)
        about = f"{room}: {ast.get_docstring(tree)}".splitlines()
        comment = "\n".join(f"# {line}".rstrip() for line in about)
        bodies.append(comment + "\n\n" + "\n".join(lines[last_import:]).strip())
    return "\n\n".join([_HEAD, "\n".join(_import_lines(imports))]) + "\n\n" + "\n\n\n".join([_OWN, *bodies]) + "\n"


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
