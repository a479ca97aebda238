"""Checkpoints that several ranks write: shares, faults of one rank, and what any number of ranks reads.

This file is also the program of a rank: `python THIS FOLDER`.
"""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from ranks import Ranks

from r1fast import checkpoint, checkpoint_writer, distributed
from r1fast.checkpoint import load_checkpoint, publish
from r1fast.checkpoint_layout import checkpoint_files, shares
from r1fast.checkpoint_writer import CheckpointWriter
from r1fast.config import CheckpointConfig


@pytest.fixture(scope="module")
def tally():
    from faults import Tally  # a rank imports nothing of what it needs

    tally = Tally("test_checkpoint_ranks")
    yield tally
    tally.write()


def tensors(step: int) -> dict:
    """Equal on all ranks, as under data parallelism."""
    g = torch.Generator().manual_seed(step)
    named = {f"layers.{i}.w": torch.randn(8 + i, 16, generator=g) for i in range(6)}
    named["embed"] = torch.randn(40, 16, generator=g)
    named["half"] = torch.randn(5, generator=g).bfloat16()
    moments = {f"exp_avg.{name}": x.float() + step for name, x in named.items()}
    return {"model": named, "optimizer": moments | {"step.embed": torch.tensor(float(step))},
            "reference": {}}  # fmt: skip


def assert_holds(folder: Path, step: int) -> None:
    """The newest checkpoint is that of `step`, to the bit."""
    found, wanted = load_checkpoint(folder), tensors(step)
    assert found.step == step
    assert found.names() == sorted(wanted)
    for name, named in wanted.items():
        loaded = found.tensors(name)
        assert loaded.keys() == named.keys()
        assert all(torch.equal(loaded[key], x) for key, x in named.items())


def step_folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_shares_are_whole_disjoint_and_of_equal_size():
    everything = tensors(1)
    for num_ranks in (1, 2, 3, 50):
        owned = shares(everything, num_ranks)
        assert len(owned) == num_ranks
        found = [
            (name.partition("-")[0], key) for own in owned for name in own for key in own[name]
        ]
        wanted = [(name, key) for name, named in everything.items() for key in named]
        assert sorted(found) == sorted(wanted)
        stems = [stem for own in owned for stem in own]
        assert len(stems) == len(set(stems))  # no two ranks write one file
        loads = [sum(x.nbytes for named in own.values() for x in named.values()) for own in owned]
        largest = max(x.nbytes for named in everything.values() for x in named.values())
        assert max(loads) - min(loads) <= largest
    assert shares(everything, 2)[0]["reference"] == {}
    assert {s for own in shares(everything, 2) for s in own} == {
        *(f"{name}-0000{i}-of-00002" for name in ("model", "optimizer") for i in (1, 2)), "reference",
    }  # fmt: skip


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_shares_are_read_as_one(tmp_path, num_ranks):
    """Written here by one process, as files are files."""
    files = [checkpoint_files(own, None) for own in shares(tensors(3), num_ranks)]
    merged = {name: chunks for own in files for name, chunks in own.items()}
    path = publish(tmp_path, 3, merged | checkpoint_files({}, {"a": 1}))
    assert_holds(tmp_path, 3)
    assert load_checkpoint(tmp_path).state == {"a": 1}
    assert json.loads((path / "manifest.json").read_text())["version"] == checkpoint.VERSION
    next(path.glob("model-00001-of-*")).unlink()
    with pytest.raises(ValueError, match=r"its files are not those of manifest\.json: model-00001"):
        load_checkpoint(tmp_path)


