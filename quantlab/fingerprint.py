"""Fingerprints of code: a hash of all code a computation can reach. Results are not reused after their fingerprint
changes.

A stage names its root modules. Their imports, including those inside functions, are followed through the sources of
this package. Every module reached is hashed as a syntax tree without docstrings, so comments, docstrings and formatting
have no effect. C sources and headers are hashed with the modules of their folder, without comments and white space.
Triton kernels are Python. Nothing is imported or executed: a fingerprint is the same on every machine and supported
version of Python.
"""

import ast
import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

_ROOT = Path(__file__).parent
_PACKAGE = _ROOT.name
_DECIDE_NO_NUMBER = ("errors", "documents", "version", "hardware", "fingerprint")
"""Top-level modules that are never followed: error texts, names, the YAML reader (documents are hashed by content)."""
_C_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", flags=re.DOTALL)


@cache
def code_fingerprint(roots: tuple[str, ...], *, without: tuple[str, ...] = ()) -> str:
    """The sha256 of the code that the root modules can reach; see `modules_reached` for the arguments."""
    digest = hashlib.sha256()
    for module in sorted(modules_reached(roots, without=without)):
        digest.update(f"{module} {_read(module)[0]}\n".encode())
    return digest.hexdigest()


def modules_reached(roots: Sequence[str], *, without: Sequence[str] = ()) -> frozenset[str]:
    """The root modules and all modules of this package that their imports lead to.

    Args:
        roots: dotted names of modules of this package, for example "quantlab.algorithms.gptq".
        without: modules and whole packages that are not followed, unless they are roots.

    Raises:
        ValueError: a root is not a module of this package.
    """
    left_out = (*without, *(f"{_PACKAGE}.{name}" for name in _DECIDE_NO_NUMBER))
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        if _path(module) is None:
            raise ValueError(f"{module} is not a module of {_PACKAGE}")
        found.add(module)
        waiting += [name for name in _read(module)[1] if not _is_within(name, left_out)]
    return frozenset(found)


def _is_within(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _path(module: str) -> Path | None:
    """The file of a module; None for a package, whose `__init__` has no code, and for modules outside this package."""
    parts = module.split(".")
    path = _ROOT.joinpath(*parts[1:]).with_suffix(".py")
    return path if parts[0] == _PACKAGE and len(parts) > 1 and path.is_file() else None


@cache
def _read(module: str) -> tuple[str, tuple[str, ...]]:
    """The hash of one module and the C sources in its folder, and the modules of this package that it imports."""
    path = _path(module)
    assert path is not None, "only modules are read"
    tree = ast.parse(path.read_bytes())
    digest = hashlib.sha256("".join(_canonical(tree)).encode())
    for source in sorted([*path.parent.glob("*.c"), *path.parent.glob("*.h")]):
        digest.update(f"{source.name} {''.join(_C_COMMENT.sub('', source.read_text()).split())}".encode())
    return digest.hexdigest(), tuple(sorted(set(_imports(tree))))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if _path(name) is not None)


def _canonical(node: object) -> Iterator[str]:
    """A syntax tree as text that is identical in every supported version of Python.

    Fields that are None or empty are omitted, because later versions of Python add such fields.
    """
    if isinstance(node, ast.AST):
        yield f"{type(node).__name__}("
        for name, value in ast.iter_fields(node):
            if value is not None and value != []:
                yield f"{name}="
                yield from _canonical(value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for element in node:
            if not _is_docstring(element):
                yield from _canonical(element)
        yield "]"
    else:
        yield f"{node!r},"


def _is_docstring(statement: object) -> bool:
    """Whether a statement is a bare string: a docstring of a module, class, function or attribute."""
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
        return False
    return isinstance(statement.value.value, str)
