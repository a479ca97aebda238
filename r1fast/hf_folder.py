"""Hugging Face model folders on disk: find, read and write JSON and safetensors files."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from r1fast.file_errors import naming
from r1fast.partial import partial_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON = 1 << 28  # bytes; an index of a thousand shards has a few millions
DOWNLOAD = [  # what a model needs; never pickles
    "config.json", "generation_config.json", "*.safetensors", INDEX, "adapter_config.json",
    "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*",
]  # fmt: skip


def resolve_model_path(name_or_path: str | os.PathLike) -> Path:
    """The local folder of a model: itself if it is one, else its snapshot from the Hub.

    Only a model id such as `Qwen/Qwen3-0.6B`, where there is no folder `Qwen` here, reaches the network, and not
    even that with HF_HUB_OFFLINE=1. Raises ValueError when there is no such folder or model.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"a model is a folder with config.json, but {name!r} is a file")
    if not _is_hub_id(name):
        raise ValueError(f"no such model folder: {name!r}, which is no model id (org/name) either")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, allow_patterns=DOWNLOAD, ignore_patterns=["original/*"])
        )
    except Exception as error:  # many kinds: offline, no such model, gated, bad name, no space
        raise ValueError(
            f"{name!r} is not a local folder, and could not be fetched from the Hugging Face Hub "
            f"(HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '0')}): {error}"
        ) from error


def _is_hub_id(name: str) -> bool:
    """org/name, unless the first of the two is a folder here: a path with a slip in it asks nobody."""
    org, slash, model = name.partition("/")
    words = all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}", word) for word in (org, model))
    return bool(slash) and words and not Path(org).exists()


def read_model_config(name_or_path: str | os.PathLike) -> dict:
    """The config.json of a model folder or, alone of its files, of a model on the Hub."""
    path = Path(name_or_path).expanduser()
    name = os.fspath(name_or_path)
    if path.exists() or not _is_hub_id(name):
        return read_json(resolve_model_path(name) / "config.json")
    from huggingface_hub import hf_hub_download

    try:
        return read_json(Path(hf_hub_download(name, "config.json")))
    except Exception as error:  # as in resolve_model_path
        raise ValueError(
            f"{name!r} is not a local folder, and its config.json could not be fetched from the "
            f"Hugging Face Hub (HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '0')}): {error}"
        ) from error


def read_json(path: Path, default: dict | None = None) -> dict:
    """The JSON object in `path`; `default` where the file is absent, ValueError without one."""
    if not path.is_file():
        if default is None:
            raise ValueError(f"no {path.name} in the folder {str(path.parent)!r}")
        return default
    if (size := path.stat().st_size) > MAX_JSON:
        raise ValueError(f"{path} has {size} bytes; at most {MAX_JSON} of JSON are read")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {value!r:.80}")
    return value