class Rank:
    """What a rank does to itself, and what it says of a save."""

    def __init__(self, out: Path):
        self.out, self.rank, self.group = out, distributed.rank(), distributed.beside()
        self.told: list[str] = []
        self.facts: dict = {}
        for module in (checkpoint, checkpoint_writer):
            module.warn = self.told.append

    def writer(self, name: str, folder: str = "", **config) -> CheckpointWriter:
        return CheckpointWriter(
            self.out / (folder or name), CheckpointConfig(**config), "", self.group
        )

    def tells(self, case: str, writer: CheckpointWriter) -> None:
        distributed.barrier()
        self.facts[case] = {"told": list(self.told), "saved": writer.saved_step}
        self.told.clear()

    def failing(self, name: str, ranks: tuple[int, ...], match: str, error: Exception):
        """os.<name> fails on these ranks where its argument is of a path that ends in `match`."""
        real = getattr(os, name)

        def call(target, *args, **kwargs):
            path = (
                os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
            )
            if self.rank in ranks and match in path:
                raise error
            return real(target, *args, **kwargs)

        setattr(os, name, call)
        return lambda: setattr(os, name, real)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FAILURES = {  # what fails -> (os's function, on which ranks, at what)
    "write of the first": ("write", (0,), "model-00001"),
    "write of the second": ("write", (1,), "optimizer-00002"),
    "flush of the second": ("fsync", (1,), "model-00002"),
    "both": ("write", (0, 1), "model-0000"),
    "temporary folder": ("mkdir", (0,), ".saving-step-000002"),
    "manifest": ("write", (0,), "manifest.json"),
    "rename": ("rename", (0,), ".saving-step-000002"),
    "state": ("fsync", (0,), "state.json"),
}


def rank_program(out: Path) -> None:
    distributed.start()
    rank = Rank(out)
    for asynchronous in (True, False):
        name = "saves" if asynchronous else "synchronous"
        with rank.writer(name, asynchronous=asynchronous, keep_last=9) as saves:
            for step in (1, 2):
                state = tensors(step)
                saves.save(step, state, {"by": rank.rank})
                state["model"]["embed"].fill_(7)  # the next step
                rank.facts[f"{name} buffers"] = len(saves._buffers)
            saves.save(3, tensors(3), {"by": rank.rank}, wait=True)
            rank.facts[f"{name} row"] = sorted(saves.saw({}))
        rank.tells(name, saves)
    for case, (function, ranks, match) in FAILURES.items():
        with rank.writer(case, keep_last=1) as saves:
            saves.save(1, tensors(1), {})
            saves.close()
            heal = rank.failing(function, ranks, match, FULL)
            saves.save(2, tensors(2), {})
            saves.close()
            heal()
            rank.tells(case, saves)
            if rank.rank == 0:
                rank.facts[case]["there"] = step_folders(out / case)
            distributed.barrier()
            saves.save(3, tensors(3), {})
        rank.facts[case]["then"] = saves.saved_step
    damaged(rank)
    other_tensors(rank)
    with rank.writer("elsewhere", f"elsewhere-{rank.rank}") as saves:  # a disk of one's own
        saves.save(1, tensors(1), {})
    rank.tells("elsewhere", saves)
    (out / f"facts-{rank.rank}.json").write_text(json.dumps(rank.facts))
    distributed.barrier()
    with rank.writer("killed") as saves:
        saves.save(1, tensors(1), {}, wait=True)
        if rank.rank == 1:  # a kill -9 amid its share
            os.write = lambda *args: os._exit(9)
        saves.save(2, tensors(2), {})
    (out / "survivor.json").write_text(json.dumps([rank.told, saves.saved_step]))
    os._exit(0)  # there is nobody left to take leave of


def damaged(rank: Rank) -> None:
    """What the disk gives back of the second rank's share is not what was written."""
    real = checkpoint.write_step

    def write_step(folder, step, files, group):
        path = real(folder, step, files, group)
        if step == 2 and rank.rank == 1:
            share = path / "model-00002-of-00002.safetensors"
            share.write_bytes(share.read_bytes()[:-3] + b"abc")
        return path

    checkpoint.write_step = write_step
    with rank.writer("damaged") as saves:
        saves.save(1, tensors(1), {})
        saves.save(2, tensors(2), {})
    checkpoint.write_step = real
    rank.tells("damaged", saves)


def other_tensors(rank: Rank) -> None:
    """Shares of tensors that are not the same would be a checkpoint with holes."""
    saves = rank.writer("other")
    mine = tensors(1)
    if rank.rank:
        del mine["optimizer"]["exp_avg.embed"]
    saves.save(1, mine, {})
    try:
        saves.close()
    except AssertionError as error:
        rank.told.append(f"{error}")
    rank.tells("other", saves)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    ended = Ranks(__file__, folder).wait()
    assert [code for code, _, _ in ended] == [0, 9], [err[-3000:] for _, _, err in ended]
    return folder


