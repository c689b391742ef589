"""The ctypes signatures that Python calls the native kernels with match the C prototypes."""

import ctypes
import re
from pathlib import Path

from quantlab.runtime.native import kernels
from quantlab.runtime.native.calls import ARGUMENTS

HEADER = Path(kernels.__file__).with_name("kernels.h")
SCALARS = {"int64_t": ctypes.c_int64, "int": ctypes.c_int, "float": ctypes.c_float}
COMMENT = re.compile(r"/\*.*?\*/", flags=re.DOTALL)


def ctype_of(declared: str) -> object:
    """The ctypes type of an argument's declaration: `const float *mask` is a pointer, `int64_t rows` a 64-bit integer."""
    return ctypes.c_void_p if "*" in declared else SCALARS[declared.split()[0]]


def prototypes() -> dict[str, list[object]]:
    text = COMMENT.sub("", HEADER.read_text())
    found = re.findall(r"void (quantlab_\w+)\((.*?)\);", text, flags=re.DOTALL)
    return {name: [ctype_of(argument.strip()) for argument in arguments.split(",")] for name, arguments in found}


def test_every_signature_matches_its_prototype() -> None:
    assert len(prototypes()) >= 14
    assert {name: list(signature) for name, signature in ARGUMENTS.items()} == prototypes()


def test_every_function_of_the_sources_is_declared() -> None:
    """Each source includes the header, so that the compiler checks definitions against prototypes."""
    defined = set()
    for source in HEADER.parent.glob("*.c"):
        assert '#include "kernels.h"' in source.read_text(), source.name
        defined |= set(re.findall(r"^void (quantlab_\w+)\(", source.read_text(), flags=re.MULTILINE))
    assert defined == set(prototypes())


def test_structures_have_the_fields_of_the_header() -> None:
    text = COMMENT.sub("", HEADER.read_text())
    for structure, name in ((kernels._RotaryStrides, "RotaryStrides"), (kernels._Choice, "Choice")):
        body = re.search(rf"typedef struct \{{([^}}]*)\}} {name};", text)
        assert body is not None
        declared = []
        for line in body[1].split(";"):
            kind, _, names = line.strip().partition(" ")
            declared += [(field.strip(), SCALARS[kind]) for field in names.split(",") if kind]
        assert list(structure._fields_) == declared
