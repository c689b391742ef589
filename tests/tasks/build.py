"""Builds the items of eval/tasks from eval/corpora/heldout.jsonl. The same text and script always give the same files.

    python tests/tasks/build.py            # writes eval/tasks/*.jsonl
    python tests/tasks/build.py DIRECTORY  # writes there

Uses only the standard library, and of its random generator only `random()`, whose sequence is stable across versions of
Python. No model's answers are used.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import TypeVar

from grammar import pairs

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "eval" / "corpora" / "heldout.jsonl"
TASKS = ROOT / "eval" / "tasks"

CONTEXT_WORDS, CHOICE_WORDS, CHOICES = 40, 6, 4
CONTINUATIONS, LAST_WORDS = 600, 560
LAST_WORD_CONTEXT = 50
LENGTHS, LINES_PER_LENGTH = (512, 1024, 2048), 50
WORDS_PER_TOKEN = 0.56  # of the reference tokenizer on this text, a little low so that a context stays below its length

Item = dict[str, object]
T = TypeVar("T")


def below(random: Random, count: int) -> int:
    return int(random.random() * count)


def shuffled(random: Random, values: Sequence[T]) -> list[T]:
    left = list(values)
    return [left.pop(below(random, len(left))) for _ in range(len(left))]


def documents() -> list[dict[str, str]]:
    return [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").split("\n") if line]


def whole(document: dict[str, str]) -> str:
    """The id of the text that a document is part of; parts are not independent, so intervals treat them as one unit."""
    return document["id"].partition("#")[0]


def spread(
    random: Random, texts: Sequence[dict[str, str]], wanted: int, make: Callable[[Random, dict[str, str]], list[Item]]
) -> list[Item]:
    """Draw items from all domains and documents in turn; other domains replace one that runs out."""
    domains = sorted({text["domain"] for text in texts})
    turns = []
    for domain in domains:
        queues = [shuffled(random, make(random, text)) for text in texts if text["domain"] == domain]
        turns.append([queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)])
    mixed = [turn[index] for index in range(max(map(len, turns))) for turn in turns if index < len(turn)]
    if len(mixed) < wanted:
        raise SystemExit(f"only {len(mixed)} items")
    return mixed[:wanted]


def word_spans(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"\S+", text)]


def continuation(random: Random, document: dict[str, str]) -> list[Item]:
    """The next six words, or six words from elsewhere in the same document."""
    text = document["text"]
    spans = word_spans(text)

    def piece(word: int) -> str:
        return text[spans[word - 1][1] : spans[word + CHOICE_WORDS - 1][1]]

    starts = [word for word in range(1, len(spans) - CHOICE_WORDS) if re.fullmatch(r"( \S+){6}", piece(word))]
    items: list[Item] = []
    for word in starts[:: CONTEXT_WORDS // 2]:
        if word < CONTEXT_WORDS:
            continue
        begin = word - CONTEXT_WORDS
        far = [other for other in starts if not begin - CHOICE_WORDS < other < word + 2 * CHOICE_WORDS]
        choices = {piece(word)}
        while far and len(choices) < CHOICES:
            choices.add(piece(far.pop(below(random, len(far)))))
        if len(choices) < CHOICES:
            continue
        order = shuffled(random, sorted(choices))
        context = text[spans[begin][0] : spans[word - 1][1]]
        items.append(
            {
                "document": whole(document),
                "group": document["domain"],
                "context": context,
                "choices": order,
                "answer": order.index(piece(word)),
            }
        )
    return items


def last_word(_: Random, document: dict[str, str]) -> list[Item]:
    """The last word of a sentence or clause that also occurs in the fifty words before, so that it can be guessed."""
    text = document["text"]
    spans = word_spans(text)
    items: list[Item] = []
    for number in range(LAST_WORD_CONTEXT, len(spans)):
        begin, end = spans[number]
        word = text[begin:end].rstrip(".?!;:")
        if word == text[begin:end] or not re.fullmatch(r"[A-Za-z]{3,}", word) or text[begin - 1] != " ":
            continue
        context = text[spans[number - LAST_WORD_CONTEXT][0] : begin - 1]
        if re.search(rf"\b{word}\b", context):
            items.append(
                {
                    "document": whole(document),
                    "group": document["domain"],
                    "context": context,
                    "choices": [f" {word}"],
                    "answer": 0,
                }
            )
    return items


def retrieval(random: Random) -> list[Item]:
    """A line with a number within other text; at the end its words are repeated, and the number is asked for."""
    things = [
        "harbour",
        "lantern",
        "bridge",
        "orchard",
        "station",
        "chapel",
        "garden",
        "library",
        "market",
        "mill",
        "tower",
        "cottage",
        "ferry",
        "quarry",
        "stable",
        "tavern",
    ]
    texts = [document for document in documents() if document["domain"] in {"literature", "speeches"}]
    items: list[Item] = []
    for length in LENGTHS:
        for number in range(LINES_PER_LENGTH):
            document = texts[(7 * number + length) % len(texts)]
            spans: list[tuple[int, int]] = []
            filler = document["text"]
            count = int(length * WORDS_PER_TOKEN) - 30
            while len(spans) < count:  # a short document is followed by the next
                spans = word_spans(filler)
                if len(spans) < count:
                    filler += "\n\n" + texts[(texts.index(document) + 1 + filler.count("\n\n\n")) % len(texts)]["text"]
            thing = things[below(random, len(things))]
            codes = [str(1000 + below(random, 9000)) for _ in range(CHOICES)]
            if len(set(codes)) < CHOICES:
                codes = [str(2111 + 1613 * index) for index in range(CHOICES)]
            depth = (number % 10 + 0.5) / 10
            place = spans[int(count * depth)][0]
            line = f"The secret number of the {thing} is {codes[0]}."
            body = filler[:place].rstrip() + f"\n\n{line}\n\n" + filler[place : spans[count - 1][1]]
            order = shuffled(random, codes)
            items.append(
                {
                    "document": f"{length}/{number}",
                    "group": str(length),
                    "context": f"{body}\n\nThe secret number of the {thing} is",
                    "choices": [f" {code}" for code in order],
                    "answer": order.index(codes[0]),
                }
            )
    return items


def numbered(items: Sequence[Item]) -> Iterator[str]:
    for index, item in enumerate(items):
        yield json.dumps({"id": index, **item}, ensure_ascii=False) + "\n"


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TASKS
    texts = documents()
    built = {
        "continuation": spread(Random(1), texts, CONTINUATIONS, continuation),
        "last_word": spread(Random(2), texts, LAST_WORDS, last_word),
        "grammar": pairs(Random(3)),
        "retrieval": retrieval(Random(4)),
    }
    for name, items in built.items():
        (target / f"{name}.jsonl").write_text("".join(numbered(items)), encoding="utf-8")
        print(f"{name}: {len(items)} items")


if __name__ == "__main__":
    main()
