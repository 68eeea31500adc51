"""How people ask: question templates per facet, follow-ups, and the noise of real typing.

In a template, {x} is the name of a topic ("the KV cache"), {bare} the name without article, and {is}, {does},
{it} agree with singular or plural. Templates after "held" are never trained on with any topic.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Forms:
    """The phrasings of one facet of a topic."""

    train: tuple[str, ...]
    """Templates to train on; the first is the canonical one."""

    held: tuple[str, ...]
    """Templates that only evaluation uses."""

    num_rotating: int = 1000
    """Each question holds out one of the first so many of train, the canonical one excepted."""


FACETS: dict[str, Forms] = {
    "what": Forms(
        train=(
            "What {is} {x}?",
            "What {does} {x} mean?",
            "Explain {x}.",
            "Define {x}.",
            "Tell me about {x}.",
            "Can you explain {x}?",
            "What do you know about {x}?",
            "I want to learn about {x}.",
            "Describe {x}.",
            "{bare}?",
            "Give me a definition of {bare}.",
            "What exactly {is} {x}?",
            "Please explain what {x} {is}.",
            "Could you tell me what {x} {is}?",
            "I keep reading about {x}. What {is} {it}?",
            "In simple words, what {is} {x}?",
            "Explain {x} in one sentence.",
            "How would you describe {x}?",
            "Help me understand {x}.",
            "{bare}",
            "what {is} {bare}",
            "What can you tell me about {x}?",
            "What do people mean by {x}?",
            "Give me an explanation of {x}.",
            "Give a short description of {x}.",
            "I have never heard of {x}.",
            "Do you know {x}?",
            "Do you know about {x}?",
            "Someone told me about {x}. What {is} {it}?",
            "Shortly explain {x}.",
            "Do you know what {bare} means?",
        ),
        num_rotating=22,
        held=(
            "What is meant by {x}?",
            "I have never heard of {x}, what {is} {it}?",
            "Give a short explanation of {x}.",
            "Do you know what {x} {is}?",
        ),
    ),
    "why": Forms(
        train=(
            "Why {is} {x} useful?",
            "Why do we need {x}?",
            "What {is} {x} good for?",
            "What is the benefit of {x}?",
            "Why would I use {x}?",
            "What is the point of {x}?",
            "Why {does} {x} matter?",
            "Why {is} {x} important?",
            "What problem {does} {x} solve?",
            "What do I gain from {x}?",
            "Why do people use {x}?",
            "What is the purpose of {x}?",
            "Why should I care about {x}?",
            "What {is} {x} used for?",
            "Why {bare}?",
            "Explain why {x} {is} useful.",
            "What are the advantages of {x}?",
            "What advantage {does} {x} have?",
            "Why {is} {x} needed?",
            "What {is} {x} needed for?",
            "Why do servers use {x}?",
            "Tell me why {x} {is} useful.",
            "Why does a server need {x}?",
            "For what purpose do we use {x}?",
            "What is the reason for {x}?",
        ),
        num_rotating=16,
        held=(
            "What is the advantage of {x}?",
            "For what reason do servers use {x}?",
            "Tell me why {x} {is} needed.",
        ),
    ),
    "how": Forms(
        train=(
            "How {does} {x} work?",
            "Explain how {x} works.",
            "How exactly {does} {x} work?",
            "Tell me how {x} works.",
            "Can you explain how {x} works?",
            "What is the mechanism behind {x}?",
            "Describe how {x} works.",
            "How {is} {x} implemented?",
            "How {does} {x} work in practice?",
            "What {does} {x} do step by step?",
            "how {does} {bare} work",
            "I want to know how {x} works.",
            "How {does} {x} work in detail?",
            "In which way {does} {x} work?",
            "Show me the way {x} works.",
            "What happens inside {x}?",
        ),
        num_rotating=12,
        held=(
            "Show me how {x} works.",
            "In what way {does} {x} work?",
            "How {does} {x} work inside?",
        ),
    ),
    "example": Forms(
        train=(
            "Give an example of {x}.",
            "Can you give me an example of {x}?",
            "Show an example of {x}.",
            "What is an example of {x}?",
            "I would like an example of {x}.",
            "Please give an example for {x}.",
            "Example of {bare}?",
            "Illustrate {x} with an example.",
            "Give me an example for {x}.",
            "Explain {x} by an example.",
            "Have you got an example of {x}?",
            "Make an example of {x}.",
            "I need a concrete example of {x}.",
        ),
        num_rotating=10,
        held=(
            "Do you have an example of {x}?",
            "Make {x} concrete with an example.",
        ),
    ),
    "short": Forms(
        train=(
            "In a few words: what {is} {x}?",
            "{bare} in a few words",
            "Say in a few words what {x} {is}.",
            "Very short: what {is} {x}?",
            "Summarize {x} in a few words.",
            "What {is} {x} in a few words?",
            "Give me the shortest definition of {x}.",
            "Define {x} in a few words.",
            "Tell me in three words what {x} {is}.",
            "What {is} {x}? Use very few words.",
            "Describe {x} in three words.",
        ),
        num_rotating=9,
        held=(
            "What {is} {x}, in very few words?",
            "Describe {x} in a few words.",
        ),
    ),
    "all": Forms(
        train=(
            "What do you know about {x} in detail?",
            "Give me a detailed explanation of {x}.",
            "Write a long text about {x}.",
            "Tell me everything about {x}.",
            "Tell me all you know about {x}.",
            "Explain {x} in detail.",
            "Give me a long explanation of {x}.",
            "Write a long answer about {x}.",
            "Describe {x} in detail.",
            "Describe {x} at length.",
            "Give me all the facts about {x}.",
            "I want to know all details of {x}.",
            "Talk at length about {x}.",
        ),
        num_rotating=9,
        held=(
            "Explain {x} at length.",
            "Give me all details about {x}.",
        ),
    ),
}

DIFFERENCE = Forms(
    train=(
        "What is the difference between {a} and {b}?",
        "{a} vs {b}?",
        "{a} or {b}: what is the difference?",
        "Compare {a} and {b}.",
        "Explain the difference between {a} and {b}.",
        "What distinguishes {a} from {b}?",
        "Is {a} the same as {b}?",
        "Tell me the difference between {a} and {b}.",
        "How can I tell {a} from {b}?",
        "{a} versus {b}",
        "How do {a} and {b} differ?",
        "How does {a} differ from {b}?",
    ),
    held=("In what way is {a} different from {b}?", "What sets {a} apart from {b}?"),
)

ACTION = Forms(
    train=(
        "How do I {x}?",
        "How can I {x}?",
        "What must I do to {x}?",
        "I want to {x}.",
        "Tell me how to {x}.",
        "What is the way to {x}?",
        "how to {x}",
        "How does one {x}?",
        "Can you show me how to {x}?",
        "I need to {x}. How?",
        "Explain how to {x}.",
        "What is the best way to {x}?",
    ),
    held=("How would one {x}?", "Which steps do I need to {x}?"),
)

# What a user says after an answer about a topic. "repeat" asks for the last answer once more.
FOLLOW_UPS: dict[str, Forms] = {
    "why": Forms(
        train=(
            "And why is that useful?",
            "Why?",
            "Why is that useful?",
            "Why is it important?",
            "What is it good for?",
            "Why do we need it?",
            "What is the benefit?",
            "And what is the point of that?",
            "Why does that matter?",
            "Why would I use that?",
            "Tell me more.",
            "Why do people use it?",
            "What is the advantage?",
            "What are the advantages of it?",
            "What advantage does it have?",
            "So why is it needed?",
            "And why does one use that?",
        ),
        held=("And what is the advantage of that?", "So why does one need it?"),
    ),
    "how": Forms(
        train=(
            "How does it work?",
            "How does that work?",
            "And how does it do that?",
            "How exactly?",
            "Explain how it works.",
            "And how does this work?",
            "How is that done?",
            "In which way?",
            "And how does it work?",
            "How does it work exactly?",
            "In what way does it do that?",
        ),
        held=("In which way does it work?", "And how does it work exactly?"),
    ),
    "example": Forms(
        train=(
            "Give an example.",
            "Can you give an example?",
            "For example?",
            "Show me an example.",
            "An example, please.",
            "Give me an example of that.",
            "Could you make an example?",
            "Do you have an example?",
            "What is an example of that?",
            "Have you got an example of it?",
        ),
        held=("Do you have an example of that?", "What would be an example?"),
    ),
    "short": Forms(
        train=(
            "Say that shorter.",
            "Shorter, please.",
            "Can you say that in fewer words?",
            "Make it shorter.",
            "That is too long.",
            "Summarize that.",
            "In a few words?",
            "Short version?",
            "Say it more briefly.",
            "Shorten that.",
            "Can you shorten it?",
            "Please make that shorter.",
            "Could you shorten your answer?",
            "Use fewer words.",
            "Put it more briefly.",
            "Please put that shorter.",
        ),
        held=("Put that in fewer words.", "Please shorten that."),
    ),
    "about": Forms(
        train=(
            "What about {x}?",
            "And {x}?",
            "And what {is} {x}?",
            "How about {x}?",
            "Tell me about {x} too.",
            "Now {x}.",
            "Next: {x}.",
            "And what do you know about {x}?",
            "Now tell me about {x}.",
            "Explain {x} too.",
        ),
        held=("And what about {x}?", "Now explain {x} too."),
    ),
    "repeat": Forms(
        train=(
            "Say that again.",
            "Repeat that, please.",
            "Can you repeat that?",
            "Once more, please.",
            "Pardon?",
            "Please repeat your answer.",
            "Could you say that once more?",
            "Repeat your last answer.",
        ),
        held=("Could you repeat your answer?", "Please say it once more."),
    ),
}

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant for LLM serving.",
    "You are the small model built into nanoserve.",
    "You are a friendly expert.",
    "Answer briefly.",
    "Answer the questions of the user.",
    "You answer questions about nanoserve.",
    "Be concise.",
    "You are a teacher. Explain things in simple words.",
    "You are an assistant in a terminal. Use plain text.",
    "Please answer politely and truthfully.",
    "You help developers who run language models.",
)

WRAPPERS = (
    "Tell me: ",
    "Can you answer this? ",
    "I wonder: ",
    "One more question: ",
    "I have a question. ",
    "Please answer: ",
)
OPENERS = ("Please ", "Hi, ", "Hello! ", "Question: ", "Hey, ", "Quick question: ", "So, ", "Hi! ")
CLOSERS = (" Please.", " Thanks!", " Answer in one sentence.", " Thank you.", " Be brief.", " I am new to this.")


def normalize(text: str) -> str:
    """Letters and digits in lower case: two phrasings that differ only in the rest count as the same."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def fill(form: str, name: str, plural: bool = False) -> str:
    """Puts a topic's name into a template."""
    bare = name
    for article in ("the ", "a ", "an "):
        bare = bare.removeprefix(article)
    text = form.format(
        x=name,
        bare=bare,
        **({"is": "are", "does": "do", "it": "are they"} if plural else {"is": "is", "does": "does", "it": "it"}),
    ).replace("are are they", "are they")
    if plural:
        text = text.replace(f"{name} works", f"{name} work")
    return text


def typo(text: str, rng: random.Random) -> str:
    """Swaps or drops one inner letter of one longer word."""
    words = text.split(" ")
    long_words = [i for i, word in enumerate(words) if len(word) > 5 and word.isalpha()]
    if not long_words:
        return text
    i = rng.choice(long_words)
    word = words[i]
    cut = rng.randrange(1, len(word) - 2)
    if rng.random() < 0.5:
        words[i] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
    else:
        words[i] = word[:cut] + word[cut + 1 :]
    return " ".join(words)


def with_noise(text: str, rng: random.Random) -> str:
    """One phrasing as a person might type it; half of the time unchanged."""
    if rng.random() < 0.5:
        return text
    if rng.random() < 0.15:
        opener = rng.choice(OPENERS)
        text = opener + (text[0].lower() + text[1:] if text[1:2].islower() else text)
    if rng.random() < 0.12 and text[-1] in ".?!":
        text += rng.choice(CLOSERS)
    if rng.random() < 0.35:
        text = text.lower()
    if rng.random() < 0.35:
        text = text.rstrip(".?!")
    if rng.random() < 0.1:
        text = typo(text, rng)
    if rng.random() < 0.02:
        text = text.upper()
    return text
