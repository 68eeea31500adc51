"""LangChain's ChatOpenAI, over chat completions and over the Responses API: invoke, stream, batch, a second turn.

python chat.py http://127.0.0.1:8000/v1
"""

import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

QUESTION = "What is the capital of France?"


def check(model):
    answer = model.invoke(QUESTION)
    assert "Paris" in answer.text, answer
    usage = answer.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]

    chunks = list(model.stream(QUESTION))
    assert "".join(chunk.text for chunk in chunks) == answer.text
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata["total_tokens"] == usage["total_tokens"]

    france, japan = model.batch([QUESTION, "What is the capital of Japan?"])
    assert "Paris" in france.text, france
    assert "Tokyo" in japan.text, japan

    # The message that came back, whole or put together from chunks, is sent back.
    for message in (answer, whole):
        second = model.invoke([HumanMessage(QUESTION), message, HumanMessage("And of Italy?")])
        assert "Rome" in second.text, second

    template = ChatPromptTemplate.from_messages([SystemMessage("Be brief."), ("user", "What is the capital of {of}?")])
    assert "Paris" in (template | model).invoke({"of": "France"}).text


options = {"model": "smollm2", "base_url": sys.argv[1], "api_key": "none", "max_retries": 0}
options |= {"temperature": 0, "max_tokens": 50}
chat = ChatOpenAI(**options, stream_usage=True)
assert chat.invoke(QUESTION).response_metadata["finish_reason"] == "stop"
check(chat)
check(ChatOpenAI(**options, use_responses_api=True))
check(ChatOpenAI(**options, use_responses_api=True, use_previous_response_id=True))
