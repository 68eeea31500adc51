"""The Python API: a model in this process, for threads and for asyncio."""

import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy
import pytest
from nanoserve_client import ConstraintOutcome, InvalidRequest, NotFound
from pydantic import BaseModel, Field

from nanoserve import LLM, AsyncLLM, SamplingParams
from nanoserve.config import ConfigError
from nanoserve.llm import as_options, make_options

GREEDY = SamplingParams(temperature=0, max_tokens=24)
QUESTIONS = ["What is paged attention?", "What is TTFT?", "Hello!"]


@pytest.fixture(scope="module")
def llm():
    with LLM(max_num_seqs=4, max_waiting=4, kv_memory_bytes=16 << 20) as llm:
        yield llm


def test_a_batch_gives_what_each_prompt_gives_alone_in_their_order(llm):
    together = llm.chat(QUESTIONS, GREEDY)
    assert [output.prompt for output in together] == QUESTIONS
    assert [output.text for output in together] == [llm.chat(question, GREEDY)[0].text for question in QUESTIONS]
    assert len({output.text for output in together}) == len(QUESTIONS)


def test_prompts_may_be_texts_token_ids_or_conversations(llm):
    ids = llm.tokenize("A KV cache")
    (of_text,), (of_ids,) = llm.generate("A KV cache", GREEDY), llm.generate(list(ids), GREEDY)
    assert of_text.text == of_ids.text
    assert of_text.usage.prompt_tokens == len(ids)
    assert len(llm.generate(["A KV cache", list(ids)], GREEDY)) == 2
    conversation = [{"role": "user", "content": QUESTIONS[0]}]
    assert llm.chat(conversation, GREEDY)[0].text == llm.chat(QUESTIONS[0], GREEDY)[0].text
    assert len(llm.chat([conversation, QUESTIONS[1]], GREEDY)) == 2
    assert llm.generate([], GREEDY) == []


def test_each_prompt_may_have_its_own_params(llm):
    params = [SamplingParams(max_tokens=2, ignore_eos=True), SamplingParams(max_tokens=3, ignore_eos=True, n=2)]
    first, second = llm.generate(["a", "b"], params)
    assert [len(completion.token_ids) for completion in first.outputs] == [2]
    assert [len(completion.token_ids) for completion in second.outputs] == [3, 3]
    with pytest.raises(ValueError, match="sampling_params has 2 values for 1 prompts"):
        llm.generate(["a"], params)


def test_many_more_prompts_than_may_wait_are_all_served(llm):
    outputs = llm.generate(["a"] * 50, SamplingParams(max_tokens=2, ignore_eos=True))
    assert [output.usage.completion_tokens for output in outputs] == [2] * 50


def test_one_bad_prompt_ends_the_batch_and_is_named(llm):
    with pytest.raises(InvalidRequest) as failure:
        llm.generate(["a", "b", ""], GREEDY)
    assert failure.value.__notes__ == ["prompt 2 of 3"]
    with pytest.raises(InvalidRequest, match=r"sampling\.temperature"):
        llm.generate("a", SamplingParams(temperature=-1))
    assert llm.chat("Hello!", GREEDY)[0].text


def test_a_stream_is_what_generate_returns_and_may_be_left(llm):
    want = llm.chat(QUESTIONS[0], GREEDY)[0].text
    assert "".join(delta.text for delta in llm.stream_chat(QUESTIONS[0], GREEDY)) == want
    with llm.stream("a", SamplingParams(max_tokens=10_000, ignore_eos=True)) as stream:
        next(stream)
    assert "".join(delta.text for delta in llm.stream_chat(QUESTIONS[0], GREEDY)) == want


def test_several_threads_may_call_at_once(llm):
    want = [llm.chat(question, GREEDY)[0].text for question in QUESTIONS]
    got = {}
    threads = [
        threading.Thread(target=lambda q=question: got.update({q: llm.chat(q, GREEDY)[0].text}))
        for question in QUESTIONS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[question] for question in QUESTIONS] == want


async def test_asyncio_gives_the_same(llm):
    async with AsyncLLM(max_num_seqs=4, kv_memory_bytes=16 << 20) as other:
        outputs = await other.chat(QUESTIONS, GREEDY)
        streamed = "".join([delta.text async for delta in other.stream_chat(QUESTIONS[0], GREEDY)])
        assert [o.text for o in await other.generate(["A KV cache"], GREEDY)] == [
            llm.generate("A KV cache", GREEDY)[0].text
        ]
    assert [output.text for output in outputs] == [output.text for output in llm.chat(QUESTIONS, GREEDY)]
    assert streamed == outputs[0].text


