"""LangChain's with_structured_output, over chat completions and over the Responses API: classes, schemas, JSON mode.

python structured.py http://127.0.0.1:8000/v1
"""

import sys
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

QUESTION = "What is the capital of France? Answer in JSON."


class Capital(BaseModel):
    """A city and its country."""

    city: str = Field(max_length=20)
    country: Literal["France", "Italy"]


def check(model):
    answer = model.with_structured_output(Capital, method="json_schema").invoke(QUESTION)
    assert answer == Capital(city="Paris", country="France"), answer
    strict = model.with_structured_output(Capital, method="json_schema", strict=True, include_raw=True).invoke(QUESTION)
    assert (strict["parsed"], strict["parsing_error"]) == (answer, None), strict
    schema = {"title": "Capital", **Capital.model_json_schema()}
    as_dict = model.with_structured_output(schema, method="json_schema")
    assert as_dict.invoke(QUESTION) == answer.model_dump()
    assert list(as_dict.stream(QUESTION))[-1] == answer.model_dump()
    assert as_dict.batch([QUESTION] * 2) == [answer.model_dump()] * 2


options = {"model": "smollm2", "base_url": sys.argv[1], "api_key": "none", "max_retries": 0}
options |= {"temperature": 0, "max_tokens": 100}
chat = ChatOpenAI(**options)
check(chat)
check(ChatOpenAI(**options, use_responses_api=True))
picked = chat.bind(extra_body={"structured_outputs": {"choice": ["Rome", "Paris"]}}).invoke(QUESTION)
assert picked.text == "Paris", picked
# Any object; the model's own wish for keys is in the prompt.
wanted = f'{QUESTION} Like {{"city": "Rome", "country": "Italy"}}'
loose = chat.with_structured_output(Capital, method="json_mode", include_raw=True).invoke(wanted)
assert loose["raw"].content.startswith("{"), loose
