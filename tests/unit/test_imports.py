"""Imports point one way, as docs/design.md draws it, and nothing but torch is needed to import the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dist_clip"

# A module may import from layers before its own, and from its own.
LAYERS = [
    {"errors", "optimizers"},
    {"layouts", "kernels", "policies"},
    {"guards"},
    {"recommended"},
    {"memory"},
    {"reduction"},
    {"step"},
    {"construction"},
    {"attachment", "explain", "functional", "verify"},
    {"clipper"},
    {"adapter", "monitor"},
    {"__init__", "megatron", "accelerate", "transformers", "lightning", "olmo_core", "torchtitan"},
    {"axolotl", "command"},
]


def layer_of(module: str) -> int:
    found = [i for i, layer in enumerate(LAYERS) if module in layer]
    assert found, f"{module!r} is a new part of the package: name its layer in LAYERS and in docs/design.md"
    return found[0]


def runtime_imports(tree: ast.Module) -> set[str]:
    """First components of what is imported from dist_clip, but for type checkers."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.ImportFrom) and inner.module and inner.module.split(".")[0] == "dist_clip":
                parts = inner.module.split(".")
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in inner.names}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for imported in runtime_imports(ast.parse(path.read_text(encoding="utf-8"))):
        assert layer_of(imported) <= layer_of(own), f"{own} imports {imported}"


def test_only_torch_is_needed() -> None:
    """In a fresh interpreter: none of the optional parts is imported along."""
    optional = (
        "numpy",
        "triton",
        "tyro",
        "zclip",
        "matplotlib",
        "megatron",
        "lightning",
        "accelerate",
        "apex",
        "transformer_engine",
    )
    code = f"""
import sys, torch, torch.distributed.tensor
before = set(sys.modules)
import dist_clip
print([name for name in {optional!r} if name in set(sys.modules) - before])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_new_module_without_a_layer_is_named() -> None:
    with pytest.raises(AssertionError, match=r"'gadgets' is a new part of the package: name its layer in LAYERS"):
        layer_of("gadgets")
