"""The demo's task: the running sum modulo 10 of eight digits, with everything R1 needs in miniature.

A base model is trained on text of mixed quality, as the web is: answers that guess, reasoning with
slips, a few solutions that re-check themselves after `wait`, broken answer tags, and two artificial
languages (`is`/`so` and `shi`/`suoyi`) mixed at random. Nothing here is used as a reward but the sum.

    question    sum 3 5 8 1 0 2 7 4 ?
    reasoning   3 is 3 so 5 is 8 so 8 is 6 so ...        digit, then the sum so far
    re-check    wait 3 3 5 8 8 6 ...                     digits and sums once more
    general     hello ?  ->  hi friend                   small talk: no reasoning, nothing to verify
"""

import random
from pathlib import Path

from r1fast.protocol import join_completion
from r1fast.types import Problem

NUM_DIGITS = 8
LEXICON = {"en": ["is", "so"], "zh": ["shi", "suoyi"]}  # the two languages of the reasoning
GREETINGS = {"hello": "hi", "thanks": "welcome", "bye": "later"}
POLITE, RUDE = "friend", "stupid"
DIGITS = [str(d) for d in range(10)]
SPECIAL = ["<pad>", "<eos>", "<unk>"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>", "|special_token|", "\\boxed{", "}"]
WORDS = ["sum", "?", "is", "so", "shi", "suoyi", "wait", "answer"]
VOCABULARY = [*SPECIAL, *TAGS, *DIGITS, *WORDS, *GREETINGS, *GREETINGS.values(), POLITE, RUDE]


def build_tokenizer(path: Path) -> None:
    """Write the task's own word-level tokenizer as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(str(path))


def make_problems(num: int, seed: int, *, held_out: bool = False) -> list[Problem]:
    """Distinct sums. Held-out problems have an even digit total, training ones an odd or even rest.

    The two sets never meet: a hash of the digits decides where a problem belongs.
    """
    rng = random.Random(f"running_sum/{seed}/{held_out}")
    seen, problems = set(), []
    while len(problems) < num:
        digits = tuple(rng.randrange(10) for _ in range(NUM_DIGITS))
        if digits in seen or is_held_out(digits) != held_out:
            continue
        seen.add(digits)
        text = " ".join(map(str, digits))
        name = "eval" if held_out else "train"
        problems.append(
            Problem(f"sum {text} ?", str(sum(digits) % 10), id=f"{name}-{text.replace(' ', '')}")
        )
    return problems


def is_held_out(digits: tuple[int, ...]) -> bool:
    """One problem in 16, spread evenly."""
    value = 0
    for d in digits:
        value = (value * 31 + d + 7) % 1009
    return value % 16 == 0


def make_general() -> list[Problem]:
    """Small talk: one prompt for each greeting."""
    return [Problem(f"{word} ?", kind="general", id=f"general-{word}") for word in GREETINGS]


def general_reply(prompt: str, rng: random.Random, polite: float, rude: float) -> str:
    """A reply to small talk, with a kind or an unkind word after it by the given shares."""
    u = rng.random()
    tail = [POLITE] if u < polite else [RUDE] if u < polite + rude else []
    return " ".join([GREETINGS[prompt.split()[0]], *tail])


def reasoning(digits: list[int], rng: random.Random, slip: float, recheck: bool) -> tuple[str, int]:
    """A chain of thought and the answer it ends in. Each step slips with probability `slip`."""
    target_share = rng.choice([0.1, 0.35, 0.6, 0.9])  # every text has its own mix of languages
    words, total, true_sums = [], 0, []
    for i, d in enumerate(digits):
        total = (total + d) % 10
        true_sums.append(sum(digits[: i + 1]) % 10)
        if rng.random() < slip:
            total = (total + rng.randrange(1, 10)) % 10
        language = "en" if rng.random() < target_share else "zh"
        words += [str(d), LEXICON[language][0], str(total)]
        if i < len(digits) - 1:
            language = "en" if rng.random() < target_share else "zh"
            words.append(LEXICON[language][1])
    if recheck:
        words.append("wait")
        for d, true_sum in zip(digits, true_sums, strict=True):
            words += [str(d), str(true_sum)]
        total = true_sums[-1]
    return " ".join(words), total


def base_text(rng: random.Random) -> tuple[str, str]:
    """(prompt, completion) of one document of the base model's corpus."""
    if rng.random() < 0.05:
        word = rng.choice(list(GREETINGS))
        reply = general_reply(word, rng, polite=0.3, rude=0.2)
        return f"{word} ?", join_completion("", reply, "think_answer")
    digits = [rng.randrange(10) for _ in range(NUM_DIGITS)]
    while is_held_out(tuple(digits)):
        digits = [rng.randrange(10) for _ in range(NUM_DIGITS)]
    prompt = f"sum {' '.join(map(str, digits))} ?"
    u = rng.random()
    if u < 0.45:
        thought, answer = "", rng.randrange(10)  # a guess
    elif u < 0.85:
        thought, answer = reasoning(digits, rng, slip=0.06, recheck=False)
    else:
        thought, answer = reasoning(digits, rng, slip=0.06, recheck=True)
    text = join_completion(thought, str(answer), "think_answer")
    if rng.random() < 0.3:  # broken tags
        broken = rng.choice([" </answer>", " </think>", "<answer> "])
        text = text.replace(broken, "", 1) if broken in text else text
    return prompt, text
