"""The reference policy of the KL term: whose weights, where they lie, of which optimizer step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from r1fast.batch import group_by_prompt
from r1fast.config import Config
from r1fast.forward import sequence_logprobs
from r1fast.lora import adapters_off, exchanged, is_untrained, lora_tensors
from r1fast.model import DTYPES, Decoder
from r1fast.policy import Policy
from r1fast.rollout.engine import Engine
from r1fast.sharding import Ddp, Divided, LoraFsdp, empty, fill_whole, hollow
from r1fast.shards import Shard
from r1fast.training_state import check_same, fill
from r1fast.types import PackedBatch, Sequence


class Reference:
    """A frozen copy of the policy: `grpo.ref_dtype` on `grpo.ref_device`.

    Weights that lie on the CPU are on the policy's device during a forward alone.
    """

    engine: Engine | None = None

    def __init__(self, policy: Policy, config: Config):
        g = config.grpo
        self.temperature = config.rollout.temperature
        self.device = policy.device  # of the forward
        self.version = 0  # the optimizer step whose weights these are
        home = torch.device("cpu") if g.ref_device == "cpu" else policy.device
        self.model = _copy(policy.model, home, DTYPES.get(g.ref_dtype))
        if config.rollout.batch_invariant:  # the sampler's bits, as the loss takes them
            self.engine = Engine.of(replace(policy, model=self.model), config.rollout)

    def tensors(self) -> dict[str, Tensor | Shard]:
        return dict(self.model.named_parameters())

    def load(self, tensors: dict[str, Tensor], version: int) -> None:
        fill(self.tensors(), tensors)
        self.version = version

    def refresh(self, model: Decoder, version: int) -> None:
        """reference := policy, as it is after optimizer step `version`."""
        self.load(dict(model.named_parameters()), version)

    def logprobs(
        self, sequences: list[Sequence], pack: Callable[[list[Sequence]], Iterable[PackedBatch]]
    ) -> list[list[float]]:
        """Of every sequence's completion."""
        if self.engine is not None:
            logprobs = engine_logprobs(self.engine, sequences, self.temperature)
            self.engine.reset_prefix_cache()  # its packed weights are a copy of the reference
            return logprobs
        with self._on_device() as model:
            return sequence_logprobs(model, pack(sequences), self.temperature)

    @contextmanager
    def _on_device(self) -> Iterator[Decoder]:
        home = [
            (module, name, p)
            for module in self.model.modules()
            for name, p in module.named_parameters(recurse=False)
        ]
        try:
            for module, name, p in home:
                moved = p.to(self.device, non_blocking=True)
                setattr(module, name, nn.Parameter(moved, requires_grad=False))
            yield self.model
        finally:
            for module, name, p in home:  # nothing has changed, so nothing is copied back
                setattr(module, name, p)


class LoraReference(Reference):
    """The policy's own base: alone, or under a copy of the adapters as they began or were at a refresh."""

    def __init__(self, policy: Policy, config: Config, parallel: Ddp | LoraFsdp):
        self.temperature, self.version, self.model = config.rollout.temperature, 0, policy.model
        self.parallel = parallel
        self.adapters: dict[str, Tensor] = {}
        if not is_untrained(policy.model):
            self.refresh(policy.model, 0)
        if config.rollout.batch_invariant:
            self.engine = Engine.of(policy, config.rollout)

    def tensors(self) -> dict[str, Tensor]:
        return self.adapters

    def load(self, tensors: dict[str, Tensor], version: int) -> None:
        if tensors:  # none: the base alone
            check_same(lora_tensors(self.model), tensors)
        device = self.model.head_weight.device
        self.adapters = {name: x.to(device, copy=True) for name, x in tensors.items()}
        self.version = version

    def refresh(self, model: Decoder, version: int) -> None:
        self.load(lora_tensors(model), version)

    def logprobs(
        self, sequences: list[Sequence], pack: Callable[[list[Sequence]], Iterable[PackedBatch]]
    ) -> list[list[float]]:
        with exchanged(self.model, self.adapters) if self.adapters else adapters_off(self.model):
            return super().logprobs(sequences, pack)

    @contextmanager
    def _on_device(self) -> Iterator[Decoder]:
        self.parallel.gather()
        try:
            yield self.model
        finally:
            self.parallel.free()


class ShardedReference(Reference):
    """A copy that is divided as the policy is, and whole on each rank during a forward alone."""

    def __init__(self, config: Config, parallel: Divided):
        g = config.grpo
        self.temperature, self.version = config.rollout.temperature, 0
        self.parallel = parallel
        self.dtype = DTYPES.get(g.ref_dtype, parallel.dtype)
        self.on_cpu = g.ref_device == "cpu"
        self.shards: dict[str, Shard] = {}
        self.refresh(parallel.model, 0)
        self.model = hollow(parallel.model.spec, self.dtype, parallel.device)

    def tensors(self) -> dict[str, Tensor | Shard]:
        return dict(self.shards)

    def refresh(self, model: Decoder, version: int) -> None:
        assert model is self.parallel.model
        # rounded as the policy's forward rounds them
        for name, x in self.parallel.stored().items():
            home = torch.device("cpu") if self.on_cpu else x.part.device
            self.shards[name] = x.of(x.part.to(home, self.dtype, copy=True))
        self.version = version

    @contextmanager
    def _on_device(self) -> Iterator[Decoder]:
        fill_whole(self.model, self.shards)
        try:
            yield self.model
        finally:
            empty(self.model, self.shards)


def make_reference(policy: Policy, config: Config, parallel: Ddp | Divided) -> Reference:
    if config.lora.rank:
        return LoraReference(policy, config, parallel)
    if isinstance(parallel, Divided):
        return ShardedReference(config, parallel)
    return Reference(policy, config)


def engine_logprobs(
    engine: Engine, sequences: list[Sequence], temperature: float
) -> list[list[float]]:
    """Of each sequence's completion under the engine's weights, in the bits of its decoding."""
    groups = group_by_prompt(sequences)
    scored = engine.score(
        [sequences[group[0]].prompt_ids for group in groups],
        [[sequences[i].completion_ids for i in group] for group in groups],
        temperature,
    )
    indices, values = sum(groups, []), sum(scored, [])
    by_index = {i: x.tolist() for i, x in zip(indices, values, strict=True)}
    return [by_index[i] for i in range(len(sequences))]


def _copy(model: Decoder, device: torch.device, dtype: torch.dtype | None) -> Decoder:
    """Without a second copy on the model's own device on the way to another."""
    memo: dict[int, object] = {}
    for p in model.parameters():
        weights = p.detach().to(device, dtype, copy=True)
        if device != p.device and p.is_cuda:
            weights = weights.pin_memory()  # so that its way to the GPU and back overlaps
        memo[id(p)] = nn.Parameter(weights, requires_grad=False)
    return copy.deepcopy(model, memo)
