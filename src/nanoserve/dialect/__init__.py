"""How a family of models writes its reasoning and its calls of tools. No torch, no tokenizer, no grammar library.

    template or name ── formats.py: the table ──▶ Dialect ──┬── grammar.py ──▶ Skeleton: what the model may write
                                                            │
                             tools.py: Tool, ToolChoice ────┤
                                                            │
    text, in any cut ───────────────────────────────────────┴── parser.py ──▶ reasoning, content, calls as JSON

Both sides are made from one description, so that whatever the grammar lets through, the parser reads as what it was
meant to be. A family whose calls are built like those of another is one more row of the table.
"""
