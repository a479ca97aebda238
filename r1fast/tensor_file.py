"""The bytes of the files that checkpoints and recordings are made of: safetensors and JSON."""

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

Bytes = bytes | memoryview
_DTYPES = {  # safetensors' names
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def json_bytes(value: Mapping) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def safetensors_bytes(named: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time: no second copy of the model, the hash
    is of what was meant and not of what was read back, and a full disk is an OSError."""
    # wide dtypes first, as the format's own writer does: every tensor starts aligned
    order = sorted(named, key=lambda name: (-named[name].element_size(), name))
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        x = named[name]
        if x.dtype not in _DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {x.dtype}, which checkpoints cannot hold")
        start, end = end, end + x.numel() * x.element_size()
        header[name] = {
            "dtype": _DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
        if named[name].numel():
            x = named[name].detach().cpu().contiguous()
            yield memoryview(x.reshape(-1).view(torch.uint8).numpy())
