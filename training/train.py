"""Trains the built-in chat model from nothing: tokenizer, weights, chat template, generation config.

    python training/train.py --out src/nanoserve/builtin
    python training/train.py --out NEW --start src/nanoserve/builtin --steps 700 --learning-rate 5e-4    # some more

One seeded script. It draws chats from dataset/, trains a byte-level BPE tokenizer on a sample of them, then a small
Qwen3 with tied embeddings on the tokens of the assistant alone. Most batches hold short chats of about equal
length, each from position 0; every twentieth is a window of 2048 tokens packed with chats, for long contexts.
A smaller draft model comes from the same script with other sizes and --tokenizer.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from dataset.conversations import Chat, training_chats
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CONTEXT = 2048
MAX_WEIGHT_BYTES = 12_000_000
IGNORE = -100  # the label that cross_entropy skips

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKUP = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# Words with their leading space, single digits, runs of punctuation with a leading space, and white space.
PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(seed: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on a sample of the chats. The markup of tool calls is single tokens, but not hidden from text."""
    chats = training_chats(random.Random(f"tokenizer {seed}"))
    sample = []
    for _ in range(20_000):
        chat = next(chats)
        sample += [json.dumps(tool) for tool in chat.tools or ()]
        for message in chat.messages:
            sample += [message["role"], message["content"] or json.dumps(message["tool_calls"][0]["function"])]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [PAD, START, END]
    bpe.train_from_iterator(
        sample,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(MARKUP),
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_tokens([AddedToken(text, normalized=False, special=False) for text in MARKUP])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START, END],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer


@dataclass
class Example:
    """One chat as tokens."""

    ids: list[int]
    """The whole chat."""

    labels: list[int]
    """The same ids where the assistant speaks, IGNORE elsewhere; not yet shifted."""


