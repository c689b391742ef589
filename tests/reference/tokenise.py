"""Train the byte-level BPE tokenizer on the training text and write every corpus as token ids.

    python tests/reference/tokenise.py --work DIRECTORY --heldout eval/corpora/heldout.jsonl --tokens DIRECTORY

Reads `train.jsonl` of `build_corpus.py`. `--tokens` receives `tokenizer.json`, `tokenizer_config.json`, `train.bin.xz`
(uint16 ids, documents between the begin and end tokens, in the corpus's order) and `heldout.json`.
"""

import argparse
import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BEGIN, END, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
VOCABULARY = 8192
SAMPLE_BYTES = 50_000_000


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE whose decoding is exact; digits stay single so that numbers are spelled alike."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, 0)]),
    ])  # fmt: skip
    return tokenizer


def sample(path: Path, size: int) -> list[str]:
    """Random documents of about `size` bytes together."""
    texts = [row["text"] for row in read_rows(path)]
    random.Random(0).shuffle(texts)
    taken, total = [], 0
    for text in texts:
        if total > size:
            break
        taken.append(text)
        total += len(text)
    return taken


def encode_all(tokenizer: Tokenizer, path: Path) -> Iterator[np.ndarray]:
    """Ids of every document with its begin and end tokens."""
    batch: list[str] = []
    for row in [*read_rows(path), None]:
        if row is not None:
            batch.append(row["text"])
        if batch and (row is None or len(batch) == 512):
            for encoding in tokenizer.encode_batch_fast(batch):
                yield np.array([*encoding.ids, 1], dtype=np.uint16)
            batch = []


def write_config(folder: Path) -> None:
    """`tokenizer_config.json` in DeepSeek's shape."""
    config = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": BEGIN, "eos_token": END, "pad_token": PAD,
        "clean_up_tokenization_spaces": False, "model_max_length": 2048, "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with train.jsonl")
    parser.add_argument("--heldout", type=Path, required=True, help="held-out JSONL")
    parser.add_argument("--tokens", type=Path, required=True, help="output folder")
    arguments = parser.parse_args()
    arguments.tokens.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(sample(arguments.work / "train.jsonl", SAMPLE_BYTES))
    tokenizer.save(str(arguments.tokens / "tokenizer.json"), pretty=False)
    write_config(arguments.tokens)
    ids = np.concatenate(list(encode_all(tokenizer, arguments.work / "train.jsonl")))
    (arguments.tokens / "train.bin.xz").write_bytes(lzma.compress(ids.tobytes(), preset=3))
    rows = [
        {"id": row["id"], "domain": row["domain"], "bytes": len(row["text"].encode()),
         "ids": tokenizer.encode(row["text"]).ids}
        for row in read_rows(arguments.heldout)
    ]  # fmt: skip
    (arguments.tokens / "heldout.json").write_text(json.dumps(rows))
    print(f"{ids.size} training tokens, {sum(len(row['ids']) for row in rows)} held-out tokens")


if __name__ == "__main__":
    main()