def test_every_sampling_parameter_reaches_the_engine(llm):
    params = SamplingParams(
        n=2, temperature=0.5, top_p=0.75, top_k=7, min_p=0.25, frequency_penalty=0.5, presence_penalty=-0.5,
        repetition_penalty=1.5, seed=3, logit_bias={5: 1.0}, max_tokens=6, min_tokens=2, stop=("xyz",),
        stop_token_ids=frozenset({9}), ignore_eos=True, include_stop=True, time_limit_s=100.0, logprobs=1,
        prompt_logprobs=1, skip_special_tokens=False,
    )  # fmt: skip
    with llm.stream("a b c", params) as stream:
        result = stream.result()
    sampling = result.started.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, dict(sampling.logit_bias)) == (0.5, 7, 3, {5: 1.0})
    assert len(result.completions) == 2
    assert all(len(completion.logprobs) == len(completion.token_ids) for completion in result.completions)
    assert len(result.prompt_logprobs) == result.usage.prompt_tokens
    assert as_options(SamplingParams(detokenize=False))["omit_text"] is True
    assert llm.generate("a", SamplingParams(max_tokens=3, ignore_eos=True, detokenize=False))[0].text == ""


def test_wrong_options_are_named():
    with pytest.raises(TypeError, match="did you mean max_num_seqs"):
        LLM(max_num_seq=3)
    with pytest.raises(ConfigError, match="--max-num-seqs is 0"):
        LLM(max_num_seqs=0)
    with pytest.raises(ConfigError, match="there is no folder"):
        LLM("/no/such/folder")
    options = make_options("a/b", {"dtype": "float32", "block_size": 8, "max_waiting": 3})
    assert (options.model.path, options.model.dtype, options.cache.block_size) == ("a/b", "float32", 8)


def test_options_of_another_kind_are_refused_and_sizes_may_be_texts():
    with pytest.raises(ConfigError, match="max_num_seqs is 'many'; it must be a whole number"):
        LLM(max_num_seqs="many")
    with pytest.raises(ConfigError, match="dtype is 'int3'; it must be auto, float32, bfloat16 or float16"):
        LLM(dtype="int3")
    with pytest.raises(ConfigError, match="compile is 'no'; it must be True or False"):
        LLM(compile="no")
    options = make_options(Path("a/b"), {"kv_memory_bytes": "2GiB", "compile": False, "revision": None})
    assert (options.model.path, options.cache.kv_memory_bytes, options.model.compile) == ("a/b", 2 << 30, False)


def test_adapters_are_named_with_their_folders_or_lie_in_one_folder():
    options = make_options(None, {"adapters": {"pirate": Path("./pirate"), "german": "b/german"}})
    assert (options.adapters.adapter, options.adapters.adapters) == ("pirate=pirate,german=b/german", None)
    for folder in ("./all", Path("./all")):
        options = make_options(None, {"adapters": folder, "adapter": "x=y"})
        assert (options.adapters.adapter, options.adapters.adapters) == ("x=y", Path("all"))
    assert make_options(None, {"adapters": {}}).adapters.adapter is None
    with pytest.raises(TypeError, match="give one of them"):
        make_options(None, {"adapters": {"pirate": "a"}, "adapter": "x=y"})
    with pytest.raises(ConfigError, match="its path may have no comma"):
        make_options(None, {"adapters": {"pirate": "a,b"}})


def test_adapters_are_for_all_prompts_or_one_for_each(llm):
    with pytest.raises(NotFound, match="there is no adapter 'pirate'") as caught:
        llm.chat(QUESTIONS, GREEDY, adapter=[None, None, "pirate"])
    assert "prompt 2 of 3" in caught.value.__notes__
    with pytest.raises(ValueError, match="adapter has 1 values for 3 prompts"):
        llm.chat(QUESTIONS, GREEDY, adapter=["pirate"])
    with pytest.raises(TypeError, match="adapter must be a str, or a list with one for each prompt"):
        llm.generate("a", GREEDY, adapter=5)
    for begin in (llm.stream, llm.stream_chat):
        with begin("a", GREEDY, adapter="pirate") as stream, pytest.raises(NotFound):
            next(stream)
    assert [output.adapter for output in llm.chat(QUESTIONS, GREEDY, adapter=[None] * 3)] == [""] * 3


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (5, "a int was given; it must be a text or token ids, or a list of such"),
        ({"prompt": "a"}, "a dict was given; it must be a text or token ids, or a list of such"),
        (["a", {"prompt_token_ids": [1]}], "prompt 1 of 2 is a dict; it must be a text or token ids"),
        ([1, "a"], "prompt 0 of 2 is a int; it must be a text or token ids"),
        ([["a"]], "prompt 0 of 1 is a list; it must be a text or token ids"),
    ],
)
def test_what_is_no_prompt_is_refused(llm, prompts, words):
    with pytest.raises(TypeError, match=words):
        llm.generate(prompts)


