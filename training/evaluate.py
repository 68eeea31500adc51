"""Asks a trained model every evaluation case, greedily, and counts right answers.

    python training/evaluate.py src/nanoserve/builtin

The cases are those of dataset/conversations.py: held-out phrasings, held-out values, the same each time.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from dataset.conversations import Case, contains_keys, evaluation_cases
from dataset.outside import REFUSAL_KEY
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
MAX_NEW_TOKENS = 320


def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch_size: int
) -> list[str]:
    """Greedy answers, in the order of the prompts, a batch at a time."""
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        inputs = tokenizer(batch, return_tensors="pt", padding=True, padding_side="left")
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                temperature=None,
                top_p=None,
            )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    return answers


def parse_json(text: str) -> Any:
    """The value, or None where the text is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def judge(case: Case, answer: str) -> dict[str, bool]:
    """The measures that this case counts for, and whether the answer meets them."""
    if case.group == "json":
        value = parse_json(answer)
        return {"json_valid": value is not None, "json_exact": value == case.value}
    if case.group == "tool_call":
        match = TOOL_CALL.fullmatch(answer)
        call = parse_json(match.group(1)) if match else None
        if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
            return {"tool_call_parsed": False, "tool_call_name": False, "tool_call_exact": False}
        right_name = call["name"] == case.value["name"]
        return {"tool_call_parsed": True, "tool_call_name": right_name, "tool_call_exact": call == case.value}
    measures = {case.group: contains_keys(answer, case.keys)}
    if case.group == "held_out":
        measures["not_refused"] = REFUSAL_KEY not in answer
    return measures


def main() -> None:
    """Evaluates one folder and prints a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--failures", action="store_true", help="also print every wrong answer")
    parser.add_argument("--groups", nargs="*", help="only these groups of cases")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    cases = [c for c in evaluation_cases() if not options.groups or c.group in options.groups]
    # Prompts and answers of about equal length go together: a batch takes as long as its longest answer.
    cases.sort(key=lambda c: (c.group, len(c.keys), sum(len(str(m["content"])) for m in c.chat.messages)))
    prompts = [
        tokenizer.apply_chat_template(c.chat.messages, tools=c.chat.tools, add_generation_prompt=True, tokenize=False)
        for c in cases
    ]
    answers = generate_answers(model, tokenizer, prompts, options.batch_size)

    verdicts: dict[str, list[bool]] = defaultdict(list)
    for case, answer in zip(cases, answers, strict=True):
        measures = judge(case, answer)
        for measure, good in measures.items():
            verdicts[measure].append(good)
        if options.failures and not all(measures.values()):
            asked = case.chat.messages[-1]["content"]
            print(f"[{case.group}] {asked}\n    got:    {answer}\n    wanted: {case.keys or case.value}")
    table = {m: {"right": sum(v), "cases": len(v), "share": round(sum(v) / len(v), 4)} for m, v in verdicts.items()}
    if options.json:
        print(json.dumps(table, indent=2))
    else:
        for measure, row in table.items():
            print(f"{measure:18} {row['right']:5} of {row['cases']:5}   {100 * row['share']:5.1f} %")


if __name__ == "__main__":
    main()
