"""Adapters over REST: one is a model, and vLLM's endpoints load and unload them."""

import json

import grpc
import pytest
from google.rpc import error_details_pb2
from nanoserve_client.v1 import admin_pb2, model_pb2
from scripted_server import RichStatus, hello, started

BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
}
EVERY_API = pytest.mark.parametrize(("path", "body"), BODIES.items(), ids=BODIES)
MODELS = model_pb2.ListModelsResponse(
    models=[
        model_pb2.Model(name="tiny", max_context_tokens=64),
        model_pb2.Model(name="team/pirate", base_model="tiny", lora_rank=8, max_context_tokens=64),
    ]
)


def computed_with_what_was_asked(request, context):
    """The service, where every model but "tiny" is an adapter."""
    adapter = "" if request.model in ("", "tiny") else request.model
    events = hello(request, context)
    next(events)
    yield started(adapter=adapter, adapter_revision=adapter and "abc")
    yield from events


def refusal(code, reason, *details, message="why not"):
    info = error_details_pb2.ErrorInfo(reason=reason, domain="nanoserve")

    def refuse(_request, context):
        context.abort_with_status(RichStatus(code, message, (info, *details)))
        yield

    return refuse


def refusing(code, reason, *details, message="why not"):
    return lambda request, context: next(refusal(code, reason, *details, message=message)(request, context))


# ---------------------------------------------------------------------------------------------------- as a model


@EVERY_API
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("asked", "told"), [("team/pirate", "team/pirate"), ("tiny", "tiny"), (None, "tiny")])
def test_an_adapter_is_asked_for_as_a_model_and_the_answer_names_it(scripted, path, body, is_streamed, asked, told):
    scripted.script.generate = computed_with_what_was_asked
    answer = scripted.http.post(path, json={**body, "model": asked, "stream": is_streamed})
    assert answer.status_code == 200
    assert scripted.script.requests[0].model == (asked or "")
    assert scripted.script.requests[0].adapter == ""
    if is_streamed:
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        models = {event.get("response", event).get("model", told) for event in events}
        assert models == {told}
    else:
        assert answer.json()["model"] == told


def test_a_response_in_the_background_names_it_from_the_begin_on(scripted):
    scripted.script.generate = computed_with_what_was_asked
    asked = {"input": "hi", "model": "team/pirate", "background": True}
    answer = scripted.http.post("/v1/responses", json=asked).json()
    assert answer["model"] == "team/pirate"
    assert scripted.script.ended.wait(30)
    assert scripted.http.get(f"/v1/responses/{answer['id']}").json()["model"] == "team/pirate"


@EVERY_API
def test_rest_has_no_second_way_to_name_one(scripted, path, body):
    answer = scripted.http.post(path, json={**body, "adapter": "team/pirate"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "adapter")
    assert not scripted.script.requests


def test_models_list_adapters_with_the_model_that_they_change(scripted):
    scripted.script.unary = lambda _request, _context: MODELS
    listed = scripted.http.get("/v1/models").json()["data"]
    assert [(each["id"], each["root"], each["parent"]) for each in listed] == [
        ("tiny", "tiny", None),
        ("team/pirate", "team/pirate", "tiny"),
    ]
    assert scripted.http.get("/v1/models/team/pirate").json() == listed[1]
    assert scripted.http.get("/v1/models/pirate").status_code == 404


def test_a_prompt_is_tokenized_for_an_adapter(scripted):
    def answer(request, _context):
        return MODELS if isinstance(request, model_pb2.ListModelsRequest) else model_pb2.TokenizeResponse(token_ids=[5])

    scripted.script.unary = answer
    told = scripted.http.post("/tokenize", json={"prompt": "hi", "model": "team/pirate"}).json()
    assert (told["count"], told["max_model_len"]) == (1, 64)
    assert scripted.script.requests[0].model == "team/pirate"


@EVERY_API
def test_a_folder_that_cannot_be_served_is_the_models_fault(scripted, path, body):
    bad = error_details_pb2.BadRequest(field_violations=[{"field": "path", "description": "tensor a: has NaN"}])
    scripted.script.generate = refusal(grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_INVALID", bad)
    answer = scripted.http.post(path, json={**body, "model": "team/pirate"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "model", "adapter_invalid")
    assert error["message"] == "model: tensor a: has NaN"


# ------------------------------------------------------------------------------------------- load and unload


def test_load(scripted):
    scripted.script.unary = lambda _request, _context: admin_pb2.LoadAdapterResponse()
    key = {"authorization": "Bearer admin-key", "x-request-id": "mine"}
    asked = {"lora_name": "pirate", "lora_path": "v2", "load_inplace": True}
    answer = scripted.http.post("/v1/load_lora_adapter", json=asked, headers=key)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'pirate' added successfully.")
    assert answer.headers["content-type"].startswith("text/plain")
    scripted.http.post("/v1/load_lora_adapter", json={"lora_name": "pirate"})
    assert scripted.script.requests == [
        admin_pb2.LoadAdapterRequest(name="pirate", path="v2", replace=True),
        admin_pb2.LoadAdapterRequest(name="pirate"),
    ]
    metadata = scripted.script.metadata[0]
    assert (metadata["authorization"], metadata["x-request-id"]) == ("Bearer admin-key", "mine")


def test_unload(scripted):
    scripted.script.unary = lambda _request, _context: admin_pb2.UnloadAdapterResponse()
    answer = scripted.http.post("/v1/unload_lora_adapter", json={"lora_name": "pirate"})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'pirate' removed successfully.")
    assert scripted.script.requests == [admin_pb2.UnloadAdapterRequest(name="pirate")]


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "lora_name"),
        ({"lora_name": 5}, "lora_name"),
        ({"lora_name": "a", "colour": "red"}, "colour"),
        ({"lora_name": "a", "lora_int_id": 1}, "lora_int_id"),
    ],
    ids=str,
)
def test_bad_bodies_are_refused_by_field(scripted, path, body, param):
    answer = scripted.http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert not scripted.script.requests


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
@pytest.mark.parametrize(
    ("code", "reason", "status"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", 401),
        (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED", 403),
        (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", 404),
        (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_IN_USE", 400),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "ADAPTER_MEMORY_FULL", 429),
    ],
)
def test_what_the_service_refuses_has_its_status(scripted, path, code, reason, status):
    scripted.script.unary = refusing(code, reason)
    answer = scripted.http.post(path, json={"lora_name": "a"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (status, "why not")
    if reason.startswith("ADAPTER"):
        assert answer.json()["error"]["code"] == reason.lower()


def test_violations_are_told_in_the_words_of_the_endpoint(scripted):
    found = [{"field": name, "description": "is wrong"} for name in ("name", "path", "replace")]
    bad = error_details_pb2.BadRequest(field_violations=found)
    scripted.script.unary = refusing(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", bad)
    error = scripted.http.post("/v1/load_lora_adapter", json={"lora_name": "../x"}).json()["error"]
    assert error["param"] == "lora_name"
    assert error["message"] == "lora_name: is wrong; lora_path: is wrong; load_inplace: is wrong"


def test_pages_of_other_sites_load_nothing(scripted):
    answer = scripted.http.post(
        "/v1/load_lora_adapter", content='{"lora_name": "a"}', headers={"origin": "http://evil.example"}
    )
    assert answer.status_code == 403
    assert not scripted.script.requests
