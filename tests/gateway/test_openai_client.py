"""OpenAI's own Python client, and LangChain on top of it, against the built-in model behind `nanoserve serve`."""

import asyncio

import openai
import pytest
from caller import is_idle, until
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI
from scripted_gateway import scripted_gateway
from scripted_server import hello, overloaded

MODEL = "nanoserve-builtin"
QUESTION = [{"role": "user", "content": "What is TTFT?"}]
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 30}


@pytest.fixture(scope="module")
def client(served):
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, **options):
    return client.chat.completions.create(**{**GREEDY, "messages": QUESTION, **options})


def test_chat_streamed_or_not_says_the_same(client):
    whole = chat(client)
    assert "time to first token" in whole.choices[0].message.content
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_answers_are_what_the_types_of_the_package_allow(client):
    # Its own clients build them without a check.
    for answer in (chat(client, logprobs=True, top_logprobs=2), client.models.list().data[0], respond(client)):
        type(answer).model_validate(answer.to_dict())


def test_completions_take_every_kind_of_prompt(client):
    def texts(prompt):
        choices = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=8).choices
        return [choice.text for choice in choices]

    ids = client.post("/../tokenize", body={"prompt": "Paged attention"}, cast_to=object)["tokens"]
    [text] = texts("Paged attention")
    assert texts(ids) == [text]
    assert texts(["Paged attention", "TTFT"]) == [text, *texts("TTFT")]
    assert texts([ids, ids]) == [text, text]


def test_echo_and_logprobs_of_the_prompt(client):
    completion = client.completions.create(
        model=MODEL, prompt="Paged attention", temperature=0, max_tokens=2, echo=True, logprobs=2
    )
    [choice] = completion.choices
    assert choice.text.startswith("Paged attention")
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs[0] is None
    assert all(len(top) <= 3 for top in choice.logprobs.top_logprobs[1:])


