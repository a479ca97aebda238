"""The process group of a torchrun launch. One process is world size 1 and needs no group."""

import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")
TIMEOUT = datetime.timedelta(hours=2)  # of what ranks wait for each other
MEETING = datetime.timedelta(minutes=10)  # of ranks that start
ATTEMPT = datetime.timedelta(seconds=2)  # to reach rank 0 where it may no longer be
POLL = 0.01  # seconds between two looks whether others are there
PORT_KEY = "r1fast/port of rank 0"
_beside: dict[dist.ProcessGroup, dist.ProcessGroup] = {}  # of the process's own group
_meshes: dict[tuple, DeviceMesh] = {}  # by it, names and shape
_context_groups: dict[tuple[dist.ProcessGroup, int, int], dist.ProcessGroup] = {}


class RankFailedError(OSError):
    """What ranks do together has failed on another one."""


class RankGoneError(RankFailedError):
    """Another rank has ended amid what ranks do together."""


def start() -> tuple[int, int]:
    """(rank, world_size); joins the process group when torchrun set the environment."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        where = {}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            own = int(os.environ["RANK"])
            where = {"store": _own_store(own), "rank": own, "world_size": world_size}
        dist.init_process_group(backend, timeout=TIMEOUT, **where)
    return rank(), world_size


def _own_store(own_rank: int) -> dist.Store:
    """A store that lives in rank 0, found through the agent's.

    The agent's own outlives the workers, and PyTorch 2.13 puts every attempt into it under the same keys: after a
    restart ranks would look for each other at the addresses of those that are gone. Here what is left of
    an earlier attempt is an address where nobody listens any more.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = dist.TCPStore(host, port, is_master=False, timeout=MEETING)
    if own_rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        agent.set(PORT_KEY, str(store.port))
        return store
    end = time.monotonic() + MEETING.total_seconds()
    while True:
        found = int(agent.get(PORT_KEY))  # waits for the first one
        try:
            store = dist.TCPStore(host, found, is_master=False, timeout=ATTEMPT)
        except RuntimeError as error:
            if time.monotonic() > end:
                raise RuntimeError(
                    f"rank {own_rank} has not found rank 0 at {host}:{found} in "
                    f"{MEETING.total_seconds():.0f} s: {error}"
                ) from error
            time.sleep(0.2)
        else:
            store.set_timeout(TIMEOUT)
            return store


