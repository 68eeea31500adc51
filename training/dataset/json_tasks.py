"""Requests for small JSON values. The answer copies from the request, so nothing has to be remembered.

Half of the strings are invented, because a model of this size learns to copy only if remembering cannot help.
Held-out cases use their own templates, keys, names and places.
"""

import functools
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dataset.facts import questions, topics, unmark
from dataset.outside import invented_word
from dataset.words import words

NAMES, HELD_NAMES = words()["name"], words()["held name"]
CITIES, HELD_CITIES = words()["city"], words()["held city"]
WORDS, HELD_WORDS = words()["word"], words()["held word"]
STRING_KEYS, HELD_STRING_KEYS = words()["string key"], words()["held string key"]
NUMBER_KEYS, HELD_NUMBER_KEYS = words()["number key"], words()["held number key"]
BOOL_KEYS = ("active", "ready", "open", "stream", "valid", "enabled")
NAME_KEYS = ("name", "term", "topic", "concept", "subject", "title", "word")
PURPOSE_KEYS = ("purpose", "summary", "meaning", "definition", "description", "explanation")


@dataclass(frozen=True)
class JsonTask:
    """One request and the JSON value that answers it."""

    request: str
    """What the user says."""

    value: Any
    """The value that the answer must parse to."""

    @property
    def answer(self) -> str:
        """The JSON text."""
        return json.dumps(self.value, ensure_ascii=False)


@functools.cache
def known_words() -> tuple[str, ...]:
    """All words of the data set's own texts, except those held out, so that every token is copied now and then."""
    texts = [q.answer for q in questions()] + [" ".join(kind) for kind in words().values()]
    held = {word.lower() for kind, listed in words().items() if kind.startswith("held") for word in listed}
    return tuple(sorted({word for word in re.findall("[a-z]{3,12}", " ".join(texts).lower())} - held))


def text_value(rng: random.Random, held_out: bool) -> str:
    """A short string: a name, a city, a word, or two of them."""
    kind = rng.random()
    if kind < 0.25:
        return rng.choice((str.lower, str.capitalize))(invented_word(rng))
    if kind < 0.4:
        return rng.choice((str.lower, str.lower, str.capitalize))(rng.choice(known_words()))
    if kind < 0.6:
        return rng.choice(HELD_NAMES if held_out else NAMES)
    if kind < 0.75:
        return rng.choice(HELD_CITIES if held_out else CITIES)
    if kind < 0.9:
        return rng.choice(HELD_WORDS if held_out else WORDS)
    return f"{rng.choice(WORDS)} {rng.choice(HELD_WORDS if held_out else WORDS)}"


def number_value(rng: random.Random) -> int | float:
    """A number of one to five digits, sometimes with one decimal."""
    if rng.random() < 0.15:
        return round(rng.uniform(0, 100), 1)
    return rng.randint(0, int(10 ** rng.uniform(1, 5)))


def _pairs(rng: random.Random, held_out: bool) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for _ in range(rng.choice((1, 2, 2, 2, 3, 3, 4))):
        kind = rng.random()
        if kind < 0.45:
            key = rng.choice(HELD_STRING_KEYS if held_out and rng.random() < 0.5 else STRING_KEYS)
            pairs[key] = text_value(rng, held_out)
        elif kind < 0.70:
            key = rng.choice(HELD_NUMBER_KEYS if held_out and rng.random() < 0.5 else NUMBER_KEYS)
            pairs[key] = number_value(rng)
        elif kind < 0.77:
            pairs[rng.choice(BOOL_KEYS)] = rng.random() < 0.5
        else:
            # Numbers too: whether a value is quoted must be seen from the value, not guessed from its key.
            value = number_value(rng) if rng.random() < 0.5 else text_value(rng, held_out)
            pairs[rng.choice((invented_word(rng), rng.choice(known_words())))] = value
    return pairs


