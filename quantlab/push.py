"""The command that puts a finished artifact on the Hugging Face hub. Nothing is sent without it.

Files are sent first and appear with one commit at the end, so that nobody sees half an artifact. The hub keeps what it has
received: after an interruption the same command sends only the rest.
"""

import itertools
import json
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import yaml
from rich.console import Console

from quantlab import console as show
from quantlab.checkpoint.hub_errors import retried
from quantlab.engine_commands import JsonOption, QuietOption
from quantlab.errors import ArtifactError, CheckpointError
from quantlab.evaluation.engines.verdict import VERDICTS_NAME
from quantlab.files import read_json

CARD: Final = "README.md"
_REPO: Final = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")
_MANIFEST: Final = "manifest.json"
_NOT_MEASURED: Final = "Not measured yet."

_err = Console(stderr=True)


def push(
    artifact: Annotated[Path, typer.Argument(help="A directory under runs/NAME/artifacts.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="The model on the hub: org/name.", show_default=False)],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; by default it is private.")
    ] = False,
    base_model: Annotated[
        str | None,
        typer.Option(
            help="Id of the source on the hub, for the card.", metavar="ORG/NAME", show_default="from the recipe"
        ),
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Message of the commit.")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send a finished artifact to the Hugging Face hub, after its hashes and its ledger were checked."""
    for word in (repo, *([base_model] if base_model else [])):
        if not _REPO.fullmatch(word):
            raise ArtifactError("not the id of a model", where="push", found=repr(word), fix="write ORGANISATION/NAME")
    files = checked_files(artifact, told=None if quiet or as_json else _err)
    card = card_for_hub((artifact / CARD).read_text(encoding="utf-8"), repo, base_model=base_model)
    if not (quiet or as_json):
        _remark(artifact, card)
    url = _send(artifact, files, card, repo=repo, private=not public, message=message or f"{artifact.name} by quantlab")
    if as_json:
        typer.echo(json.dumps({"repository": repo, "commit": url, "files": [*files, CARD]}))
    elif not quiet:
        _err.print(f"{len(files) + 1} files: {url}", highlight=False, markup=False, soft_wrap=True)


def checked_files(artifact: Path, *, told: Console | None) -> list[str]:
    """The files of a complete artifact besides its card, after every hash and the ledger were checked.

    Args:
        artifact: its directory.
        told: where the checks are printed; None for nowhere.

    Raises:
        ArtifactError: the directory is no artifact, is incomplete, or was changed.
        CheckpointError: its shards are damaged.
    """
    from quantlab.evaluation.verify import verify  # imports torch

    for check in itertools.islice(verify(artifact), 2):
        if told is not None:
            show.print_check(told, check.name, check.verdict, check.detail)
        if check.verdict == "failed":
            raise ArtifactError(
                "the artifact is not complete or was changed; nothing was sent",
                where=str(artifact),
                found=check.detail,
                fix="make it again: `quantlab run` with --overwrite, or delete what does not belong to it",
            )
    if not (artifact / _MANIFEST).is_file() or not (artifact / CARD).is_file():
        raise ArtifactError(
            "only artifacts are pushed",
            where=str(artifact),
            found=f"no {_MANIFEST} or no {CARD}",
            fix="give a directory under runs/NAME/artifacts; an export can be sent with `hf upload`",
        )
    beside = [name for name in (VERDICTS_NAME,) if (artifact / name).is_file()]
    return [*read_json(artifact / _MANIFEST)["files"], _MANIFEST, *beside]


def card_for_hub(text: str, repo: str, *, base_model: str | None) -> str:
    """The card of an artifact with the name that users of the hub load, and the source's id if it is given.

    Args:
        text: the card.
        repo: id of the repository, which replaces `DIR` in commands and code.
        base_model: id of the source; None to keep what the card says.
    """
    text = re.sub(r"\bDIR\b", repo, text)
    opening, first, rest = text.partition("---\n")
    block, last, after = rest.partition("\n---\n")
    if base_model is None or opening or not first or not last:
        return text
    metadata: dict[str, Any] = yaml.safe_load(block)
    relation = {"base_model_relation": "quantized"} if _is_quantized(text) else {}
    metadata = {**metadata, "base_model": base_model, **relation}
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n{after}"


def _is_quantized(card: str) -> bool:
    return "- compressed-tensors\n" in card or "base_model_relation: quantized" in card


def _remark(artifact: Path, card: str) -> None:
    """Say what a reader of the card will miss, and which engines do not agree."""
    remarks = []
    if _NOT_MEASURED in card:
        remarks.append("the artifact was not measured: its card has no numbers (`quantlab eval`)")
    if "\nlicense:" not in card:
        remarks.append("the card states no licence, because the source's card has none: add it on the hub")
    if "\nbase_model:" not in card:
        remarks.append("the card names no base model: give --base-model ORG/NAME")
    verdicts = read_json(artifact / VERDICTS_NAME).get("verdicts", []) if (artifact / VERDICTS_NAME).is_file() else []
    remarks += [
        f"{one['engine']}: {one['verdict']}" for one in verdicts if one.get("verdict") in {"differs", "refuses"}
    ]
    for remark in remarks:
        _err.print(f"note: {remark}", style="yellow", highlight=False, markup=False)


def _send(artifact: Path, files: list[str], card: str, *, repo: str, private: bool, message: str) -> str:
    """Send everything and commit it; returns the address of the commit.

    Raises:
        ArtifactError: the user may not write there.
        CheckpointError: the hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        retried(api.whoami, where=repo)
        retried(partial(api.create_repo, repo, private=private, exist_ok=True), where=repo)
        operations = [CommitOperationAdd(name, str(artifact / name)) for name in files]
        for operation in operations:  # one by one: what has arrived is not sent again
            send = partial(api.preupload_lfs_files, repo, [operation], num_threads=1)
            retried(send, where=f"{repo}, {operation.path_in_repo}")
        operations.append(CommitOperationAdd(CARD, card.encode()))
        done = retried(partial(api.create_commit, repo, operations, commit_message=message), where=repo)
    except CheckpointError as error:
        status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
        if status in {401, 403, 404} or _has_no_token(error.__cause__):
            raise ArtifactError(
                "the hub does not let you write there",
                where=repo,
                found=error.found,
                fix="log in with a token that may write to this organisation: `hf auth login`, or HF_TOKEN",
            ) from error
        raise
    return str(done.commit_url)


def _has_no_token(error: BaseException | None) -> bool:
    from huggingface_hub.errors import LocalTokenNotFoundError

    return isinstance(error, LocalTokenNotFoundError)
