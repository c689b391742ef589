"""Times calibration text from messages: rows of a dataset through a chat template into tokens.

    PYTHONPATH=. python tests/benchmarks/chat_tokens.py [--checkpoint DIR] [--rows N]

Dialogues are made from the calibration corpus of the repository: paragraphs, in turn the user's and the assistant's. Prints a table of tokens per minute.
"""

import argparse
import json
import os
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from quantlab.checkpoint.tokenizer import load_tokenizer, named_tokens
from quantlab.errors import CalibrationError
from quantlab.recipe.texts import TextSource
from quantlab.texts.document import Encoder
from quantlab.texts.locate import Commits, locate
from quantlab.texts.rows import Reading, documents

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)


def dialogues(count: int) -> list[list[dict[str, str]]]:
    """Six messages each, the last with reasoning in every second dialogue."""
    lines = (ROOT / "eval" / "corpora" / "calibration.jsonl").read_text().splitlines()
    parts = [part for line in lines for part in json.loads(line)["text"].split("\n\n") if len(part.split()) > 20]
    found = []
    for index in range(count):
        texts = [parts[(7 * index + turn) % len(parts)] for turn in range(7)]
        if index % 2:
            texts[5] = f"<think>\n{texts[6]}\n</think>\n\n{texts[5]}"
        found.append([{"role": ("user", "assistant")[turn % 2], "content": texts[turn]} for turn in range(6)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "eval" / "reference" / "deepseek-v3-mini")
    parser.add_argument("--rows", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "chat.jsonl"
        path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in dialogues(options.rows)))
        (Path(directory) / "t.jinja").write_text(TEMPLATE)
        tokenizer, prefix = load_tokenizer(options.checkpoint)
        encoder = Encoder(tokenizer, prefix)
        print(f"{options.rows} dialogues, {os.cpu_count()} CPUs, tokenizer of {options.checkpoint.name}")
        print("| special tokens | tokens | read and render s | encode s | million tokens a minute |")
        print("|---|--:|--:|--:|--:|")
        for special in ("special", "text"):
            fields: dict[str, Any] = {"dataset": str(path), "chat_template": "t.jinja", "special_tokens": special}
            text = locate(
                [TextSource(**fields)],
                lambda name: Path(directory) / name,
                options.checkpoint,
                commits=Commits(Path("/nonexistent")),
                error=CalibrationError,
            )
            reading = Reading(text.sources[0], named_tokens(options.checkpoint), encoder.added, 0, CalibrationError)
            list(islice(documents(reading), 1))  # imports, and the reader's first file
            start = time.monotonic()
            rendered = list(documents(reading))
            between = time.monotonic()
            tokens = sum(len(encoder.tokens(document)) for document in rendered)
            end = time.monotonic()
            print(
                f"| {special} | {tokens:,} | {between - start:.2f} | {end - between:.2f} | {tokens / (end - start) * 60 / 1e6:.1f} |"
            )


if __name__ == "__main__":
    main()
