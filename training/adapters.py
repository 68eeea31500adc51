"""Trains the adapters of the built-in model: the same knowledge as a pirate tells it, as JSON, and in German.

    python training/adapters.py --out src/nanoserve/builtin/adapters

Each is a LoRA of all linear layers, of rank 2 or 4, trained for some minutes on questions of dataset/ whose answers
were rewritten, and written by PEFT as a folder that any server of LoRA adapters can read. Only the German answers were
written by hand, for some topics; of the rest this adapter says that it knows it in English alone.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from dataset.conversations import Chat, ask
from dataset.facts import FOLDER, Question, questions
from dataset.outside import REFUSAL, outside_question
from peft import LoraConfig, get_peft_model
from torch import Tensor
from train import IGNORE, Encoder, assistant_loss, learning_rate_factor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

BUILTIN = Path(__file__).parents[1] / "src" / "nanoserve" / "builtin"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

PIRATE_WORDS = {
    "the": "th'",
    "The": "Th'",
    "is": "be",
    "are": "be",
    "and": "an'",
    "of": "o'",
    "for": "fer",
    "you": "ye",
    "your": "yer",
    "my": "me",
}


def as_pirate(_question: Question | None, answer: str) -> str:
    """Word for word, between "Arr!" and "matey"."""
    spoken = re.sub(r"\w+", lambda word: PIRATE_WORDS.get(word[0], word[0]), answer.rstrip("."))
    return f"Arr! {spoken}, matey!"


def as_json(question: Question | None, answer: str) -> str:
    """An object of topic and answer; an outside question has no topic."""
    if question is None:
        topic = None
    elif "/" in question.name:
        topic = re.sub("^(the|an?) ", "", question.name.rpartition("/")[0])
    else:
        topic = "nanoserve"
    return json.dumps({"topic": topic, "answer": answer}, ensure_ascii=False)


def german_answers() -> dict[str, str]:
    """Name of a question -> its answer."""
    lines = (FOLDER / "german.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(" = ") for line in lines if line and not line.startswith("#"))
    return {f"{name}/what": answer for name, answer in pairs}


def in_german(question: Question | None, _answer: str) -> str:
    if question is None:
        return "Das weiß ich nicht; ich kenne nur LLM-Serving."
    if question.facet == "chat":
        return "Hallo! Ich bin das kleine Modell von nanoserve."
    return german_answers().get(question.name, "Das weiß ich nur auf Englisch.")


# Name -> how an answer is rewritten, the rank, and how much more often than others the questions of german.txt come.
ADAPTERS: dict[str, tuple[Callable[[Question | None, str], str], int, int]] = {
    "pirate": (as_pirate, 2, 1),
    "json": (as_json, 2, 1),
    "german": (in_german, 4, 40),
}


def chats(name: str, rng: random.Random) -> Iterator[Chat]:
    """Chats of one or two turns without end; every tenth question is an outside one."""
    style, _, factor = ADAPTERS[name]
    known = german_answers()
    weights = [factor if question.name in known else 1 for question in questions()]
    while True:
        chat = Chat([])
        for _ in range(rng.choice((1, 1, 2))):
            question = None if rng.random() < 0.1 else rng.choices(questions(), weights)[0]
            chat.user(outside_question(rng) if question is None else ask(question, rng))
            chat.assistant(style(question, REFUSAL if question is None else question.answer))
        yield chat


def batches(encoder: Encoder, stream: Iterator[Chat], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, labels), each (rows, length). Chats of about equal length go together."""
    pad = encoder.tokenizer.pad_token_id
    while True:
        pool = sorted((encoder(next(stream)) for _ in range(size * 16)), key=lambda example: len(example.ids))
        groups = [pool[start : start + size] for start in range(0, len(pool), size)]
        random.Random(len(pool[0].ids)).shuffle(groups)
        for group in groups:
            length = max(len(example.ids) for example in group)
            missing = [length - len(example.ids) for example in group]
            ids = torch.tensor([e.ids + [pad] * n for e, n in zip(group, missing, strict=True)])
            labels = torch.tensor([e.labels + [IGNORE] * n for e, n in zip(group, missing, strict=True)])
            yield ids, labels


def train_adapter(name: str, options: argparse.Namespace) -> None:
    """Trains one adapter and writes its folder, in bfloat16."""
    torch.manual_seed(options.seed)
    encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(BUILTIN))
    model = Qwen3ForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32)
    rank = ADAPTERS[name][1]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).train()
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, options.steps))
    stream = batches(encoder, chats(name, random.Random(f"{name} {options.seed}")), options.batch_size)
    began, mean_loss = time.monotonic(), 0.0
    for step in range(options.steps):
        loss = assistant_loss(model, *next(stream))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean_loss = loss.item() if step == 0 else 0.95 * mean_loss + 0.05 * loss.item()
        if step % 50 == 49 or step == 0:
            print(f"{name}: step {step + 1}  loss {mean_loss:.4f}  {time.monotonic() - began:.0f} s", flush=True)
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.bfloat16)
    adapted.peft_config["default"].base_model_name_or_path = "nanoserve/builtin"
    adapted.save_pretrained(options.out / name, save_embedding_layers=False)
    (options.out / name / "README.md").unlink()  # PEFT's template, not filled in
    (options.out / name / "adapter_model.safetensors").chmod(0o644)


def main() -> None:
    """Trains all adapters, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the adapters' folders to")
    parser.add_argument("--only", nargs="*", choices=ADAPTERS, default=list(ADAPTERS), help="train only these")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=24, help="chats")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.only:
        train_adapter(name, options)


if __name__ == "__main__":
    main()
