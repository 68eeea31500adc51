"""Times answers of a real chat model with guesses of the next tokens and without, one caller, the same prompts.

    python benchmarks/speculation.py FOLDER [--tokens N] [--rounds N] [--workloads NAME ...] [--gguf FILE] [--serve ...]

FOLDER: benchmarks/checkpoints/smollm2-135m, of `make benchmarks/checkpoints/smollm2-135m`. One server serves both in
turn: with max_draft_tokens 0, and with as many as it likes. Each answer has a cache salt of its own, so that nothing is
guessed from an answer to the same question. Output tokens/s from the first token on; medians, and their ratio.

    repeat       a text of 280 tokens, to be repeated with one word changed
    prediction   the same, and the caller says what is expected
    summary      the text in five sentences
    chat         a question
    wrong        the same, and the caller expects something else from the first token on
    known        the question as it is, not as a chat, and the caller expects just what comes: what guesses can give at
                 most, and the one workload that says something of random weights

Peers of `make bench-peers` that are installed do repeat, summary and chat, with their own lookup and without: vllm on
FOLDER, llama.cpp on FILE. --serve: options for our server, such as --serve --draft-model FOLDER.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanoserve_client import Client
from offline import PYTHONS, Engine
from served import serving

TEXT = (
    "The lighthouse stood at the edge of the cliff for more than a hundred years. Every evening the keeper climbed the"
    " spiral stairs, lit the great lamp, and watched the ships pass in the dark. He wrote the name of each ship in a"
    " brown leather book, together with the hour and the weather. In spring the fishermen brought him bread and salted"
    " cod, and in return he told them where the shoals of herring had been seen. When the railway came to the village,"
    " fewer ships passed by, and the company sent a letter that said the lamp would soon be lit by electricity. The"
    " keeper read the letter twice, put it between the pages of his book, and went up the stairs as he had done every"
    " evening before. On the last night of the year a storm broke over the coast. The waves reached the windows of the"
    " lower rooms, and the wind tore the slates from the roof of the chapel. The keeper stayed beside the lamp until"
    " morning, and when the sun rose he counted nine ships in the bay, all safe at anchor. The captains sent him"
    " a silver watch, on which their names were written, and he kept it in the drawer with the leather book."
    " Years later a young {} came to the village to write about the coast, found the book in the museum, read it from"
    " the first page to the last, and copied the names of the ships by hand."
)
# One for each round.
PEOPLE = ("woman", "teacher", "sailor", "painter", "doctor")
QUESTIONS = (
    "Explain to a beginner how a sailing boat can move against the wind.",
    "Why do leaves change their color in autumn? Answer for a child.",
    "Give advice to somebody who wants to learn to play the piano at forty.",
    "What should one know before visiting Japan for the first time?",
    "Describe how bread is made, from the field to the table.",
)


# Those that peers do: a prediction is only ours.
OF_PEERS = ("repeat", "summary", "chat")


def prompts(round_number: int) -> dict[str, tuple[str, str]]:
    """What -> the prompt and the prediction."""
    person = PEOPLE[round_number]
    text = TEXT.format(person)
    repeat = f"Repeat the following text exactly, word for word, but write '{person}' in place of 'keeper'.\n\n{text}"
    return {
        "repeat": (repeat, ""),
        "prediction": (repeat, text.replace("keeper", person)),
        "summary": (f"Summarize the following text in five sentences.\n\n{text}", ""),
        "chat": (QUESTIONS[round_number], ""),
        "wrong": (QUESTIONS[round_number], text),
        "known": (QUESTIONS[round_number], ""),
    }


def tokens_per_s(client: Client, prompt: str, *, is_chat: bool, **options: Any) -> float:
    """From the first token to the last."""
    first_s, num_first, num = 0.0, 0, 0
    ask = client.chat if is_chat else client.generate
    for delta in ask(prompt, temperature=0, ignore_eos=True, **options):
        num += len(delta.token_ids)
        if not first_s:
            first_s, num_first = time.perf_counter(), num
    return (num - num_first) / (time.perf_counter() - first_s)


def measure(arguments: argparse.Namespace) -> dict[str, tuple[list[float], list[float]]]:
    """What -> output tokens/s of each round, without guesses and with."""
    options = ("--http-port", "0", "--max-context-tokens", "2048", "--kv-memory", "1GiB", *arguments.serve)
    speeds: dict[str, tuple[list[float], list[float]]] = {}
    with serving((str(arguments.folder), *options)) as (_, address), Client(address) as client:
        # Until all is compiled, and steps were measured.
        for what in arguments.workloads:
            prompt, prediction = prompts(len(PEOPLE) - 1)[what]
            tokens_per_s(client, prompt, is_chat=what != "known", max_tokens=arguments.tokens, prediction=prediction)
        for number in range(arguments.rounds):
            for what in arguments.workloads:
                prompt, prediction = prompts(number)[what]
                if what == "known":
                    answer = client.generate(prompt, temperature=0, ignore_eos=True, max_tokens=arguments.tokens)
                    prediction = list(answer.result().completions[0].token_ids)
                for place, most in enumerate((0, None)):
                    speed = tokens_per_s(
                        client,
                        prompt,
                        is_chat=what != "known",
                        max_tokens=arguments.tokens,
                        max_draft_tokens=most,
                        prediction=prediction,
                        cache_salt=f"{number} {what} {most}",
                    )
                    speeds.setdefault(what, ([], []))[place].append(speed)
    return speeds


def of_peers(arguments: argparse.Namespace) -> list[str]:
    return [what for what in arguments.workloads if what in OF_PEERS]


def measure_peer(name: str, model: Path, arguments: argparse.Namespace) -> dict[str, tuple[list[float], list[float]]]:
    """The same of a peer, in a process each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    wanted = of_peers(arguments)
    asked = [(what, prompts(number)[what][0]) for number in range(arguments.rounds) for what in wanted]
    token_ids = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        for _, prompt in asked
    ]
    engine = Engine.parse(name)
    speeds: dict[str, tuple[list[float], list[float]]] = {what: ([], []) for what in wanted}
    for place, guesses in enumerate(("off", "on")):
        script = Path(__file__).with_name("speculation_peers.py")
        command = [str(PYTHONS[name]), str(script), name, str(model), str(arguments.tokens), guesses]
        run = subprocess.run(
            command,
            input=json.dumps(token_ids),
            stdout=subprocess.PIPE,
            text=True,
            env=engine.environment(),
            check=True,
        )
        for (what, _), speed in zip(asked, json.loads(run.stdout.splitlines()[-1]), strict=True):
            speeds[what][place].append(speed)
    return speeds


def show(who: str, speeds: dict[str, tuple[list[float], list[float]]]) -> None:
    print(f"{who:12}{'without':>9}{'with':>9}{'ratio':>7}   of each round")
    for what, (without, guessing) in speeds.items():
        before, after = statistics.median(without), statistics.median(guessing)
        ratios = ", ".join(f"{b / a:.2f}" for a, b in zip(without, guessing, strict=True))
        print(f"{what:12}{before:9.1f}{after:9.1f}{after / before:7.2f}   {ratios}", flush=True)


def main() -> None:
    workloads: Sequence[str] = list(prompts(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=200, help="SmolLM2 ends its repetition after 212")
    parser.add_argument("--rounds", type=int, default=3, choices=range(1, len(PEOPLE)))
    parser.add_argument("--workloads", nargs="+", default=workloads, choices=workloads)
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options for our server")
    arguments = parser.parse_args()
    show("nanoserve", measure(arguments))
    for name, model in (("vllm", arguments.folder), ("llama.cpp", arguments.gguf)):
        if model is not None and PYTHONS[name].exists() and of_peers(arguments):
            show(name, measure_peer(name, model, arguments))


if __name__ == "__main__":
    main()
