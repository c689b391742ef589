"""Minimal pairs from templates: two sentences that differ in one word, one of them ungrammatical.

There are eight kinds, each testing one rule. The two differing words are both common in their position, so that only
the rest of the sentence determines which is correct. All combinations of subject, verb and so on are generated, and a
fixed number of each kind is drawn.
"""

from collections.abc import Iterator
from itertools import product
from random import Random

PER_KIND = 70

PEOPLE = {
    "the man": "the men",
    "the woman": "the women",
    "the boy": "the boys",
    "the officer": "the officers",
    "the captain": "the captains",
    "the lady": "the ladies",
    "the child": "the children",
    "the servant": "the servants",
}
OBJECTS = {
    "the house": "the houses",
    "the ship": "the ships",
    "the letter": "the letters",
    "the door": "the doors",
    "the law": "the laws",
    "the table": "the tables",
    "the road": "the roads",
    "the tree": "the trees",
}
PLACES = ["near the river", "in the town", "behind the church", "on the hill", "of the village"]
STATES = ["very old", "quite new", "well known", "in great danger", "still there", "of little value"]
MALE = ["the king", "my father", "his brother", "the boy", "the gentleman", "her husband"]
FEMALE = ["the queen", "my mother", "his sister", "the girl", "the lady", "his wife"]
REFLEXIVE_VERBS = ["found", "saw", "blamed", "hurt", "called", "thought of"]
PAST = {
    "go": ("went", "gone"),
    "see": ("saw", "seen"),
    "take": ("took", "taken"),
    "give": ("gave", "given"),
    "write": ("wrote", "written"),
    "know": ("knew", "known"),
    "do": ("did", "done"),
    "begin": ("began", "begun"),
}
TRANSITIVE = {"see": "him", "follow": "her", "know": "them", "help": "him", "tell": "her", "leave": "them"}
SUBJECT_FORM = {"him": "he", "her": "she", "them": "they"}
MODALS = ["will", "can", "may", "must", "would", "could"]
VERBS = {"go": "goes", "stay": "stays", "speak": "speaks", "return": "returns", "write": "writes", "work": "works"}
COUNTABLE = ["book", "horse", "ship", "letter", "house", "soldier", "child", "tree"]
PLURALS = {
    "book": "books",
    "horse": "horses",
    "ship": "ships",
    "letter": "letters",
    "house": "houses",
    "soldier": "soldiers",
    "child": "children",
    "tree": "trees",
}
SCENES = ["on the table", "in the garden", "before the door", "at the end of the road", "by the water"]

Pair = tuple[str, str]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def agreement() -> Iterator[Pair]:
    for (one, many), state in product({**PEOPLE, **OBJECTS}.items(), STATES):
        yield f"{one} is {state}", f"{one} are {state}"
        yield f"{many} are {state}", f"{many} is {state}"


def agreement_across() -> Iterator[Pair]:
    """The noun next to the verb differs in number from the subject."""
    for (one, many), (other, others), state in product(OBJECTS.items(), PEOPLE.items(), STATES[:3]):
        yield f"{one} of {others} is {state}", f"{one} of {others} are {state}"
        yield f"{many} of {other} are {state}", f"{many} of {other} is {state}"


def reflexive() -> Iterator[Pair]:
    for his, hers, verb in product(MALE, FEMALE, REFLEXIVE_VERBS):
        yield f"{his} {verb} himself", f"{his} {verb} herself"
        yield f"{hers} {verb} herself", f"{hers} {verb} himself"


def participle() -> Iterator[Pair]:
    ends = {
        "go": "to the town",
        "see": "the letter",
        "take": "the money",
        "give": "it to the man",
        "write": "a letter",
        "know": "the truth",
        "do": "the work",
        "begin": "the work",
    }
    for who, (verb, (past, done)) in product(["he", "she", "they", "the captain", "my father"], PAST.items()):
        have = "have" if who == "they" else "has"
        yield f"{who} {have} {done} {ends[verb]}", f"{who} {have} {past} {ends[verb]}"
        yield f"{who} {past} {ends[verb]} yesterday", f"{who} {done} {ends[verb]} yesterday"


def pronoun() -> Iterator[Pair]:
    for who, modal, (verb, whom) in product(PEOPLE, MODALS, TRANSITIVE.items()):
        yield f"{who} {modal} {verb} {whom} in the morning", f"{who} {modal} {verb} {SUBJECT_FORM[whom]} in the morning"


def bare_verb() -> Iterator[Pair]:
    for who, modal, (verb, third) in product(PEOPLE, MODALS, VERBS.items()):
        yield f"{who} {modal} {verb} again", f"{who} {modal} {third} again"


def number() -> Iterator[Pair]:
    for noun, scene, (few, one) in product(
        COUNTABLE, SCENES, (("many", "one"), ("several", "every"), ("these", "this"))
    ):
        were = "were" if few != "these" else "are"
        yield f"{few} {PLURALS[noun]} {were} {scene}", f"{few} {noun} {were} {scene}"
        was = "was" if one != "this" else "is"
        yield f"{one} {noun} {was} {scene}", f"{one} {PLURALS[noun]} {was} {scene}"


def article() -> Iterator[Pair]:
    vowels = ["old man", "honest man", "island", "hour", "officer", "answer", "empty house", "open door"]
    consonants = ["young man", "good man", "river", "day", "soldier", "question", "large house", "closed door"]
    for (with_an, with_a), start in product(
        zip(vowels, consonants, strict=True),
        ["it was", "there is", "he spoke of", "she thought of", "we waited for", "they saw"],
    ):
        yield f"{start} an {with_an}", f"{start} a {with_an}"
        yield f"{start} a {with_a}", f"{start} an {with_a}"


KINDS = {
    "agreement": agreement,
    "agreement across a noun": agreement_across,
    "reflexive": reflexive,
    "participle": participle,
    "pronoun": pronoun,
    "bare verb": bare_verb,
    "number": number,
    "article": article,
}


def pairs(random: Random) -> list[dict[str, object]]:
    """The items in the format of eval/tasks; the pairs of a kind share words, which intervals take into account."""
    items: list[dict[str, object]] = []
    for kind, make in KINDS.items():
        left = sorted(set(make()))
        for index in range(PER_KIND):
            good, bad = left.pop(int(random.random() * len(left)))
            order = [sentence(good), sentence(bad)]
            answer = int(random.random() * 2)
            if answer:
                order.reverse()
            items.append(
                {"document": f"{kind}/{index}", "group": kind, "context": "", "choices": order, "answer": answer}
            )
    return items
