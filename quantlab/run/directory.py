"""Where a recipe's results lie, and who may write there."""

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
from quantlab.run.artifact import manifest_identity, manifest_is_whole
from quantlab.run.identity import Identity, is_current

State = Literal["complete", "missing", "outdated"]

_COMPANIONS_BYTES = 100_000_000


@dataclass(frozen=True)
class RunDirectory:
    """The output directory of a recipe: artifacts/, records/, the matrix, and .work/ while something is unfinished.

    Everything unfinished is in .work/, one directory a variant: `shards` becomes the artifact by one rename, `journal`
    says which of its blocks are done, `replaced` is an older artifact on its way out. `shared` beside them is what variants
    share.
    """

    path: Path

    def artifact(self, variant: str) -> Path:
        return self.path / "artifacts" / variant

    def work(self, variant: str) -> Path:
        return self.path / ".work" / "variants" / variant

    def shards(self, variant: str) -> Path:
        return self.work(variant) / "shards"

    def journal(self, variant: str) -> Path:
        return self.work(variant) / "journal.jsonl"

    @property
    def shared(self) -> Path:
        """What variants in the making share."""
        return self.path / ".work" / "shared"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other run out of the directory; unfinished work stays in .work/, nothing else does.

        Raises:
            ArtifactError: another run is writing there, or the directory cannot be made.
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
                    fix="wait for it, or choose another --out",
                ) from error
            except FileNotFoundError:
                continue  # a run that ended removed .work/ between the two calls
            except OSError as error:
                raise ArtifactError(
                    "the output directory cannot be locked",
                    where=str(path),
                    found=error.strerror,
                    fix="choose another --out",
                ) from error
            if path.exists() and os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
                return lock
            lock.close()  # the file was removed by a run that ended; what is locked is not what others will find

    def state(self, variant: str, identity: Identity, *, overwrite: bool = False) -> State:
        """Whether a variant's artifact is there, whole, and what this code would make.

        Args:
            variant: its name.
            identity: everything the artifact depends on.
            overwrite: answer "outdated" for an artifact of another recipe or device, which is to be replaced.

        Returns:
            "complete"; "missing"; "outdated" where other code made it from the same recipe, so that it has to be made again.

        Raises:
            ArtifactError: something else has its place: an artifact of another recipe, model or device, or no artifact at all.
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
            "the output directory holds "
            + (f"an artifact of another {difference}" if whole else "an incomplete artifact"),
            where=str(artifact),
            found=identity.explain(found) if whole else "files are missing",
            fix="choose another --out, or replace it with --overwrite",
        )

    def check_measurable(self, variant: VariantPlan) -> bool:
        """Check that a variant's artifact is there, whole and of this recipe; on which device and by which code it was made is its own affair.

        Returns:
            Whether this very code would make it.

        Raises:
            ArtifactError: it is missing, incomplete, or of another recipe.
        """
        artifact = self.artifact(variant.name)
        if not artifact.exists():
            raise ArtifactError(
                "an artifact is not there yet",
                where=str(artifact),
                found="no such directory",
                fix="make it first: `quantlab run` with this recipe",
            )
        found = manifest_identity(artifact)
        if found.get("recipe") != variant.recipe_key or not manifest_is_whole(artifact):
            whole = manifest_is_whole(artifact)
            raise ArtifactError(
                "the output directory holds "
                + ("an artifact of another recipe" if whole else "an incomplete artifact"),
                where=str(artifact),
                found=f"recipe {str(found.get('recipe'))[:12]}, this one is {variant.recipe_key[:12]}"
                if whole
                else "files are missing",
                fix="choose another --out, or make it again: `quantlab run` with --overwrite",
            )
        return is_current(variant, found)

    def publish(self, variant: VariantPlan) -> None:
        """Give the finished shards their name; an artifact that is replaced goes only now, by a rename too.

        Raises:
            ArtifactError: the disk does not take the rename.
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
                "the artifact cannot be put in its place",
                where=str(artifact),
                found=error.strerror,
                fix="artifacts/ must be a directory on the disk of --out",
            ) from error

    def tidy(self, variant: VariantPlan) -> None:
        """Remove what a run that was killed after the last rename has left."""
        shutil.rmtree(self.work(variant.name), ignore_errors=True)

    def check_space(self, plan: Plan, complete: set[str]) -> int:
        """Refuse to begin what the disk cannot hold.

        Returns:
            The bytes that will still be free.

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
