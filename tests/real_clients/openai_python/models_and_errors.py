"""The list of models, and errors, with OpenAI's Python client.

python models_and_errors.py http://127.0.0.1:8000/v1
"""

import sys

import openai
from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)


def refusal(kind, call):
    """The error that the call must raise."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def chat(**options):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    return client.chat.completions.create(**{"model": "smollm2", "messages": messages, "max_tokens": 5, **options})


[model] = client.models.list()
assert model.id == client.models.retrieve("smollm2").id == "smollm2"
assert model.object == "model"
assert isinstance(model.created, int)
assert isinstance(model.owned_by, str)

unknown = refusal(openai.NotFoundError, lambda: chat(model="gpt-4"))
assert unknown.code == "model_not_found"
assert "gpt-4" in unknown.message
# A user finds the request in the server's log by it.
assert unknown.request_id
refusal(openai.NotFoundError, lambda: client.models.retrieve("gpt-4"))

cold = refusal(openai.BadRequestError, lambda: chat(temperature=-1))
assert (cold.param, "temperature" in cold.message) == ("temperature", True)
long = refusal(openai.BadRequestError, lambda: chat(messages=[{"role": "user", "content": "x " * 10_000}]))
assert long.code == "context_length_exceeded"

forgotten = {"model": "smollm2", "input": "And of Italy?", "previous_response_id": "resp_unknown"}
assert "resp_unknown" in refusal(openai.APIStatusError, lambda: client.responses.create(**forgotten)).message
