"""Clients that people have do their main use against a real chat model. `make soak`.

Each script in the folders beside is an example that a user could run, and fails if the answer is wrong.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak

HERE = Path(__file__).parent
LM_EVAL = HERE / "lm_eval"
INSTRUCTOR = ("instructor==1.17.0",)
PYDANTIC_AI = ("pydantic-ai", "pydantic-ai-slim[openai]==2.68.0")
OPENAI_AGENTS = ("openai-agents", "openai-agents==0.24.0")
OPENAI_JAVASCRIPT = ("openai-javascript", "openai@7.59.0", "zod@4.6.7")
AI_SDK = ("ai-sdk", "ai@7.0.173", "@ai-sdk/openai@4.0.118", "@ai-sdk/openai-compatible@3.0.92", "zod@4.6.7")


@pytest.mark.parametrize("script", ["chat", "completions", "responses", "structured", "tools", "models_and_errors"])
def test_openai_python(url, run, script):
    run(sys.executable, HERE / f"openai_python/{script}.py", f"{url}/v1")


@pytest.mark.parametrize("script", ["chat", "structured"])
def test_langchain(url, run, script):
    run(sys.executable, HERE / f"langchain/{script}.py", f"{url}/v1")


@pytest.mark.parametrize("script", ["agent", "structured"])
def test_pydantic_ai(url, run, python_with, script):
    run(python_with(*PYDANTIC_AI), HERE / f"pydantic_ai/{script}.py", f"{url}/v1")


def test_instructor(url, run, python_with):
    run(python_with("instructor", *INSTRUCTOR), HERE / "instructor/structured.py", f"{url}/v1")


def test_openai_agents(url, run, python_with):
    run(python_with(*OPENAI_AGENTS), HERE / "openai_agents/agent.py", f"{url}/v1")


@pytest.mark.parametrize("script", ["completion", "responses", "structured", "anthropic_messages"])
def test_litellm(url, run, python_with, script):
    # Its streams for Anthropic's API import what only its proxy depends on.
    packages = ("litellm==1.110.2", "fastapi==0.165.0", "orjson==3.13.0", "soundfile==0.14.0")
    run(python_with("litellm", *packages), HERE / f"litellm/{script}.py", f"{url}/v1")


@pytest.mark.parametrize("script", ["chat", "responses", "structured"])
def test_openai_javascript(url, run, folder_with, script):
    run_node(run, folder_with(*OPENAI_JAVASCRIPT), HERE / f"openai_javascript/{script}.mjs", url)


@pytest.mark.parametrize("script", ["chat", "responses", "structured"])
def test_ai_sdk(url, run, folder_with, script):
    run_node(run, folder_with(*AI_SDK), HERE / f"ai_sdk/{script}.mjs", url)


def test_tools_as_a_form_of_answers(url, run, python_with):
    """What several clients do for a class unless told otherwise: the model has to call a function that takes it."""
    run(sys.executable, HERE / "langchain/answer_by_tool.py", f"{url}/v1")
    run(python_with("instructor", *INSTRUCTOR), HERE / "instructor/answer_by_tool.py", f"{url}/v1")
    run(python_with(*PYDANTIC_AI), HERE / "pydantic_ai/answer_by_tool.py", f"{url}/v1")


def test_tools_of_langchain(caller_url, run):
    run(sys.executable, HERE / "langchain/tools.py", f"{caller_url}/v1")


@pytest.mark.parametrize(("folder", "packages"), [("pydantic_ai", PYDANTIC_AI), ("openai_agents", OPENAI_AGENTS)])
def test_tools_of_agents(caller_url, run, python_with, folder, packages):
    run(python_with(*packages), HERE / folder / "tools.py", f"{caller_url}/v1")


@pytest.mark.parametrize(("folder", "packages"), [("openai_javascript", OPENAI_JAVASCRIPT), ("ai_sdk", AI_SDK)])
def test_tools_in_javascript(caller_url, run, folder_with, folder, packages):
    run_node(run, folder_with(*packages), HERE / folder / "tools.mjs", caller_url)


def run_node(run, folder, script, url):
    # Node.js looks for packages beside the script.
    shutil.copy(script, folder)
    run("node", folder / script.name, f"{url}/v1")


@pytest.mark.parametrize("request_format", ["chat/completions", "completions", "responses"])
def test_guidellm(url, model, run, python_with, tmp_path, request_format):
    report = tmp_path / "report.json"
    run(
        # Without its version pip brings a torch of several gigabytes for CUDA.
        *(python_with("guidellm", "guidellm==0.8.1", "torch==2.13.0"), "-m", "guidellm", "run"),
        *("--backend", f"kind=openai_http,target={url},model=smollm2,request_format=/v1/{request_format}"),
        *("--tokenizer", f"kind=huggingface_auto,model={model}"),
        # A second turn sends the first one's answer back.
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8,turns=2"),
        *("--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=4"),
        *("--output", f"kind=json,path={report}", "--disable-console-interactive"),
    )
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert [request["info"]["error"] for request in requests["errored"]] == []
    assert len(requests["successful"]) == 4
    assert {request["output_metrics"]["text_tokens"] for request in requests["successful"]} == {8}


def test_lm_eval(url, model, run, python_with, tmp_path):
    run(
        # It reads the tokenizer with transformers.
        *(python_with("lm-eval", "lm_eval[api]==0.4.13", "transformers==5.23.0"), "-m", "lm_eval", "run"),
        *("--model", "local-completions"),
        *("--model_args", f"model=smollm2,base_url={url}/v1/completions,tokenizer={model},num_concurrent=2"),
        *("--batch_size", "4"),
        *("--tasks", "capitals_choice,capitals_written", "--include_path", LM_EVAL),
        *("--output_path", tmp_path),
        cwd=LM_EVAL,
    )
    [report] = tmp_path.rglob("results_*.json")
    results = json.loads(report.read_text())["results"]
    assert results["capitals_choice"]["acc,none"] >= 0.8
    assert results["capitals_written"]["exact_match,none"] >= 0.8
