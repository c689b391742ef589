"""Tied heads: config.json may say that the head is the embeddings while the files hold another head.

Engines disagree about such a checkpoint: some use the embeddings, others the stored head, and the two are different
models. So the stored head is compared with the embeddings, byte for byte.
"""

from collections.abc import Iterator
from typing import Final

from quantlab.checkpoint.header import TensorEntry
from quantlab.checkpoint.index import Checkpoint
from quantlab.errors import CheckpointError

_EMBEDDINGS: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"
_CHUNK: Final = 1 << 24


def check_tied_head(checkpoint: Checkpoint, *, fetch: bool = True) -> None:
    """Compare the stored head of a checkpoint with tied embeddings; reads both tensors once, nothing without a head.

    Args:
        checkpoint: the checkpoint.
        fetch: whether files that are still on a hub are fetched for it; otherwise only those that are here are compared.

    Raises:
        CheckpointError: config.json ties them and they differ, or they cannot be read.
    """
    embeddings, head = checkpoint.tensors.get(_EMBEDDINGS), checkpoint.tensors.get(_HEAD)
    if not checkpoint.config.get("tie_word_embeddings") or embeddings is None or head is None:
        return
    if (head.dtype, head.shape) != (embeddings.dtype, embeddings.shape):
        found = f"{head.dtype} {list(head.shape)}, embeddings {embeddings.dtype} {list(embeddings.shape)}"
    elif not fetch and not all(checkpoint.shards.is_here(entry.file.name) for entry in (head, embeddings)):
        return
    elif any(
        one != other for one, other in zip(_chunks(checkpoint, head), _chunks(checkpoint, embeddings), strict=True)
    ):
        found = "other values than the embeddings have"
    else:
        return
    raise CheckpointError(
        "config.json ties the head to the embeddings, and the stored head differs",
        where=f"{head.file}, {_HEAD}",
        found=found,
        fix="set `tie_word_embeddings: false` in config.json if the head is meant, or delete the tensor",
    )


def _chunks(checkpoint: Checkpoint, entry: TensorEntry) -> Iterator[bytes]:
    """The bytes of a tensor; the file is opened for every chunk, because a file of a hub is here until the next is asked for."""
    try:
        for start in range(0, entry.nbytes, _CHUNK):
            with checkpoint.shards.path(entry.file.name).open("rb") as file:
                file.seek(entry.offset + start)
                yield file.read(min(_CHUNK, entry.nbytes - start))
    except OSError as error:
        raise CheckpointError(
            "a shard cannot be read",
            where=str(entry.file),
            found=error.strerror,
            fix="check the disk and the file's permissions",
        ) from error
