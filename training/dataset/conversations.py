"""Whole chats: the endless stream for training and the fixed cases for evaluation.

A chat is a list of OpenAI-style messages and perhaps a list of tools. The mixture below decides how often each kind
of chat is drawn; one seeded random.Random makes the stream reproducible.
"""

import functools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dataset.facts import NO_EXAMPLE, Question, Topic, questions, topics, unmark
from dataset.json_tasks import copy_task, json_task
from dataset.outside import REFUSAL, REFUSAL_KEY, outside_question
from dataset.phrasings import FOLLOW_UPS, SYSTEM_PROMPTS, fill, normalize, with_noise
from dataset.tool_tasks import tool_task

Message = dict[str, Any]


@dataclass
class Chat:
    """One conversation, ready for the chat template."""

    messages: list[Message]
    """Messages in order; the model is trained on those of the assistant."""

    tools: list[dict[str, Any]] | None = None
    """Tools for the system prompt, or none."""

    def user(self, content: str) -> None:
        """Adds what the user says."""
        self.messages.append({"role": "user", "content": content})

    def assistant(self, content: str) -> None:
        """Adds what the model answers."""
        self.messages.append({"role": "assistant", "content": content})


@functools.cache
def _by_name() -> dict[str, Question]:
    return {question.name: question for question in questions()}


@functools.cache
def _held_out() -> frozenset[str]:
    return frozenset(normalize(text) for question in questions() for text in question.held_out)


@functools.cache
def _weights() -> list[float]:
    """Short answers are also learned elsewhere, and complete ones are long; questions asked in few other ways,
    and by everybody, are drawn more often."""
    weight = {"short": 0.4, "all": 0.3, "single": 2.0, "action": 1.5, "chat": 5.0}
    return [weight.get(question.facet, 1.0) for question in questions()]


def ask(question: Question, rng: random.Random) -> str:
    """One training phrasing with noise; noise that happens to make a held-out phrasing is dropped."""
    phrasing = question.train[0] if rng.random() < 0.15 else rng.choice(question.train)
    noisy = with_noise(phrasing, rng)
    return phrasing if normalize(noisy) in _held_out() else noisy


def _random_question(rng: random.Random) -> Question:
    return rng.choices(questions(), _weights())[0]


def _facet_answer(topic: Topic, facet: str) -> str:
    """The answer to a follow-up; a topic without example says so, one without "how" says what it is."""
    marked = topic.facets.get(facet) or (NO_EXAMPLE if facet == "example" else topic.facets["what"])
    return unmark(marked)[0]


def _system(chat: Chat, rng: random.Random) -> None:
    """Sometimes a system prompt; rarely a long one, as a document in front of a chat would be."""
    kind = rng.random()
    if kind < 0.22:
        chat.messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    elif kind < 0.24:
        chosen = rng.sample(topics(), rng.randint(3, 14))
        document = " ".join(unmark(topic.facets["what"])[0] for topic in chosen)
        chat.messages.append({"role": "system", "content": f"{rng.choice(SYSTEM_PROMPTS)} {document}"})


def _single(rng: random.Random) -> Chat:
    chat = Chat([])
    _system(chat, rng)
    question = _random_question(rng)
    chat.user(ask(question, rng))
    chat.assistant(question.answer)
    return chat


def _outside(rng: random.Random) -> Chat:
    chat = Chat([])
    _system(chat, rng)
    chat.user(with_noise(outside_question(rng), rng))
    chat.assistant(REFUSAL)
    return chat


def _follow_up(chat: Chat, topic: Topic, rng: random.Random) -> Topic:
    """Adds one more turn about the topic, or about another one; returns the topic then talked about."""
    kind = rng.choices(("why", "how", "example", "short", "about", "repeat"), (5, 2, 4, 4, 3, 1))[0]
    if kind == "how" and "how" not in topic.facets:
        kind = "why"
    if kind == "example" and "example" not in topic.facets and rng.random() < 0.6:
        kind = "short"
    form = rng.choice(FOLLOW_UPS[kind].train)
    if kind == "about":
        topic = rng.choice(topics())
        name = rng.choice(topic.names)
        chat.user(with_noise(fill(form, name, topic.plural and name == topic.names[0]), rng))
        chat.assistant(unmark(topic.facets["what"])[0])
    else:
        last = str(chat.messages[-1]["content"])
        chat.user(with_noise(form, rng))
        chat.assistant(last if kind == "repeat" else _facet_answer(topic, kind))
    return topic


def _multi_turn(rng: random.Random) -> Chat:
    """Two to five turns: a topic with follow-ups, mixed with other questions and small talk."""
    chat = Chat([])
    _system(chat, rng)
    topic: Topic | None = None
    for turn in range(rng.choice((2, 2, 2, 3, 3, 4, 5))):
        kind = rng.random()
        if topic is not None and kind < 0.7:
            topic = _follow_up(chat, topic, rng)
        elif kind < 0.84 or (turn == 0 and kind < 0.75):
            topic = rng.choice(topics())
            question = _by_name()[f"{topic.names[0]}/{rng.choice(('what', 'what', 'what', 'why'))}"]
            chat.user(ask(question, rng))
            chat.assistant(question.answer)
        elif kind < 0.9:
            topic = None
            chat.user(with_noise(outside_question(rng), rng))
            chat.assistant(REFUSAL)
        else:
            topic = None
            question = _random_question(rng)
            chat.user(ask(question, rng))
            chat.assistant(question.answer)
    return chat


