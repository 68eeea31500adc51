"""What models of each family write, and what it means. As data: (format of calls, text, reasoning, content, calls)."""

WEATHER = {"city": "Oslo", "days": 3}
BOTH = [("get_weather", WEATHER), ("get_time", {})]

TRANSCRIPTS = [
    (
        "hermes",
        "<think>\nThe user asks\nfor two things.\n</think>\n\nOne moment.\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
        "The user asks\nfor two things.",
        "One moment.",
        BOTH,
    ),
    # The name last, further members, compact.
    (
        "hermes",
        '<tool_call>{"id":7,"arguments":{"city":"Oslo","days":3},"name":"get_weather"}</tool_call>',
        "",
        "",
        BOTH[:1],
    ),
    # Parameters instead of arguments, none, and null.
    ("hermes", '<tool_call>{"name":"get_weather","parameters":{"city":"Oslo","days":3}}', "", "", BOTH[:1]),
    ("hermes", '<tool_call>{"name":"get_time"}</tool_call>', "", "", BOTH[1:]),
    ("hermes", '<tool_call>{"name":"get_time","arguments":null}</tool_call>', "", "", BOTH[1:]),
    # The last brace is forgotten.
    ("hermes", '<tool_call>{"name":"get_weather","arguments":{"city":"Oslo","days":3}', "", "", BOTH[:1]),
    # Whitespace before a call is nothing, that between it and a text is the text's.
    ("hermes", '\n <tool_call>{"name":"get_time"}</tool_call> b', "", " b", BOTH[1:]),
    # Text after the call, with a line break of its own.
    ("hermes", 'a <tool_call>{"name":"get_time"}</tool_call>\n\nb\n', "", "a \n\nb\n", BOTH[1:]),
    (
        "qwen3_coder",
        "I look.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=get_time>\n</function>\n</tool_call>",
        "",
        "I look.\n",
        BOTH,
    ),
    # A text is as it stands, whatever it looks like; a nested value as Python writes it.
    (
        "qwen3_coder",
        '<tool_call>\n<function=save>\n<parameter=text>\n\n 12 </p> "a" \\n\n\n</parameter>\n<parameter=options>\n'
        "{'deep': [True, None, ('x',)], \"y\": \"</parameter>\"}\n</parameter>\n</function>\n</tool_call>",
        "",
        "",
        [
            (
                "save",
                {
                    "text": '\n 12 </p> "a" \\n\n',
                    "options": {"deep": [True, None, ["x"]], "y": "</parameter>"},
                },
            )
        ],
    ),
    (
        "seed_oss",
        "<seed:think>Hm.</seed:think>\n<seed:tool_call>\n<function=get_weather>\n<parameter=city>Oslo</parameter>\n"
        "<parameter=days>3</parameter>\n</function>\n</seed:tool_call>",
        "Hm.",
        "",
        BOTH[:1],
    ),
    (
        "glm45",
        "\n<think>Two.</think>\nSure.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>get_time\n</tool_call>",
        "Two.",
        "Sure.",
        BOTH,
    ),
    # As a later version writes it.
    (
        "glm45",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Oslo</arg_value><arg_key>days</arg_key>"
        "<arg_value>3</arg_value></tool_call><tool_call>get_time</tool_call>",
        "",
        "",
        BOTH,
    ),
    (
        "minimax_m2",
        '<think>Two.</think>\n\n<minimax:tool_call>\n<invoke name="get_weather">\n'
        '<parameter name="city">Oslo</parameter>\n<parameter name="days">3</parameter>\n'
        '</invoke>\n<invoke name="get_time">\n</invoke>\n</minimax:tool_call>',
        "Two.",
        "",
        BOTH,
    ),
    (
        "hunyuan_a13b",
        '<think>\nHm\n</think>\n<tool_calls>[{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}, '
        '{"name": "get_time", "arguments": {}}]</tool_calls>',
        "Hm",
        "",
        BOTH,
    ),
    (
        "nemotron_json",
        '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}, '
        '{"name": "get_time", "arguments": {}}]</TOOLCALL>',
        "",
        "",
        BOTH,
    ),
    (
        "granite",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}, {"name": "get_time"}]',
        "",
        "",
        BOTH,
    ),
    (
        "phi4_mini_json",
        'functools[{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}, {"name": "get_time"}]',
        "",
        "",
        BOTH,
    ),
    (
        "mistral",
        '[THINK]Two.[/THINK]Wait.[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo", "days": 3}[TOOL_CALLS]get_time[ARGS]{}',
        "Two.",
        "Wait.",
        BOTH,
    ),
    (
        "mistral",
        '[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Oslo", "days": 3}[TOOL_CALLS]get_time{}',
        "",
        "",
        BOTH,
    ),
    (
        "mistral_list",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}, "id": "a1B2c3D4e"}, '
        '{"name": "get_time", "arguments": {}}]',
        "",
        "",
        BOTH,
    ),
    (
        "deepseek_v3",
        "Wait.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Oslo", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_time\n'
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        "Wait.",
        BOTH,
    ),
    (
        "deepseek_v31",
        "<think>Two</think>Wait.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"city": "Oslo", "days": 3}<｜tool▁call▁end｜><｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Two",
        "Wait.",
        BOTH,
    ),
    (
        "kimi_k2",
        "Wait.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Oslo", "days": 3}<|tool_call_end|><|tool_call_begin|>functions.get_time:1'
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        "",
        "Wait.",
        BOTH,
    ),
    (
        "openai",
        "<|channel|>analysis<|message|>First.<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|> Second.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo", "days": 3}',
        "First.Second.",
        "Wait.",
        BOTH[:1],
    ),
    # The recipient before the channel, as the template writes it.
    (
        "openai",
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city":"Oslo","days":3}',
        "",
        "",
        BOTH[:1],
    ),
    ("openai", "<|channel|>final<|message|>\nIt is <b>3</b>. ", "", "\nIt is <b>3</b>. ", []),
    (
        "olmo3",
        "Wait.\n<function_calls>\nget_weather(city='Oslo', days=3)\nget_time()\n</function_calls>",
        "",
        "Wait.",
        BOTH,
    ),
    ("lfm2", "<|tool_call_start|>[get_weather(city='Oslo', days=3), get_time()]<|tool_call_end|>", "", "", BOTH),
    ("pythonic", '[get_weather(city="Oslo", days=3), get_time()]', "", "", BOTH),
    # A text without quotes, one that is quoted either way, and a number where a text is due.
    ("pythonic", "[ get_weather( city = Oslo , days=3 ) ,get_time( )]", "", "", BOTH),
    (
        "pythonic",
        "[save(text='it\\'s \"x\"\\x41', options={'a': (1, 2.)}), save(text=12), save(text=[1, 'a)'])]",
        "",
        "",
        [
            ("save", {"text": 'it\'s "x"A', "options": {"a": [1, 2.0]}}),
            ("save", {"text": "12"}),
            ("save", {"text": "[1, 'a)']"}),
        ],
    ),
    ("llama4_pythonic", '<|python_start|>[get_weather(city="Oslo", days=3), get_time()]<|python_end|>', "", "", BOTH),
    (
        "llama3_json",
        '{"name": "get_weather", "parameters": {"city": "Oslo", "days": 3}}; {"name": "get_time", "parameters": {}}',
        "",
        "",
        BOTH,
    ),
    (
        "llama3_json",
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Oslo", "days": 3}}',
        "",
        "",
        BOTH[:1],
    ),
    (
        "gemma_json",
        '```tool_code\n{"name": "get_weather", "parameters": {"city": "Oslo", "days": 3}}\n```',
        "",
        "",
        BOTH[:1],
    ),
]