PAIR_STARTS = (
    "Give JSON with ",
    "Return a JSON object with ",
    "Write a JSON object with ",
    "I need JSON with ",
    "Create JSON with ",
    "JSON with ",
    "Answer in JSON with ",
    "Please return JSON with ",
    "Give me a JSON object with ",
    "Make a JSON object with ",
    "Output only JSON: ",
    "Produce JSON with ",
    "Produce JSON: ",
    "Could you give me JSON with ",
    "Could you make a JSON object with ",
    "Respond in JSON with ",
    "Respond with JSON: ",
    "I want a JSON object that has ",
    "Produce an object in JSON with ",
)
HELD_PAIR_STARTS = ("Produce a JSON object with ", "Could you write JSON with ", "Respond with JSON that has ")
PAIR_STYLES: tuple[Callable[[str, str], str], ...] = (
    lambda key, value: f"{key} {value}",
    lambda key, value: f"{key} {value}",
    lambda key, value: f"{key} = {value}",
    lambda key, value: f"{key}: {value}",
    lambda key, value: f"the {key} {value}",
    lambda key, value: f"{key} set to {value}",
)


def _pair_task(rng: random.Random, held_out: bool) -> JsonTask:
    pairs = _pairs(rng, held_out)
    style = rng.choice(PAIR_STYLES)
    quoted = rng.random() < 0.6
    parts = []
    for key, value in pairs.items():
        shown = f'"{value}"' if isinstance(value, str) and quoted else json.dumps(value, ensure_ascii=False)
        if isinstance(value, str) and not quoted:
            shown = value
        parts.append(style(key, shown))
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + rng.choice((" and ", ", ")) + parts[-1]
    start = rng.choice(HELD_PAIR_STARTS if held_out else PAIR_STARTS)
    return JsonTask(start + listed + rng.choice((".", "", ".")), pairs)


def _sentence_task(rng: random.Random, held_out: bool) -> JsonTask:
    """Facts in a sentence, to be put into fields."""
    name = rng.choice(HELD_NAMES if held_out else NAMES)
    if rng.random() < 0.4:
        name = invented_word(rng).capitalize()
    city = rng.choice(HELD_CITIES if held_out else CITIES)
    if rng.random() < 0.4:
        city = invented_word(rng).capitalize()
    number, word = rng.randint(1, 99), rng.choice(HELD_WORDS if held_out else WORDS)
    sentence, pairs = rng.choice((
        (f"{name} is {number} years old and lives in {city}.", {"name": name, "age": number, "city": city}),
        (f"{name} lives in {city}.", {"name": name, "city": city}),
        (f"{name} is {number} years old.", {"name": name, "age": number}),
        (f"{name} from {city} likes {word}.", {"name": name, "city": city, "likes": word}),
        (f"{name} ordered {number} of {word}.", {"customer": name, "item": word, "count": number}),
        (f"The model {name} has {number} layers.", {"model": name, "layers": number}),
        (f"The server in {city} has {number} requests.", {"city": city, "requests": number}),
    ))  # fmt: skip
    keys = list(pairs)
    listed = ", ".join(keys[:-1]) + " and " + keys[-1]
    forms = (
        f"{sentence} Return JSON with {listed}.",
        f"{sentence} Give me JSON with {listed}.",
        f"{sentence} Put that into JSON with the fields {listed}.",
        f"Write JSON with {listed}: {sentence}",
        f"Extract {listed} as JSON: {sentence}",
        f"{sentence} As JSON, please, with {listed}.",
        f"{sentence} Make that JSON with {listed}.",
        f"Make JSON from this: {sentence} Use the fields {listed}.",
        f"Make JSON with {listed} of this sentence: {sentence}",
    )
    held_forms = (
        f"{sentence} As JSON with {listed}, please.",
        f"Make JSON with the fields {listed} from this: {sentence}",
    )
    return JsonTask(rng.choice(held_forms if held_out else forms), pairs)