def _json(rng: random.Random) -> Chat:
    chat = Chat([])
    _system(chat, rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        task = json_task(rng)
        chat.user(task.request if rng.random() < 0.8 else task.request.rstrip("."))
        chat.assistant(task.answer)
    return chat


def _copy(rng: random.Random) -> Chat:
    chat = Chat([])
    for _ in range(rng.choice((1, 2, 3))):
        request, answer = copy_task(rng)
        chat.user(request)
        chat.assistant(answer)
    return chat


def _tool_call(call: dict[str, Any]) -> Message:
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}


def _tools(rng: random.Random) -> Chat:
    """A call, its result and its sentence; sometimes a question that needs no tool before or after."""
    task = tool_task(rng)
    chat = Chat([], task.tools)
    if rng.random() < 0.15:
        chat.messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})

    def plain_turn() -> None:
        if rng.random() < 0.8:
            question = _random_question(rng)
            chat.user(ask(question, rng))
            chat.assistant(question.answer)
        else:
            chat.user(f"Who was {rng.choice(('Mozart', 'Homer', 'Einstein', 'Napoleon', 'Bach', 'Galileo'))}?")
            chat.assistant(REFUSAL)

    if rng.random() < 0.2:
        plain_turn()
    chat.user(task.request if rng.random() < 0.7 else with_case(task.request, rng))
    chat.messages.append(_tool_call(task.call))
    chat.messages.append({"role": "tool", "content": task.result})
    chat.assistant(task.sentence)
    if rng.random() < 0.15:
        plain_turn()
    return chat


def with_case(request: str, rng: random.Random) -> str:
    """Noise that keeps the argument values: a polite word in front, or no final mark."""
    if rng.random() < 0.5:
        return request.rstrip("?.")
    return rng.choice(("Please: ", "Hi! ", "Hey, ", "I have a task: ")) + request


MIXTURE: tuple[tuple[Callable[[random.Random], Chat], float], ...] = (
    (_single, 0.30),
    (_multi_turn, 0.19),
    (_outside, 0.08),
    (_json, 0.17),
    (_tools, 0.12),
    (_copy, 0.14),
)


def training_chats(rng: random.Random) -> Iterator[Chat]:
    """Training chats without end."""
    kinds, weights = zip(*MIXTURE, strict=True)
    while True:
        yield rng.choices(kinds, weights)[0](rng)


@dataclass(frozen=True)
class Case:
    """One evaluation prompt and what its answer must be."""

    group: str
    """trained, held_out, follow_up, outside, json, tool_call or tool_answer."""

    chat: Chat
    """The messages up to the last one of the user or tool."""

    keys: tuple[str, ...] = ()
    """Phrases that a right answer contains."""

    value: Any = None
    """For json and tool_call: what the answer must parse to."""


def contains_keys(answer: str, keys: tuple[str, ...]) -> bool:
    """Whether every key phrase stands in the answer, regardless of case and punctuation."""
    plain = f" {normalize(answer)} "
    return all(f" {normalize(key)} " in plain for key in keys)


def _one_turn(content: str) -> Chat:
    return Chat([{"role": "user", "content": content}])


def _follow_up_case(rng: random.Random) -> Case:
    """A topic, zero or one turns between, and a held-out follow-up."""
    topic = rng.choice(topics())
    chat = _one_turn(_by_name()[f"{topic.names[0]}/what"].train[0])
    chat.assistant(unmark(topic.facets["what"])[0])
    if rng.random() < 0.5:
        topic = _follow_up(chat, topic, rng)
    kind = rng.choice([k for k in ("why", "why", "how", "example", "short", "short") if k in topic.facets] + ["about"])
    form = rng.choice(FOLLOW_UPS[kind].held)
    if kind == "about":
        topic, kind = rng.choice(topics()), "what"
        form = fill(form, topic.names[0], topic.plural)
    chat.user(form)
    return Case("follow_up", chat, unmark(topic.facets[kind])[1])


def evaluation_cases(seed: int = 1) -> list[Case]:
    """The same cases every time: two per question, and some hundred of each generated kind."""
    rng = random.Random(seed)
    cases = []
    for question in questions():
        cases.append(Case("trained", _one_turn(question.train[0]), question.keys))
        cases.append(Case("trained", _one_turn(rng.choice(question.train)), question.keys))
        cases += [Case("held_out", _one_turn(text), question.keys) for text in question.held_out]
    cases += [_follow_up_case(rng) for _ in range(300)]
    cases += [Case("outside", _one_turn(outside_question(rng, held_out=True)), (REFUSAL_KEY,)) for _ in range(300)]
    for _ in range(200):
        json_case = json_task(rng, held_out=True)
        cases.append(Case("json", _one_turn(json_case.request), value=json_case.value))
        task = tool_task(rng, held_out=True)
        call = Chat([{"role": "user", "content": task.request}], task.tools)
        cases.append(Case("tool_call", call, value=task.call))
        result = Chat([*call.messages, _tool_call(task.call), {"role": "tool", "content": task.result}], task.tools)
        cases.append(Case("tool_answer", result, (task.sentence, *map(str, json.loads(task.result).values()))[:1]))
    return cases
