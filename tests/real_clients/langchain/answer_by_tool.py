"""LangChain's with_structured_output by a function that the model has to call, over chat completions and responses.

python answer_by_tool.py http://127.0.0.1:8000/v1
"""

import sys
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

QUESTION = "What is the capital of France?"


class Capital(BaseModel):
    """A city and its country."""

    city: str = Field(max_length=20)
    country: Literal["France", "Italy"]


def check(model):
    for strict in (None, True):
        asked = model.with_structured_output(Capital, method="function_calling", strict=strict, include_raw=True)
        answer = asked.invoke(QUESTION)
        assert isinstance(answer["parsed"], Capital), answer
        whole = model.with_structured_output(Capital, method="function_calling", strict=strict)
        assert whole.invoke(QUESTION) == answer["parsed"]
        assert list(whole.stream(QUESTION))[-1] == answer["parsed"]


options = {"model": "smollm2", "base_url": sys.argv[1], "api_key": "none", "max_retries": 0}
options |= {"temperature": 0, "max_tokens": 200}
check(ChatOpenAI(**options))
check(ChatOpenAI(**options, use_responses_api=True))
