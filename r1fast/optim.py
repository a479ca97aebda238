"""AdamW with float32 master weights, gradient clipping and a warm-up + cosine schedule to a floor."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from r1fast.config import OptimConfig
from r1fast.shards import Shard


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Of optimizer step `step` (0-based) of `num_steps`: linear warm-up, then cosine to the floor."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(1, num_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    floor = config.lr * config.min_lr_ratio
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class Optimizer:
    """AdamW over named parameters. Parameters below float32 get a float32 master copy.

    `accumulate` after each micro-batch's backward adds their gradients up in float32, in
    `masters[i].grad`; float32 parameters are their own masters.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig):
        self.config = config
        self.named = [(name, p) for name, p in named_parameters if p.requires_grad]
        self.masters = [self._make_master(name, p) for name, p in self.named]
        matrices = [p for p in self.masters if p.dim() >= 2]
        vectors = [p for p in self.masters if p.dim() < 2]  # norms and biases do not decay
        self.adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def _make_master(self, name: str, p: nn.Parameter) -> Tensor:
        return p if p.dtype == torch.float32 else p.detach().float().requires_grad_()

    def _has_master(self, p: nn.Parameter) -> bool:
        """Whether a checkpoint holds its master beside it."""
        return p.dtype != torch.float32

    @torch.no_grad()
    def accumulate(self) -> None:
        """Move gradients below float32 to their masters: a sum in bfloat16 loses small terms."""
        for (_, p), master in zip(self.named, self.masters, strict=True):
            if p is master or p.grad is None:
                continue
            grad = self._grad(p)
            if master.grad is None:
                master.grad = grad.float()
            else:
                master.grad += grad
            p.grad = None

    def spoil(self) -> None:
        """Make the gradient of this step non-finite, on every rank once summed: it is then skipped."""
        p = self.named[0][1]
        p.grad = torch.full_like(p, math.nan)

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:  # () float32
        """Clip, update, clear. Returns the gradient's norm before clipping, on its device.

        A gradient that is not finite is not applied: weights and moments stay as they were. Nothing here
        waits for the device: the fused kernel reads there what to divide by and whether to do anything.
        """
        self.accumulate()
        grads = [m.grad for m in self.masters if m.grad is not None]
        if not grads:
            return torch.zeros(())
        norm = self._norm(grads)
        limit = self.config.max_grad_norm
        self.adamw.grad_scale = ((norm + 1e-6) / limit).clamp(min=1) if limit else None
        self.adamw.found_inf = norm.isfinite().logical_not().float()
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self._update()
        self.zero_grad()
        return norm

    def _grad(self, p: nn.Parameter) -> Tensor:
        return p.grad

    def _norm(self, grads: list[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(grads)

    def _update(self) -> None:
        self.adamw.step()
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        """The masters become the weights."""
        for (_, p), master in zip(self.named, self.masters, strict=True):
            if p is not master:
                p.copy_(master)

    def zero_grad(self) -> None:
        for (_, p), master in zip(self.named, self.masters, strict=True):
            p.grad = master.grad = None

    def state_tensors(self) -> dict[str, Tensor | Shard]:
        """Everything a resumed run needs, as named tensors."""
        tensors = {}
        for (name, p), master in zip(self.named, self.masters, strict=True):
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value if key == "step" else self._stored(name, value)
            if self._has_master(p):
                tensors[f"master.{name}"] = self._stored(name, master.detach())
        return tensors

    def _shape(self, name: str, p: nn.Parameter) -> torch.Size:
        """Of what a checkpoint holds of it."""
        return p.shape

    def _stored(self, name: str, x: Tensor) -> Tensor | Shard:
        """What a checkpoint holds of a master, or of a moment of it."""
        return x

    def _loaded(self, name: str, whole: Tensor) -> Tensor:
        """What is taken of it again."""
        return whole

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, p in self.named:
            first = f"master.{name}"
            needed = {first} if self._has_master(p) else set()
            if f"step.{name}" in tensors:
                needed |= {f"exp_avg.{name}", f"exp_avg_sq.{name}"}
            for key in needed:
                shape = self._shape(name, p)
                if key not in tensors or tensors[key].shape != shape:
                    found = tuple(tensors[key].shape) if key in tensors else "nothing"
                    raise ValueError(
                        f"the optimizer state has {found} for {key!r}, not {tuple(shape)}"
                    )
            step = tensors.get(f"step.{name}", torch.zeros(()))
            if step.shape or step.dtype != torch.float32 or not 0 <= step.item() < math.inf:
                raise ValueError(
                    f"the optimizer state must have one float32 number of at least 0 for 'step.{name}', "
                    f"got {step.dtype} of {tuple(step.shape)}"
                )
        self.adamw.state.clear()
        for (name, p), master in zip(self.named, self.masters, strict=True):
            if self._has_master(p):
                master.data.copy_(self._loaded(name, tensors[f"master.{name}"]))
            if f"step.{name}" in tensors:
                moments = {
                    key: self._loaded(name, tensors[f"{key}.{name}"]).to(master).clone()
                    for key in ("exp_avg", "exp_avg_sq")
                }
                step = tensors[f"step.{name}"].to(master.device, copy=True)
                self.adamw.state[master] = {"step": step, **moments}
