"""What a token costs on this machine, in seconds and bytes: a decoder of one and of two layers, run as in training.

The difference of the two is a layer, what is left of the first the rest; both are linear in tokens. Bytes are
those of the tensors that the operations make, of a narrow decoder: they grow with its widths. Seconds are of
the real widths and of a vocabulary that is cut, with the run's own packing, attention, loss, AdamW and engine.
"""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r1fast.batch import pack
from r1fast.config import LoraConfig, OptimConfig
from r1fast.costs import Counts, Groups, apart, count
from r1fast.forward import hidden_states
from r1fast.kernels.linear import linear
from r1fast.kernels.linear_cross_entropy import linear_cross_entropy
from r1fast.kernels.linear_logprobs import linear_logprobs
from r1fast.lora import add_lora
from r1fast.model import Decoder, ModelSpec
from r1fast.optim import Optimizer
from r1fast.rollout.engine import Engine
from r1fast.rollout.sampler import SamplingParams
from r1fast.types import PackedBatch, Sequence

NARROW = 64  # about the width of the decoder whose bytes are counted
MAX_VOCAB = 8192  # of the decoder that is timed; what follows from it is stretched
PASS_SECONDS = 0.06  # about, of a layer forward and backward
SHORT, LONG = 3, 19  # tokens that are generated
CONTEXT = (
    4096  # of the decoder that is timed: lengths are cut to half of it, whatever the model's is
)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes a token of a micro-batch, beside parameters and their gradients and the head's chunks."""

    layer: float  # that each layer keeps for the backward
    loss: float  # beside those, while the loss is computed
    backward: float  # while the last layer's gradients are
    forward: float  # of a forward without gradient, whatever the depth


