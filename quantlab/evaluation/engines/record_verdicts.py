"""Verdicts of engines on the artifacts of a run, kept beside each artifact and in its record."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from quantlab.errors import ArtifactError
from quantlab.evaluation.engines.engine import ENGINES
from quantlab.evaluation.engines.judge import Judge, Judging, Sources
from quantlab.evaluation.engines.judged import Judged, exports_of, find_source, judged_of
from quantlab.evaluation.engines.verdict import EngineVerdict, manifest_sha256, read_verdicts, write_verdict
from quantlab.evaluation.record import Record, read_record
from quantlab.files import write_atomically
from quantlab.recipe.schema import EngineName


def judge_directory(directory: Path, engines: Sequence[EngineName], how: Judging) -> Iterator[EngineVerdict]:
    """Judge one artifact or export; every verdict is written to verdicts.json and to the artifact's record when it is known.

    Args:
        directory: an artifact, or an export.
        engines: the engines, in order.
        how: settings; the source model is searched for if it is None.

    Raises:
        ArtifactError: the directory is neither an artifact nor an export.
        EvaluationError: the text, the source or a named Python cannot be used.
    """
    judged = judged_of(directory)
    judge = Judge(judged, replace(how, source=find_source(judged.artifact, how.source)))
    for name in engines:
        verdict = judge.verdict(name)
        keep(judged.artifact, verdict)
        yield verdict


def judge_run(
    artifacts: Sequence[Path], engines: Sequence[EngineName], how: Judging
) -> dict[Path, tuple[EngineVerdict, ...]]:
    """Judge the artifacts of a run and their exports, each engine by the files whose format it reads.

    Args:
        artifacts: directories of the artifacts.
        engines: the engines.
        how: settings, with the source model.

    Returns:
        All verdicts on each artifact.
    """
    sources = Sources()
    for artifact in artifacts:
        places = [judged_of(artifact), *map(judged_of, exports_of(artifact))]
        judges = {place: Judge(place, how, sources) for place in places}
        for name in engines:
            for place in _read_by(name, places):
                write_verdict(artifact, judges[place].verdict(name))
    return {artifact: read_verdicts(artifact) for artifact in artifacts}


def _read_by(name: EngineName, places: Sequence[Judged]) -> Sequence[Judged]:
    """The files that an engine reads; the artifact if there are none, whose verdict then says so."""
    return [place for place in places if place.format in ENGINES[name].formats] or places[:1]


def keep(artifact: Path, verdict: EngineVerdict) -> None:
    """Write a verdict to the artifact's verdicts.json, and all of them to its record if it is of the same artifact."""
    found = write_verdict(artifact, verdict)
    path = artifact.parent.parent / "records" / f"{artifact.name}.json"
    if artifact.parent.name != "artifacts" or not path.is_file():
        return
    try:
        record = read_record(path)
    except ArtifactError:  # of another version of quantlab: `quantlab eval` will write it anew
        return
    if record.artifact_sha256 == manifest_sha256(artifact):
        write_record(path, record.model_copy(update={"engines": found}))


def write_record(path: Path, record: Record) -> None:
    """Write a record in the form in which an evaluation writes it."""
    write_atomically(path, record.model_dump_json(indent=2).encode() + b"\n")
