"""The table itself: names, what templates are known by, and whether a prompt ends inside of reasoning."""

import pytest

from nanoserve.config import BUILTIN_MODEL
from nanoserve.dialect.formats import CALLS, REASONING, call_format, detect, reasoning_format

# The lines by which templates tell, as the checkpoints named here have them: how a call is written into the prompt, and
# how reasoning is cut off again.
CUTS_THINK = "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}"
TEMPLATES = [
    # Qwen 2.5, Qwen 3, Hermes 2 and 3
    (
        '{{- "<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>" }}',
        None,
        "hermes",
    ),
    (
        "{{- '<tool_call>\\n{\"name\": \"' }}{{- '\", \"arguments\": ' }}{{- '}\\n</tool_call>' }}" + CUTS_THINK,
        "qwen3",
        "hermes",
    ),
    # Qwen 3 Coder, Step 3.5
    (
        "{{- '<tool_call>\\n<function=' + call.name + '>\\n' }}"
        "{{- '<parameter=' + name + '>\\n' }}{{- '\\n</parameter>\\n' }}"
        "{{- '</function>\\n</tool_call>' }}",
        None,
        "qwen3_coder",
    ),
    # Seed-OSS
    (
        "{%- set toolcall_begin_token = '<seed:tool_call>' -%}{%- set think_end_token = '</seed:think>' -%}"
        "{{ toolcall_begin_token + '\\n<function=' + call.name + '>\\n' }}{{ '<parameter=' + name + '>' }}",
        "seed_oss",
        "seed_oss",
    ),
    # GLM 4.5, 4.6
    (
        "{{ '\\n<tool_call>' + call.name }}<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v }}</arg_value>\n</tool_call>"
        + CUTS_THINK,
        "glm45",
        "glm45",
    ),
    # MiniMax M2
    (
        "{%- set toolcall_begin_token = '<minimax:tool_call>' -%}{{- '<invoke name=\"' + call.name + '\">\\n' }}"
        + CUTS_THINK,
        "minimax_m2",
        "minimax_m2",
    ),
    # Mistral Nemo, Mistral Small 3; Mistral Small 3.2, Devstral; Magistral
    ('{{- "[TOOL_CALLS] [" }}{{- call.function|tojson }}{{- "]" + eos_token }}', None, "mistral_list"),
    (
        "{{- '[TOOL_CALLS]' + call.name }}{{- '[CALL_ID]' + call.id }}{{- '[ARGS]' + arguments|tojson }}",
        None,
        "mistral",
    ),
    (
        "{{- '[THINK]' + text + '[/THINK]' }}{{- '[TOOL_CALLS]' + call.name + '[ARGS]' + arguments }}",
        "mistral",
        "mistral",
    ),
    # DeepSeek V3, R1; V3.1
    (
        "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>"
        "' + name + '\\n' + '```json' + '\\n'}}",
        None,
        "deepseek_v3",
    ),
    (
        "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
        "' + name + '<｜tool▁sep｜>' + arguments + '<｜tool▁call▁end｜>'}}"
        "{{'<｜Assistant｜></think>'}}",
        "deepseek_r1",
        "deepseek_v31",
    ),
    # Kimi K2
    (
        "<|tool_calls_section_begin|><|tool_call_begin|>{{ id }}<|tool_call_argument_begin|>{{ arguments }}",
        None,
        "kimi_k2",
    ),
    # gpt-oss
    (
        '{{- "<|start|>assistant<|channel|>analysis<|message|>" }}{{- "assistant to=" }}{{- "functions." + f }}'
        '{{- "<|channel|>commentary " }}{{- "<|channel|>final<|message|>" }}',
        "openai_gptoss",
        "openai",
    ),
    # Olmo 3; LFM 2.5
    ('{{- "<|im_start|>assistant\\n<function_calls>\\n" }}{{- "\\n</function_calls><|im_end|>\\n" }}', None, "olmo3"),
    ('{{- "<|tool_call_start|>[" + calls + "]<|tool_call_end|>" -}}', None, "lfm2"),
    # Llama 4 and Llama 3.2 with calls in Python
    (
        "<|header_start|>{{- 'Use exact format: [func_name1(param1=value1), func_name2(...)]' }}",
        None,
        "llama4_pythonic",
    ),
    ("<|start_header_id|>{{- 'in the format [func_name1(params_name1=params_value1...)]' }}", None, "pythonic"),
    # Llama 3.1, 3.2, 3.3; Llama 4
    (
        "<|start_header_id|>assistant{{- '{\"name\": \"' + call.name + '\", ' }}{{- '\"parameters\": ' }}",
        None,
        "llama3_json",
    ),
    (
        "<|header_start|>assistant{{- '{\"name\": \"' + call.name + '\", ' }}{{- '\"parameters\": ' }}",
        None,
        "llama3_json",
    ),
    # Hunyuan, Apriel; Nemotron Nano 2; Granite 3.3; Phi 4 mini
    ("{% set content = content + '<tool_calls>[' + calls + ']</tool_calls>' %}<tool_call>", None, "hunyuan_a13b"),
    ("{{- '<TOOLCALL>[' -}}{{- ']</TOOLCALL>' -}}{{- '<think></think>' -}}", "qwen3", "nemotron_json"),
    ("<|start_of_role|>{%- set text = 'respond only with <|tool_call|> followed by a JSON list' %}", None, "granite"),
    ('all function calls as functools[{"name": [function name], "arguments": [arguments]}]', None, "phi4_mini_json"),
    # Gemma 3 with calls in a block of code
    ("<start_of_turn>model\n```tool_code\n{{ call }}\n```", None, "gemma_json"),
    # None of the table: Phi 4 mini's own, Functionary, Hunyuan's newer one, DeepSeek V3.2; and no tools at all
    ("<|tool_call|>{{ calls | tojson }}<|/tool_call|><|start_of_role|>", None, None),
    ("<|start_header_id|>{{ '<function=' + call.name + '>' + arguments + '</function>' }}", None, None),
    ("<tool_call>{{ name }}<tool_sep><arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value></tool_call>", None, None),
    ('<｜DSML｜function_calls>\n<｜DSML｜invoke name="{{ name }}">', None, None),
    (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}",
        None,
        None,
    ),
    ("<|im_start|>{{ '<tool_response>' + message.content + '</tool_response>' }}", None, None),
]


