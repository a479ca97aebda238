"""The language-model head in chunks of rows: log-probabilities, entropies and their gradients.

Anchored: c, close to the logsumexp, is known before the big GEMM, so exp needs no running maximum
and what the GEMM leaves behind is E = exp(z - c) with the target's column 0. With s its row sum:

    e_y = exp(z_y - c);  S = s + e_y;  logp = log(e_y / S);  1 - p_y = s / S  (no cancellation)
    H = log S - (sum e (z - c)) / S

    dz_j = E_j / S (-g - h (H - log S) - h log E_j),  j != y;  g = dloss/dlogp, h = dloss/dH
    dz_y = g (1 - p_y) - h p_y (log p_y + H)          added apart, in float32

Without h the factor of E_j is one number a row, so both backward products take E as it is:
dX = v (E W), dW = E^T (v X), v = -g / S. Rows with g = h = 0 leave before them, unless
the host would have to ask a GPU which they are: there they are multiplied by 0.

c = z_y - old_logprob, or z_y where there is none; a row whose S shows that c was far off is done
again with the true logsumexp. Asking for that after each chunk would leave a GPU idle until the host has
queued the next one, so there all chunks are computed `deferred`, and asked for once (`held`).

Over a process group each rank holds a contiguous slice of the vocabulary, and two sums of (R,) numbers make the
rows whole.
Shapes: R rows of a chunk, N rows in all, D width, V vocabulary (of this rank).
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from r1fast.kernels import cpu_head, torch_head
from r1fast.kernels.dispatch import Backend, use_triton
from r1fast.kernels.loss_rows import NonFiniteError

DEFERS = {"cuda"}  # devices that the host should not wait for within a call
S_RANGE = (1e-20, 1e20)  # outside, the anchor was too far off for float32
SMALL_BYTES = 4 << 20  # of exponentials: not worth dividing
CPU_ROWS = 16  # the C++ kernels work on so many at a time, best in an odd number of such parts
NARROW_BYTES = 1 << 20  # of float32 that is rounded to bfloat16 in place: fresh memory is slow
COMPACT_BELOW = 7 / 8  # share of live rows under which moving them pays


@dataclass
class ChunkStats:
    """What the forward of a chunk leaves for its backward. Shapes (R,)."""

    logprobs: Tensor
    entropy: Tensor | None
    log_S: Tensor
    S: Tensor
    s: Tensor
    p_target: Tensor
    slope: Tensor | None  # of the softcap at the target
    E: object | None


def head_module(x: Tensor, backend: Backend):
    """Which implementation computes a chunk: the one dispatch rule of the head."""
    if use_triton(x, backend):
        if x.dtype == torch.float64:
            if backend == "auto":
                return torch_head.EXACT
            raise ValueError("backend triton has no float64: take backend='torch'")
        if not x.is_cuda and not triton.knobs.runtime.interpret:
            raise ValueError(
                f"backend triton needs a CUDA tensor, got one on {x.device}; for Triton's "
                "interpreter set TRITON_INTERPRET=1 before triton is imported"
            )
        from r1fast.kernels import triton_head

        return triton_head
    if backend == "native" and (x.is_cuda or not cpu_head.supported(x.dtype)):
        raise ValueError(
            f"backend native needs a CPU tensor of float32 or bfloat16, and AVX2; "
            f"got {x.dtype} on {x.device}. Take backend='auto' or 'torch'"
        )
    if backend == "native" or (backend == "auto" and not x.is_cuda and cpu_head.supported(x.dtype)):
        return cpu_head
    return torch_head.FAST if backend == "fast" else torch_head.EXACT


class VocabHead:
    """One op call: N rows of hidden states against one weight, a chunk at a time.

    `backward` calls accumulate into dhidden, dweight and dbias, which `gradients` returns.
    """

    def __init__(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        target_ids: Tensor,  # (N,), global
        *,
        bias: Tensor | None = None,
        temperature: float = 1.0,
        softcap: float | None = None,
        backend: Backend = "auto",
        process_group: dist.ProcessGroup | None = None,
        needs: tuple[bool, bool, bool] = (True, True, True),  # gradients of hidden, weight, bias
        row_numbers: Tensor | None = None,  # (N,) what the caller calls the rows, for messages
        finite_logprobs: bool = False,  # whether a target of probability 0 is an error
        deferred: bool = False,  # chunks do not wait for the device; without `held` all is void
    ):
        self.hidden, self.weight, self.bias = hidden.detach(), weight.detach(), bias
        if bias is not None:
            self.bias = bias.detach()
        self.temperature, self.softcap, self.group = temperature, softcap, process_group
        self.module = head_module(hidden, backend)
        self.in_triton = use_triton(hidden, backend) and self.module is not torch_head.EXACT
        if self.module is cpu_head:  # the C++ reads whole rows
            self.hidden, self.weight = (
                x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
                for x in (self.hidden, self.weight)
            )
        self.wide = torch.promote_types(hidden.dtype, torch.float32)
        self.target_ids, self.max_V = target_ids, len(weight)
        if process_group is not None:
            self._find_slice(target_ids, process_group)
        self.need_hidden, self.need_weight, self.need_bias = needs
        self.row_numbers, self.finite_logprobs = row_numbers, finite_logprobs
        self.deferred, self._good = deferred, []
        self.dhidden = self.dweight = self.dbias = self._workspace = None

    def _find_slice(self, target_ids: Tensor, group: dist.ProcessGroup) -> None:
        """Targets in this rank's slice of the vocabulary, -1 for the others."""
        rank = dist.get_rank(group)
        sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=target_ids.device)
        sizes[rank] = len(self.weight)
        dist.all_reduce(sizes, group=group)
        sizes = sizes.tolist()
        if len(target_ids) and not 0 <= int(target_ids.min()) <= int(target_ids.max()) < sum(sizes):
            raise ValueError(
                f"target_ids must be in [0, {sum(sizes)}), the vocabulary of all ranks; got values "
                f"from {int(target_ids.min())} to {int(target_ids.max())}"
            )
        local = target_ids - sum(sizes[:rank])
        self.target_ids = torch.where((local >= 0) & (local < sizes[rank]), local, -1)
        self.max_V = max(sizes)

    def rows_per_chunk(self, num_rows: int, workspace_bytes: int | None) -> int:
        """By default an eleventh of many rows: then all memory stays under an eighth of the logits.

        Small chunks read and write dweight more often and have more fixed costs, so there is a lower
        limit, and chunks are even.
        """
        if workspace_bytes is None:
            least = 2048
            if not self.hidden.is_cuda:
                least = (13 if num_rows >= 2048 else 17) * CPU_ROWS
            least = max(least, int(SMALL_BYTES / self._bytes_per_row()))
            rows = min(max(least, math.ceil(num_rows / 11)), max(least, 4096))
        else:
            rows = max(1, int(workspace_bytes / self._bytes_per_row()))
        num_chunks = max(1, math.ceil(num_rows / rows))
        rows = max(1, math.ceil(num_rows / num_chunks))
        if workspace_bytes is None and not self.hidden.is_cuda:
            rows = math.ceil(rows / CPU_ROWS) * CPU_ROWS
        return rows

    def bytes_of(self, num_rows: int) -> int:
        """Memory of E for so many rows."""
        dtype = self.hidden.dtype
        numel = self.module.workspace_numel(num_rows, self.max_V, dtype)
        return numel * self.module.workspace_dtype(dtype).itemsize

    def _bytes_per_row(self) -> float:
        """Of a chunk: a single row would be padded to several."""
        many = 63 * CPU_ROWS
        return self.bytes_of(many) / many

    def forward(
        self,
        rows: slice,
        old_logprobs: Tensor | None = None,  # (R,) finite
        *,
        keep: bool,
        want_entropy: bool,
        own_workspace: bool = False,  # or in the one that the next chunk will overwrite
    ) -> ChunkStats:
        """Statistics of `hidden[rows]`; with `keep`, E too. Raises NonFiniteError."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            return self._forward(rows, old_logprobs, keep, want_entropy, own_workspace)

    def _forward(self, rows, old_logprobs, keep, want_entropy, own_workspace) -> ChunkStats:
        h, y = self.hidden[rows], self.target_ids[rows]
        z, slope = self._target_logits(h, y)
        c = z if old_logprobs is None else z - old_logprobs.to(self.wide)
        stats, good = self._stats(h, y, z, c, slope, keep, want_entropy, own_workspace)
        if self.deferred:
            self._good.append(good.all())
            return stats
        if bool(good.all()):
            return stats
        bad = (~good).nonzero()[:, 0]
        exact = c.clone()
        exact[bad] = self._logsumexp(h[bad], rows.start + bad)
        stats.E = None
        stats, good = self._stats(h, y, z, exact, slope, keep, want_entropy, own_workspace)
        if not bool(good.all()):
            first = int((~good).nonzero()[0])
            row = self._row(rows.start + first)
            if float(stats.logprobs[first]) == -math.inf:
                raise NonFiniteError(
                    f"row {row}: its target has probability 0, so its loss is infinite; mask the "
                    "row, or look for a logit or bias of minus infinity"
                )
            for name, x in (("weight", self.weight), ("bias", self.bias)):
                if x is not None and not bool(x.isfinite().all()):
                    raise NonFiniteError(f"{name} holds NaN or Inf")
            raise NonFiniteError(
                f"row {row}: its logits over the temperature overflow {self.wide}; "
                f"temperature is {self.temperature:g}"
            )
        return stats

    def held(self) -> bool:
        """Whether the anchors of all chunks were good; if not, a head that is not deferred has to do them."""
        return not self._good or bool(torch.stack(self._good).all())

    def _stats(self, h, y, z, c, slope, keep, want_entropy, own_workspace):
        with torch.cuda.device_of(h):  # where Triton launches
            s, sz, E = self.module.forward(
                h, self.weight, self.bias, y, c,
                inv_temperature=1 / self.temperature, softcap=self.softcap,
                keep=keep, want_sz=want_entropy,
                workspace=self._take_workspace(len(h), own_workspace) if keep else None,
            )  # fmt: skip
        if self.group is not None:
            both = torch.stack([s, sz]) if want_entropy else s[None]
            dist.all_reduce(both, group=self.group)
            s, sz = both[0], both[1] if want_entropy else None
        e = (z - c).exp()
        S = s + e
        log_S = S.log()
        logprobs = torch.where(s <= e, -torch.log1p(s / e), z - c - log_S)
        good = (S > S_RANGE[0]) & (S < S_RANGE[1])
        entropy = None
        if want_entropy:
            entropy = log_S - (sz + torch.where(e > 0, e * (z - c), 0)) / S
        if self.finite_logprobs:
            good &= logprobs.isfinite()
        return ChunkStats(logprobs, entropy, log_S, S, s, e / S, slope, E), good

    def _take_workspace(self, R: int, own: bool) -> Tensor:
        dtype = self.hidden.dtype
        numel = self.module.workspace_numel(R, len(self.weight), dtype)
        if own:
            return self._empty(numel, self.module.workspace_dtype(dtype))
        if self._workspace is None or self._workspace.numel() < numel:
            self._workspace = None
            self._workspace = self._empty(numel, self.module.workspace_dtype(dtype))
        return self._workspace

    def _empty(self, shape, dtype: torch.dtype) -> Tensor:
        if self.hidden.is_cuda:
            return torch.empty(shape, dtype=dtype, device=self.hidden.device)
        return cpu_head.empty(shape, dtype)

    def _target_logits(self, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:  # (R,), (R,)
        """z_y / temperature in the wide dtype, and the softcap's slope there."""
        u = (h.to(self.wide) * self.weight[y.clamp(min=0)].to(self.wide)).sum(1)
        if self.bias is not None:
            u = u + self.bias[y.clamp(min=0)]
        if self.group is not None:
            u = torch.where(y >= 0, u, 0)
            dist.all_reduce(u, group=self.group)
        slope = None
        if self.softcap is not None:
            u = self.softcap * torch.tanh(u / self.softcap)
            slope = 1 - (u / self.softcap) ** 2
        return u / self.temperature, slope

    def _logits(self, h: Tensor) -> Tensor:  # (R, D) -> (R, V)
        """All logits of a few rows, capped, over the temperature, in the wide dtype."""
        z = torch_head.logits(h, self.weight, self.wide)
        if self.bias is not None:
            z = z + self.bias
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature

    def _logsumexp(self, h: Tensor, numbers: Tensor) -> Tensor:  # (R,)
        finite = h.isfinite().all(1)
        if not finite.all():
            row = self._row(int(numbers[~finite][0]))
            raise NonFiniteError(
                f"hidden holds NaN or Inf in row {row}; look for the first layer that overflows, or "
                "mask the row"
            )
        return torch.cat([self._lse_of(self._logits(part)) for part in h.split(64)])

    def _row(self, n: int) -> int:
        return n if self.row_numbers is None else int(self.row_numbers[n])

    def backward(
        self,
        rows: slice,
        stats: ChunkStats,
        dlogprobs: Tensor,  # (R,)
        dentropy: Tensor | None = None,  # (R,)
    ) -> None:
        """Adds this chunk's gradients. Uses up `stats.E`."""
        kind = self.hidden.device.type
        with torch.cuda.device_of(self.hidden), torch.autocast(kind, enabled=False):
            self._backward(rows, stats, dlogprobs, dentropy)

    def _backward(self, rows, stats, dlogprobs, dentropy):
        g = dlogprobs.to(self.wide)
        h = None if dentropy is None else dentropy.to(self.wide)
        x, y, E = self.hidden[rows], self.target_ids[rows], stats.E
        fields = (stats.S, stats.log_S, stats.s, stats.p_target, stats.logprobs)
        entropy, slope, index = stats.entropy, stats.slope, None
        if not self.deferred:
            live = g != 0 if h is None else (g != 0) | (h != 0)
            num_live = int(live.sum())
            if not num_live:
                return
            if num_live < COMPACT_BELOW * len(live):
                index = live.nonzero()[:, 0]
        if index is not None:
            E.compact(index)
            x, y, g = x[index], y[index], g[index]
            fields = tuple(f[index] for f in fields)
            h, entropy, slope = (f if f is None else f[index] for f in (h, entropy, slope))
        S, log_S, s, p, logp = fields
        onehot = g * (s / S)
        if h is None:
            v = -g / (S * self.temperature)
        else:
            onehot = onehot - h * p * (logp + entropy)
            a = -(g + h * (entropy - log_S)) / (S * self.temperature)
            b = -h / (S * self.temperature)
            if self.softcap is None:
                E.affine(a, b)
            else:  # E holds the softcap's slope, so its logarithm is not z
                E = torch_head.DenseE(self._softcap_gradient(x, y, a, b, S, log_S))
            v = torch.ones_like(g)
        onehot = onehot / self.temperature
        if slope is not None:
            onehot = onehot * slope
        mine = (y >= 0).to(onehot.dtype) * onehot
        at = y.clamp(min=0)
        if self.need_hidden:
            if self.dhidden is None:
                self.dhidden = self._new_dhidden()
            self._store_dhidden(E.dhidden(self.weight), v, at, mine, rows, index)
        if self.need_weight:
            first = self.dweight is None
            if first:
                self.dweight = self._empty(self.weight.shape, self.wide)
            E.dweight_(self._scaled(x, v), self.dweight, accumulate=not first)
            _add_rows(self.dweight, at, x.to(self.wide) * mine[:, None])
        if self.need_bias:
            first = self.dbias is None
            if first:
                self.dbias = self._empty(self.weight.shape[:1], self.wide)
            E.dbias_(v, self.dbias, accumulate=not first)
            _add_rows(self.dbias, at, mine)

    def _scaled(self, x: Tensor, v: Tensor) -> Tensor:  # (R, D), (R,)
        if not self.in_triton:
            return x * v[:, None]
        from r1fast.kernels.triton_rows import scaled_rows

        return scaled_rows(x, v)

    def _store_dhidden(self, out, v, at, mine, rows, index) -> None:
        """out v + W_at mine, into the rows of dhidden."""
        if self.in_triton:
            from r1fast.kernels.triton_rows import store_dhidden

            store_dhidden(out, v, self.weight, at, mine, self.dhidden[rows], index)
            return
        out = out.mul_(v[:, None]).addcmul_(self.weight[at].to(self.wide), mine[:, None])
        if index is None:
            self.dhidden[rows] = out
        else:
            self.dhidden[rows.start + index] = out.to(self.dhidden.dtype)

    def _softcap_gradient(self, x, y, a, b, S, log_S) -> Tensor:  # (R, V)
        """dz of an entropy under a softcap, from the logits once more; the target's column is 0."""
        parts = []
        for n in range(0, len(x), 64):
            z = self._logits(x[n : n + 64])
            # a and b hold 1 / S; log E = z - c, and log S = lse - c
            lse = self._lse_of(z)
            shifted = z - lse[:, None] + log_S[n : n + 64, None]
            dz = shifted.exp() * (a[n : n + 64, None] + b[n : n + 64, None] * shifted)
            dz *= 1 - (z * self.temperature / self.softcap) ** 2
            here = (y[n : n + 64] >= 0).nonzero()[:, 0]
            dz[here, y[n : n + 64][here]] = 0
            parts.append(dz)
        return torch.cat(parts)

    def _lse_of(self, z: Tensor) -> Tensor:
        lse = z.logsumexp(1)
        if self.group is None:
            return lse
        top = lse.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        total = (lse - top).exp()
        dist.all_reduce(total, group=self.group)
        return top + total.log()

    def _new_dhidden(self) -> Tensor:
        """In float32 where ranks will be summed or a loss scale may follow (float16)."""
        wide = self.group is not None or self.hidden.dtype == torch.float16
        dtype = self.wide if wide else self.hidden.dtype
        return torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dhidden, dweight and dbias): what was asked for, the last two in the wide dtype.

        Hands them over: the next `backward` begins at zero.
        """
        if self.need_hidden and self.dhidden is None:
            self.dhidden = self._new_dhidden()
        if self.need_weight and self.dweight is None:
            self.dweight = torch.zeros_like(self.weight, dtype=self.wide)
        if self.need_bias and self.dbias is None:
            self.dbias = torch.zeros_like(self.weight[:, 0], dtype=self.wide)
        if self.need_hidden and self.group is not None:
            dist.all_reduce(self.dhidden, group=self.group)
        result = self.dhidden, self.dweight, self.dbias
        self.dhidden = self.dweight = self.dbias = self._workspace = None
        return result


def _add_rows(out: Tensor, index: Tensor, values: Tensor) -> None:
    """out[index] += values, in a fixed order: index_add_ uses atomics on CUDA, index_put_ sorts."""
    if out.is_cuda:
        # what index_put_ does, but for asking the device whether the indices are in range
        torch._index_put_impl_(out, [index], values, accumulate=True, unsafe=True)
    else:
        out.index_add_(0, index, values)


def grad_dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """The dtype autograd wants of each gradient: the tensor's, or its `grad_dtype` where set.

    A bfloat16 parameter with `grad_dtype = torch.float32` gets the float32 sum itself. Only a leaf
    may be asked.
    """
    found = []
    for x in tensors:
        wanted = getattr(x, "grad_dtype", None) if x is not None and x.is_leaf else None
        found.append(None if x is None else wanted or x.dtype)
    return tuple(found)


def to_dtypes(
    gradients: tuple[Tensor | None, ...], dtypes: tuple[torch.dtype | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients in the dtypes asked for; they are used up. A large one on the CPU stays in its memory."""
    found = []
    for x, dtype in zip(gradients, dtypes, strict=True):
        narrow = x is not None and (x.dtype, dtype) == (torch.float32, torch.bfloat16)
        if narrow and x.is_cpu and x.is_contiguous() and x.nbytes >= NARROW_BYTES:
            found.append(cpu_head.narrow_to_bf16(x))
        else:
            found.append(x if x is None else x.to(dtype))
    return tuple(found)


def gradients_needed(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Asked outside of autograd.Function.apply, which does not know of torch.no_grad."""
    return tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors)
