"""A text that every machine has: the documentation inside the running Python interpreter.

The topics of `help()` (`pydoc_data`) and the docstrings of the standard library's source files: about two million
characters of technical English, without a download. The exact number depends on the interpreter's version.
"""

from __future__ import annotations

import ast
import functools
import sysconfig
import warnings
from pathlib import Path

# Not part of what `help()` documents: tests, vendored packages, installed packages.
_EXCLUDED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "ensurepip",
}


@functools.cache
def python_docs() -> tuple[str, ...]:
    """One document for each help topic and one for each module's docstrings, in a fixed order."""
    documents = []
    try:
        from pydoc_data import topics
    except ImportError:  # some distributions leave it out
        pass
    else:
        for _, text in sorted(topics.topics.items()):
            documents.append(text.strip() + "\n")
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not _EXCLUDED.intersection(path.relative_to(root).parts):
            text = _docstrings(path)
            if text:
                documents.append(text)
    return tuple(documents)


def _docstrings(path: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # odd escapes in the library's own sources
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return ""
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                title = "" if isinstance(node, ast.Module) else f"{node.name}: "
                parts.append(f"{title}{docstring}\n")
    return f"{path.stem}\n\n" + "\n".join(parts) if parts else ""
