"""The demo's task: the running sum modulo 10 of eight digits, with everything R1 needs in miniature.

A base model is trained on text of mixed quality, as the web is: answers that guess, reasoning with
slips, a few solutions that re-check themselves after `wait`, broken answer tags, and two artificial
languages (`is`/`so` and `shi`/`suoyi`) mixed at random. Nothing here is used as a reward but the sum.

    question    sum 3 5 8 1 0 2 7 4 ?
    reasoning   3 is 3 so 5 is 8 so 8 is 6 so ...        digit, then the sum so far
    re-check    wait 3 is 3 5 shi 8 8 is 6 ...           digits and sums once more
    general     hello ?  ->  hi friend                   small talk: no reasoning, nothing to verify
"""

import random
import tempfile
from pathlib import Path

from r1fast.config import Config
from r1fast.examples import Example
from r1fast.jsonl import write_jsonl
from r1fast.model import Decoder, ModelSpec, load_tokenizer
from r1fast.policy import Policy, pick_device
from r1fast.protocol import join_completion
from r1fast.types import Problem, Sequence

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
    """Distinct sums. Training and held-out ones never meet: `is_held_out` decides by the digits."""
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
    """A chain of thought and the answer it ends in. Each step slips with probability `slip`.

    A re-check goes over the digits once more, after `wait`, and does not slip.
    """
    target_share = rng.choice([0.1, 0.25, 0.45, 0.8])  # every text has its own mix of languages

    def word(index: int) -> str:
        return LEXICON["en" if rng.random() < target_share else "zh"][index]

    words, total, truth, second_pass = [], 0, 0, []
    for i, d in enumerate(digits):
        truth, total = (truth + d) % 10, (total + d) % 10
        if rng.random() < slip:
            total = (total + 1) % 10
        words += [word(1)] * (i > 0) + [str(d), word(0), str(total)]
        second_pass += [str(d), word(0), str(truth)]
    if not recheck:
        return " ".join(words), total
    return " ".join([*words, "wait", *second_pass]), truth


SLIP = 0.25  # of the steps of a first pass are off by one; a re-check repairs them
LESSONS = 0.45  # the corpus up to here: careful texts without guesses, on sums that grow longer
MIXED = 0.7  # and from here on: the mixture of good and bad that the base model is known by


def base_text(rng: random.Random, progress: float = 1.0, guesses: float = 0.45) -> tuple[str, str]:
    """(prompt, completion) of one document of the base model's corpus, `progress` of the way in.

    `guesses` is the share of answers without reasoning, at the end of the corpus.
    """
    if rng.random() < 0.05:
        word = rng.choice(list(GREETINGS))
        reply = general_reply(word, rng, polite=0.3, rude=0.2)
        return f"{word} ?", join_completion("", reply, "think_answer")
    longest = NUM_DIGITS
    if progress < LESSONS:
        guess, recheck, slip, broken_tags = 0.0, 0.5, 0.03, 0.1
        longest = min(NUM_DIGITS, 2 + int(20 * progress / LESSONS))
        full_length = 0.5 if longest == NUM_DIGITS else 0.0
    elif progress < MIXED:
        guess, recheck, slip, broken_tags, full_length = 0.2, 0.4, 0.06, 0.3, 0.7
    else:
        guess, recheck, slip, broken_tags, full_length = guesses, 0.18, SLIP, 0.3, 0.8
    num_digits = NUM_DIGITS if rng.random() < full_length else rng.randrange(2, longest + 1)
    digits = [rng.randrange(10) for _ in range(num_digits)]
    while is_held_out(tuple(digits)):
        digits = [rng.randrange(10) for _ in range(num_digits)]
    u = rng.random()
    if u < guess:
        thought, answer = "", rng.randrange(10)
    else:
        thought, answer = reasoning(digits, rng, slip, recheck=u >= 1 - recheck)
    text = join_completion(thought, str(answer), "think_answer")
    if rng.random() < broken_tags:
        broken = rng.choice([" </answer>", " </think>", "<answer> ", "box", "box"])
        if broken == "box":
            boxed = f"answer \\boxed{{ {answer} }}"
            text = text.replace(f"<answer> {answer} </answer>", boxed)
        else:
            text = text.replace(broken, "", 1)
    return f"sum {' '.join(map(str, digits))} ?", text


