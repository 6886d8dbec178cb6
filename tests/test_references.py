"""What docstrings refer to (``:class:``, ``:func:``, ``:mod:``, …) is there: a name that moved takes its references along."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lightning_vlmq"


def modules() -> dict[str, tuple[str, set[str]]]:
    """Text and names of every module: what it defines anywhere, and what it imports."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text, names = path.read_text(), set[str]()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.ImportFrom):
                names |= {alias.asname or alias.name for alias in node.names}
        found[".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)] = text, names
    return found


def is_there(reference: str, module: str, known: dict[str, set[str]]) -> bool:
    """Whether a reference of a module's text names something of this package; those to other packages are not looked at."""
    package = module.removesuffix(".__init__") if module.endswith(".__init__") else module.rpartition(".")[0]
    if reference.startswith("."):
        reference = package + reference
    elif not reference.startswith("lightning_vlmq"):
        return "." in reference or reference in known[module.removesuffix(".__init__")] or hasattr(builtins, reference)
    place = reference
    while place not in known:
        place = place.rpartition(".")[0]
    name = reference.removeprefix(place).lstrip(".").partition(".")[0]
    return not name or name in known[place]


def test_what_docstrings_refer_to_is_there():
    found = modules()
    known = {name.removesuffix(".__init__"): names for name, (_, names) in found.items()}
    lost = [
        f"{module}: {reference}"
        for module, (text, _) in found.items()
        for kind, reference in re.findall(r":(mod|func|class|data):`~?([^`]+?)(?:\(\))?`", text)
        if not is_there(reference, module, known)
    ]
    assert not lost, "\n".join(lost)