@pytest.mark.parametrize("echoed", ["text", "ids"])
def test_a_prompt_is_scored_without_a_token_more(client, echoed):
    ids = client.post("/../tokenize", body={"prompt": "Paged attention"}, cast_to=object)["tokens"]
    prompt = "Paged attention" if echoed == "text" else [ids]
    fields = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 0, "echo": True, "logprobs": 1}
    [choice] = client.completions.create(**fields).choices
    assert (choice.text, choice.finish_reason) == ("Paged attention", "length")
    assert len(choice.logprobs.tokens) == len(ids)
    for token, logprob, top in list(zip(*(list(v) for v in lists_of(choice.logprobs)), strict=True))[1:]:
        assert top[token] == logprob <= max(top.values())
    chunks = [chunk.choices[0] for chunk in client.completions.create(**fields, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == choice.text
    assert [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.tokens] == choice.logprobs.tokens


def lists_of(logprobs):
    return logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs


def test_a_conversation_can_be_sent_back_as_it_came(client):
    first = chat(client).choices[0].message
    more = {"role": "user", "content": "What is a KV cache?"}
    # Some send objects of the package, some all of their fields.
    for sent in (first, first.model_dump()):
        assert chat(client, messages=[*QUESTION, sent, more]).choices[0].message.content


def test_an_answer_goes_on_from_its_beginning(client):
    begun = [*QUESTION, {"role": "assistant", "content": "TTFT, the"}]
    answer = chat(client, messages=begun, extra_body={"continue_final_message": True})
    assert answer.choices[0].message.content.startswith(" time to first token")


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_prediction_is_taken_and_counted(client, in_parts):
    plain = chat(client, extra_body={"max_draft_tokens": 0})
    text = plain.choices[0].message.content
    content = [{"type": "text", "text": part} for part in (text[:9], text[9:])] if in_parts else text
    # Whether guesses pay is for the server's clock to say, which needs a few answers. Another salt for each, so that no
    # other answer is guessed from.
    for attempt in range(30):
        salt = {"cache_salt": f"{in_parts} {attempt}"}
        answer = chat(client, prediction={"type": "content", "content": content}, extra_body=salt)
        assert answer.choices[0].message.content == text
        if (details := answer.usage.completion_tokens_details).accepted_prediction_tokens:
            break
    assert 0 < details.accepted_prediction_tokens < answer.usage.completion_tokens
    assert details.rejected_prediction_tokens >= 0
    with pytest.raises(openai.BadRequestError, match="prediction"):
        chat(client, prediction={"type": "content", "content": 5})


def test_usage_so_far_ends_at_the_usage(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = chat(client, stream=True, stream_options=options, n=2, seed=1)
    # What became of guesses is known at the end.
    assert last.usage.completion_tokens_details.accepted_prediction_tokens == 0
    assert chunks[-1].usage == last.usage.model_copy(update={"completion_tokens_details": None})
    assert chunks[0].usage.completion_tokens == 0


def test_n_choices_differ_and_a_seed_repeats_them(client):
    def texts(seed):
        answer = chat(client, n=3, temperature=50, seed=seed)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    assert texts(-5) == texts(-5)
    assert len(set(texts(-5))) > 1
    assert texts(-5) != texts(6)


def test_stop_logprobs_and_extensions(client):
    answer = chat(client, stop="token", logprobs=True, top_logprobs=2, extra_body={"return_token_ids": True})
    [choice] = answer.choices
    assert choice.finish_reason == "stop"
    assert "token" not in choice.message.content
    assert len(choice.logprobs.content) == len(choice.token_ids) == answer.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    cut = chat(client, max_tokens=3, extra_body={"ignore_eos": True, "min_tokens": 3})
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)


def respond(client, **options):
    return client.responses.create(**{"model": MODEL, "temperature": 0, "input": "What is TTFT?", **options})


def test_responses_are_kept_continued_and_forgotten(client):
    first = respond(client, instructions="Be brief.")
    assert first.status == "completed"
    second = respond(client, input="What is a KV cache?", previous_response_id=first.id)
    assert second.usage.input_tokens > first.usage.output_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    assert client.responses.retrieve(first.id, stream=False).id == first.id
    with pytest.raises(openai.BadRequestError, match="include"):
        client.responses.retrieve(first.id, include=["message.output_text.logprobs"])
    assert client.responses.input_items.list(first.id).data[0].content[0].text == "What is TTFT?"
    items = [{"role": "user", "content": text} for text in ("a", "b", "c")]
    paged = client.responses.input_items.list(respond(client, input=items).id, limit=1, order="asc")
    assert [item.content[0].text for item in paged] == ["a", "b", "c"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_a_streamed_response_is_read_by_the_packages_own_helper(client):
    with client.responses.stream(model=MODEL, input="What is TTFT?", temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == respond(client).output_text
    assert "time to first token" in text


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_errors_are_the_packages_typed_exceptions(client):
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-4")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, temperature=-1, n=1000)
    assert caught.value.param == "n"
    assert "temperature" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, messages=[{"role": "user", "content": "x " * 10_000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="web_search_options"):
        chat(client, web_search_options={})


def test_a_time_limit_of_the_caller_ends_the_request(client, served):
    endless = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, **endless, extra_headers={"x-request-timeout": "0.2"})
    assert caught.value.status_code == 504
    with pytest.raises(openai.APITimeoutError):
        chat(client, **endless, timeout=0.2)
    asyncio.run(until(lambda: is_idle(served)))


def test_leaving_a_stream_frees_its_blocks(client, served):
    for create in (
        lambda: chat(client, stream=True, max_tokens=1500, extra_body={"ignore_eos": True}),
        lambda: respond(client, stream=True, extra_body={"ignore_eos": True}),
    ):
        with create() as stream:
            next(stream)
        asyncio.run(until(lambda: is_idle(served)))


def test_the_packages_client_tries_again_when_it_is_told_to_wait():
    attempts = []

    def generate(request, context):
        attempts.append(request)
        if len(attempts) < 3:
            context.abort_with_status(overloaded(10))
        yield from hello(request, context)

    with scripted_gateway() as gateway:
        gateway.script.generate = generate
        with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=2) as client:
            assert chat(client).choices[0].message.content == "Hello"
    assert len(attempts) == 3


async def test_the_asyncio_client(served):
    async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        whole, stream, response = await asyncio.gather(
            chat(client),
            chat(client, stream=True),
            respond(client),
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == whole.choices[0].message.content == response.output_text
        completion = await client.completions.create(model=MODEL, prompt="TTFT", max_tokens=3)
        assert completion.usage.completion_tokens <= 3
        assert [model.id async for model in client.models.list()] == [MODEL]
        with pytest.raises(openai.NotFoundError):
            await chat(client, model="gpt-4")


def test_langchain(served):
    model = ChatOpenAI(model=MODEL, base_url=f"{served.url}/v1", api_key="none", temperature=0, max_tokens=30)
    answer = model.invoke("What is TTFT?")
    assert "time to first token" in answer.content
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream("What is TTFT?")) == answer.content
    assert [each.content for each in model.batch(["What is TTFT?"] * 2)] == [answer.content] * 2