class Encoder:
    """Chat → Example. Owns the tokenizer and the ids that mark where the assistant speaks."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.header: list[int] = tokenizer.encode(f"{START}assistant\n")
        self.end: int = tokenizer.convert_tokens_to_ids(END)

    def __call__(self, chat: Chat) -> Example:
        text = self.tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False)
        ids: list[int] = self.tokenizer.encode(text)
        labels = [IGNORE] * len(ids)
        i = 0
        while i < len(ids):
            i += 1
            if ids[i - len(self.header) : i] == self.header:
                stop = ids.index(self.end, i) + 1
                labels[i:stop] = ids[i:stop]
                i = stop
        return Example(ids, labels)


def batches(encoder: Encoder, rng: random.Random, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, labels), each (rows, length). A pool of chats is sorted by length and cut into full batches."""
    chats = training_chats(rng)
    pad = encoder.tokenizer.pad_token_id
    while True:
        pool = sorted((encoder(next(chats)) for _ in range(1500)), key=lambda e: len(e.ids) + rng.random())
        groups: list[list[Example]] = [[]]
        for example in pool:
            if groups[-1] and len(example.ids) * (len(groups[-1]) + 1) > batch_tokens:
                groups.append([])
            groups[-1].append(example)
        groups += [[_packed(encoder, chats)] for _ in range(len(groups) // 19)]
        rng.shuffle(groups)
        for group in groups:
            length = max(len(e.ids) for e in group)
            ids = torch.tensor([e.ids + [pad] * (length - len(e.ids)) for e in group])
            labels = torch.tensor([e.labels + [IGNORE] * (length - len(e.ids)) for e in group])
            yield ids, labels


def _packed(encoder: Encoder, chats: Iterator[Chat]) -> Example:
    """One full window: chats after each other. Later chats see the earlier ones, as a long history would be seen."""
    window = Example([], [])
    while len(window.ids) < CONTEXT:
        example = encoder(next(chats))
        window.ids += [*example.ids, encoder.tokenizer.pad_token_id]
        window.labels += [*example.labels, IGNORE]
    return Example(window.ids[:CONTEXT], window.labels[:CONTEXT])


def make_model(options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters / 1e6:.2f} M parameters, {2 * num_parameters / 1e6:.2f} MB in bf16", flush=True)
    assert 2 * num_parameters < MAX_WEIGHT_BYTES, "the model must stay small enough for the package"
    return model


def assistant_loss(model: Qwen3ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the tokens of the assistant; logits are computed for those alone.

    In bfloat16 where this CPU computes in it, which is faster; elsewhere it would be many times slower than float32.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # (rows, length - 1, hidden)
        wanted = labels[:, 1:] != IGNORE
        logits = model.lm_head(hidden[wanted])  # (wanted tokens, vocab)
    return F.cross_entropy(logits.float(), labels[:, 1:][wanted])


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warmup over 100 steps, then cosine to 3 percent."""
    if step < 100:
        return (step + 1) / 100
    return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * (step - 100) / max(1, steps - 100)))


def optimizers(model: Qwen3ForCausalLM, learning_rate: float, *, is_trained: bool) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding and norms; for a trained model AdamW for all.

    Muon computes in bfloat16 wherever it runs, and so is very slow on a CPU without arithmetic for it.
    """
    if is_trained:
        return [torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)]
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=10 * learning_rate, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(options: argparse.Namespace, model: Qwen3ForCausalLM, encoder: Encoder) -> None:
    """The loop. With --checkpoint it saves every five minutes, and goes on from there when started again."""
    optims = optimizers(model, options.learning_rate, is_trained=options.start is not None)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: learning_rate_factor(step, options.steps)) for o in optims
    ]
    parts = [model, *optims, *schedules]
    start = 0
    if options.checkpoint and options.checkpoint.exists():
        saved = torch.load(options.checkpoint, weights_only=True)
        start = saved["step"]
        for part, state in zip(parts, saved["parts"], strict=True):
            part.load_state_dict(state)
    stream = batches(encoder, random.Random(f"batches {options.seed} {start}"), options.batch_tokens)
    began = last_save = time.monotonic()
    mean_loss, num_tokens = 0.0, 0
    model.train()
    for step in range(start, options.steps):
        ids, labels = next(stream)
        loss = assistant_loss(model, ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optims, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        mean_loss = loss.item() if step == start else 0.95 * mean_loss + 0.05 * loss.item()
        num_tokens += ids.numel()
        now = time.monotonic()
        if step % 50 == 49 or step == start:
            speed = num_tokens / (now - began)
            print(f"step {step + 1}  loss {mean_loss:.4f}  {now - began:.0f} s  {speed:.0f} tokens/s", flush=True)
        if options.checkpoint and (now - last_save > 300 or step == options.steps - 1):
            torch.save({"step": step + 1, "parts": [p.state_dict() for p in parts]}, options.checkpoint)
            last_save = now


def save(out: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes the folder in the format of the Hugging Face Hub, weights in bf16."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.3,
        top_p=0.9,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [START, END],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    weights = out / "model.safetensors"
    weights.chmod(0o644)
    num_bytes = weights.stat().st_size
    assert num_bytes < MAX_WEIGHT_BYTES, num_bytes
    print(f"saved {out}, {num_bytes / 1e6:.2f} MB of weights")


def parse_options() -> argparse.Namespace:
    """The defaults are those of the built-in model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--start", type=Path, help="go on from the weights and tokenizer of this folder")
    parser.add_argument("--tokenizer", type=Path, help="take the tokenizer of this folder, as a draft model must")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=2560)
    parser.add_argument("--steps", type=int, default=2700)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens of a batch, padding included")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of AdamW; Muon uses ten times as much")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, help="file to save to and to continue from")
    return parser.parse_args()


def main() -> None:
    """Tokenizer, model, training, saving."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if options.start or options.tokenizer:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.start or options.tokenizer)
    else:
        tokenizer = train_tokenizer(options.seed, options.vocab)
    if options.start:
        model = Qwen3ForCausalLM.from_pretrained(options.start, dtype=torch.float32)
    else:
        model = make_model(options, tokenizer)
    train(options, model, Encoder(tokenizer))
    save(options.out, model, tokenizer)


if __name__ == "__main__":
    main()