class LiveBytes(TorchDispatchMode):
    """Memory of the tensors that operations make under it: now, and the most since `restart`."""

    def __init__(self, known):
        super().__init__()
        self.now = self.most = 0
        self._known = {x.untyped_storage().data_ptr() for x in known}
        self._live: dict[int, weakref.ref] = {}

    def restart(self) -> None:
        self.most = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return out

    def _add(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._live or storage.data_ptr() in self._known:
            return

        def gone(_) -> None:
            del self._live[key]
            self.now -= size

        self._live[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def measure_footprint(
    spec: ModelSpec,
    dtype: torch.dtype,
    *,
    share_prompts: bool,
    lora: LoraConfig,
    checkpointing: str = "none",
) -> Footprint:
    """Counted on the CPU in a tenth of a second; no weights of the model's size are made."""
    # widths go with the head's, of which there are as many
    times = max(n for n in (1, 2, 4, 8, 16, 32, 64) if all(x % (2 * n) == 0 for x in _widths(spec)) and
                (n == 1 or spec.hidden_size >= n * (NARROW if n <= 16 else 4 * NARROW)))  # fmt: skip
    narrow = replace(
        spec,
        vocab_size=16,
        hidden_size=spec.hidden_size // times,
        intermediate_size=spec.intermediate_size // times,
        head_dim=spec.head_dim // times,
    )
    lora = replace(lora, rank=-(-lora.rank // times))
    one, two = (
        [
            _live(replace(narrow, num_layers=L), dtype, lora, n, share_prompts, checkpointing)
            for n in (1, 3)
        ]
        for L in (1, 2)
    )
    tokens = one[1]["tokens"] - one[0]["tokens"]
    of_one, of_two = ({key: (b[key] - a[key]) / tokens * times for key in a} for a, b in (one, two))
    layer = of_two["backward"] - of_one["backward"]
    return Footprint(
        layer, of_one["loss"] - layer, of_one["backward"] - layer, of_one["forward"]
    )  # fmt: skip


def _widths(spec: ModelSpec) -> tuple[int, int, int]:
    return spec.hidden_size, spec.intermediate_size, spec.head_dim


def _live(
    spec: ModelSpec,
    dtype: torch.dtype,
    lora: LoraConfig,
    num_groups: int,
    share: bool,
    checkpointing: str,
) -> dict[str, int]:
    """The most memory in each part of a training pass over some tokens."""
    model = Decoder(spec, dtype=dtype, seed=0)
    model.checkpointing = checkpointing
    if lora.rank:
        add_lora(model, lora)
    for p in model.parameters():
        if p.requires_grad:  # beside so few tokens the gradients of all weights would be the peak
            p.register_post_accumulate_grad_hook(_drop_gradient)
    # prompts are told apart by their first token, so that each is a group
    groups = [(16, [17] * 4)] * num_groups
    batch = _batch(groups, spec.vocab_size, 10**6, share)
    most = {"tokens": batch.num_tokens}
    with LiveBytes(model.parameters()) as live:
        with torch.no_grad():
            hidden_states(model, batch)
        most["forward"] = live.most
        live.restart()
        loss = _loss(model, batch)
        most["loss"] = live.most
        live.restart()
        loss.backward()
        most["backward"] = live.most
    return most


def _drop_gradient(p: Tensor) -> None:
    p.grad = None


def _loss(model: Decoder, batch: PackedBatch) -> Tensor:
    hidden = hidden_states(model, batch)
    return linear_cross_entropy(
        hidden, model.head_weight, batch.target_ids, token_weights=batch.token_weights,
        reduction="sum", return_entropy=True,
    )[0]  # fmt: skip


def _sequences(groups: Groups, vocab_size: int) -> list[Sequence]:
    draw = random.Random(0)
    found = []
    for i, (prompt, completions) in enumerate(groups):
        ids = [i % vocab_size, *draw.choices(range(vocab_size), k=prompt)][:prompt]
        found += [Sequence(ids, draw.choices(range(vocab_size), k=n)) for n in completions]
    return found


def _batch(groups: Groups, vocab_size: int, budget: int, share: bool) -> PackedBatch:
    sequences = _sequences(groups, vocab_size)
    return pack(sequences, budget, [1.0] * len(sequences), share_prompts=share)[0]


@dataclass(frozen=True, slots=True)
class Pass:
    """Seconds of a pass over packed sequences, linear in what `Counts` counts."""

    token: float
    pair: float  # of query and key
    target: float

    def __call__(self, counts: Counts) -> float:
        return (
            self.token * counts.tokens + self.pair * counts.pairs + self.target * counts.targets
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds that the parts of a step take."""

    gemm: float  # FLOP/s of a large product in the model's type
    train: Pass
    forward: Pass  # without gradient
    update: float  # AdamW on all weights
    begin: float  # of a rollout: what is done once for new weights
    prefill: float  # a token
    step: float  # of decoding, whatever the rows
    row: float  # more for each
    position: float  # and for each position that a row looks back on
    context: float = 0.0  # positions that are in `row` already

    def rollout(self, groups: Groups, max_batch_size: int) -> float:
        """A slot that comes free is filled again; the longest completion ends alone."""
        lengths = [n - 1 for _, ns in groups for n in ns]
        num_steps = max(max(lengths, default=0), -(-sum(lengths) // max_batch_size))
        looks = sum((n - 1) * (p + n / 2 - self.context) for p, ns in groups for n in ns)
        return (
            self.begin
            + self.prefill * sum(p for p, _ in groups)
            + self.step * num_steps
            + self.row * sum(lengths)
            + self.position * looks
        )


def measure_speed(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    groups: Groups,
    *,
    share_prompts: bool,
    token_budget: int,
    max_batch_size: int,
    sampling: SamplingParams | None,  # None: no rollout
    optim: OptimConfig,
    lora: LoraConfig,
    checkpointing: str = "none",
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """In about a second, a few layers' worth of memory, and no draw from a global generator."""
    bench = _Bench(spec, dtype, device, optim, lora, checkpointing, clock)
    gemm = measure_gemm(dtype, device, clock)
    per_token = 6 * sum(p.numel() for p in bench.two.layers[0].parameters())
    sample = cut(groups, min(int(PASS_SECONDS * gemm / per_token), token_budget))
    train, forward = bench.passes(sample, share_prompts)
    decode = dict.fromkeys(("begin", "prefill", "step", "row", "position", "context"), 0.0)
    if sampling is not None:
        decode = bench.decoding(groups, max_batch_size, sampling)
        decode["position"] = forward.pair
    return Speed(gemm=gemm, train=train, forward=forward, update=bench.update(), **decode)


@torch.no_grad()
def measure_gemm(dtype: torch.dtype, device: torch.device, clock=time.perf_counter) -> float:
    """FLOP/s of a large product, by the faster of PyTorch and what the layers take."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    products = (lambda: a @ b, lambda: linear(a, b))
    return 2 * n**3 / min(_best(product, clock, device, 3) for product in products)


def _best(run: Callable[[], object], clock, device: torch.device, repeats: int = 2) -> float:
    """Seconds of the fastest of some runs; the first one does not count."""
    seconds = []
    for _ in range(repeats + 1):
        begin = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(clock() - begin)
    return min(seconds[1:])


def cut(groups: Groups, most: int) -> Groups:
    """Some of the groups, or a part of one, of about so many tokens."""
    most, found, tokens = max(most, 16), [], 0
    for prompt, completions in groups:
        prompt, members = min(prompt, most // 2), []
        for n in completions:
            n = min(n, most // 2 + 1)
            if tokens >= most:
                break
            tokens += n - 1 + (0 if members else prompt)
            members.append(n)
        if members:
            found.append((prompt, members))
    return found


class _Bench:
    """A decoder of two layers and one of the first alone, and what is timed on them."""

    def __init__(self, spec, dtype, device, optim: OptimConfig, lora: LoraConfig, mode: str, clock):
        self.spec, self.device, self.optim, self.clock = spec, device, optim, clock
        self.vocab_size = min(spec.vocab_size, MAX_VOCAB)
        self.stretch = spec.vocab_size / self.vocab_size
        small = replace(
            spec, vocab_size=self.vocab_size, num_layers=2,
            max_position_embeddings=CONTEXT,
        )  # fmt: skip
        self.two = Decoder(small, dtype=dtype, device=device)
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for p in self.two.parameters():
                if p.ndim == 2:
                    p.uniform_(-0.03, 0.03, generator=generator)
                elif p.is_floating_point():
                    p.fill_(1)
        if lora.rank:
            add_lora(self.two, lora)
        self.one = Decoder(replace(small, num_layers=1), dtype=dtype, device="meta")
        self.one.embed, self.one.norm = self.two.embed, self.two.norm
        self.one.lm_head, self.one.layers = self.two.lm_head, self.two.layers[:1]
        self.one.checkpointing = self.two.checkpointing = mode

    def best(self, run: Callable[[], object], repeats: int = 2) -> float:
        return _best(run, self.clock, self.device, repeats)

    def deep(self, one: float, two: float, stretch: float = 1.0) -> float:
        """Of the whole depth, from that of one and of two layers; `stretch` is of what is no layer."""
        layer = max(two - one, 0.0)
        return self.spec.num_layers * layer + max(one - layer, 0.0) * stretch

    def passes(self, groups: Groups, share: bool) -> tuple[Pass, Pass]:
        """Training and a forward without gradient."""
        V, spec = self.vocab_size, self.spec
        sequences = _sequences(groups, V)
        options = {"device": self.device, "share_prompts": share}
        (batch,) = pack(sequences, 10**9, [1.0] * len(sequences), **options)
        counts = count(groups if share else apart(groups), 10**9)
        packing = self.best(lambda: pack(sequences, 10**9, [1.0] * len(sequences), **options))

        def train(model: Decoder) -> None:
            hidden_states(model, batch).backward(upstream)
            model.zero_grad()

        @torch.no_grad()
        def forward(model: Decoder) -> None:
            hidden_states(model, batch)

        upstream = torch.ones_like(hidden_states(self.one, batch))
        attend = _attend_of(batch, spec.hidden_size)
        q, k, v = (
            torch.ones(counts.tokens, n, spec.head_dim, dtype=upstream.dtype, device=self.device)
            .requires_grad_()
            for n in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        )  # fmt: skip
        do = torch.ones_like(q)
        pair = self.best(lambda: attend(0, q, k, v).backward(do)) / counts.pairs
        with torch.no_grad():
            pair_forward = self.best(lambda: attend(0, q, k, v)) / counts.pairs
        if self.two.checkpointing == "full":
            pair += pair_forward
        found = []
        for run, attention, target in zip(
            (train, forward), (pair, pair_forward), self.head(counts), strict=True
        ):
            times = [self.best(lambda m=m, run=run: run(m)) for m in (self.one, self.two)]
            whole = self.deep(*times) - spec.num_layers * attention * counts.pairs + packing
            token = max(whole, 0.0) / counts.tokens
            found.append(Pass(token, spec.num_layers * attention, target))
        return found[0], found[1]

    def head(self, counts: Counts) -> tuple[float, float]:
        """Seconds a target of the loss with its gradients, and of log-probabilities."""
        N, weight = min(max(counts.targets, 16), 416), self.one.head_weight
        hidden = torch.ones(N, weight.shape[1], dtype=weight.dtype, device=self.device)
        hidden.requires_grad_()
        ids = torch.arange(N, device=self.device) % self.vocab_size

        def train() -> None:
            linear_cross_entropy(hidden, weight, ids, reduction="sum").backward()
            hidden.grad = weight.grad = None

        with_gradient = self.best(train)
        with torch.no_grad():
            forward = self.best(lambda: linear_logprobs(hidden, weight, ids, return_entropy=True))
        return with_gradient / N * self.stretch, forward / N * self.stretch

    def update(self) -> float:
        seconds = []
        for model in (self.one, self.two):
            optimizer = Optimizer(model.named_parameters(), self.optim)
            gradients = [torch.ones_like(p) for _, p in optimizer.named]

            def step(optimizer=optimizer, gradients=gradients) -> None:
                for (_, p), gradient in zip(optimizer.named, gradients, strict=True):
                    p.grad = gradient
                optimizer.step(1e-9)

            seconds.append(self.best(step))
        return self.deep(*seconds, self.stretch)

    def decoding(self, groups: Groups, max_batch_size: int, sampling: SamplingParams) -> dict:
        """Generation of a few tokens for all slots and for a quarter of them, seldom two that end together."""
        members = _members(cut([(p, [1] * len(ns)) for p, ns in groups], CONTEXT), max_batch_size)
        few = _members([(p, [1] * n) for p, n in members], sum(n for _, n in members) // 4 or 1)
        of_one, of_two = (self._decoding(m, members, few, sampling) for m in (self.one, self.two))
        found = {key: self.deep(of_one[key], of_two[key], self.stretch) for key in of_one}
        context = sum(p * n for p, n in members) / sum(n for _, n in members)
        return found | {"context": context + (SHORT + LONG) / 2}

    def _decoding(self, model: Decoder, many, few, sampling: SamplingParams) -> dict[str, float]:
        engine = Engine(model, [0], max_batch_size=sum(n for _, n in many))
        sampling = replace(sampling, max_tokens=LONG, ignore_eos=True)
        tokens, ends, short, more = [], [], [], []
        for members in (many, few):
            groups = [(p, [1]) for p, _ in members]
            prompts = [s.prompt_ids for s in _sequences(groups, self.vocab_size)]
            span = range(SHORT + 1, LONG + 1)
            lengths = [
                [span[i * len(span) // n] for i in range(n - 1)] + [LONG] for _, n in members
            ]

            def generate(lengths, prompts=prompts) -> None:
                engine.reset_prefix_cache()  # as after an update
                for prompt, own in zip(prompts, lengths, strict=True):
                    seeds = range(len(own))
                    engine.add(prompt, seeds, sampling, stream=False, lengths=own)
                while engine.has_work:
                    engine.step()

            tokens.append(sum(p for p, _ in members))
            ends.append(sum(n - SHORT for own in lengths for n in own))
            all_short = [[SHORT] * n for _, n in members]
            short.append(self.best(lambda: generate(all_short), 1))  # noqa: B023
            whole = self.best(lambda: generate(lengths), 1)  # noqa: B023
            # a disturbed measurement may have no difference
            more.append(whole - short[-1] if whole > short[-1] else whole * (1 - SHORT / LONG))
        row = _slope(ends, more)
        step = max(more[0] - row * ends[0], 0.0) / (LONG - SHORT)
        begin = [
            max(seconds - (SHORT - 1) * (step + row * sum(n for _, n in members)), 0.0)
            for seconds, members in zip(short, (many, few), strict=True)
        ]
        prefill = _slope(tokens, begin)
        begun = max(begin[0] - prefill * tokens[0], 0.0)
        return {"begin": begun, "prefill": prefill, "step": step, "row": row}


def _slope(x: list[int], y: list[float]) -> float:
    return max(y[0] - y[1], 0.0) / (x[0] - x[1]) if x[0] > x[1] else y[0] / x[0]


def _members(groups: Groups, most: int) -> list[tuple[int, int]]:
    """(prompt tokens, samples) of the first `most` samples."""
    found = []
    for prompt, completions in groups:
        num = min(len(completions), most)
        if num:
            found.append((prompt, num))
        most -= num
    return found


def _attend_of(batch: PackedBatch, width: int):
    """What `hidden_states` gives the decoder to attend with."""
    found = []

    def model(input_ids: Tensor, position_ids: Tensor, attend) -> Tensor:
        found.append(attend)
        return torch.empty(len(input_ids), width, device=input_ids.device)

    hidden_states(model, batch)
    return found[0]