@pytest.mark.parametrize(("template", "reasoning", "calls"), TEMPLATES)
def test_a_template_tells_its_formats(template, reasoning, calls):
    found = detect(template)
    assert found.reasoning == (None if reasoning is None else reasoning_format(reasoning))
    assert found.calls == (None if calls is None else call_format(calls))


def test_the_built_in_model_writes_calls_as_hermes_does():
    found = detect((BUILTIN_MODEL / "chat_template.jinja").read_text())
    assert (found.reasoning, found.calls) == (None, call_format("hermes"))


def test_each_format_is_known_by_a_template_that_has_no_other_s_signs():
    for calls in CALLS:
        for signs in calls.signs:
            assert detect(" ".join(signs)).calls == calls


@pytest.mark.parametrize("table", [REASONING, CALLS])
def test_names_are_given_once(table):
    names = [name for each in table for name in each.names]
    assert len(names) == len({*names})


def test_a_name_that_is_not_known_is_told_with_those_that_are():
    with pytest.raises(ValueError, match=r"'hermez' is not known; known: apriel, deepseek_v3, .* qwen3_xml, seed_oss$"):
        call_format("hermez")
    with pytest.raises(ValueError, match=r"reasoning format 'hermes' is not known; known: deepseek_r1, "):
        reasoning_format("hermes")


def test_a_format_that_may_stand_anywhere_begins_in_one_way():
    """The grammar looks for one trigger."""
    for calls in CALLS:
        assert calls.is_at_start or len({*calls.triggers}) == 1
        assert all(each.strip() == each != "" for each in calls.triggers)


@pytest.mark.parametrize(
    ("name", "prompt", "is_open"),
    [
        ("qwen3", "<|im_start|>assistant\n", False),
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("qwen3", "<|im_start|>assistant\n<think>", True),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("qwen3", "<|im_start|>assistant\n<think>a</think>b<|im_end|>\n<|im_start|>assistant\n", False),
        ("qwen3", "<|im_start|>assistant\n<think>a</think>b<|im_end|>\n<|im_start|>assistant\n<think>\n", True),
        # Reasoning that the model is to continue.
        ("qwen3", "<|im_start|>assistant\n<think>\nFirst, 1 < 2", True),
        # The user has written it, and it opens nothing.
        ("qwen3", "<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
        ("deepseek_r1", "<｜User｜>What is <think>?<｜Assistant｜>", False),
        ("deepseek_r1", "<｜User｜>Hi<｜Assistant｜><think>\n", True),
        ("deepseek_r1", "<｜User｜>Hi<｜Assistant｜></think>", False),
        ("mistral", "[INST]What is [THINK]?[/INST]", False),
        ("mistral", "[INST]Hi[/INST][THINK]", True),
        ("openai_gptoss", "<|start|>user<|message|>Hi<|end|><|start|>assistant", False),
        ("openai_gptoss", "<|start|>assistant<|channel|>analysis<|message|>", True),
    ],
)
def test_whether_a_prompt_ends_inside_of_reasoning(name, prompt, is_open):
    assert reasoning_format(name).is_open(prompt) is is_open
