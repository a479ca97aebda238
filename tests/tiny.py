"""Small models, a small tokenizer, small problems and configs that the tests share."""

from contextlib import nullcontext
from functools import cache

import pytest
import torch

from r1fast.config import Config, load_config
from r1fast.model import Decoder, ModelSpec
from r1fast.policy import Policy
from r1fast.rollout.native import is_supported
from r1fast.types import Completion, Problem, Reward, RolloutGroup

EOS = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXTS = [
    "A conversation between User and Assistant. The user asks, the Assistant thinks first.",
    "<think> reasoning process here </think> <answer> answer here </answer>",
    *(f"What is {a} + {b}? {a} + {b} = {a + b}." for a in range(10) for b in range(10)),
]
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False},
    "llama": {"model_type": "llama", "num_key_value_heads": 1, "rope_parameters": LLAMA3_ROPE},
}
CONFIG = [  # overrides of every tiny_config
    "--template.name=raw",
    "--rollout.num_generations=4",
    "--rollout.max_prompt_tokens=32",
    "--rollout.max_completion_tokens=8",
    "--grpo.num_steps=4",
    "--grpo.prompts_per_step=4",
    "--grpo.kl_coef=0.05",
    "--grpo.max_logprob_mismatch=1000",  # the old logprobs of random_groups are no policy's
    "--optim.lr=0.001",
    "--sft.batch_size=8",
    "--sft.max_steps=4",
    "--checkpoint.every_steps=0",
    "--model.device=cpu",
]


def tiny_model(family: str = "qwen2", seed: int = 0, std: float = 0.25, **changes) -> Decoder:
    """A decoder whose every weight moves the logits: biases and norms are random too."""
    spec = ModelSpec.from_hf_config(SHAPE | FAMILIES[family] | changes)
    model = Decoder(spec, seed=seed, init_std=std)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.normal_(float(not name.endswith("bias")), 0.25, generator=generator)
    return model


@cache
def tiny_tokenizer(extra: tuple[str, ...] = (), vocab_size: int = 320):
    """Byte-level BPE trained on TEXTS and `extra`, in transformers' format."""
    import pytest

    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([*TEXTS, *extra], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_policy(
    family: str = "qwen2", seed: int = 0, std: float = 0.1, tokenizer=None, **changes
) -> Policy:
    tokenizer = tokenizer or tiny_tokenizer()
    model = tiny_model(family, seed, std, vocab_size=len(tokenizer), **changes)
    return Policy(model, tokenizer, [tokenizer.eos_token_id])


def tiny_checkpoint(folder, **changes) -> str:
    """A Hugging Face folder: a random Qwen2 and its tokenizer."""
    tiny_policy(**changes).save(folder)
    return str(folder)


def tiny_problems(num: int = 12, kind: str = "math") -> list[Problem]:
    """Sums of two digits."""
    return [
        Problem(f"What is {i % 10} + {i * 7 % 10}?", str(i % 10 + i * 7 % 10), f"p{i}", kind)
        for i in range(num)
    ]


def tiny_config(*overrides: str) -> Config:
    return load_config(None, [*CONFIG, *overrides])


class TokenScorer:
    """Rewards by the completion's tokens alone; needs no grader."""

    def __init__(self, reward=lambda ids: sum(t % 2 for t in ids) / len(ids)):
        self.reward, self.steps_from_end = reward, []

    def as_one_call(self):
        return nullcontext()

    def score(self, groups: list[RolloutGroup], step_from_end: int | None = None) -> None:
        self.steps_from_end.append(step_from_end)
        for group in groups:
            totals = [self.reward(c.token_ids) for c in group.completions]
            group.rewards = [Reward(t, {"stub": t}, None) for t in totals]


@cache
def has_fixed_sums() -> bool:
    """Whether the sampler's bits do not depend on what is in its batch: the native forward is there."""
    return is_supported(tiny_model())


def alike(logprobs: list[float]):
    """What the log-probabilities of a completion from another batch equal."""
    return logprobs if has_fixed_sums() else pytest.approx(logprobs, abs=2e-5)


def random_groups(
    num_groups: int, G: int, vocab_size: int, seed: int = 0, longest: int = 9
) -> list[RolloutGroup]:
    """Groups that no policy sampled: random tokens, lengths, old log-probabilities and rewards."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, n: int) -> list[int]:
        return torch.randint(low, high, (n,), generator=generator).tolist()

    groups = []
    for n, prompt_length in enumerate(integers(1, 6, num_groups)):
        completions = []
        for length in integers(1, longest + 1, G):
            logprobs = -5.5 + torch.randn(length, generator=generator)
            completions.append(
                Completion(integers(0, vocab_size, length), logprobs.tolist(), "stop")
            )
        rewards = [Reward(float(r), {"stub": float(r)}, None) for r in integers(0, 3, G)]
        prompt_ids = integers(0, vocab_size, prompt_length)
        groups.append(RolloutGroup(Problem("?", "0", f"g{n}"), prompt_ids, completions, rewards))
    return groups


def each_backend(shapes):
    """Parametrizes `backend`, `dtype`, `shape`, `slack`: C++, Triton (interpreted without a GPU) and PyTorch.

    Triton's interpreter is slow, and cuts off what a GPU rounds to bfloat16.
    """
    import pytest

    half, cases = torch.bfloat16, []
    for shape in shapes:
        cases += [("auto", torch.float32, shape, 2), ("auto", half, shape, 2)]
        cases += [("triton", torch.float32, shape, 2)]
    cases += [
        ("triton", half, shape, 2 if torch.cuda.is_available() else 6) for shape in shapes[::3]
    ]
    cases += [("torch", dtype, shapes[-1], 2) for dtype in (torch.float32, half)]
    ids = [f"{b}-{str(d)[6:]}-{'x'.join(map(str, s))}" for b, d, s, _ in cases]
    return pytest.mark.parametrize(("backend", "dtype", "shape", "slack"), cases, ids=ids)


def at_level(monkeypatch, level: str, *functions: str) -> None:
    """Functions of r1fast._C whose last arguments are (level, threads) run at `level`, or the test is skipped."""
    import pytest

    from r1fast import _C

    def wrap(f):
        return lambda *args: f(*args[:-2], level, args[-1])

    try:
        _C.swiglu_forward(0, 0, 0, 0, False, 0, level, 1)
    except ValueError as error:
        pytest.skip(str(error))
    for name in functions:
        monkeypatch.setattr(_C, name, wrap(getattr(_C, name)))


def without_clock(rows: list[dict]) -> list[dict]:
    """Rows of metrics.jsonl without what differs between two equal runs."""

    def is_timed(name: str) -> bool:
        return "time" in name or name.startswith("checkpoint/") or name == "tokens_per_second"

    return [{k: v for k, v in row.items() if not is_timed(k)} for row in rows]
