"""Questions outside of the subject, which the model declines with one fixed sentence.

Thousands of questions are drawn from templates and fillers. Of every list of fillers the last fifth, and the
templates in HELD_TEMPLATES, are only asked in evaluation. Invented words teach that an unknown name is unknown.
"""

import random

from dataset.phrasings import DIFFERENCE, FACETS, fill
from dataset.words import words

REFUSAL = "I do not know that; I only know about LLM serving."
REFUSAL_KEY = "I do not know that"

TEMPLATES = (
    "What is the capital of {place}?",
    "How many people live in {place}?",
    "Where is {place}?",
    "What is the weather in {place}?",
    "Will it rain in {place} tomorrow?",
    "What should I see in {place}?",
    "Tell me about the history of {place}.",
    "How far is it from {place} to {place}?",
    "What language do they speak in {place}?",
    "What is the highest mountain of {place}?",
    "Who is the president of {place}?",
    "Which river flows through {place}?",
    "What time is it in {place}?",
    "How do I get from {place} to {place}?",
    "Can you recommend a hotel in {place}?",
    "Is {place} a nice place to live?",
    "Which currency is used in {place}?",
    "Who was {person}?",
    "When was {person} born?",
    "Tell me about {person}.",
    "What did {person} do?",
    "How old is {person}?",
    "Where did {person} live?",
    "Why is {person} famous?",
    "Who was the wife of {person}?",
    "When did {person} die?",
    "How do I cook {food}?",
    "Give me a recipe for {food}.",
    "How long does {food} take in the oven?",
    "How many calories does {food} have?",
    "What goes well with {food}?",
    "Is {food} healthy?",
    "Where can I buy {food}?",
    "I would like to make {food}. What do I need?",
    "How long does a {animal} live?",
    "What does a {animal} eat?",
    "How fast is a {animal}?",
    "Is a {animal} a good pet?",
    "How big is a {animal}?",
    "Where does the {animal} live?",
    "Why does my {animal} not sleep?",
    "Write a poem about a {animal}.",
    "Who won the {sport} match yesterday?",
    "What are the rules of {sport}?",
    "Who is the best {sport} player?",
    "How do I get better at {sport}?",
    "How many players are in a {sport} team?",
    "Who won the {sport} world cup in {year}?",
    "When was {sport} invented?",
    "What helps against {illness}?",
    "How do I treat {illness}?",
    "What causes {illness}?",
    "Which medicine is good for {illness}?",
    "I have {illness}. What should I do?",
    "Is {illness} dangerous?",
    "What happened in {year}?",
    "Who was king in {year}?",
    "What was invented in {year}?",
    "Who directed {film}?",
    "What is {film} about?",
    "Who wrote {film}?",
    "Who plays in {film}?",
    "Is {film} worth watching?",
    "How does {film} end?",
    "How do you say {phrase} in {language}?",
    "Translate {phrase} into {language}.",
    "What does {phrase} mean in {language}?",
    "How difficult is {language}?",
    "What is {number} times {number}?",
    "What is {number} plus {number}?",
    "What is the square root of {number}?",
    "Is {number} a prime number?",
    "How many days are in {number} weeks?",
    "What is {number} divided by {number}?",
    "Write a poem about {term}.",
    "Write a story about {term}.",
    "Who invented {term}?",
    "How do I draw {term}?",
    "How much does {term} cost?",
    "How old is {term}?",
    "What do you think about {term}?",
    "What is the color of {term}?",
    "Where can I find {term}?",
    "How do I learn about {term}?",
    "What is the history of {term}?",
    "What is the best book about {term}?",
    "Which movie should I watch tonight?",
    "What should I eat today?",
    "What day is it today?",
    "What is the meaning of life?",
    "What is the news?",
    "Who will win the election?",
    "What time is it?",
    "Which stocks should I buy?",
    "How do I lose weight?",
    "What should I wear to a wedding?",
    "Which phone should I buy?",
    "How do I find a job?",
    "Can you sing?",
    "How do I repair my car?",
    "Why is the sky blue?",
    "What is your favorite color?",
    "How many planets are there?",
    "How do I remove a stain?",
    "What is the fastest car?",
    "How do airplanes fly?",
)

HELD_TEMPLATES = (
    "Can you tell me the population of {place}?",
    "What is the best restaurant in {place}?",
    "Is it warm in {place} now?",
    "What is {person} known for?",
    "In which year was {person} born?",
    "What are the ingredients of {food}?",
    "Can I freeze {food}?",
    "How much does a {animal} weigh?",
    "Can a {animal} swim?",
    "How long is a {sport} match?",
    "What equipment do I need for {sport}?",
    "How long does {illness} last?",
    "Should I see a doctor about {illness}?",
    "Who won the {sport} championship of {year}?",
    "When did {film} come out?",
    "What is the word for {phrase} in {language}?",
    "Can you add {number} and {number}?",
    "Sing a song about {term}.",
    "When was {term} discovered?",
    "How is {term} made?",
    "How many stars are in the sky?",
    "What should I cook for dinner?",
    "Who is the richest person in the world?",
    "Why do cats purr?",
    "How do I grow tomatoes?",
    "Which train goes to the airport?",
)

CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"


def invented_word(rng: random.Random) -> str:
    """A word that means nothing, such as "brolvan", or sometimes mere letters."""
    if rng.random() < 0.25:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8)))
    word = ""
    for _ in range(rng.randint(2, 3)):
        word += rng.choice(CONSONANTS) + rng.choice(("", "", "r", "l")) + rng.choice(VOWELS)
        word += rng.choice(("", "", "n", "s", "x", "m"))
    return word


def _filler(kind: str, rng: random.Random, held_out: bool) -> str:
    if kind == "year":
        return str(rng.randint(1200, 2023))
    if kind == "number":
        return str(rng.randint(2, 999))
    fillers = words()[kind]
    cut = len(fillers) * 4 // 5
    return rng.choice(fillers[cut:] if held_out else fillers[:cut])


def _fill_all(template: str, rng: random.Random, held_out: bool) -> str:
    while "{" in template:
        start, end = template.index("{"), template.index("}")
        template = template[:start] + _filler(template[start + 1 : end], rng, held_out) + template[end + 1 :]
    return template


def outside_question(rng: random.Random, held_out: bool = False) -> str:
    """One question that the model should decline; half of them in the forms of in-subject questions."""
    kind = rng.random()
    if kind < 0.5:
        templates = HELD_TEMPLATES if held_out and rng.random() < 0.5 else TEMPLATES
        return _fill_all(rng.choice(templates), rng, held_out)

    def name() -> str:
        if rng.random() < 0.2:
            return rng.choice(("", "", "a ", "the ")) + invented_word(rng)
        return _filler(rng.choice(("term", "term", "term", "term", "food", "sport", "place")), rng, held_out)

    if kind < 0.58:
        forms = DIFFERENCE.held if held_out else DIFFERENCE.train
        return rng.choice(forms).format(a=name(), b=name())
    facet = FACETS[rng.choice(("what", "what", "why", "how", "example", "all", "short"))]
    return fill(rng.choice(facet.held if held_out else facet.train), name())
