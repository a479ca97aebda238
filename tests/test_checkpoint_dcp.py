"""A checkpoint is what torch.distributed.checkpoint reads: any rank, any slices, with any world size."""

import pytest
import torch
from ranks import Ranks
from tiny import TokenScorer, tiny_config, tiny_policy, tiny_problems

from r1fast.checkpoint import STATE, load_checkpoint, write_step
from r1fast.tensor_file import json_bytes, safetensors_bytes
from r1fast.trainer import GRPOTrainer

RANK = """
import sys, torch
from pathlib import Path
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from r1fast import distributed
from r1fast.checkpoint import load_checkpoint
from test_checkpoint_dcp import train

folder = Path(sys.argv[1])
rank, _ = distributed.start()
train(folder / "two")
mesh = init_device_mesh("cpu", (2,))
for name in ("one", "two"):
    saved = load_checkpoint(folder / name / "checkpoints")
    whole = dict(saved.tensors("model"))
    for name in ("optimizer", "reference"):
        whole |= {f"{name}.{key}": x for key, x in saved.tensors(name).items()}
    state = {
        key: distribute_tensor(torch.full_like(x, 9), mesh, [Shard(0)]) if x.dim() else torch.full_like(x, 9)
        for key, x in whole.items()
    }
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(saved.path)))
    for key, x in whole.items():
        own = state[key].to_local() if x.dim() else state[key]
        expected = x.chunk(2)[rank] if x.dim() else x
        assert torch.equal(own, expected), key
    print("read", len(whole), file=sys.stderr)
dist.barrier()
distributed.leave(0)
"""


def train(folder) -> None:
    config = tiny_config("--grpo.num_steps=1", "--grpo.ref_refresh_steps=9")
    GRPOTrainer(tiny_policy(), config, folder, tiny_problems(), TokenScorer()).run()


def test_two_ranks_read_their_shards(tmp_path):
    """Of what one process has written, and of what two have."""
    train(tmp_path / "one")
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    told = Ranks(program, tmp_path).succeed()
    one, two = (load_checkpoint(tmp_path / name / "checkpoints") for name in ("one", "two"))
    assert not list(one.path.glob("*-of-*"))
    assert len(list(two.path.glob("*-of-00002.safetensors"))) == 6
    for saved in (one, two):
        assert saved.names() == ["model", "optimizer", "reference"]
        # the reference is not the policy: a name that two files share would show
        model, reference = saved.tensors("model"), saved.tensors("reference")
        assert model.keys() == reference.keys()
        assert not torch.equal(model["embed.weight"], reference["embed.weight"])
        assert f"read {sum(len(saved.tensors(name)) for name in saved.names())}\n" in told[1]


def test_folders_of_the_first_layout_are_read(tmp_path):
    tensors = {"model": {"w": torch.ones(2)}, "optimizer": {"step.w": torch.ones(())}}
    files = {f"{name}.safetensors": safetensors_bytes(x) for name, x in tensors.items()}
    path = write_step(tmp_path, 3, files | {STATE: [json_bytes({})]})
    manifest = path / "manifest.json"
    text = manifest.read_text().replace('"version": 4', '"version": 1')
    manifest.write_text(text)
    assert load_checkpoint(tmp_path).tensors("optimizer").keys() == {"step.w"}
    manifest.write_text(text.replace('"version": 1', '"version": 3'))
    with pytest.raises(ValueError, match=r"layout is version 3, this program reads \(1, 2, 4\)"):
        load_checkpoint(tmp_path)
