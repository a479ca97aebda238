"""A checkpoint is what torch.distributed.checkpoint reads: any rank, any slices, with any world size."""

import subprocess
import sys

import pytest
import torch
from tiny import TokenScorer, tiny_config, tiny_policy, tiny_problems

from r1fast.checkpoint import STATE, load_checkpoint, write_step
from r1fast.tensor_file import json_bytes, safetensors_bytes
from r1fast.trainer import GRPOTrainer

RANK = """
import sys, torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from r1fast.checkpoint import load_checkpoint

folder, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
saved = load_checkpoint(folder)
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
print(len(whole))
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_read_their_shards(tmp_path):
    config = tiny_config("--grpo.num_steps=1", "--grpo.ref_refresh_steps=9")
    trainer = GRPOTrainer(tiny_policy(), config, tmp_path, tiny_problems(), TokenScorer())
    trainer.run()
    folder = tmp_path / "checkpoints"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(tmp_path / "store"), str(rank)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    saved = load_checkpoint(folder)
    assert saved.names() == ["model", "optimizer", "reference"]
    assert int(told[0][0]) == sum(len(saved.tensors(name)) for name in saved.names())
    # the reference is not the policy: a name that two files share would show
    model, reference = saved.tensors("model"), saved.tensors("reference")
    assert model.keys() == reference.keys()
    assert not torch.equal(model["embed.weight"], reference["embed.weight"])


def test_folders_of_the_first_layout_are_read(tmp_path):
    tensors = {"model": {"w": torch.ones(2)}, "optimizer": {"step.w": torch.ones(())}}
    files = {f"{name}.safetensors": safetensors_bytes(x) for name, x in tensors.items()}
    path = write_step(tmp_path, 3, files | {STATE: [json_bytes({})]})
    manifest = path / "manifest.json"
    text = manifest.read_text().replace('"version": 2', '"version": 1')
    manifest.write_text(text)
    assert load_checkpoint(tmp_path).tensors("optimizer").keys() == {"step.w"}
    manifest.write_text(text.replace('"version": 1', '"version": 3'))
    with pytest.raises(ValueError, match=r"layout is version 3, this program reads \(1, 2\)"):
        load_checkpoint(tmp_path)