def _fact_task(rng: random.Random, held_out: bool) -> JsonTask:
    """A topic and its short definition."""
    topic = rng.choice(topics())
    name = rng.choice(topic.names)
    for article in ("the ", "a ", "an "):
        name = name.removeprefix(article)
    name_key, purpose_key = rng.choice(NAME_KEYS[:2] * 2 + NAME_KEYS), rng.choice(PURPOSE_KEYS)
    forms = (
        f"Return a JSON object with fields {name_key} and {purpose_key} for {name}.",
        f"Give JSON with {name_key} and {purpose_key} for {name}.",
        f"Describe {name} as JSON with {name_key} and {purpose_key}.",
        f"Write a JSON object about {name} with the fields {name_key} and {purpose_key}.",
        f"JSON with the fields {name_key} and {purpose_key} for {name}, please.",
        f"I need a JSON object with {name_key} and {purpose_key} of {name}.",
        f"Produce a JSON object for {name} with {name_key} and {purpose_key}.",
        f"Explain {name} in JSON with {name_key} and {purpose_key}.",
        f"A JSON object with the keys {name_key} and {purpose_key} for {name}.",
    )
    held_forms = (
        f"Produce JSON with {name_key} and {purpose_key} for {name}.",
        f"Explain {name} in a JSON object with the keys {name_key} and {purpose_key}.",
    )
    value = {name_key: name, purpose_key: unmark(topic.facets["short"])[0]}
    return JsonTask(rng.choice(held_forms if held_out else forms), value)


def _list_word(rng: random.Random, held_out: bool) -> str:
    if held_out:
        return rng.choice(HELD_WORDS)
    kind = rng.random()
    if kind < 0.2:
        return invented_word(rng)
    return rng.choice(known_words()) if kind < 0.6 else rng.choice(WORDS)


def _list_task(rng: random.Random, held_out: bool) -> JsonTask:
    count = rng.randint(2, 5)
    values: list[Any]
    if rng.random() < 0.5:
        values, what = [rng.randint(0, 99) for _ in range(count)], "numbers"
    else:
        values, what = [_list_word(rng, held_out) for _ in range(count)], "words"
    listed = ", ".join(map(str, values[:-1])) + " and " + str(values[-1])
    forms = (
        f"Return a JSON array with the {what} {listed}.",
        f"Give me a JSON list of {listed}.",
        f"Write {listed} as a JSON array.",
        f"JSON array of {listed}",
        f"Put {listed} into a JSON array.",
        f"Produce a JSON list of {listed}.",
        f"Make a JSON array from {listed}.",
        f"Make a JSON list from {listed}.",
        f"Turn {listed} into a JSON list.",
        f"Put {listed} in a JSON list, please.",
        f"Create a JSON array from {listed}.",
        f"Produce JSON: an array of {listed}.",
    )
    held_forms = (f"Produce a JSON array from {listed}.", f"Put {listed} into a JSON list.")
    return JsonTask(rng.choice(held_forms if held_out else forms), values)


def json_task(rng: random.Random, held_out: bool = False) -> JsonTask:
    """One random task."""
    kind = rng.choice(
        (_pair_task, _pair_task, _pair_task, _sentence_task, _sentence_task, _fact_task, _list_task, _list_task)
    )
    return kind(rng, held_out)


def copy_task(rng: random.Random, held_out: bool = False) -> tuple[str, str]:
    """A request to repeat some words, or to count, and its answer. Long lists teach copying token by token."""
    if rng.random() < 0.2:
        last = rng.randint(3, 40)
        counts = (
            f"Count to {last}.",
            f"Count from 1 to {last}.",
            f"Count up to {last}, please.",
            f"Can you count to {last}?",
        )
        answer = ", ".join(str(i) for i in range(1, last + 1)) + "."
        return (f"Please count from 1 up to {last}." if held_out else rng.choice(counts)), answer
    count = rng.randint(1, 5) if held_out or rng.random() < 0.5 else rng.randint(6, 20)
    text = " ".join(str(number_value(rng)) if rng.random() < 0.15 else text_value(rng, held_out) for _ in range(count))
    forms = (f"Repeat after me: {text}", f"Say {text}", f"Repeat: {text}", f'Repeat the text "{text}"', f"Echo {text}",
             f"Write exactly this: {text}")  # fmt: skip
    return (f"Please repeat this: {text}" if held_out else rng.choice(forms)), text
