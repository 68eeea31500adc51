"""The data set of the built-in model is sound, and the folder that was trained from it is complete."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
BUILTIN = ROOT / "src" / "nanoserve" / "builtin"
sys.path.insert(0, str(ROOT / "training"))

from dataset import outside  # noqa: E402
from dataset.conversations import contains_keys, evaluation_cases, training_chats  # noqa: E402
from dataset.facts import questions, topics  # noqa: E402
from dataset.json_tasks import copy_task, json_task  # noqa: E402
from dataset.phrasings import ACTION, DIFFERENCE, FACETS, FOLLOW_UPS, normalize  # noqa: E402
from dataset.tool_tasks import tool_task  # noqa: E402


def render(messages: list[dict[str, Any]], **variables: Any) -> str:
    """The chat template of the built-in folder, as transformers would render it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string((BUILTIN / "chat_template.jinja").read_text(encoding="utf-8"))
    return template.render(messages=messages, **variables)


def test_there_are_enough_questions_and_phrasings() -> None:
    known = [q for q in questions() if q.facet not in ("short", "all")]
    assert len({q.answer for q in known}) >= 320
    assert len({q.name for q in questions()}) == len(questions())
    for question in questions():
        assert len(question.train) >= 5, question.name
        assert len(question.held_out) >= 2, question.name


def test_no_phrasing_is_both_trained_and_held_out() -> None:
    trained = {normalize(text) for q in questions() for text in q.train}
    held_out = {normalize(text) for q in questions() for text in q.held_out}
    assert not trained & held_out


def test_no_template_is_both_trained_and_held_out() -> None:
    for forms in (*FACETS.values(), *FOLLOW_UPS.values(), ACTION, DIFFERENCE):
        assert not {normalize(form) for form in forms.train} & {normalize(form) for form in forms.held}


def test_no_phrasing_asks_for_two_answers() -> None:
    owner: dict[str, str] = {}
    for question in questions():
        for text in (*question.train, *question.held_out):
            assert owner.setdefault(normalize(text), question.name) == question.name, text


def test_every_answer_contains_its_key_phrases() -> None:
    for question in questions():
        assert question.keys, question.name
        assert contains_keys(question.answer, question.keys), question.name
        assert "*" not in question.answer
        assert outside.REFUSAL_KEY not in question.answer


def test_every_topic_has_the_facets_that_follow_ups_ask_for() -> None:
    for topic in topics():
        assert {"what", "why", "short", "all"} <= set(topic.facets), topic.names


def test_the_training_stream_never_asks_a_held_out_phrasing() -> None:
    held_out = {normalize(text) for q in questions() for text in q.held_out}
    stream = training_chats(random.Random(0))
    for _ in range(5000):
        for message in next(stream).messages:
            if message["role"] == "user":
                assert normalize(message["content"]) not in held_out


def test_the_same_seed_gives_the_same_chats() -> None:
    first, second = training_chats(random.Random(7)), training_chats(random.Random(7))
    assert [next(first) for _ in range(100)] == [next(second) for _ in range(100)]
    assert evaluation_cases() == evaluation_cases()


def test_outside_questions_hold_out_templates() -> None:
    assert not set(outside.TEMPLATES) & set(outside.HELD_TEMPLATES)
    rng = random.Random(0)
    asked = {outside.outside_question(rng) for _ in range(5000)}
    assert len(asked) > 3000
    known = {normalize(text) for q in questions() for text in q.train}
    assert not {normalize(text) for text in asked} & known


@pytest.mark.parametrize("held_out", [False, True])
def test_json_answers_parse(held_out: bool) -> None:
    rng = random.Random(0)
    for _ in range(1000):
        task = json_task(rng, held_out)
        assert json.loads(task.answer) == task.value
        request, answer = copy_task(rng, held_out)
        assert request
        assert answer


@pytest.mark.parametrize("held_out", [False, True])
def test_tool_calls_name_an_offered_tool_with_its_arguments(held_out: bool) -> None:
    rng = random.Random(0)
    for _ in range(500):
        task = tool_task(rng, held_out)
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in task.tools}
        assert set(task.call["arguments"]) == set(offered[task.call["name"]]["properties"])
        assert isinstance(json.loads(task.result), dict)
        assert "{" not in task.sentence


def test_the_chat_template_renders_every_role() -> None:
    text = render(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello!"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
        ],
        add_generation_prompt=True,
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("as_text", [False, True])
def test_the_chat_template_renders_tools(as_text: bool) -> None:
    task = tool_task(random.Random(0))
    arguments = task.call["arguments"]
    function = {"name": task.call["name"], "arguments": json.dumps(arguments) if as_text else arguments}
    text = render(
        [
            {"role": "user", "content": task.request},
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": task.result},
        ],
        tools=task.tools,
    )
    listed = text.split("<tools>\n")[1].split("\n</tools>")[0]
    assert [json.loads(line) for line in listed.split("\n")] == task.tools
    called = text.split("<|im_start|>assistant\n<tool_call>\n")[1].split("\n</tool_call><|im_end|>")[0]
    assert json.loads(called) == task.call
    assert f"<|im_start|>tool\n<tool_response>\n{task.result}\n</tool_response><|im_end|>\n" in text


def test_the_built_in_folder_is_complete_and_small() -> None:
    names = {path.name for path in BUILTIN.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert sum(path.stat().st_size for path in BUILTIN.iterdir()) < 12_000_000
    trained_with = ROOT / "training" / "chat_template.jinja"
    assert (BUILTIN / "chat_template.jinja").read_text().strip() == trained_with.read_text().strip()


def test_the_tokenizer_encodes_every_text() -> None:
    tokenizer = Tokenizer.from_file(str(BUILTIN / "tokenizer.json"))
    for text in ("What is paged attention?", "Zoë, Łódź, 東京, 🙂\n\tend", '{"age": 36}', "<tool_call>\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    for text in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>"):
        assert tokenizer.token_to_id(text) is not None
        assert len(tokenizer.encode(text).ids) == 1
