"""Are the borders kept that import-linter does not see? The others are contracts in pyproject.toml."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"gateway", "backends", "policies", "routing"}
OPTIONAL = ("litellm", "matplotlib", "numpy", "psycopg", "pyarrow", "tokenizers", "vllm", "xllamacpp")


def imported(source: str) -> Iterator[str]:
    """The top-level names that `source` imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(a.value).partition(".")[0] for a in node.args if isinstance(a, ast.Constant))


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import os.path, gateway.app as g", {"os", "gateway"}),
        ("def f():\n    from routing.plan import plan", {"routing"}),
        ("importlib.import_module('backends.vllm')", {"backends"}),
        ("from . import neighbour", set()),
        ("gateway = 'policies'", set()),
    ],
)
def test_imports_are_found(source: str, names: set[str]) -> None:
    assert set(imported(source)) == names


def test_load_tests_are_black_box_clients() -> None:
    files = sorted((ROOT / "loadtests").glob("**/*.py"))
    assert files
    for file in files:
        assert not OURS & set(imported(file.read_text())), f"{file.name} must know the gateway by its address alone"


def test_the_product_does_not_know_its_tests() -> None:
    for package in sorted(OURS):
        for file in (ROOT / package).glob("**/*.py"):
            assert not {"tests", "loadtests", "pytest"} & set(imported(file.read_text())), file


def test_what_is_optional_is_missed_by_nobody_who_does_not_ask_for_it() -> None:
    tools = [f"gateway.tools.{path.stem}" for path in sorted((ROOT / "gateway" / "tools").glob("[a-z]*.py"))]
    program = f"""
import importlib, sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
for name in {["gateway.cli", "gateway.serve", "gateway.app", *tools]!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, cwd=ROOT, text=True)
    assert done.returncode == 0, done.stderr
