"""Decode steps as CUDA graphs: captured once for a bucket of shapes, then replayed with other contents.

A decode step is hundreds of short kernels, and starting them one by one takes longer than they run where the batch
is small. A graph starts them at once, but fixes their shapes and addresses. So a step is padded to a bucket
of rows, of blocks a row and of shared blocks, and its inputs are copied into memory that stays where it is:
one copy from pinned memory. The weights are read where they lie, so training them in place leaves a graph valid.

Rows that only fill up a bucket have a context of 0: they see nothing, nobody sees them, and their keys and values
go to the cache's scratch slot.
Shapes: B running rows, R rows and M blocks a row of the bucket, V vocabulary.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from r1fast.kernels.paged_attention import DecodePlan
from r1fast.rollout.decode_step import DecodeStep, Inputs
from r1fast.rollout.kv_cache import KVCache

# inputs and plan of a step, and the cache -> (R, V) logits
Forward = Callable[[Inputs, DecodePlan, KVCache], Tensor]
# captures a callable: (what computes its result again, the result, always in the same memory)
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
Bucket = tuple[int, int, int]  # R, M, most shared blocks

DOUBLING_ROWS = 16  # up to here buckets of rows double, from here on there is one between
LEAST_POSITIONS = 512  # of a row in the smallest bucket: what one program of the kernel reads
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
        self._graphs: dict[Bucket, Graph] = {}
        self._cache: KVCache | None = None
        self._capture: Capture | None = None  # with the memory that the graphs share

    @property
    def buckets(self) -> list[Bucket]:
        """Those that have been captured."""
        return list(self._graphs)

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
        if cache is not self._cache:
            self.clear()
            self._cache = cache
        bucket = self.bucket_of(step, cache.block_size)
        graph = self._graphs.get(bucket)
        if graph is None:
            if bucket is None or not self.can_capture or len(self._graphs) >= MAX_GRAPHS:
                return None
            try:
                graph = Graph(bucket, cache.scratch_slot, self.device)
                graph.fill(step)
                self._capture = self._capture or self.make_capture()
                graph.capture(lambda: forward(graph.inputs, graph.plan, cache), self._capture)
            except RuntimeError as error:  # also of CUDA, and out of its memory
                self.can_capture = False
                warnings.warn(f"decoding without CUDA graphs: {error}", stacklevel=2)
                return None
            self._graphs[bucket] = graph
        else:
            graph.fill(step)
        graph.replay()
        return graph.result[: len(step.context)]


class Graph:
    """One bucket: its inputs, and what was captured over them."""

    def __init__(self, bucket: Bucket, scratch_slot: int, device: torch.device):
        R, M, max_shared = bucket
        self.num_rows, self.scratch_slot = R, scratch_slot
        parts = {
            "tokens": (torch.int64, R), "positions": (torch.int64, R), "slots": (torch.int64, R),
            "context": (torch.int32, R), "group_starts": (torch.int32, R + 1),
            "shared_blocks": (torch.int32, R), "table": (torch.int32, R, M),
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

    def fill(self, step: DecodeStep) -> None:
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
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def capture(self, compute: Callable[[], Tensor], capture: Capture) -> None:
        self.replay, self.result = capture(compute)


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