def test_what_is_no_conversation_and_no_sampling_params_is_refused(llm):
    with pytest.raises(TypeError, match="prompt 0 of 1 is a int; it must be a text or a list of messages"):
        llm.chat([5])
    with pytest.raises(TypeError, match="sampling_params must be a SamplingParams, or a list"):
        llm.generate("a", {"temperature": 0})
    with pytest.raises(TypeError, match="temperature is 'hot': must be real number"):
        llm.generate("a", SamplingParams(temperature="hot"))


def test_arrays_of_token_ids_are_prompts(llm):
    [output] = llm.generate(numpy.array([5, 6, 7]), GREEDY)
    assert output.usage.prompt_tokens == 3
    assert len(llm.generate(numpy.array([[5, 6, 7], [8, 9, 10]]), GREEDY)) == 2


@pytest.mark.parametrize("empty", ["", [""], [[]]])
def test_an_empty_prompt_is_refused_by_the_server(llm, empty):
    with pytest.raises(InvalidRequest, match="must not be empty"):
        llm.generate(empty, GREEDY)


async def test_outside_of_its_block_there_is_no_model():
    with pytest.raises(RuntimeError, match="only within `async with"):
        await AsyncLLM().generate("a")


def test_a_cache_that_is_smaller_than_the_models_context_is_warned_about(caplog):
    LLM(dtype="float32", kv_memory_bytes=1 << 20).close()
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "the KV cache holds 160 tokens" in warning
    assert "the model's 2048" in warning
    caplog.clear()
    LLM(kv_memory_bytes=1 << 20, max_context_tokens=100).close()
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_after_close_calls_fail_at_once():
    llm = LLM(kv_memory_bytes=1 << 20)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("a", GREEDY)


def test_the_process_ends_although_a_model_was_left_open_in_the_middle_of_a_stream():
    code = (
        "from nanoserve import LLM, SamplingParams\n"
        "stream = LLM().stream('a', SamplingParams(max_tokens=100000, ignore_eos=True))\n"
        "print(len(next(stream).token_ids) > 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_importing_the_package_imports_neither_torch_nor_grpc():
    code = "import sys, nanoserve; sys.exit(bool({'torch', 'grpc', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class City(BaseModel):
    name: str = Field(max_length=12)
    people: int = Field(ge=0, le=99)


def test_outputs_of_a_batch_are_what_the_constraint_says(llm):
    outputs = llm.chat(QUESTIONS, GREEDY, schema=City)
    assert all(isinstance(output.parsed, City) for output in outputs)
    twice = llm.generate("a", SamplingParams(n=2, seed=1, max_tokens=24), choices=["yes", "no"])[0]
    assert {output.parsed for output in twice.outputs} <= {"yes", "no"}
    assert {output.constraint_outcome for output in twice.outputs} == {ConstraintOutcome.SATISFIED}
    assert llm.stream_chat(QUESTIONS[0], GREEDY, json_object=True, regex=None).result().text.startswith("{")
    with llm.stream("a", GREEDY, regex=re.compile("[0-9]{3}")) as stream:
        assert int(stream.result().parsed) < 1000
    assert llm.chat(QUESTIONS[0], GREEDY)[0].outputs[0].constraint_outcome is None


def test_what_of_a_relaxed_schema_was_not_enforced_is_told(llm):
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
    with pytest.raises(InvalidRequest, match="uniqueItems"):
        llm.generate("a", GREEDY, schema=schema)
    [output] = llm.generate("a", SamplingParams(temperature=0, max_tokens=200), schema=schema, relaxed=True)
    assert [each.keyword for each in output.unenforced] == ["uniqueItems"]
    assert output.outputs[0].constraint_outcome in (ConstraintOutcome.RELAXED_OK, ConstraintOutcome.RELAXED_VIOLATED)


def test_an_output_that_is_cut_off_has_no_value(llm):
    [output] = llm.generate("a", SamplingParams(temperature=0, max_tokens=2), schema=City)
    with pytest.raises(ValueError, match=r"cut off \(length\)"):
        assert output.parsed


def test_keywords_are_those_of_a_constraint_alone(llm):
    for call in (llm.generate, llm.chat, llm.stream, llm.stream_chat):
        with pytest.raises(TypeError, match="unknown option: temperature"):
            call("a", GREEDY, temperature=0)
    with pytest.raises(TypeError, match="regex and choices are given"):
        llm.generate("a", regex="a", choices=["a"])


async def test_asyncio_takes_constraints_too():
    async with AsyncLLM(max_num_seqs=4, kv_memory_bytes=16 << 20) as llm:
        assert isinstance((await llm.chat("a", GREEDY, schema=City))[0].parsed, City)
        assert (await llm.generate(["a", "b"], GREEDY, choices=["x"]))[1].parsed == "x"
        assert "".join([delta.text async for delta in llm.stream("a", GREEDY, choices=["x"])]) == "x"
        assert (await llm.stream_chat("a", GREEDY, regex="[ab]").result()).parsed in "ab"