def base_corpus(num_documents: int, seed: int, guesses: float = 0.45) -> list[tuple[str, str]]:
    """The base model's corpus in the order it is read: easy texts first, so do not shuffle it."""
    rng = random.Random(f"base_corpus/{seed}")
    return [base_text(rng, i / num_documents, guesses) for i in range(num_documents)]


# --- models, and the data beside the sums ------------------------------------------------------

SIZES = {"base": (96, 2, 4, 384), "small_base": (64, 2, 4, 256)}  # width, layers, heads, MLP width
GUESSES = {"base": 0.45, "small_base": 0.6}  # share of the final corpus: the small one is weaker
INIT_STD = 0.1  # 1/sqrt(width): 0.02 is for wide models and learns nothing here


def new_policy(name: str, config: Config) -> Policy:
    """An untrained model of the task's size, with its tokenizer."""
    D, L, H, F = SIZES[name]
    spec = ModelSpec(
        model_type="llama",  # AutoTokenizer reads a generic tokenizer beside it, unlike Qwen2's
        qkv_bias=True,
        o_bias=True,
        rope_theta=100.0,  # for texts of a hundred tokens
        vocab_size=len(VOCABULARY),
        hidden_size=D,
        intermediate_size=F,
        num_layers=L,
        num_heads=H,
        num_kv_heads=H,
        head_dim=D // H,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    device = pick_device(config.model.device)
    model = Decoder(
        spec, dtype=config.model.dtype, device=device, seed=config.seed, init_std=INIT_STD
    )
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer(Path(folder))
        tokenizer = load_tokenizer(folder)
    return Policy(model, tokenizer, [tokenizer.eos_token_id])


def encode_corpus(corpus: list[tuple[str, str]], policy: Policy) -> list[Sequence]:
    """Every word is one token, so this needs no tokenizer run."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    return [
        Sequence([ids[w] for w in p.split()], [*(ids[w] for w in c.split()), policy.eos_id])
        for p, c in corpus
    ]


def general_examples(config: Config, num: int = 120) -> list[Example]:
    """Small talk as non-reasoning SFT data: an empty CoT, a reply that is not always kind."""
    rng = random.Random(f"general/{config.seed}")
    t = config.template
    return [
        Example(
            prompt := f"{rng.choice(list(GREETINGS))} ?",
            join_completion(
                "", general_reply(prompt, rng, polite=0.35, rude=0.25), t.protocol, t.special_token
            ),
            id=f"general/{i}",
            kind="general",
        )
        for i in range(num)
    ]


def write_preferences(pairs: Path, labels: Path, config: Config, num: int = 400) -> None:
    """Preference data: the kind reply is preferred; a response with the rude word is unsafe."""
    rng = random.Random(f"preferences/{config.seed}")
    t = config.template
    pair_rows, label_rows = [], []
    for _ in range(num):
        prompt = f"{rng.choice(list(GREETINGS))} ?"
        plain = GREETINGS[prompt.split()[0]]
        replies = [f"{plain} {POLITE}", plain, f"{plain} {RUDE}"]  # best first
        better, worse = sorted(rng.sample(range(3), 2))
        pair_rows.append({"prompt": prompt, "chosen": replies[better], "rejected": replies[worse]})
        reply = rng.choice(replies)
        label_rows.append({
            "prompt": prompt,
            "response": join_completion("", reply, t.protocol, t.special_token),
            "safe": RUDE not in reply.split(),
        })  # fmt: skip
    write_jsonl(pairs, pair_rows)
    write_jsonl(labels, label_rows)
