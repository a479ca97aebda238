"""Decode steps as CUDA graphs: captured once for a bucket of shapes, then replayed with other contents.

A decode step is hundreds of short kernels, and starting them one by one takes longer than they run where the batch
is small. A graph starts them at once, but fixes their shapes and addresses. So a step is padded to a bucket
of rows, of blocks a row and of shared blocks, and its inputs are copied into memory that stays where it is:
one copy from pinned memory. The weights are read where they lie, so training them in place leaves a graph valid.

Where tokens are drawn by the temperature alone, the draw is part of the graph, and so is making the next step's
inputs of it (kernels/advance.py): `draws` replays it for several steps before the host looks at any of them.

Rows that only fill up a bucket have a context of 0: they see nothing, nobody sees them, and their keys and values
go to the cache's scratch slot.
Shapes: B running rows, R rows and M blocks a row of the bucket, K steps, V vocabulary.
"""

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from r1fast.kernels.advance import StepState, advance
from r1fast.kernels.paged_attention import DecodePlan
from r1fast.kernels.sample import sample
from r1fast.rollout.decode_step import DecodeStep, Inputs
from r1fast.rollout.kv_cache import KVCache

# inputs and plan of a step, and the cache -> (R, V) logits
Forward = Callable[[Inputs, DecodePlan, KVCache], Tensor]
# captures a callable: (what computes its result again, the result, always in the same memory)
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
Bucket = tuple[int, int, int]  # R, M, most shared blocks

DOUBLING_ROWS = 16  # up to here buckets of rows double, from here on there is one between
LEAST_POSITIONS = 512  # of a row in the smallest bucket: what one program of the kernel reads
MAX_STEPS = 8  # between two looks of the host: what it costs is an eighth then
MAX_GRAPHS = 128  # each takes some memory of the driver; other shapes then run without
ALIGNMENT = 16  # bytes


