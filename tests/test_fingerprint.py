"""Fingerprints of code change if and only if the computation changes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quantlab import fingerprint

SOURCES = {
    "top.py": '"""Top."""\nfrom package.inner.low import value\n\ndef f() -> int:\n    from package.late import g\n    return g() + value\n',
    "late.py": 'import math\n\nclass C:\n    x: int = 1\n    """An attribute."""\n\ndef g() -> int:\n    return 1  # a comment\n',
    "inner/__init__.py": "",
    "inner/low.py": "value = 1\n",
    "inner/kernel.c": "int f(void) { return 1; /* one */ } // end\n",
    "apart.py": "other = 1\n",
    "errors.py": "message = 'x'\n",
}
Edit = Callable[[str, str, str], str]


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Edit]:
    """Replace text in a file of a small package, and return the fingerprint of its module `top`."""
    root = tmp_path / "package"
    for name, text in SOURCES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(fingerprint, "_ROOT", root)
    monkeypatch.setattr(fingerprint, "_PACKAGE", "package")

    def replace(name: str = "top.py", old: str = "", new: str = "") -> str:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new) if old else text)
        fingerprint._read.cache_clear()
        fingerprint.code_fingerprint.cache_clear()
        return fingerprint.code_fingerprint(("package.top",))

    yield replace
    fingerprint._read.cache_clear()
    fingerprint.code_fingerprint.cache_clear()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("top.py", "Top.", "Another docstring."),
        ("top.py", '"""Top."""\n', ""),
        ("top.py", "\n    return", "\n\n    # why\n    return"),
        ("late.py", "# a comment", ""),
        ("late.py", "An attribute.", "Another."),
        ("late.py", "int = 1", "int = (\n        1\n    )"),
        ("inner/kernel.c", "/* one */", ""),
        ("inner/kernel.c", "{ return 1;", "{\n    return 1;"),
        ("inner/kernel.c", "// end", "// over"),
        ("apart.py", "1", "2"),
        ("errors.py", "x", "y"),
    ],
)
def test_wording_and_unused_code_change_nothing(edit: Edit, name: str, old: str, new: str) -> None:
    before = edit()
    assert edit(name, old, new) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("top.py", "g() +", "g() -"),
        ("late.py", "return 1", "return 2"),
        ("inner/low.py", "1", "1.0"),
        ("inner/low.py", "value = 1", "value = '1'"),
        ("inner/kernel.c", "return 1", "return 2"),
    ],
)
def test_code_changes_it(edit: Edit, name: str, old: str, new: str) -> None:
    before = edit()
    assert edit(name, old, new) != before


def test_modules_are_followed_through_imports(edit: Edit) -> None:
    edit()
    assert fingerprint.modules_reached(["package.top"]) == {"package.top", "package.late", "package.inner.low"}
    assert fingerprint.modules_reached(["package.top"], without=["package.inner"]) == {"package.top", "package.late"}
    with pytest.raises(ValueError, match=r"package\.nothing is not a module"):
        fingerprint.modules_reached(["package.nothing"])


def test_it_is_the_same_in_every_version_of_python() -> None:
    """Compare with a value stored from Python 3.11; f-strings, type parameters and positions differ in 3.12's trees."""
    import ast

    tree = ast.parse("def f(x: int) -> str:\n    return f'{x!r:>4} a' if x else ''\n")
    assert "".join(fingerprint._canonical(tree)) == (
        "Module(body=[FunctionDef(name='f',args=arguments(args=[arg(arg='x',annotation=Name(id='int',ctx=Load()))])"
        "body=[Return(value=IfExp(test=Name(id='x',ctx=Load())body=JoinedStr(values=[FormattedValue(value=Name(id='x',ctx=Load())"
        "conversion=114,format_spec=JoinedStr(values=[Constant(value='>4',)]))Constant(value=' a',)])orelse=Constant(value='',)))]"
        "returns=Name(id='str',ctx=Load()))])"
    )
