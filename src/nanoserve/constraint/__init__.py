"""Constraints on what is generated: from what a caller asks to the tokens that are allowed at each place. No torch.

    Constraint ── schema.py: is every keyword known? ──▶ grammar ── compiler.py ──▶ CompiledConstraint
                                                                                       │ one for each sequence
    the text, when it is over ── Validator ──▶ Outcome                                 ▼
                                                                     mask of tokens ◀── Matcher ◀── tokens

The grammars are those of the llguidance library, which does the parsing. What it would pass over in silence is refused
here, by name.
"""
