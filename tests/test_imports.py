"""The import contract that CONTRIBUTING states: arrows between packages point one way, and no two modules import each other."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lightning_vlmq"
LAYERS = (
    ("core",),
    ("spectral",),
    ("statistics", "metrics", "data", "models"),
    ("quant",),
    ("lowbit", "results"),
    ("evaluation",),
    ("plotting",),
    ("modules", "callbacks"),
    ("experiment", "api"),
    ("commands", "cli"),
    ("study",),
)
"""Low to high. A package imports from those below it, and within its own layer."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports() -> dict[str, set[str]]:
    """Modules that each module imports when it is imported (not those inside functions), without type-checking ones."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        found[name] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_vlmq"):
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= {node.module or ""} | inner
    known = set(found)
    return {name: (targets & known) - {name, "lightning_vlmq"} for name, targets in found.items()}


def layer(module: str) -> str:
    return module.split(".")[1]


def test_every_package_has_a_layer():
    top = {layer(module) for module in imports() if "." in module}
    assert top - {"__main__"} == set(LEVEL)


def test_imports_point_one_way():
    wrong = [
        f"{module} imports {target}"
        for module, targets in imports().items()
        if module not in ("lightning_vlmq", "lightning_vlmq.__main__")
        for target in targets
        if LEVEL[layer(target)] > LEVEL[layer(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_import_each_other():
    graph = imports()
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                if not target.startswith(f"{module}.") and not module.startswith(f"{target}."):
                    visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())