def _shards(index: Path) -> list[str]:
    """The files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(
            f"{index}: 'weight_map' must be an object of file names, got {weight_map!r:.80}"
        )
    files = sorted(set(weight_map.values()))
    if bad := [f for f in files if not f.endswith(".safetensors") or set(f) & set("/\\\0")]:
        raise ValueError(
            f"{index}: 'weight_map' must name .safetensors files of its own folder, got {bad[0]!r:.80}"
        )
    return files


def read_tensors(
    folder: Path, file: str = ""
) -> Iterator[tuple[str, "Callable[[], Tensor]", tuple[int, ...]]]:
    """(name, load, shape) of every tensor of the folder, or of one `file`; `load()` reads it from disk."""
    from safetensors import SafetensorError, safe_open

    if file:
        files = [file]
    elif (folder / INDEX).is_file():
        files = _shards(folder / INDEX)
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        raise ValueError(
            f"no {SINGLE} and no {INDEX} in {str(folder)!r}; "
            "other weight formats (.bin, .pt: pickles) are not read"
        )
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{INDEX} names {file!r}, which is not in {str(folder)!r}")
        try:
            with safe_open(folder / file, framework="pt") as shard:
                for name in shard.keys():
                    shape = tuple(shard.get_slice(name).get_shape())
                    yield name, lambda name=name: shard.get_tensor(name), shape
        except SafetensorError as error:
            raise ValueError(
                f"{folder / file} is not a readable safetensors file: {error}"
            ) from error


def fill_tensors(
    folder: Path, targets: Mapping[str, Tensor], ignored: Iterable[str] = (), *, file: str = ""
) -> None:
    """Copy every tensor of the folder, or of one `file`, into the target of its name, converting the dtype.

    Names that end with one of `ignored` are skipped. Raises ValueError naming tensors that are
    missing, unexpected or of another shape; the targets are then partly filled.
    """
    missing, unexpected, misshapen = set(targets), [], []
    for name, load, shape in read_tensors(folder, file):
        if name not in targets:
            if not name.endswith(tuple(ignored)):
                unexpected.append(name)
        elif shape != tuple(targets[name].shape):
            missing.discard(name)
            misshapen.append(f"{name} {shape}, not {tuple(targets[name].shape)}")
        else:
            missing.discard(name)
            tensor = load()
            if not tensor.is_floating_point():
                raise ValueError(f"{str(folder)!r}: {name!r} must hold floats, not {tensor.dtype}")
            with torch.no_grad():
                targets[name].copy_(tensor)
            # a sum is one cheap pass; it is finite where all terms are, unless they are enormous
            finite = tensor.sum(dtype=torch.float32).isfinite() or tensor.isfinite().all()
            if not finite:
                raise ValueError(f"{str(folder)!r}: {name!r} holds values that are not finite")
    problems = {"missing": sorted(missing), "unexpected": unexpected, "wrong shape": misshapen}
    if any(problems.values()):
        whom = "the model" if file else "its config.json"
        raise ValueError(
            f"the weights in {str(folder / file)!r} do not fit {whom}: "
            + "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        )


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def write_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int,
    finish: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> None:
    """One safetensors file, or shards of at most `max_shard_bytes` (or one tensor) and an index.

    `finish` makes of each what is written, of the same shape and dtype, when its shard is.
    """
    shards: list[list[str]] = [[]]
    shard_bytes = total = 0
    for name, tensor in tensors.items():
        if shards[-1] and shard_bytes + tensor.nbytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += tensor.nbytes
        total += tensor.nbytes

    weight_map = {}
    for i, names in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        shard = {
            name: finish(name, tensors[name].detach())
            .cpu()
            .clone(memory_format=torch.contiguous_format)
            for name in names
        }
        write_safetensors(folder / file, shard)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Contiguous tensors of the CPU as one file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()  # with the mode of any new file; safetensors would make it private
    mode = path.stat().st_mode & 0o777
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, for instance
        raise OSError(f"could not write {path}: {error}") from error
    path.chmod(mode)


def write_json(path: Path, value: dict) -> None:
    """`value` as the whole of `path`, or the file as it was."""
    part = partial_of(path)
    try:
        with naming(part):
            part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_folder(
    path: str | os.PathLike, write: Callable[[Path], None], marker: str = "config.json"
) -> None:
    """Make the folder `path` by `write(temporary folder)` and a rename: whole or not at all.

    An older folder of its kind, which holds `marker`, or an empty one is replaced; any other is a
    ValueError.
    """
    path = Path(path).expanduser().absolute()
    replaceable = (path / marker).is_file() or (path.is_dir() and not any(path.iterdir()))
    if path.exists() and not replaceable:
        kind = "a model folder" if marker == "config.json" else f"a folder with {marker}"
        raise ValueError(f"{str(path)!r} exists and is not {kind}; not overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = partial_of(path)
    try:
        new, old = scratch / "new", scratch / "old"
        new.mkdir(parents=True)
        with naming(path):
            write(new)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