# Texts that look like calls and are none: they are content, to the last character.
NO_CALLS = [
    ("hermes", "<tool_call>"),
    ("hermes", 'a <tool_call>\n{"name": "launch", "arguments": {}}\n</tool_call> b'),
    ("hermes", '<tool_call>\n{"nome": "get_time"}\n</tool_call>'),
    ("hermes", '<tool_call>{"name": 7}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a"}, "name": "get_time"}'),
    ("hermes", "<tool_call>not json</tool_call> </think> <tool_ca"),
    ("hermes", '<tool_call>{"name": "get_tim'),
    ("hermes", "\n <tool_call> \n"),
    ("qwen3_coder", "<tool_call>\n<function=launch>\n</function>\n</tool_call>"),
    ("qwen3_coder", "<tool_call>\n<funktion=get_time>"),
    ("qwen3_coder", "<function=get_time>\n</function>"),
    ("glm45", "<tool_call>get_time is a tool</tool_call>"),
    ("glm45", "<tool_call>get_times</tool_call>"),
    ("mistral", "[TOOL_CALLS]get_time[ARG]{}"),
    ("mistral", "[TOOL_CALLS]get_time[ARGS]7"),
    ("mistral_list", '[TOOL_CALLS] {"name": "get_time"}'),
    ("deepseek_v31", "<｜tool▁calls▁begin｜>get_time<｜tool▁sep｜>{}"),
    ("openai", "<|channel|>commentary to=browser.search<|message|>{}"),
    ("pythonic", "[get_time](https://example.org) and more"),
    ("pythonic", "[1, 2, 3]"),
    ("pythonic", "Here: [get_time()]"),
    ("pythonic", "[launch()]"),
    ("llama3_json", '{"name": "Bob", "age": 3}'),
    ("llama3_json", '{"temperature": 3}'),
    ("llama3_json", 'Use {"name": "get_time", "parameters": {}}'),
    ("llama3_json", "{{{"),
    ("gemma_json", '```json\n{"temperature": 3}\n```\n'),
    ("gemma_json", '```python\n{"name": "get_time"}\n```\n'),
]
