"""Tiny models with a tokenizer, held-out text in two domains, and a suite that measures them in seconds."""

import json
import random
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from quantlab.checkpoint.tokenizer import load_tokenizer
from quantlab.evaluation.quality.windows import HeldOut, cut, read_corpus
from tests.checkpoints import make_checkpoint

WORDS = {
    "prose": [
        "the",
        "sun",
        "rose",
        "over",
        "a",
        "quiet",
        "harbour",
        "and",
        "nobody",
        "spoke",
        "of",
        "naïve",
        "hopes",
        "–",
        "or",
        "of",
        "the",
        "😀",
        "old",
        "café",
        "again",
    ],
    "code": [
        "def",
        "return",
        "self.",
        "x",
        "=",
        "y",
        "+",
        "1",
        "for",
        "i",
        "in",
        "range(10):",
        "print(“héllo”)",
        "#",
        "漢字",
        "import",
        "os",
        "class",
        "Wörker:",
    ],
}
TINY_SUITE = """
name: tiny
version: 1
text: {{corpus: {corpus}, length: 24, tokens_per_domain: 600}}
speed:
  description: a twin of nothing
  batches: [1, 2]
  prompt: 4
  steps: 2
  processes: 2
  rounds: 8
  seconds: 20
  task_seconds: 0
  shape: {shape}
"""


def write_corpus(path: Path, *, documents: int = 8, seed: int = 0) -> Path:
    """Random sentences of unequal length."""
    generator = random.Random(seed)
    lines = []
    for domain, words in WORDS.items():
        for index in range(documents):
            text = " ".join(generator.choice(words) for _ in range(generator.randint(10, 60)))
            lines.append({"id": f"{domain}-{index}", "domain": domain, "source": "made up", "text": text})
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def write_tokenizer(directory: Path, *, bos: bool = True) -> None:
    """A byte-level BPE tokenizer with 300 tokens, like DeepSeek's: the BOS token is only known to tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<bos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(words) for words in WORDS.values()] * 2, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"add_bos_token": bos, "bos_token": {"content": "<bos>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "heldout.jsonl")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DeepSeek-V2 with a tokenizer."""
    directory = make_checkpoint(tmp_path_factory.mktemp("models") / "model", "deepseek_v2")
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape with other weights."""
    directory = make_checkpoint(tmp_path_factory.mktemp("models") / "other", "deepseek_v2", seed=1)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def held_out(corpus: Path, model: Path) -> HeldOut:
    tokenizer, prefix = load_tokenizer(model)
    return cut(read_corpus(corpus), tokenizer, prefix, length=24, tokens_per_domain=600)


@pytest.fixture
def suite(tmp_path: Path, corpus: Path, model: Path) -> Path:
    """A suite file beside a copy of the corpus."""
    shutil.copy(corpus, tmp_path / "heldout.jsonl")
    path = tmp_path / "tiny.yaml"
    shape = (model / "config.json").read_text().replace("\n", " ")
    path.write_text(TINY_SUITE.format(corpus="heldout.jsonl", shape=shape))
    return path
