"""Tool calls in the Hermes format: which tool, which arguments, and one sentence from the result.

Each tool below is a JSON schema, ways to ask for it, and the sentence that its result becomes. Held-out cases use
HELD_REQUESTS and argument values of their own. Names of tools and arguments vary, so that the model reads the list
of tools instead of remembering it.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dataset.json_tasks import CITIES, HELD_CITIES, HELD_NAMES, HELD_WORDS, NAMES, WORDS
from dataset.outside import invented_word

Value = Callable[[random.Random, bool], Any]


def _pool(train: tuple[str, ...], held: tuple[str, ...]) -> Value:
    """Draws from a list of words or, often, invents a word, so that values must be copied."""

    def draw(rng: random.Random, held_out: bool) -> str:
        if rng.random() < 0.4:
            return invented_word(rng).capitalize()
        return rng.choice(held if held_out else train)

    return draw


def _number(low: int, high: int) -> Value:
    return lambda rng, _held_out: rng.randint(low, high)


def _one_of(*values: str) -> Value:
    return lambda rng, _held_out: rng.choice(values)


CITY, NAME, WORD = _pool(CITIES, HELD_CITIES), _pool(NAMES, HELD_NAMES), _pool(WORDS, HELD_WORDS)


@dataclass(frozen=True)
class Tool:
    """One function that the model may ask for."""

    names: tuple[str, ...]
    """Function names; each chat uses one of them."""

    description: str
    """What the tool list says about it."""

    arguments: dict[str, tuple[str, Value]]
    """JSON type and generator of each argument."""

    requests: tuple[str, ...]
    """What a user says; {argument} is filled in."""

    held_requests: tuple[str, ...]
    """The same, held out."""

    results: dict[str, Value]
    """Fields of the result."""

    sentence: str
    """The last answer, from arguments and results."""

    def schema(self, name: str, rng: random.Random) -> dict[str, Any]:
        """The tool as OpenAI clients describe it; argument descriptions are there only sometimes."""
        properties: dict[str, dict[str, str]] = {}
        described = rng.random() < 0.3
        for argument, (kind, _) in self.arguments.items():
            properties[argument] = {"type": kind}
            if described:
                properties[argument]["description"] = f"The {argument.replace('_', ' ')}"
        parameters = {"type": "object", "properties": properties, "required": list(self.arguments)}
        function = {"name": name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


TOOLS = (
    Tool(
        ("get_weather", "weather", "get_current_weather", "current_weather", "lookup_weather"),
        "Get the current weather of a city",
        {"city": ("string", CITY)},
        (
            "What is the weather in {city}?",
            "How is the weather in {city}?",
            "Is it cold in {city}?",
            "Tell me the weather in {city}.",
            "Weather in {city}?",
            "Check the weather in {city}, please.",
            "How warm is {city} today?",
            "What is the weather in {city} now?",
            "Is it warm in {city}?",
            "Look up the weather in {city}.",
            "What's the weather like in {city}?",
        ),
        ("How warm is it in {city} now?", "Please check the weather in {city}."),
        {"temperature": _number(-10, 38), "condition": _one_of("sunny", "cloudy", "rainy", "windy", "clear", "foggy")},
        "It is {temperature} degrees and {condition} in {city}.",
    ),
    Tool(
        ("get_time", "current_time", "get_local_time", "clock"),
        "Get the current time in a city",
        {"city": ("string", CITY)},
        (
            "What time is it in {city}?",
            "Tell me the time in {city}.",
            "How late is it in {city}?",
            "Time in {city}?",
            "What is the time in {city} now?",
            "Which time is it in {city}?",
            "Please look up the time in {city}.",
            "Local time in {city}?",
        ),
        ("What is the local time in {city}?", "Which time is it now in {city}?"),
        {"time": lambda rng, _held_out: f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"},
        "It is {time} in {city}.",
    ),
    Tool(
        ("add", "add_numbers", "sum", "plus"),
        "Add two numbers",
        {"a": ("integer", _number(0, 999)), "b": ("integer", _number(0, 999))},
        (
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "How much is {a} + {b}?",
            "Compute {a} + {b}.",
            "{a} + {b}?",
            "Add {a} to {b}, please.",
            "What do you get for {a} plus {b}?",
            "Please compute {a} + {b}.",
        ),
        ("Please add {a} to {b}.", "What do I get for {a} + {b}?"),
        {"result": _number(0, 1998)},
        "The result is {result}.",
    ),
    Tool(
        ("multiply", "multiply_numbers", "product", "times"),
        "Multiply two numbers",
        {"a": ("integer", _number(0, 99)), "b": ("integer", _number(0, 99))},
        (
            "What is {a} times {b}?",
            "Multiply {a} by {b}.",
            "How much is {a} * {b}?",
            "Compute {a} times {b}.",
            "Multiply {a} and {b}, please.",
            "What do you get for {a} times {b}?",
            "Please compute {a} * {b}.",
        ),
        ("Please multiply {a} and {b}.", "What do I get for {a} times {b}?"),
        {"result": _number(0, 9801)},
        "The result is {result}.",
    ),
    Tool(
        ("count_tokens", "token_count", "tokenize"),
        "Count the tokens of a text",
        {"text": ("string", WORD)},
        (
            'How many tokens has "{text}"?',
            'Count the tokens of "{text}".',
            'How many tokens are in "{text}"?',
            'What is the number of tokens in "{text}"?',
            'Please count the tokens in "{text}".',
            'Tell me how many tokens "{text}" has.',
        ),
        ('Tell me the number of tokens of "{text}".',),
        {"tokens": _number(1, 60)},
        "The text has {tokens} tokens.",
    ),
    Tool(
        ("get_metric", "read_metric", "query_metric"),
        "Read the current value of a server metric",
        {
            "name": (
                "string",
                _one_of("ttft", "itl", "tpot", "throughput", "queue_length", "kv_usage", "running", "waiting"),
            )
        },
        (
            "What is the current {name}?",
            "Show me the metric {name}.",
            "Read {name}.",
            "How high is {name} now?",
            "Please read the metric {name}.",
            "Look up {name}.",
            "Tell me the value of the metric {name}.",
        ),
        ("Please look up the metric {name}.",),
        {"value": _number(0, 2000)},
        "The value of {name} is {value}.",
    ),
    Tool(
        ("load_adapter", "add_adapter", "load_lora"),
        "Load a LoRA adapter",
        {"name": ("string", WORD)},
        (
            "Load the adapter {name}.",
            "Please load the LoRA adapter {name}.",
            "I need the adapter {name}.",
            "Activate the adapter {name}.",
            "Can you activate the adapter {name}?",
            "Could you load {name}?",
            "I want to use the adapter {name}.",
        ),
        ("Can you load the adapter {name}?",),
        {"status": _one_of("loaded", "ready", "failed", "active")},
        "The adapter {name} is {status}.",
    ),
    Tool(
        ("convert_currency", "exchange", "convert_money"),
        "Convert an amount of money",
        {
            "amount": ("number", _number(1, 999)),
            "currency": ("string", _one_of("EUR", "USD", "GBP", "JPY", "CHF", "SEK")),
        },
        (
            "Convert {amount} dollars to {currency}.",
            "How much is {amount} dollars in {currency}?",
            "What are {amount} dollars in {currency}?",
            "Change {amount} dollars to {currency}, please.",
            "Please convert {amount} dollars into {currency}.",
        ),
        ("Please change {amount} dollars into {currency}.",),
        {"converted": _number(1, 2000)},
        "That is {converted} {currency}.",
    ),
    Tool(
        ("set_timer", "start_timer", "timer"),
        "Start a timer",
        {"minutes": ("integer", _number(1, 120))},
        (
            "Set a timer for {minutes} minutes.",
            "Start a timer of {minutes} minutes.",
            "Wake me in {minutes} minutes.",
            "Timer, {minutes} minutes.",
            "Can you start a timer for {minutes} minutes?",
            "I need to wait {minutes} minutes.",
            "Please set a timer of {minutes} minutes.",
        ),
        ("I need a timer for {minutes} minutes.",),
        {"status": _one_of("started", "running", "set")},
        "The timer for {minutes} minutes is {status}.",
    ),
    Tool(
        ("send_message", "send_email", "write_message", "notify"),
        "Send a message to a person",
        {"to": ("string", NAME), "text": ("string", WORD)},
        (
            'Send "{text}" to {to}.',
            'Write to {to}: "{text}"',
            'Tell {to} "{text}".',
            'Send {to} the message "{text}".',
            'Let {to} know: "{text}"',
            'Please tell {to} this: "{text}"',
            'Can you write "{text}" to {to}?',
        ),
        ('Please let {to} know "{text}".',),
        {"status": _one_of("sent", "delivered", "queued")},
        "The message to {to} is {status}.",
    ),
    Tool(
        ("get_price", "stock_price", "get_stock_price", "quote"),
        "Get the price of a stock",
        {
            "symbol": (
                "string",
                lambda rng, _held_out: "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(2, 4))),
            )
        },
        (
            "What is the price of {symbol}?",
            "How much is {symbol}?",
            "Stock price of {symbol}?",
            "Show me the price of {symbol}.",
            "Please look up the price of {symbol}.",
            "Look up the stock price of {symbol}.",
            "What does the stock {symbol} cost?",
            "Tell me the price of {symbol} now.",
        ),
        ("Please look up the stock {symbol}.",),
        {"price": _number(1, 999)},
        "The price of {symbol} is {price}.",
    ),
    Tool(
        ("search", "search_docs", "find_documents", "lookup"),
        "Search the documentation",
        {"query": ("string", WORD)},
        (
            'Search for "{query}".',
            'Find documents about "{query}".',
            'Look for "{query}" in the documentation.',
            "Search the docs for {query}.",
            'Can you search for "{query}"?',
            'Please find "{query}" in the docs.',
            'Look "{query}" up for me.',
        ),
        ('Please search "{query}" for me.',),
        {"hits": _number(0, 99)},
        "I found {hits} documents about {query}.",
    ),
    Tool(
        ("get_user", "find_user", "user_info"),
        "Look up a user by name",
        {"name": ("string", NAME)},
        (
            "Who is the user {name}?",
            "Look up the user {name}.",
            "Find the user {name}.",
            "In which city is the user {name}?",
            "Show me {name}, please.",
            "Please look up {name}.",
            "What do we know about the user {name}?",
            "Can you show the user {name}?",
        ),
        ("Please show me the user {name}.",),
        {"city": CITY, "requests": _number(0, 999)},
        "The user {name} is in {city} and has {requests} requests.",
    ),
    Tool(
        ("book_table", "reserve_table", "make_reservation"),
        "Book a table in a restaurant",
        {"city": ("string", CITY), "people": ("integer", _number(1, 12))},
        (
            "Book a table for {people} in {city}.",
            "Reserve a table for {people} people in {city}.",
            "I need a table in {city} for {people}.",
            "Can you book a table for {people} people in {city}?",
            "Get a table for {people} in {city}, please.",
            "A table in {city} for {people} people, please.",
        ),
        ("Can you get a table for {people} people in {city}?",),
        {"status": _one_of("booked", "confirmed", "full")},
        "The table for {people} in {city} is {status}.",
    ),
)


@dataclass(frozen=True)
class ToolTask:
    """One request that needs one tool call."""

    tools: list[dict[str, Any]]
    """The tool list of the system prompt."""

    request: str
    """What the user says."""

    call: dict[str, Any]
    """The right call: name and arguments."""

    result: str
    """What the tool returns, as JSON."""

    sentence: str
    """The answer from the result."""


def tool_task(rng: random.Random, held_out: bool = False) -> ToolTask:
    """A request with one to three tools, of which one fits."""
    offered = rng.sample(TOOLS, rng.choice((1, 1, 2, 2, 3)))
    schemas = []
    for tool in offered:
        name = rng.choice(tool.names)
        if rng.random() < 0.15:
            name = f"{invented_word(rng)}_{name}"
        schemas.append(tool.schema(name, rng))
    tool, schema = offered[0], schemas[0]
    rng.shuffle(schemas)
    arguments = {name: draw(rng, held_out) for name, (_, draw) in tool.arguments.items()}
    results = {name: draw(rng, held_out) for name, draw in tool.results.items()}
    request = rng.choice(tool.held_requests if held_out else tool.requests).format(**arguments)
    call = {"name": schema["function"]["name"], "arguments": arguments}
    sentence = tool.sentence.format(**{**arguments, **results})
    return ToolTask(schemas, request, call, json.dumps(results, ensure_ascii=False), sentence)
