"""Models, tokens of prompts, and what else the application asks the service for so that an answer can tell it."""

import itertools
import json

import pytest
from nanoserve_client.v1 import model_pb2
from nanoserve_client.v1.generation_pb2 import GenerateResponse, PromptLogprobs, TokenLogprob
from scripted_server import hello, overloaded, started

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
PATHS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "tiny", "prompt": "hi"},
    "/v1/responses": {"model": "tiny", "input": "hi"},
}
EVERY_API = pytest.mark.parametrize(("path", "body"), PATHS.items(), ids=PATHS)
WAIT_S = 30
MODELS = model_pb2.ListModelsResponse(models=[model_pb2.Model(name="tiny", max_context_tokens=64)])


def tokens_of(request, _context):
    """The service, as far as prompts that become the tokens 5 and 6 go."""
    if isinstance(request, model_pb2.ListModelsRequest):
        return MODELS
    if isinstance(request, model_pb2.DetokenizeRequest):
        return model_pb2.DetokenizeResponse(text="a")
    return model_pb2.TokenizeResponse(token_ids=[5, 6], tokens=[b"a", b"\xff"], text="a?")


def test_tokens_there_and_back(scripted):
    scripted.script.unary = tokens_of
    fields = {"chat_template_kwargs": {"a": 1}, "add_generation_prompt": False, "add_special_tokens": True}
    asked = {"messages": CHAT["messages"], **fields}
    told = {"count": 2, "max_model_len": 64, "tokens": [5, 6], "token_strs": ["a", "\ufffd"], "text": "a?"}
    assert scripted.http.post("/tokenize", json=asked).json() == told
    [request] = [r for r in scripted.script.requests if isinstance(r, model_pb2.TokenizeRequest)]
    assert request.chat.messages[0].content == "hi"
    assert (request.chat.template_kwargs_json, request.chat.add_generation_prompt) == ('{"a": 1}', False)
    assert request.add_special_tokens
    unsaid = scripted.http.post("/tokenize", json={"prompt": "hi", "return_token_strs": False})
    assert unsaid.json() == {**told, "token_strs": None}
    refused = scripted.http.post("/tokenize", json={"prompt": "hi", "continue_final_message": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "continue_final_message")
    assert scripted.http.post("/tokenize", json={}).status_code == 400
    assert scripted.http.post("/detokenize", json={"tokens": [5]}).json() == {"prompt": "a"}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_token_ids_of_a_prompt_are_asked_for_if_the_answer_tells_them(scripted, is_streamed):
    scripted.script.unary = tokens_of
    body = {"prompt": ["a", [7]], "return_token_ids": True, "stream": is_streamed}
    answer = scripted.http.post("/v1/completions", json=body).text
    assert answer.count('"prompt_token_ids":[5,6]') == answer.count('"prompt_token_ids":[7]') == 1
    kinds = [type(request) for request in scripted.script.requests]
    assert kinds.count(model_pb2.TokenizeRequest) == 1
    body = {**CHAT, "return_token_ids": True, "stream": is_streamed}
    assert '"prompt_token_ids":[5,6]' in scripted.http.post("/v1/chat/completions", json=body).text


def test_a_refusal_to_tokenize_is_the_answers(scripted):
    scripted.script.unary = lambda _request, context: context.abort_with_status(overloaded(1000))
    answer = scripted.http.post("/v1/chat/completions", json={**CHAT, "return_token_ids": True})
    assert answer.status_code == 429
    assert scripted.script.ended.wait(WAIT_S)


def test_models_are_told_with_what_clients_of_vllm_read(scripted):
    scripted.script.unary = tokens_of
    listed = scripted.http.get("/v1/models").json()
    [model] = listed["data"]
    assert (model["id"], model["root"], model["parent"], model["max_model_len"]) == ("tiny", "tiny", None, 64)
    [permission] = model["permission"]
    assert (permission["object"], permission["allow_sampling"]) == ("model_permission", True)
    assert scripted.http.get("/v1/models/tiny").json() == model
    assert scripted.http.get("/v1/models/").json() == listed


@EVERY_API
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("model", [{}, {"model": None}])
def test_the_model_may_be_left_out_and_the_answer_names_it(scripted, path, body, is_streamed, model):
    unnamed = {name: value for name, value in body.items() if name != "model"}
    answer = scripted.http.post(path, json={**unnamed, **model, "stream": is_streamed})
    assert scripted.script.requests[0].model == ""
    if is_streamed:
        assert '"model":"tiny"' in answer.text
        assert '"model":""' not in answer.text
    else:
        assert answer.json()["model"] == "tiny"


def test_a_streamed_echo_of_token_ids_is_what_the_service_told(scripted):
    def generate(request, context):
        yield started()
        tokens = [TokenLogprob(token_id=5, token=b"A"), TokenLogprob(token_id=6, token=b"B", logprob=-1)]
        yield GenerateResponse(prompt_logprobs=PromptLogprobs(tokens=tokens))
        yield from itertools.islice(hello(request, context), 1, None)

    scripted.script.generate = generate
    body = {"prompt": [5, 6], "echo": True, "stream": True}
    lines = scripted.http.post("/v1/completions", json=body).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["AB", "Hel", "lo", ""]
    # No sign of life where nothing has been silent yet.
    assert ": keep-alive" not in lines
