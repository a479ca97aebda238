"""How weights travel: as safetensors files in a folder that both sides see, or by NCCL.

The file way is an engine of ours behind vLLM's weight-transfer interface (plugin/), NCCL is vLLM's own, whose
trainer's side is a class of vLLM: it has to be installed beside the trainer too.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from r1fast.config import VllmConfig
from r1fast.hf_folder import write_tensors
from r1fast.lora import merged_weights
from r1fast.model import Decoder
from r1fast.rollout.vllm.client import Client, ServerError

MAX_SHARD_BYTES = 2 << 30
MEMORY = Path("/dev/shm")
_FOLDER = re.compile(r"r1fast-weights-(\d+)-.*")


class Transfer(Protocol):
    num_bytes: int  # written or broadcast since it was set to 0

    def prepare(self, version: int) -> None:
        """The weights as they are now are what `send` sends, until the next call."""

    def send(self, client: Client, *, timeout: float) -> None:
        """Between start_weight_update and finish_weight_update."""

    def close(self) -> None: ...


def make_transfer(model: Decoder, config: VllmConfig, clients: Sequence[Client]) -> Transfer:
    """Raises ValueError where weights cannot go the way that the config says."""
    kind = config.weight_transfer
    if kind == "auto":
        kind = "nccl" if model.head_weight.is_cuda and not config.start else "file"
    if kind == "nccl":
        if not model.head_weight.is_cuda:
            raise ValueError(
                "rollout.vllm.weight_transfer = nccl needs the policy on a GPU; on CPUs it is file"
            )
        return NcclTransfer(model)
    away = [client.url for client in clients if not client.is_local]
    if away and not config.weight_folder:
        raise ValueError(
            f"{away[0]} is on another machine: rollout.vllm.weight_folder must name a folder that it and the "
            "trainer both see (or rollout.vllm.weight_transfer = nccl, between GPUs)"
        )
    return FileTransfer(model, config.weight_folder)


class FileTransfer:
    """Versions as folders of safetensors files under a folder of this process's own; the newest stays."""

    def __init__(self, model: Decoder, root: str):
        self.model, self.num_bytes = model, 0
        self._root = (
            Path(root) if root else MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())
        )
        self._folder: Path | None = None
        self._version, self._files = -1, []

    def prepare(self, version: int) -> None:
        if version == self._version:
            return
        if self._folder is None:
            self._root.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self._root)
            name = f"r1fast-weights-{os.getpid()}-{socket.gethostname()}-"
            self._folder = Path(tempfile.mkdtemp(prefix=name, dir=self._root))
            self._folder.chmod(0o755)  # servers may be another user's
        tensors = self.model.hf_tensors()
        size = sum(x.nbytes for x in tensors.values())
        self._clear()  # nobody reads the one before any more
        if shutil.disk_usage(self._folder).free < size:
            raise OSError(
                f"no room for {size >> 20} MiB of weights in {self._folder}: set "
                "rollout.vllm.weight_folder to a folder that has"
            )
        part, whole = self._folder / "part", self._folder / f"version-{version}"
        part.mkdir()
        write_tensors(part, tensors, MAX_SHARD_BYTES, merged_weights(self.model))
        part.rename(whole)
        self._version, self._files = version, sorted(str(f) for f in whole.glob("*.safetensors"))
        self.num_bytes += size

    def send(self, client: Client, *, timeout: float) -> None:
        client.post("/update_weights", {"update_info": {"files": self._files}}, timeout=timeout)

    def _clear(self) -> None:
        self._version, self._files = -1, []
        for path in self._folder.iterdir():
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder, self._version = None, -1


def _remove_leftovers(root: Path) -> None:
    """Folders of trainers of this machine that were killed: in memory they would take it for ever."""
    for path in root.glob("r1fast-weights-*"):
        match = _FOLDER.fullmatch(path.name)
        here = f"-{socket.gethostname()}-" in path.name
        if match and here and not Path(f"/proc/{match[1]}").exists():
            shutil.rmtree(path, ignore_errors=True)


class NcclTransfer:
    """Broadcasts by vLLM's own trainer engine, one communicator a server.

    Written to vLLM 0.32's interface and **not run yet**: the machines that test this have no GPU.
    """

    def __init__(self, model: Decoder):
        try:
            from vllm.distributed.weight_transfer import factory, nccl_engine
        except ImportError:
            raise ValueError(
                "rollout.vllm.weight_transfer = nccl needs vLLM in the trainer's environment too, whose class "
                "broadcasts; without it take file, with a weight_folder that servers see"
            ) from None
        self.model, self.num_bytes = model, 0
        self._factory, self._nccl = factory.WeightTransferTrainerFactory, nccl_engine
        self._engines: dict[str, object] = {}

    def prepare(self, version: int) -> None:
        pass  # weights are read while they are broadcast

    def send(self, client: Client, *, timeout: float) -> None:
        control = _Control(client, timeout)
        if (engine := self._engines.get(client.url)) is None:
            reply = client.get("/get_world_size", timeout=timeout)
            with socket.socket() as free:
                free.bind(("", 0))
                port = free.getsockname()[1]
            host = "127.0.0.1" if client.is_local else socket.gethostbyname(socket.gethostname())
            info = self._nccl.NCCLTrainerInitInfo(
                master_address=host, master_port=port, world_size=1 + reply["world_size"], rank=0
            )
            source = _source(self.model)
            engine = self._factory.trainer_init(info, client=control, source=source)
            self._engines[client.url] = engine
        try:
            engine.client = control
            engine.send_weights()
        except Exception as error:  # a communicator that has failed once is of no use
            self._engines.pop(client.url, None)
            raise ServerError(f"{client.url}: the broadcast failed: {error}") from error
        self.num_bytes += sum(x.nbytes for x in self.model.hf_tensors().values())

    def close(self) -> None:
        for engine in self._engines.values():
            engine.shutdown()
        self._engines = {}


class _Control:
    """What vLLM's trainer engine asks of a server; update and finish are `WeightSync.give`'s to frame."""

    def __init__(self, client: Client, timeout: float):
        self._client, self._timeout = client, timeout

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        body = {"init_info": init_info}
        self._client.post("/init_weight_transfer_engine", body, timeout=self._timeout)

    def start_weight_update(self) -> None:
        """Done before."""

    def update_weights(self, update_info: dict) -> None:
        body = {"update_info": update_info}
        self._client.post("/update_weights", body, timeout=self._timeout)

    def finish_weight_update(self) -> None:
        """Done behind it, with the version."""


def _source(model: Decoder):
    """vLLM's WeightSource over the model: names of Hugging Face, adapters merged, the head also where tied."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def tensors(self) -> dict[str, Tensor]:
            named = model.hf_tensors()
            return named | {"lm_head.weight": model.head_weight.detach()}

        def metadata(self) -> list:
            return [ParamMeta(n, x.dtype, tuple(x.shape)) for n, x in self.tensors().items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            merged = merged_weights(model)
            for name, tensor in self.tensors().items():
                yield name, merged(name, tensor)

    return Source()