@pytest.fixture(scope="module")
def facts(out) -> list[dict]:
    return [json.loads((out / f"facts-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["saves", "synchronous"])
def test_two_ranks_write_one_checkpoint(out, facts, name):
    folder = out / name
    assert step_folders(folder) == ["latest", *(f"step-00000{n}" for n in (1, 2, 3))]
    assert_holds(folder, 3)
    found = load_checkpoint(folder, up_to=1)  # of the call, not of what was trained since
    assert torch.equal(found.tensors("model")["embed"], tensors(1)["model"]["embed"])
    assert found.state == {"by": 0}
    files = json.loads((found.path / "manifest.json").read_text())["files"]
    sizes = [sum(files[f"{s}-0000{r}-of-00002.safetensors"]["size"] for s in ("model", "optimizer"))
             for r in (1, 2)]  # fmt: skip
    assert max(sizes) < 1.2 * min(sizes)
    assert [f[name] for f in facts] == [{"told": [], "saved": 3}] * 2
    copied = [f[f"{name} buffers"] for f in facts]  # each copies its share alone
    number = sum(len(named) for named in tensors(1).values())
    assert sum(copied) == (number if name == "saves" else 0)
    timed = ["checkpoint/seconds", "checkpoint/write_seconds"]
    assert [f[f"{name} row"] for f in facts] == [["checkpoint/bytes", *timed], timed]


@pytest.mark.parametrize("case", FAILURES)
def test_what_fails_on_one_rank_is_no_checkpoint_and_all_say_so(out, facts, tally, case):
    ranks = FAILURES[case][1]
    for rank, fact in enumerate(facts):
        (told,) = fact[case]["told"]
        assert told.startswith("checkpoint of step 2 could not be written, training goes on: ")
        assert "No space left on device" in told
        if rank not in ranks:
            assert f"rank {ranks[0]}: OSError: [Errno 28]" in told
        assert fact[case]["saved"] == 1
        assert fact[case]["then"] == 3
    assert facts[0][case]["there"] == ["latest", "step-000001"]  # nothing half-written stays
    assert step_folders(out / case) == ["latest", "step-000003"]
    assert_holds(out / case, 3)
    tally.count("a full disk on one of two ranks, or both, in a save of theirs")


def test_a_share_that_was_not_read_back_as_written_is_damage_for_all(out, facts, tally):
    for fact in facts:
        (told,) = fact["damaged"]["told"]
        assert "step-000002 IS DAMAGED" in told
        assert "the content of model-00002-of-00002.safetensors has changed" in told
        assert "now called step-000002.damaged" in told
        assert fact["damaged"]["saved"] == 1
    assert step_folders(out / "damaged") == ["latest", "step-000001", "step-000002.damaged"]
    assert_holds(out / "damaged", 1)
    tally.count("a damaged share of one of two ranks")


def test_ranks_that_hold_other_tensors_write_nothing(out, facts):
    for fact in facts:
        (told,) = fact["other"]["told"]
        assert told.startswith("ranks would write shares of other tensors")
    assert not (out / "other").exists()


def test_ranks_need_one_filesystem(out, facts):
    told = [fact["elsewhere"]["told"][0] for fact in facts]
    assert "rank 1: OSError" in told[0]
    assert all("all ranks need one filesystem" in text for text in told)
    assert step_folders(out / "elsewhere-0") == []


def test_a_rank_that_is_killed_leaves_the_checkpoint_before(out, tally):
    told, saved = json.loads((out / "survivor.json").read_text())
    assert saved == 1
    assert "checkpoint of step 2: whether it is whole is not known" in told[0]
    assert "another rank is gone" in told[0]
    assert step_folders(out / "killed") == ["latest", "step-000001"]
    assert_holds(out / "killed", 1)
    tally.count("one of two ranks killed amid its share")


if __name__ == "__main__":
    rank_program(Path(sys.argv[1]))