class DecodeGraphs:
    """The graphs of one model and cache. `make_capture` is called when the first one is captured."""

    def __init__(
        self,
        make_capture: Callable[[], Capture],
        *,
        max_rows: int,
        max_positions: int,
        device: torch.device,
    ):
        self.make_capture, self.device = make_capture, device
        self.max_positions = max_positions
        self.row_ladder = row_ladder(max_rows)
        self.can_capture = True
        self.clear()

    def clear(self) -> None:
        """Forget the graphs: what they read or write has moved."""
        self._graphs: dict[tuple[Bucket, bool], Graph] = {}  # bool: whether it draws
        self._cache: KVCache | None = None
        self._capture: Capture | None = None  # with the memory that the graphs share

    @property
    def buckets(self) -> list[Bucket]:
        """Those that have been captured."""
        return list(dict.fromkeys(bucket for bucket, _ in self._graphs))

    def bucket_of(self, step: DecodeStep, block_size: int) -> Bucket | None:
        """None: the step does not fit into any."""
        num_rows = next((r for r in self.row_ladder if r >= len(step.context)), None)
        if num_rows is None or step.query_starts is not None:
            return None
        least, most = (-(-n // block_size) for n in (LEAST_POSITIONS, self.max_positions))
        width, shared = (
            _rung(n, least, most) for n in (step.table.shape[1], int(step.shared_blocks.max()))
        )
        return num_rows, width, shared

    def logits(self, step: DecodeStep, cache: KVCache, forward: Forward) -> Tensor | None:
        """(B, V) in memory that the next call uses again, or None where the step has to run without."""
        graph = self._graph_of(step, cache, forward, draws=False)
        if graph is None:
            return None
        graph.fill(step)
        graph.replay()
        return graph.result[: len(step.context)]

    def draws(
        self,
        step: DecodeStep,  # the first one, with blocks in its table for all
        u: np.ndarray,  # (K, B) float64 uniforms, K up to MAX_STEPS
        temperature: np.ndarray,  # (B,) float32
        cache: KVCache,
        forward: Forward,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Tokens, log-probabilities and whether the logits were bad, (K, B) each, of K steps in a row.

        None where they have to run without.
        """
        graph = self._graph_of(step, cache, forward, draws=True)
        if graph is None:
            return None
        graph.fill(step, u, temperature)
        for _ in range(len(u)):
            graph.replay()
        return graph.read(*u.shape)

    def _graph_of(
        self, step: DecodeStep, cache: KVCache, forward: Forward, *, draws: bool
    ) -> "Graph | None":
        """The graph of the step's bucket, captured if need be."""
        if cache is not self._cache:
            self.clear()
            self._cache = cache
        bucket = self.bucket_of(step, cache.block_size)
        graph = self._graphs.get((bucket, draws))
        if graph is not None or bucket is None:
            return graph
        if not self.can_capture or len(self._graphs) >= MAX_GRAPHS:
            return None
        try:
            graph = Graph(bucket, cache.scratch_slot, self.device, draws=draws)
            graph.fill(step)
            self._capture = self._capture or self.make_capture()
            graph.capture(forward, cache, self._capture)
        except RuntimeError as error:  # also of CUDA, and out of its memory
            self.can_capture = False
            warnings.warn(f"decoding without CUDA graphs: {error}", stacklevel=2)
            return None
        self._graphs[bucket, draws] = graph
        return graph


class Graph:
    """One bucket: its inputs, and what was captured over them. With `draws` its results too."""

    def __init__(
        self, bucket: Bucket, scratch_slot: int, device: torch.device, *, draws: bool = False
    ):
        R, M, max_shared = bucket
        self.num_rows, self.scratch_slot = R, scratch_slot
        parts = {
            "tokens": (torch.int64, R), "positions": (torch.int64, R), "slots": (torch.int64, R),
            "context": (torch.int32, R), "group_starts": (torch.int32, R + 1),
            "shared_blocks": (torch.int32, R), "table": (torch.int32, R, M),
        }  # fmt: skip
        if draws:
            parts |= {
                "step": (torch.int64, 1), "u": (torch.float64, MAX_STEPS, R),
                "temperature": (torch.float32, R),
            }  # fmt: skip
        on_gpu = device.type == "cuda"
        self._host, host = _carve(parts, pin_memory=on_gpu)
        self._device, self.tensors = _carve(parts, device=device)
        self.arrays = {name: x.numpy() for name, x in host.items()}
        self._copied = torch.cuda.Event() if on_gpu else None
        t = self.tensors
        self.inputs = Inputs(t["tokens"], t["positions"], t["slots"])
        # a group for each row: how many there are is no part of the shape
        self.plan = DecodePlan(
            t["table"], t["context"], t["group_starts"], t["shared_blocks"],
            max_shared_blocks=max_shared,
        )  # fmt: skip
        self.state: StepState | None = None
        if draws:
            shape = MAX_STEPS, R
            parts = {
                "tokens": (torch.int64, *shape), "logprobs": (torch.float32, *shape),
                "bad": (torch.uint8, *shape),
            }  # fmt: skip
            self._host_results, host = _carve(parts, pin_memory=on_gpu)
            self._results, results = _carve(parts, device=device)
            self.results = {name: x.numpy() for name, x in host.items()}
            self.state = StepState(
                t["step"], t["tokens"], t["positions"], t["slots"], t["context"], t["table"],
                results["tokens"], results["logprobs"], results["bad"],
            )  # fmt: skip

    def fill(
        self, step: DecodeStep, u: np.ndarray | None = None, temperature: np.ndarray | None = None
    ) -> None:
        """Copy a step's inputs to the device, padded; the host does not wait for it."""
        if self._copied is not None:
            self._copied.synchronize()  # the last copy may still be reading
        a, B, G = self.arrays, len(step.context), len(step.shared_blocks)
        for name, padding in (
            ("tokens", 0), ("positions", 0), ("slots", self.scratch_slot), ("context", 0),
        ):  # fmt: skip
            a[name][:B], a[name][B:] = getattr(step, name), padding
        # the rows of padding are a group, those after it are empty
        a["group_starts"][: G + 1], a["group_starts"][G + 1 :] = step.group_starts, self.num_rows
        a["shared_blocks"][:G], a["shared_blocks"][G:] = step.shared_blocks, 0
        a["table"][:B, : step.table.shape[1]] = step.table  # nobody reads behind the context
        if self.state is not None:
            a["step"][:], a["u"][:], a["temperature"][:] = 0, 0, 1
            if u is not None:
                a["u"][: len(u), :B], a["temperature"][:B] = u, temperature
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def capture(self, forward: Forward, cache: KVCache, capture: Capture) -> None:
        """Also computes it once, which a graph that draws takes for a step: fill it again."""
        inputs, plan, state, t = self.inputs, self.plan, self.state, self.tensors

        def compute() -> Tensor:
            logits = forward(inputs, plan, cache)
            if state is None:
                return logits
            u = t["u"].index_select(0, state.step)[0]
            drawn = sample(logits, u, temperature=t["temperature"])
            advance(state, drawn, cache.block_size)
            return state.step

        self.replay, self.result = capture(compute)

    def read(self, num_steps: int, num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, log-probabilities, whether bad: (num_steps, num_rows) each. Waits for the device."""
        self._host_results.copy_(self._results, non_blocking=True)
        if self._copied is not None:
            torch.cuda.current_stream().synchronize()
        found = (self.results[n][:num_steps, :num_rows] for n in ("tokens", "logprobs", "bad"))
        tokens, logprobs, bad = (x.copy() for x in found)
        return tokens, logprobs, bad.astype(bool)


class CudaCapture:
    """Captures on a stream of its own, which must not be the default one, into one pool of memory."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.stream.wait_stream(current)
        options = {"capture_error_mode": "thread_local"}  # other threads may go on allocating
        try:
            # this outer context gives the stream back also where the capture fails
            with torch.cuda.stream(self.stream):
                compute()  # kernels are compiled, libraries make their workspaces: not to be captured
                with torch.cuda.graph(graph, self.pool, self.stream, **options):
                    result = compute()
        finally:
            current.wait_stream(self.stream)
        return graph.replay, result


def row_ladder(max_rows: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ... and max_rows itself: at most half the rows are padding."""
    rungs, step = [], 1
    while step < max_rows:
        rungs.append(step)
        if step >= DOUBLING_ROWS and step * 3 // 2 < max_rows:
            rungs.append(step * 3 // 2)
        step *= 2
    return [*rungs, max_rows]


def _rung(num_blocks: int, least: int, most: int) -> int:
    """0, or the first of least, 2 least, 4 least, ... and `most` that is no less."""
    if num_blocks == 0:
        return 0
    return min(least * 2 ** max(math.ceil(math.log2(num_blocks / least)), 0), most)


def _carve(parts: dict[str, tuple], **where) -> tuple[Tensor, dict[str, Tensor]]:
    """Name -> (dtype, *shape): one buffer of bytes, and a tensor of it for each name."""
    sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, *shape) in parts.items()}
    padded = {name: -(-n // ALIGNMENT) * ALIGNMENT for name, n in sizes.items()}
    buffer = torch.zeros(sum(padded.values()), dtype=torch.uint8, **where)
    tensors, at = {}, 0
    for name, (dtype, *shape) in parts.items():
        tensors[name] = buffer[at : at + sizes[name]].view(dtype).view(shape)
        at += padded[name]
    return buffer, tensors
