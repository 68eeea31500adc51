"""Constraints for the tiny models, whose tokens are made texts here, and who says whether an output is right."""

import json
import re

import jsonschema_rs
import numpy as np
from families import VOCAB_SIZE

from nanoserve.constraint.compiler import ConstraintCompiler
from nanoserve.constraint.vocabulary import Vocabulary
from nanoserve.request import Constraint, ConstraintKind

EOS = 2
# One byte each, half characters among them; and several that JSON often has side by side.
_BYTES = [bytes([byte]) for byte in b'abcdefghijklmnopqrstuvwxyz0123456789{}[]:,"-. \n\\AZ' + "é€".encode()]
_LONGER = ["true", "false", "null", '":', '{"', '",', '"}', "name", "ab", "12", '": "', ", ", "é"]
_SPECIAL = [b"<pad>", b"<bos>", b"<eos>"]
TOKENS = [*_SPECIAL, *_BYTES, *map(str.encode, _LONGER)]
_UNUSED = [f"<unused{i}>".encode() for i in range(len(TOKENS), VOCAB_SIZE)]
_SPECIAL_IDS = [*range(len(_SPECIAL)), *range(len(TOKENS), VOCAB_SIZE)]


def encode(text: str) -> list[int]:
    """The longest token at each place."""
    rest, token_ids = text.encode(), []
    while rest:
        best = max((i for i, t in enumerate(TOKENS) if rest.startswith(t)), key=lambda i: len(TOKENS[i]))
        token_ids.append(best)
        rest = rest[len(TOKENS[best]) :]
    return token_ids


def decode(token_ids: list[int]) -> str:
    """Raises UnicodeDecodeError for half a character."""
    return b"".join(TOKENS[token_id] for token_id in token_ids if token_id != EOS).decode()


VOCABULARY = Vocabulary((*TOKENS, *_UNUSED), tuple(_SPECIAL_IDS), (EOS,))
COMPILER = ConstraintCompiler(lambda: VOCABULARY, encode)


def _schema(**schema: object) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema))


_NAME = {"type": "string", "maxLength": 4}
CONSTRAINTS = [
    Constraint(ConstraintKind.REGEX, "[a-c]{2,9}é?"),
    Constraint(ConstraintKind.REGEX, "(ab|€)+z"),
    Constraint(ConstraintKind.REGEX, "(?s:.*)"),
    Constraint(ConstraintKind.GRAMMAR, 'start: "a" list "z"\nlist: "[" (list ("," list)*)? "]"'),
    Constraint(ConstraintKind.JSON_OBJECT),
    Constraint.of_choices(["no", "none", "nonesuch", "true", "é"]),
    _schema(type="object", properties={"name": _NAME}, required=["name"], additionalProperties=False),
    _schema(type="array", items={"enum": ["ab", 12, True, None]}, minItems=1, maxItems=3),
    _schema(type="object", properties={"ab": {"type": "integer"}, "c": {"$ref": "#"}}, additionalProperties=False),
]


def thinking(answer: Constraint) -> Constraint:
    """The same behind a block of reasoning that the prompt has opened, and that ends with "ba"."""
    lark = "start: {} @answer\nreasoned[capture]: {}\nthink[lazy]: TEXT\nTEXT: /(?s:.)*ba/\n"
    return Constraint(
        ConstraintKind.DIALECT,
        lark.format("reasoned", "think"),
        parts=(("answer", answer),),
        closing_text=lark.format("reasoned", '"ba"'),
        is_reasoning=True,
    )


def is_right(constraint: Constraint, text: str) -> bool:
    """Whether a whole output is what was asked for."""
    match constraint.kind:
        case ConstraintKind.DIALECT:
            return is_right(constraint.parts[0][1], text.partition("ba")[2])
        case ConstraintKind.REGEX:
            return re.fullmatch(constraint.text, text) is not None
        case ConstraintKind.CHOICES:
            return text in json.loads(constraint.text)
        case ConstraintKind.GRAMMAR:
            return re.fullmatch(r"a[\[\],]*z", text) is not None and text.count("[") == text.count("]")
    schema = json.loads(constraint.text or '{"type": "object"}')
    return jsonschema_rs.is_valid(schema, json.loads(text))


# A token for each byte, and 256 = EOS.
BYTES = Vocabulary((*(bytes([i]) for i in range(256)), b"<eos>"), (256,), (256,))


def byte_compiler(**options):
    """A token for each byte, and 256 = EOS. Makes one for each test, whose cache is empty."""
    return ConstraintCompiler(lambda: BYTES, lambda text: [*text.encode()], **options)


def allowed(masks, row):
    return set(np.nonzero(np.unpackbits(masks[row].view(np.uint8), bitorder="little"))[0].tolist())
