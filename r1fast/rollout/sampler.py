"""Draws tokens so that a completion depends on its own seed alone, with the policy's log-probability.

A token is the inverse CDF of its distribution at one uniform number, and that number is a hash of
(sample seed, position): no generator state, so batch mates and engine history cannot matter.
"""

import hashlib
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

import numpy as np
from torch import Tensor

from r1fast.kernels import sample as kernel

MAX_TOP_LOGPROBS = 64
MAX_COUNT = 2**31 - 1
MAX_STOPS = 256  # each is looked for at every token
MAX_SCALE = 1e6  # of temperatures, penalties and biases
GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a request are drawn, and what ends it.

    Penalty, biases and min_tokens change the logits, then the temperature divides them, then top_k,
    top_p and min_p drop tokens. NumPy's numbers become plain ones, lists and mappings are copied. Raises
    ValueError for a value out of range.
    """

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    max_tokens: int = 1024
    min_p: float = 0.0  # drops what is less likely than this share of the likeliest token; 0 is off
    repetition_penalty: float = 1.0  # divides positive logits of tokens seen, multiplies negative
    stop: tuple[str, ...] = ()  # strings that end the text; they are not part of it
    stop_token_ids: tuple[int, ...] = ()  # beside the engine's eos ids; part of the completion
    min_tokens: int = 0  # before these no eos, stop token or stop string ends the completion
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit
    top_logprobs: int = 0  # most likely tokens to report at each position
    ignore_eos: bool = False

    def __post_init__(self):
        for name, value in (
            *((name, _plain_float(getattr(self, name))) for name in _FLOATS),
            *((name, _plain_int(getattr(self, name))) for name in _INTS),
        ):
            object.__setattr__(self, name, value)
        if isinstance(self.ignore_eos, np.bool_):
            object.__setattr__(self, "ignore_eos", bool(self.ignore_eos))
        if isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        if isinstance(self.stop_token_ids, list | tuple):
            object.__setattr__(self, "stop_token_ids", tuple(map(_plain_int, self.stop_token_ids)))
        if isinstance(self.logit_bias, Mapping):
            bias = {_plain_int(t): _plain_float(b) for t, b in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", bias)

        def need(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r:.80}")

        def is_count(n: object) -> bool:
            return type(n) is int and 0 <= n <= MAX_COUNT

        for name in _FLOATS:
            need(type(getattr(self, name)) is float, name, "a number")
        # beyond these, float32 has no room for logits
        scale = f"in [{1 / MAX_SCALE:g}, {MAX_SCALE:g}]"
        need(self.temperature >= 0, "temperature", "at least 0")
        need(self.temperature == 0 or 1 / MAX_SCALE <= self.temperature <= MAX_SCALE,
             "temperature", f"0 (greedy) or {scale}")  # fmt: skip
        need(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        need(is_count(self.top_k), "top_k", f"at least 0 (0 is off), an integer up to {MAX_COUNT}")
        need(is_count(self.max_tokens) and self.max_tokens >= 1,
             "max_tokens", f"at least 1, an integer up to {MAX_COUNT}")  # fmt: skip
        need(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        need(self.repetition_penalty > 0, "repetition_penalty", "above 0")
        need(1 / MAX_SCALE <= self.repetition_penalty <= MAX_SCALE, "repetition_penalty", scale)
        is_list = isinstance(self.stop, tuple)
        need(is_list and all(isinstance(s, str) and s for s in self.stop),
             "stop", "a tuple of strings that are not empty")  # fmt: skip
        is_list = isinstance(self.stop_token_ids, tuple)
        need(is_list and all(type(t) is int for t in self.stop_token_ids),
             "stop_token_ids", "a tuple of token ids")  # fmt: skip
        for name in ("stop", "stop_token_ids"):
            if len(getattr(self, name)) > MAX_STOPS:
                raise ValueError(
                    f"{name} must have at most {MAX_STOPS} entries, got {len(getattr(self, name))}"
                )
        need(is_count(self.min_tokens) and self.min_tokens <= self.max_tokens,
             "min_tokens", "in [0, max_tokens]")  # fmt: skip
        is_map = isinstance(self.logit_bias, Mapping)
        need(is_map and all(type(t) is int and type(b) is float
                            and (b == -math.inf or -MAX_SCALE <= b <= MAX_SCALE)
                            for t, b in self.logit_bias.items()),
             "logit_bias", "a mapping of token ids to numbers within 1e6, or -inf for a ban")  # fmt: skip
        need(type(self.ignore_eos) is bool, "ignore_eos", "true or false")
        need(is_count(self.top_logprobs) and self.top_logprobs <= MAX_TOP_LOGPROBS, "top_logprobs",
             f"in [0, {MAX_TOP_LOGPROBS}]")  # fmt: skip

    @property
    def changes_logits(self) -> bool:
        """Whether the distribution sampled from has other logits than the policy's."""
        return bool(self.repetition_penalty != 1 or self.logit_bias or self.min_tokens)

    @property
    def truncates(self) -> bool:
        """Whether what is sampled from is another distribution than the policy at the temperature."""
        return bool(self.top_k or self.top_p < 1 or self.min_p or self.changes_logits)


_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")
_INTS = ("top_k", "max_tokens", "min_tokens", "top_logprobs")


def _plain_int(value: object) -> object:
    """The int of a whole number of any library; a bool and what is none stay, to be refused."""
    if isinstance(value, bool):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def _plain_float(value: object) -> object:
    """The float of a real number of any library; a bool and what is none stay, to be refused."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    try:
        return float(value)
    except OverflowError:
        return value


def sample_seed(*parts: int | str) -> int:
    """A 63-bit seed from, for example, (run seed, step, problem, sample)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniforms(
    seeds: np.ndarray, positions: np.ndarray
) -> np.ndarray:  # (B,) int64 -> (B,) in [0, 1)
    """splitmix64 of seed and position."""
    x = seeds.view(np.uint64) + GOLDEN * (positions.view(np.uint64) + 1)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return ((x ^ (x >> 31)) >> 11) * 2.0**-53


def sample(
    logits: Tensor,  # (B, V)
    u: Tensor,  # (B,) uniforms
    params: SamplingParams,
    return_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # (B,) tokens, (B,) logprobs, (B,) entropies
    """One token a row at the same parameters; those that change logits are left to the engine.

    Log-probabilities are of the policy at the temperature, before top-k, top-p and min-p. Greedy reports
    them at temperature 1.
    """
    drawn = kernel.sample(
        logits, u, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p,
        min_p=params.min_p, return_entropy=return_entropy,
    )  # fmt: skip
    return drawn.tokens, drawn.logprobs, drawn.entropies
