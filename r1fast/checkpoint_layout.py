"""What the files of a checkpoint are called, hold, and which rank writes them."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from r1fast.shards import Shard
from r1fast.tensor_file import Bytes, json_bytes, safetensors_bytes

VERSION = 4  # of this layout; in 2 no set had shares, in 1 no file its name before the keys
READABLE = (1, 2, 4)
NEVER = (3, 5, 6)  # a flipped bit away from one that was written: the next is 7
MANIFEST, STATE = "manifest.json", "state.json"
NAME = re.compile(r"step-([0-9]{1,18})(\.old)?")  # .old: when the same step was saved again
_STEM = re.compile(r"([A-Za-z0-9_]+)(-\d{5}-of-\d{5})?")  # of a file of tensors; of which share


def shares(
    tensors: Mapping[str, Mapping[str, Tensor | Shard]], num_ranks: int
) -> list[dict[str, dict[str, Tensor | Shard]]]:
    """What each rank writes: whole tensors, about as many bytes on all, by the name of its file."""
    if num_ranks == 1:
        return [{name: dict(named) for name, named in tensors.items()}]
    loads, owned = [0] * num_ranks, [{} for _ in range(num_ranks)]
    everything = [(x, name, key) for name, named in tensors.items() for key, x in named.items()]
    everything.sort(key=lambda item: -item[0].nbytes)  # stable: alike on all ranks
    for x, name, key in everything:
        rank = loads.index(min(loads))
        loads[rank] += x.nbytes
        owned[rank].setdefault(name, {})[key] = x
    for name, named in tensors.items():
        if not named:  # it is there, and empty
            owned[0][name] = {}
        parts = [own for own in owned if name in own]
        for i, own in enumerate(parts):
            if len(parts) > 1:
                own[f"{name}-{i + 1:05d}-of-{len(parts):05d}"] = own.pop(name)
    return owned


def checkpoint_files(
    tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping | None
) -> dict[str, Iterable[Bytes]]:
    """The files of a checkpoint. `state` is encoded now, tensors when their file is written.

    Of one rank of several: its share, and the state on the first alone.
    """
    for name in tensors:
        if not _STEM.fullmatch(name):
            raise ValueError(f"a name of tensors must be letters, digits and _, got {name!r}")
    encoded = {} if state is None else {STATE: [json_bytes(state)]}
    files: dict[str, Iterable[Bytes]] = {}
    for name, named in tensors.items():
        prefixed = {prefix_of(name) + key: x for key, x in named.items()}
        files[f"{name}.safetensors"] = safetensors_bytes(prefixed)
    return files | encoded


def set_of(stem: str) -> str:
    """The key of `tensors` that a file is of, or has a share of."""
    match = _STEM.fullmatch(stem)
    return match[1] if match else stem


def prefix_of(file: str) -> str:
    """Before the names in a file, so that no two in a folder are the same: torch.distributed.checkpoint's
    HuggingFaceStorageReader takes all files for one dict, of which any rank reads any slices."""
    name = set_of(file)
    return "" if name == "model" else f"{name}."


def checkpoints_around(path: Path) -> Path | None:
    """The folder of checkpoints that `path` is or lies in, or the checkpoint: what is there may be removed."""
    for folder in (path.absolute(), *path.absolute().parents):
        if NAME.fullmatch(folder.name) and (folder / MANIFEST).is_file():
            return folder
        if any(NAME.fullmatch(x.parent.name) for x in folder.glob(f"step-*/{MANIFEST}")):
            return folder
    return None