def mesh(
    replicas: int, device_type: str, num_slices: int = 1
) -> tuple[DeviceMesh, DeviceMesh | None]:
    """(ranks that train one slice of the model, those that have all slices of it and so train the same tokens).

    The former in `replicas` rows, or of one dimension; the latter, neighbours, are None for one slice. Ranks ask for it
    together. A process that is alone becomes a group of one. Raises ValueError where ranks cannot be divided so.
    """
    if not dist.is_initialized():
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if world_size() % num_slices:
        raise ValueError(
            f"parallel.tensor_parallel = {num_slices} does not divide the {world_size()} processes"
        )
    num_data = world_size() // num_slices
    if num_data % replicas:
        each = f" / tensor_parallel {num_slices}" * (num_slices > 1)
        raise ValueError(
            f"parallel.replicas = {replicas} does not divide the {world_size()} processes{each}"
        )
    shape, names = [num_data // replicas], ["shard"]
    if replicas > 1:
        shape, names = [replicas, *shape], ["replica", *names]
    data_names = tuple(names)
    if num_slices > 1:
        shape, names = [*shape, num_slices], [*names, "tensor"]
    key = (dist.group.WORLD, *names, *shape)
    if key not in _meshes:
        _meshes[key] = init_device_mesh(device_type, tuple(shape), mesh_dim_names=tuple(names))
    found = _meshes[key]
    return (found, None) if num_slices == 1 else (found[data_names], found["tensor"])


@dataclass(frozen=True, slots=True)
class RankGrid:
    """All ranks as data x context x tensor, the last one fastest.

    Neighbours of one data rank are a model-parallel group: they train the same sequences, each a piece of their
    tokens (context) with a part of the weights (tensor).
    """

    num_data_ranks: int
    context: int = 1
    tensor: int = 1
    context_group: dist.ProcessGroup | None = None  # this rank's; None of one rank

    @property
    def group_size(self) -> int:
        """Ranks of a model-parallel group."""
        return self.context * self.tensor

    def data_rank_of(self, rank: int) -> int:
        return rank // self.group_size

    @property
    def data_rank(self) -> int:
        return self.data_rank_of(rank())

    @property
    def tensor_rank(self) -> int:
        """Of this rank among those of its tensor group."""
        return rank() % self.tensor

    def once(self, values: dict[str, float]) -> dict[str, float]:
        """Numbers that all ranks of a tensor group have, for a sum over ranks: they are of the first of each."""
        return dict.fromkeys(values, 0.0) if self.tensor_rank else values


def grid(context: int, tensor: int) -> RankGrid:
    """The layout of this launch. Ranks ask for it together; ValueError where they cannot be laid out so."""
    num_ranks, size = world_size(), context * tensor
    if num_ranks % size:
        raise ValueError(
            f"parallel.context_parallel x parallel.tensor_parallel = {context} x {tensor} does not divide the "
            f"number of processes, {num_ranks}: start a multiple of {size} (torchrun --nproc-per-node)"
        )
    if context == 1:
        return RankGrid(num_ranks // size, tensor=tensor)
    key = (dist.group.WORLD, context, tensor)
    if key not in _context_groups:
        firsts = (r + t for r in range(0, num_ranks, size) for t in range(tensor))
        rows = [[first + c * tensor for c in range(context)] for first in firsts]
        own, _ = dist.new_subgroups_by_enumeration(rows, timeout=TIMEOUT)
        _context_groups[key] = own
    return RankGrid(num_ranks // size, context, tensor, _context_groups[key])


def stop() -> None:
    _beside.clear()
    _meshes.clear()
    _context_groups.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End a rank of a torchrun launch without the C++ destructors of the interpreter's end.

    On a busy machine a gloo rank now and then aborts in them ("terminate called without an active
    exception"), and torchrun then reports a finished run as failed.
    """
    stop()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def store_and_rank() -> tuple[dist.Store, int, int]:
    """The store in which the ranks have met, this rank, and how many there are."""
    return dist.distributed_c10d._get_default_store(), rank(), world_size()


def is_main() -> bool:
    return rank() == 0


def beside() -> dist.ProcessGroup | None:
    """All ranks once more, for a thread beside the training; None for one process.

    Ranks ask for it together, in the thread that trains.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if (world := dist.group.WORLD) not in _beside:
        _beside.clear()  # of a group that is gone
        _beside[world] = dist.new_group(timeout=TIMEOUT, backend="gloo")
    return _beside[world]


def is_first(group: dist.ProcessGroup | None) -> bool:
    """Of the ranks of a group; without one the process is alone."""
    return group is None or dist.get_rank(group) == 0


def together(do: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """What `do()` gives on every rank of `group`, in rank order; without a group, of this process alone.

    Plain data: it travels as JSON. Where it fails on a rank it fails on all: there as it is, on the others
    with RankFailedError (RankGoneError: it has ended). All ranks call it equally often.
    """
    if group is None:
        return [do()]
    value, failure = None, None
    try:
        value = do()
    except Exception as error:
        failure = error
    why = None if failure is None else f"{type(failure).__name__}: {failure}"
    try:
        parts = gather_bytes(json.dumps([value, why]).encode(), group)
    except RuntimeError as error:
        raise failure or RankGoneError(f"another rank is gone: {error}") from None
    if failure is not None:
        raise failure
    found = [json.loads(part) for part in parts]
    if failed := [f"rank {r}: {why}" for r, (_, why) in enumerate(found) if why is not None]:
        raise RankFailedError("; ".join(failed))
    return [value for value, _ in found]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce(x: Tensor, op: str = "sum", meanwhile: Callable[[], object] | None = None) -> Tensor:
    """In place over all ranks; `op` is sum, max or min. `meanwhile` is called again and again until all are there."""
    if dist.is_initialized():
        work = dist.all_reduce(x, getattr(dist.ReduceOp, op.upper()), async_op=True)
        while meanwhile is not None and not work.is_completed():
            meanwhile()
            time.sleep(POLL)
        work.wait()
    return x


def sum_dict(values: dict[str, float]) -> dict[str, float]:
    """Every value summed over ranks. Keys may differ between ranks."""
    if not dist.is_initialized():
        return values
    total: dict[str, float] = {}
    for part in gather_objects(values):
        for key, value in part.items():
            total[key] = total.get(key, 0.0) + value
    return total


def gather_objects(value, group: dist.ProcessGroup | None = None) -> list:
    """`value` of every rank (of `group`), in rank order, on every rank. Small plain data: it travels as JSON."""
    if not dist.is_initialized():
        return [value]
    return [json.loads(part) for part in gather_bytes(json.dumps(value).encode(), group)]


def gather_bytes(data: bytes, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """`data` of every rank, in rank order, on every rank (of `group`, where there is one)."""
    if not dist.is_initialized():
        return [data]
    device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    num_ranks = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(num_ranks)]
    dist.all_gather(sizes, torch.tensor([len(own)], device=device), group)
    longest = max(int(n) for n in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(num_ranks)]
    dist.all_gather(parts, padded, group)
    return [p[: int(n)].cpu().numpy().tobytes() for p, n in zip(parts, sizes, strict=True)]


def gather_tensors(own: Tensor, sizes: list[int]) -> list[Tensor]:  # (sizes[rank],) of every rank
    """The tensor of every rank, on the CPU, on every rank; all know the `sizes`."""
    if not dist.is_initialized():
        return [own]
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    padded = torch.zeros(max(sizes), dtype=own.dtype, device=device)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[:n].cpu() for part, n in zip(parts, sizes, strict=True)]


def gather_problems(rows: list[dict], ids: Iterable[str], key: str = "problem_id") -> list[dict]:
    """Rows of every rank in the order of their problems' `ids`: the same for any number of ranks.

    All rows of one problem come from one rank and keep their order.
    """
    place = {name: i for i, name in enumerate(ids)}
    rows = [row for part in gather_objects(rows) for row in part]
    return sorted(rows, key=lambda row: place[row[key]])


def sum_gradients(
    parameters: Iterable[torch.nn.Parameter],
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
) -> None:
    """Sum every gradient over ranks (of `group`) in one flat all-reduce. A missing gradient counts as zero.

    `device` is where ranks meet, if gradients lie elsewhere.
    """
    if not dist.is_initialized():
        return
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.reshape(-1) for p in parameters]).to(device)
    dist.all_reduce(flat, group=group)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(part.view_as(p))
