"""The hand-written text files, crossed with the templates: every question the model can answer from memory.

A Question is one answer with all its phrasings. Two kinds of phrasing are held out of training: one in a template
that no topic is trained on, and one in a known template that this topic alone is not trained on.
"""

import functools
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from dataset.phrasings import ACTION, DIFFERENCE, FACETS, WRAPPERS, Forms, fill, normalize

FOLDER = Path(__file__).parent
NO_EXAMPLE = "I have *no example* for that."


@dataclass(frozen=True)
class Question:
    """One fact and the ways to ask for it."""

    name: str
    """Unique, for example "paged attention/why"."""

    facet: str
    """what, why, how, example, short, all, difference, action, single or chat."""

    train: tuple[str, ...]
    """Phrasings to train on; the first is the canonical one."""

    held_out: tuple[str, ...]
    """Phrasings that only evaluation asks."""

    answer: str
    """What the model should say."""

    keys: tuple[str, ...]
    """Phrases that a right answer contains."""


@dataclass(frozen=True)
class Topic:
    """One subject with its facets, for conversations that stay with a subject."""

    names: tuple[str, ...]
    """How people call it; the first is the usual name, with its article."""

    plural: bool
    """Whether the first name takes "are"."""

    facets: dict[str, str]
    """Marked answers by facet."""


def unmark(marked: str) -> tuple[str, tuple[str, ...]]:
    """Splits "text with a *key phrase*" into the plain text and its key phrases."""
    keys = tuple(re.findall(r"\*([^*]+)\*", marked))
    return marked.replace("*", ""), keys


def _lines(file_name: str) -> list[str]:
    text = (FOLDER / file_name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


@functools.cache
def topics() -> tuple[Topic, ...]:
    """All topics of topics.txt."""
    found: list[Topic] = []
    for line in _lines("topics.txt"):
        if line.startswith("== "):
            plural = "(plural)" in line
            names = tuple(n.strip() for n in line[3:].replace("(plural)", "").split("|"))
            found.append(Topic(names, plural, {}))
        else:
            facet, answer = line.split(":", 1)
            found[-1].facets[facet] = answer.strip()
    for topic in found:
        parts = [topic.facets[f] for f in ("what", "why", "how", "example") if f in topic.facets]
        topic.facets["all"] = " ".join(parts)
    return tuple(found)


def _phrasings(name: str, forms: Forms, fillings: list[tuple[str, bool]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Trained and held-out phrasings of one question; the choice depends on its name alone."""
    rng = random.Random(zlib.crc32(name.encode()))
    rotating = rng.choice(forms.train[1 : forms.num_rotating])
    usual, plural = fillings[0]
    train = [fill(f, usual, plural) for f in forms.train if f != rotating]
    for other, other_plural in fillings[1:]:
        some = rng.sample(forms.train, max(4, len(forms.train) // 2))
        train += [fill(form, other, other_plural) for form in some if form != rotating]
    held_name, held_plural = rng.choice(fillings)
    held = [fill(rng.choice(forms.held), held_name, held_plural), fill(rotating, usual, plural)]
    return _without(train, held), tuple(held)


def _without(train: list[str], held: list[str]) -> tuple[str, ...]:
    """The training phrasings that are no held-out phrasing in other letters, each once."""
    asked = {normalize(text) for text in held}
    return tuple(text for text in dict.fromkeys(train) if normalize(text) not in asked)


def _topic_questions() -> list[Question]:
    questions = []
    for topic in topics():
        # Aliases without article and in the singular ("TTFT", "stop sequences" follows the plural of its topic).
        fillings = [(name, topic.plural and not name.startswith(("a ", "an "))) for name in topic.names]
        for facet, marked in topic.facets.items():
            name = f"{topic.names[0]}/{facet}"
            train, held = _phrasings(name, FACETS[facet], fillings)
            if facet == "what" and "how" not in topic.facets:  # then "How does it work?" is told what it is
                train += tuple(fill(form, *fillings[0]) for form in FACETS["how"].train[:5])
            answer, keys = unmark(marked)
            questions.append(Question(name, facet, train, held, answer, keys))
    return questions


def _difference_questions() -> list[Question]:
    questions = []
    lines = _lines("differences.txt")
    for head, marked in zip(lines[::2], lines[1::2], strict=True):
        a, b = (side.strip() for side in head[3:].split("|"))
        rng = random.Random(zlib.crc32(head.encode()))
        rotating = rng.choice(DIFFERENCE.train[1:])
        train = [f.format(a=a, b=b) for f in DIFFERENCE.train if f != rotating]
        train += [f.format(a=b, b=a) for f in DIFFERENCE.train if f != rotating]
        held = (rng.choice(DIFFERENCE.held).format(a=a, b=b), rotating.format(a=a, b=b))
        answer, keys = unmark(marked)
        questions.append(Question(f"{a} | {b}", "difference", tuple(train), held, answer, keys))
    return questions


def _single_questions() -> list[Question]:
    questions = []
    lines = _lines("questions.txt")
    for head, marked in zip(lines[::2], lines[1::2], strict=True):
        answer, keys = unmark(marked.removeprefix("= "))
        facet, text = {"d": ("action", head[3:]), "?": ("single", head[1:]), "c": ("chat", head[5:])}[head[0]]
        phrasings = [p.strip() for p in text.split("|")]
        if facet == "action":
            train, held = _phrasings(head, ACTION, [(p, False) for p in phrasings])
        else:
            spoken = [p for p in phrasings if not p.startswith("!")]
            held = tuple(p[1:].strip() for p in phrasings if p.startswith("!"))
            if facet == "single":
                rng = random.Random(zlib.crc32(head.encode()))
                spoken += [wrapper + rng.choice(spoken) for wrapper in WRAPPERS]
            train = _without(spoken, list(held))
        questions.append(Question(phrasings[0], facet, train, held, answer, keys))
    return questions


@functools.cache
def questions() -> tuple[Question, ...]:
    """Every question, in the order of the files."""
    return tuple(_topic_questions() + _difference_questions() + _single_questions())
