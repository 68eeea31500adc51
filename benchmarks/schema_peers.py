"""Asks nanoserve and llama.cpp for outputs under the same schemas, of the same model, and counts those that are valid.

    nanoserve serve FOLDER &
    python benchmarks/schema_peers.py GGUF [--server ADDRESS] [--schemas N] [--samples N] [--tokens N] [--examples N]

GGUF: FOLDER's model for llama.cpp, which `make bench-peers` installs; its chats are ChatML. The schemas are spread over
tests/constraint/schemas.jsonl. Outputs are drawn at temperature 1; one that is cut off counts as neither valid nor
invalid. No times are taken: each schema is another process of llama.cpp, since some schemas are the end of one.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import schemas
from nanoserve_client import Client, InvalidRequest

PEER = Path(__file__).resolve().parent / "venvs/llama.cpp/bin/python"
# Of one schema, to the end of llama.cpp's process.
PEER_TIMEOUT_S = 120
QUESTION = "Answer with JSON of any content."
# What the other process does. It has nothing of ours.
PEER_PROGRAM = """
import json, sys
from llama_cpp import Llama, LlamaGrammar
asked = json.load(sys.stdin)
grammar = LlamaGrammar.from_json_schema(json.dumps(asked["schema"]), verbose=False)
llm = Llama(asked["model"], n_ctx=2048, verbose=False)
outputs = []
for seed in range(asked["samples"]):
    llm.reset()
    answer = llm.create_completion(
        asked["prompt"], grammar=grammar, max_tokens=asked["tokens"], seed=seed,
        temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0,
    )["choices"][0]
    outputs.append([answer["text"], answer["finish_reason"] == "stop"])
print("OUTPUTS", json.dumps(outputs))
"""

# Of a schema: texts, each with whether it came to its end. Raises Refused.
Ask = Callable[[dict[str, Any]], list[tuple[str, bool]]]


class Refused(Exception):
    """A schema that is not taken, and why."""


def nanoserve(arguments: argparse.Namespace) -> Ask:
    client = Client(arguments.server)

    def ask(schema: dict[str, Any]) -> list[tuple[str, bool]]:
        outputs = []
        for seed in range(arguments.samples):
            try:
                options: Any = {"temperature": 1, "max_tokens": arguments.tokens, "seed": seed}
                answer = client.chat(QUESTION, schema=schema, **options).result()
            except InvalidRequest as error:
                raise Refused(str(error)) from None
            outputs.append((answer.content, str(answer.completions[0].constraint_outcome) == "satisfied"))
        return outputs

    return ask


def llama_cpp(arguments: argparse.Namespace) -> Ask:
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    fixed = {"model": str(arguments.gguf), "prompt": prompt, "samples": arguments.samples, "tokens": arguments.tokens}

    def ask(schema: dict[str, Any]) -> list[tuple[str, bool]]:
        asked = json.dumps({"schema": schema, **fixed})
        command = [str(PEER), "-c", PEER_PROGRAM]
        try:
            done = subprocess.run(
                command, input=asked, capture_output=True, text=True, timeout=PEER_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise Refused("takes too long") from None
        if done.returncode != 0:
            raise Refused((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
        outputs = json.loads(done.stdout.partition("OUTPUTS ")[2])
        return [(text, is_whole) for text, is_whole in outputs]

    return ask


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        return jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(json.loads(text))
    except ValueError:
        return False


def measure(name: str, ask: Ask, cases: list[dict[str, Any]], num_examples: int) -> str:
    """A row of the table. Tells of refusals and of invalid outputs on the way."""
    counts: Counter[str] = Counter()
    examples = []
    for case in cases:
        try:
            outputs = ask(case["schema"])
        except Refused as refusal:
            counts["refused"] += 1
            examples.append(f"  refused: {case['name']}: {str(refusal)[:120]}")
            continue
        counts["accepted"] += 1
        for text, is_whole in outputs:
            kind = "cut off" if not is_whole else "valid" if is_valid(text, case["schema"]) else "invalid"
            counts[kind] += 1
            if kind == "invalid":
                examples.append(f"  invalid: {case['name']}: {text[:120]!r}")
    print("\n".join([name, *examples[:num_examples]]), flush=True)
    return f"{name:<12}" + "".join(f"{counts[column]:>10}" for column in COLUMNS)


COLUMNS = ("accepted", "refused", "valid", "invalid", "cut off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--server", default="127.0.0.1:50051")
    parser.add_argument("--schemas", type=int, default=60)
    parser.add_argument("--samples", type=int, default=2, help="outputs of each schema")
    parser.add_argument("--tokens", type=int, default=128, help="at most, of an output")
    parser.add_argument("--examples", type=int, default=20, help="refusals and invalid outputs that are shown of each")
    arguments = parser.parse_args()
    if not PEER.exists():
        sys.exit("llama.cpp is not installed: make bench-peers")
    cases = list(schemas.read_cases(schemas.SHIPPED))
    cases = cases[:: max(1, len(cases) // arguments.schemas)][: arguments.schemas]
    engines = {"nanoserve": nanoserve, "llama.cpp": llama_cpp}
    rows = [measure(name, make(arguments), cases, arguments.examples) for name, make in engines.items()]
    print(f"\n{len(cases)} schemas" + "".join(f"{column:>10}" for column in COLUMNS), *rows, sep="\n")


if __name__ == "__main__":
    main()
