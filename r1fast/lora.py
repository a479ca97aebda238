"""Low-rank adapters (LoRA) on a decoder: put on, switch off or exchange, merge. The base is frozen.

    W' = W + s B A        A (r, D), B (N, r), s = alpha / r, or alpha / sqrt(r) with rslora

Adapters are of Hugging Face's projections: of a fused layer each one has its own, and they share one
module. A begins uniform in +-1/sqrt(D) and B at zero, as in PEFT, so that training begins at the base.
They are float32 whatever the base is. There is no dropout: the sampler's policy is the one that is
trained, token for token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from r1fast.config import LoraConfig
from r1fast.config_check import lora_targets
from r1fast.kernels.linear import add_product_, linear_fwd
from r1fast.kernels.lora_linear import lora_linear, wide_factor


class Adapter(nn.Module):
    """The adapters of one layer's linear, which may hold several projections."""

    def __init__(
        self, lora: LoraConfig, in_features: int, parts: Mapping[str, tuple[int, int]], device
    ):
        super().__init__()
        self.lora, self.parts = lora, dict(parts)  # projection -> [start, end) of the outputs
        self.scale = lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)
        num_out = sum(end - start for start, end in self.parts.values())
        factory = {"dtype": torch.float32, "device": device}
        self.A = nn.Parameter(torch.empty(len(self.parts) * lora.rank, in_features, **factory))
        self.B = nn.Parameter(torch.zeros(num_out, lora.rank, **factory))
        self.instead: tuple[Tensor, Tensor] | None = None  # of A and B, see `exchanged`
        self.stack: tuple[Tensor, Tensor] | None = None  # of both, see `with_stacks`
        self.is_on = True

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A and B as they count now; None: the layer is its base alone."""
        return (self.instead or (self.A, self.B)) if self.is_on else None

    def forward(self, x: Tensor, linear: nn.Linear) -> Tensor:  # (T, D) -> (T, N)
        if self.stack is not None:
            A, B = self.stack
            y, h = linear_fwd(x, linear.weight, linear.bias), linear_fwd(x, A, None)
            return add_product_(y, h, B.t())
        A, B = self.factors
        parts = list(self.parts.values())
        return lora_linear(x, linear.weight, linear.bias, A, B, parts, self.scale)

    def of_part(self, name: str) -> tuple[Tensor, Tensor]:  # (r, D), (N_p, r)
        """Views of a projection's own A and B: writing to them writes the adapter."""
        p, r = list(self.parts).index(name), self.lora.rank
        sizes = [end - start for start, end in self.parts.values()]
        return self.A.detach()[p * r : (p + 1) * r], self.B.detach().split(sizes)[p]

    def merged(self, weight: Tensor, name: str) -> Tensor:  # (N_p, D) -> (N_p, D)
        """A projection's weight with its adapter in it: added in float32, rounded once."""
        A, B = (x.float() for x in self.of_part(name))
        return torch.addmm(weight.float(), B, A, alpha=self.scale).to(weight.dtype)

    @torch.no_grad()
    def stacked(self, num_out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """(P r, D) and (N, P r) for a forward without gradients: y = x W^T + (x A^T) B^T.

        The factors as they count now, rounded as in `lora_linear`; B has the scale and is block-diagonal.
        """
        if self.factors is None:
            return None
        A, B = self.factors
        B = (B * self.scale).to(dtype)
        return A.to(dtype), wide_factor(B, list(self.parts.values()), num_out)


def add_lora(model: nn.Module, lora: LoraConfig, *, seed: int = 0) -> None:
    """Freeze `model`, a Decoder, and put new adapters on it.

    Raises ValueError for a rank or targets that cannot be, and where it has adapters already.
    """
    if lora.rank < 1 or not lora.alpha > 0:
        raise ValueError(
            f"adapters need a rank of at least 1 and an alpha above 0, got {lora.rank} and {lora.alpha}"
        )
    if (old := lora_of(model)) is not None:
        raise ValueError(f"the model has adapters already ({old}); merge_lora makes it a plain one")
    lora = replace(lora, targets=lora_targets(lora.targets))
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on any device
    model.requires_grad_(False)
    for layer in model.layers:
        for linear, _, widths in layer.projections():
            ends = accumulate(widths.values())
            spans = {n: (end - widths[n], end) for n, end in zip(widths, ends, strict=True)}
            parts = {name: span for name, span in spans.items() if name in lora.targets}
            if parts:
                adapter = Adapter(lora, linear.in_features, parts, linear.weight.device)
                bound = 1 / math.sqrt(linear.in_features)
                if not adapter.A.is_meta:
                    A = torch.empty(adapter.A.shape).uniform_(-bound, bound, generator=generator)
                    adapter.A.data.copy_(A)
                linear.adapter = adapter


def share_adapters(model: nn.Module, other: nn.Module) -> None:
    """Put the adapters of `model` on `other`, a decoder of its shape, too: they are the same modules."""
    for layer, same in zip(model.layers, other.layers, strict=True):
        for (linear, _, _), (its, _, _) in zip(
            layer.projections(), same.projections(), strict=True
        ):
            its.adapter = linear.adapter


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """(the prefix of its projections' Hugging Face names, adapter) of every linear that has one."""
    for layer in model.layers:
        for linear, block, _ in layer.projections():
            if linear.adapter is not None:
                yield f"model.layers.{layer.index}.{block}.", linear.adapter


def lora_of(model: nn.Module) -> LoraConfig | None:
    """What its adapters are, with the targets one by one; None: it has none."""
    return next((adapter.lora for _, adapter in adapters(model)), None)


def is_untrained(model: nn.Module) -> bool:
    """Whether its adapters change nothing yet, as every B is zero."""
    return not any(bool(adapter.B.any()) for _, adapter in adapters(model))


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the adapters to their weights, in float32, and take them off: a plain model, not frozen."""
    for layer in model.layers:
        for linear, _, _ in layer.projections():
            if linear.adapter is not None:
                for name, (start, end) in linear.adapter.parts.items():
                    weight = linear.weight[start:end]
                    weight.copy_(linear.adapter.merged(weight, name))
    drop_lora(model)


def drop_lora(model: nn.Module) -> None:
    """Take the adapters off: the base, not frozen."""
    for layer in model.layers:
        for linear, _, _ in layer.projections():
            linear.adapter = None
    model.requires_grad_(True)


def merged_weights(model: nn.Module) -> Callable[[str, Tensor], Tensor]:
    """(Hugging Face's name, base weight) -> the weight with its adapter, one at a time: no second model."""
    found = {f"{at}{p}.weight": (a, p) for at, a in adapters(model) for p in a.parts}

    def merged(name: str, weight: Tensor) -> Tensor:
        if name not in found:
            return weight
        adapter, part = found[name]
        return adapter.merged(weight, part)

    return merged


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it the model is its base, bit for bit."""
    found = [adapter for _, adapter in adapters(model)]
    before = [adapter.is_on for adapter in found]
    try:
        for adapter in found:
            adapter.is_on = False
        yield
    finally:
        for adapter, is_on in zip(found, before, strict=True):
            adapter.is_on = is_on


@contextmanager
def exchanged(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it the model has other A and B: `tensors`, named as by `lora_tensors`."""
    named = {name: m for name, m in model.named_modules() if isinstance(m, Adapter)}
    try:
        for name, adapter in named.items():
            adapter.instead = tensors[f"{name}.A"], tensors[f"{name}.B"]
        yield
    finally:
        for adapter in named.values():
            adapter.instead = None


def stacks(model: nn.Module) -> list[tuple[Tensor, Tensor] | None]:
    """`Adapter.stacked` of every adapter."""
    return [
        linear.adapter.stacked(len(linear.weight), linear.weight.dtype)
        for layer in model.layers
        for linear, _, _ in layer.projections()
        if linear.adapter is not None
    ]


@contextmanager
def with_stacks(model: nn.Module, stacks: Sequence[tuple[Tensor, Tensor] | None]) -> Iterator[None]:
    """Within it adapters count as in `stacks`, and are two products a layer. Without gradients."""
    found = [adapter for _, adapter in adapters(model)]
    try:
        for adapter, stack in zip(found, stacks, strict=True):
            adapter.stack = stack
        yield
    finally:
        for adapter in found:
            adapter.stack = None


def lora_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapter under the model's own names, detached."""
    return {
        f"{name}.{key}": p.detach()
        for name, module in model.named_modules()
        if isinstance(module, Adapter)
        for key, p in module.named_parameters()
    }
