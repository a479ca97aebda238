"""vLLM takes weights from files: a transfer engine for its own weight-transfer interface.

It runs in vLLM's processes, without r1fast; a server finds it with

    PYTHONPATH=<this folder> ... --worker-extension-cls r1fast_vllm_worker.FileTransfer
        --weight-transfer-config '{"backend": "r1fast_file"}'

The files are safetensors in Hugging Face's names, in a folder that trainer and server both see. Layers are
loaded one after the other as when the model was read first, so that what a backend makes of them (packed
weights on CPUs, quantised ones) is made again.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

BACKEND = "r1fast_file"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing is to be agreed on before."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """`files`: absolute paths, which hold all of the model's weights together."""

    files: list[str]

    def __post_init__(self) -> None:
        if not self.files or not all(os.path.isabs(file) for file in self.files):
            raise ValueError(f"files must be absolute paths, got {self.files!r:.200}")


class FileEngine(WeightTransferEngine):
    init_info_cls, update_info_cls = FileInitInfo, FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        self.model.load_weights(_named_tensors(update_info.files))

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


def _named_tensors(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, and the embedding as the head too where the model ties them: a reload without that
    name would leave the old head in its place."""
    embedding, has_head = None, False
    for file in files:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():
                tensor = shard.get_tensor(name)
                has_head |= name == HEAD
                if name == EMBEDDING:
                    embedding = tensor
                yield name, tensor
    if embedding is not None and not has_head:
        yield HEAD, embedding


class FileTransfer:
    """The worker extension, whose module registers the engine: it adds nothing else to a worker."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileEngine)
