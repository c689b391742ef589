"""The output directory of a recipe: its layout, its lock, and the state of its artifacts."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from quantlab.errors import ArtifactError, PlanError
from quantlab.plan.model import Plan, VariantPlan
from quantlab.recipe.schemes import FormatName
from quantlab.run.artifact import manifest_identity, manifest_is_whole
from quantlab.run.identity import Identity, is_current

State = Literal["complete", "missing", "outdated"]

_COMPANIONS_BYTES = 100_000_000


@dataclass(frozen=True)
class RunDirectory:
    """The output directory of a recipe: artifacts/, exports/, records/, the matrix, and .work/ while something is unfinished.

    All unfinished work is in .work/, with one directory per variant: `shards` becomes the artifact by one rename,
    `journal.jsonl` lists its finished blocks, `replaced` is an older artifact about to be deleted. Variants share the
    results in `.work/shared`.
    """

    path: Path

    def artifact(self, variant: str) -> Path:
        return self.path / "artifacts" / variant

    def export(self, variant: str, format: FormatName) -> Path:
        return self.path / "exports" / f"{variant}.{format}"

    def work(self, variant: str) -> Path:
        return self.path / ".work" / "variants" / variant

    def shards(self, variant: str) -> Path:
        return self.work(variant) / "shards"

    def journal(self, variant: str) -> Path:
        return self.work(variant) / "journal.jsonl"

    @property
    def shared(self) -> Path:
        """Directory of the results that unfinished variants share."""
        return self.path / ".work" / "shared"

    def source(self, commit: str) -> Path:
        """Directory of the shards that a run fetches from a hub and does not keep."""
        return self.path / ".work" / "source" / commit

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory for this run; at the end .work/ is removed unless it contains unfinished work.

        Raises:
            ArtifactError: another run has locked the directory, or it cannot be created.
        """
        existed = self.path.exists()
        lock = self._lock()
        try:
            yield
        finally:
            if not any((self.path / ".work" / "variants").glob("*")):
                shutil.rmtree(self.path / ".work")
                if not existed and not any(self.path.iterdir()):
                    self.path.rmdir()
            lock.close()

    def _lock(self) -> IO[str]:
        path = self.path / ".work" / "lock"
        while True:
            make_directory(path.parent / "variants")
            try:
                lock = path.open("w")
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ArtifactError(
                    "another run is writing to the output directory",
                    where=str(self.path),
                    found="its lock is held",
                    fix="wait for the other run, or choose another --out",
                ) from error
            except FileNotFoundError:
                continue  # another run ended and removed .work/ between the two calls
            except OSError as error:
                raise ArtifactError(
                    "the output directory cannot be locked",
                    where=str(path),
                    found=error.strerror,
                    fix="choose another --out",
                ) from error
            if path.exists() and os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
                return lock
            lock.close()  # another run ended and removed the file: others would lock a new one

    def state(self, variant: str, identity: Identity, *, overwrite: bool = False) -> State:
        """State of a variant's artifact relative to the current code, recipe and device.

        Args:
            variant: name of the variant.
            identity: everything the artifact depends on.
            overwrite: return "outdated" for an artifact of another recipe or device instead of raising.

        Returns:
            "complete"; "missing"; "outdated" if other code made it from the same recipe and it must be made again.

        Raises:
            ArtifactError: its path holds an incomplete artifact, one of another recipe, model or device, or something
                else.
        """
        artifact = self.artifact(variant)
        if not artifact.exists():
            return "missing"
        found = manifest_identity(artifact)
        difference = identity.difference(found)
        if difference == "none" and manifest_is_whole(artifact):
            return "complete"
        if overwrite or difference == "code":
            return "outdated"
        whole = difference != "none"
        raise ArtifactError(
            "the output directory contains "
            + (f"an artifact of another {difference}" if whole else "an incomplete artifact"),
            where=str(artifact),
            found=identity.explain(found) if whole else "files are missing",
            fix="choose another --out, or replace it with --overwrite",
        )

    def check_measurable(self, variant: VariantPlan) -> bool:
        """Check that a variant's artifact exists, is complete and belongs to this recipe, made by any code on any
        device.

        Returns:
            Whether the current code would make the same artifact.

        Raises:
            ArtifactError: it is missing, incomplete, or of another recipe.
        """
        artifact = self.artifact(variant.name)
        if not artifact.exists():
            raise ArtifactError(
                "an artifact is missing",
                where=str(artifact),
                found="no such directory",
                fix="make it first with `quantlab run`",
            )
        found = manifest_identity(artifact)
        if found.get("recipe") != variant.recipe_key or not manifest_is_whole(artifact):
            whole = manifest_is_whole(artifact)
            raise ArtifactError(
                "the output directory contains "
                + ("an artifact of another recipe" if whole else "an incomplete artifact"),
                where=str(artifact),
                found=f"recipe {str(found.get('recipe'))[:12]}, this one is {variant.recipe_key[:12]}"
                if whole
                else "files are missing",
                fix="choose another --out, or make it again with `quantlab run --overwrite`",
            )
        return is_current(variant, found)

    def publish(self, variant: VariantPlan) -> None:
        """Rename the finished shards to the artifact's path; an older artifact is moved away first and then deleted.

        Raises:
            ArtifactError: a rename failed.
        """
        artifact, replaced = self.artifact(variant.name), self.work(variant.name) / "replaced"
        try:
            artifact.parent.mkdir(exist_ok=True)
            if artifact.exists():
                artifact.replace(replaced)
            self.shards(variant.name).replace(artifact)
            shutil.rmtree(self.work(variant.name))
        except OSError as error:
            raise ArtifactError(
                "the artifact cannot be moved to its path",
                where=str(artifact),
                found=error.strerror,
                fix="artifacts/ must be a directory on the disk of --out",
            ) from error

    def tidy(self, variant: VariantPlan) -> None:
        """Remove a variant's work directory, left by a run that was killed after the last rename."""
        shutil.rmtree(self.work(variant.name), ignore_errors=True)

    def check_space(self, plan: Plan, complete: set[str]) -> int:
        """Check that the missing artifacts fit onto the disk.

        Returns:
            Bytes that will remain free.

        Raises:
            PlanError: less space is free than the missing artifacts need.
        """
        missing = [variant for variant in plan.variants if variant.name not in complete]
        begun = sum(path.stat().st_size for variant in missing for path in self.shards(variant.name).glob("*"))
        needed = sum(variant.artifact_bytes for variant in missing) - begun
        free = shutil.disk_usage(self.path).free
        if missing and needed + _COMPANIONS_BYTES > free:
            raise PlanError(
                "the disk cannot hold the artifacts",
                where=str(self.path),
                found=f"{free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed",
                fix="free space, choose another --out, or make fewer variants",
            )
        return max(free - needed - _COMPANIONS_BYTES, 0)


def make_directory(path: Path) -> None:
    """Create a directory and its parents.

    Raises:
        ArtifactError: it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            "the output directory cannot be created", where=str(path), found=error.strerror, fix="choose another --out"
        ) from error
