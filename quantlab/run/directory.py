"""Where a recipe's results lie, and who may write there."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantlab.errors import ArtifactError, PlanError
from quantlab.plan.model import Plan, VariantPlan
from quantlab.run.artifact import manifest_key
from quantlab.run.journal import journal_key

_COMPANIONS_BYTES = 100_000_000


@dataclass(frozen=True)
class RunDirectory:
    """The output directory of a recipe: artifacts/, records/, the matrix, and .work/ while something is unfinished."""

    path: Path

    def artifact(self, variant: str) -> Path:
        return self.path / "artifacts" / variant

    def work(self, variant: str) -> Path:
        return self.path / ".work" / variant

    def journal(self, variant: str) -> Path:
        return self.path / ".work" / f"{variant}.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other run out of the directory; unfinished work stays in .work/, nothing else does.

        Raises:
            ArtifactError: another run is writing there, or the directory cannot be made.
        """
        work = self.path / ".work"
        make_directory(work)
        with (work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ArtifactError(
                    "another run is writing to the output directory",
                    where=str(self.path),
                    found="its lock is held",
                    fix="wait for it, or choose another --out",
                ) from error
            try:
                yield
            finally:
                if not any(path.suffix == ".jsonl" for path in work.iterdir()):
                    shutil.rmtree(work)
                    if not any(self.path.iterdir()):
                        self.path.rmdir()

    def is_complete(self, variant: VariantPlan) -> bool:
        """Whether the variant's artifact is there and was made by this plan.

        Raises:
            ArtifactError: an artifact of another recipe or model has its place.
        """
        artifact = self.artifact(variant.name)
        if not artifact.exists():
            return False
        found = manifest_key(artifact)
        if found != variant.key:
            raise ArtifactError(
                "the output directory holds an artifact of another recipe",
                where=str(artifact),
                found=f"plan {found[:12]}, this one is {variant.key[:12]}",
                fix="choose another --out, or replace it with --overwrite",
            )
        return True

    def discard_foreign(self, variant: VariantPlan) -> None:
        """Remove a variant's artifact and unfinished work where another recipe made them."""
        artifact, journal = self.artifact(variant.name), self.journal(variant.name)
        if artifact.exists() and manifest_key(artifact) != variant.key:
            shutil.rmtree(artifact)
        if journal.exists() and journal_key(journal) != variant.key:
            shutil.rmtree(self.work(variant.name), ignore_errors=True)
            journal.unlink()

    def check_space(self, plan: Plan) -> None:
        """Refuse to begin what the disk cannot hold.

        Raises:
            PlanError: less space is free than the missing artifacts need.
        """
        missing = [variant for variant in plan.variants if not self.artifact(variant.name).exists()]
        begun = sum(path.stat().st_size for variant in missing for path in self.work(variant.name).glob("*"))
        needed = sum(variant.artifact_bytes for variant in missing) - begun
        free = shutil.disk_usage(self.path).free
        if missing and needed + _COMPANIONS_BYTES > free:
            raise PlanError(
                "the disk cannot hold the artifacts",
                where=str(self.path),
                found=f"{free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed",
                fix="free space, choose another --out, or make fewer variants",
            )


def make_directory(path: Path) -> None:
    """Make a directory and its parents.

    Raises:
        ArtifactError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            "the output directory cannot be made", where=str(path), found=error.strerror, fix="choose another --out"
        ) from error
