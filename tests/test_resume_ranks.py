"""Two gloo ranks stop and go on to the bit, and a run may go on with another number of ranks than it had.

This file is also the program of a rank: `python THIS FOLDER`.
"""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from safetensors.torch import save_file
from tiny import TokenScorer, tiny_config, tiny_policy, tiny_problems, without_clock

from r1fast import distributed, watchdog
from r1fast.checkpoint import load_checkpoint
from r1fast.examples import Example
from r1fast.export import find_checkpoint, restored
from r1fast.interrupt import Stopped
from r1fast.metrics import read_metrics
from r1fast.sft import SFTTrainer, encode_examples
from r1fast.trainer import GRPOTrainer
from r1fast.training import Trainer

STEPS, STOP = 4, 2
RUNS = {
    "sft": ("--sft.batch_size=3",),
    "grpo": ("--grpo.num_mini_batches=2", "--grpo.num_iterations=2", "--grpo.ref_refresh_steps=3",
             "--grpo.prompts_per_step=5"),
    "dynamic": ("--grpo.dynamic_sampling=signal", "--grpo.kl_coef=0", "--grpo.prompts_per_step=3"),
    "lora": ("--lora.rank=3", "--optim.lr=0.01", "--grpo.ref_refresh_steps=1"),
}  # fmt: skip


def make(name: str, folder: Path, *overrides: str) -> Trainer:
    # an eps far above the gradients' rounding: AdamW's first steps divide by the gradient's size
    config = tiny_config(
        f"--grpo.num_steps={STEPS}", f"--sft.max_steps={STEPS}", "--checkpoint.every_steps=1",
        "--optim.eps=0.001", "--optim.warmup_steps=2", *RUNS[name], *overrides,
    )  # fmt: skip
    policy = tiny_policy()
    if name != "sft":
        scorer = TokenScorer(lambda ids: float(sum(t % 2 for t in ids) > len(ids) / 2))
        return GRPOTrainer(policy, config, folder, tiny_problems(), scorer, stage=name)
    examples = [Example(f"What is {a} + 1?", str(a + 1)) for a in range(8)]
    return SFTTrainer(policy, config, folder, encode_examples(examples, policy, config))


def run(trainer: Trainer, stop: int = STEPS) -> None:
    """To the end, or to before the step `stop`; what this rank learned from is in learned-rank<r>-*.json."""
    real, trainer.watch = trainer.train_step, lambda: None
    first, learned, width = trainer.step, {}, trainer.world_size

    def train_step(n):
        if n == stop:
            raise Stopped
        row = real(n)
        if isinstance(trainer, SFTTrainer):
            items = [[*x.prompt_ids, *x.completion_ids] for x in trainer.batch]
            learned[n + 1] = [[trainer.rank + i * width, x] for i, x in enumerate(items)]
        return row

    def update(groups, n):
        learned[n + 1] = [
            [g.position, g.problem.id, [c.token_ids for c in g.completions]] for g in groups
        ]
        return real_update(groups, n)

    trainer.train_step = train_step
    if isinstance(trainer, GRPOTrainer):
        real_update, trainer.update = trainer.update, update
    try:
        trainer.run()
    except Stopped:
        assert stop < STEPS
    name = f"learned-rank{trainer.rank}-from{first}.json"
    (trainer.folder / name).write_text(json.dumps(learned))


def learned(folder: Path, width: int) -> dict[int, list]:
    """{step: what all ranks learned from}: the first `width` facts of each, in the order of the data."""
    found: dict[int, list] = {}
    for file in folder.glob("learned-rank*.json"):
        for step, items in json.loads(file.read_text()).items():
            found.setdefault(int(step), []).extend(item[:width] for item in items)
    return {step: sorted(items) for step, items in found.items()}


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    found = trainer.state_tensors()
    return {f"{name}.{key}": x for name, named in found.items() for key, x in named.items()}


def rows_of(folder: Path) -> list[dict]:
    rows = without_clock(read_metrics(folder))
    for row in rows:
        row.pop("rollout/cache_mib", None)  # the most that the processes' engines ever held
    return rows


def in_ranks(out: Path) -> None:
    distributed.start()
    for name in RUNS:
        whole, parts = make(name, out / name / "whole"), make(name, out / name / "parts")
        run(whole)
        run(parts, STOP)
        parts = make(name, out / name / "parts")
        assert parts.step == STOP
        assert parts.note == ""
        run(parts)
        ours, theirs = tensors(whole), tensors(parts)
        assert ours.keys() == theirs.keys()
        for key, x in ours.items():
            assert torch.equal(x, theirs[key]), (name, key)
        save_file({k: x.contiguous() for k, x in ours.items()},
                  out / name / f"rank{distributed.rank()}.safetensors")  # fmt: skip
        run(make(name, out / name / "one_to_two"))  # begun by one process
        run(make(name, out / name / "two_to_one"), STOP)
        run(
            make(name, out / name / "there_and_back"), STOP + 1
        )  # begun by one process, and ended by one
    between_updates(out)
    try:  # the second rank is not to see what the first has
        make("sft", out / ("sft" if distributed.is_main() else "elsewhere") / "whole")
    except ValueError as error:
        (out / f"refused-rank{distributed.rank()}").write_text(str(error))
    distributed.barrier()
    distributed.leave(0)


def between_updates(out: Path) -> None:
    """A signal to the second rank alone, when the first of a rollout's two updates is made."""
    whole = out / "grpo" / "whole"
    trainer = make("grpo", out / "signal", "--checkpoint.deadline_seconds=0.001")
    plain, updates = watchdog.Watchdog.beat, []

    def beat(dog, phase, detail=""):
        plain(dog, phase, detail)
        if phase == "optimizer":
            updates.append(phase)
            if len(updates) == 4 + 1 and distributed.rank() == 1:
                signal.raise_signal(signal.SIGTERM)

    watchdog.Watchdog.beat = beat
    try:
        trainer.run()
        raise SystemExit("nothing stopped")
    except Stopped:
        assert trainer.was_updated
    watchdog.Watchdog.beat = plain
    parts = make("grpo", out / "signal")
    assert parts.step == 1, parts.step  # the whole rollout is made again
    run(parts)
    if distributed.is_main():
        assert rows_of(parts.folder) == rows_of(whole)
        a, b = (load_checkpoint(folder / "checkpoints") for folder in (parts.folder, whole))
        for name in a.names():
            assert all(torch.equal(x, b.tensors(name)[key]) for key, x in a.tensors(name).items())


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    for name in RUNS:
        run(make(name, folder / name / "one_to_two"), STOP)
        run(make(name, folder / name / "there_and_back"), STOP - 1)
    ranks = Ranks(__file__, folder)
    for name in RUNS:  # meanwhile
        run(make(name, folder / name / "one"))
    said = ranks.succeed()
    for rank, text in enumerate(said):
        (folder / f"stderr-rank{rank}").write_text(text)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_that_were_stopped_are_two_that_were_not(out, name):
    """The weights, moments and reference of every rank were compared in it."""
    whole, parts = (rows_of(out / name / run) for run in ("whole", "parts"))
    assert [row["step"] for row in whole] == list(range(1, STEPS + 1))
    assert parts == whole
    assert learned(out / name / "parts", 3) == learned(out / name / "whole", 3)
    if name != "sft":
        texts = [
            (out / name / run / "completions.jsonl").read_bytes() for run in ("whole", "parts")
        ]
        assert texts[0] == texts[1]
    files = [(out / name / f"rank{rank}.safetensors").read_bytes() for rank in (0, 1)]
    assert files[0] == files[1]  # the ranks never drift apart
    newest = out / name / "parts" / "checkpoints" / f"step-00000{STEPS}"
    assert (newest / "optimizer-00002-of-00002.safetensors").is_file()


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("change", ["one_to_two", "two_to_one"])
def test_another_number_of_ranks_learns_from_the_same_in_the_same_order(out, name, change, capfd):
    folder = out / name / change
    if change == "two_to_one":
        run(make(name, folder))
        told, numbers = capfd.readouterr().err, "2 -> 1"
    else:
        told, numbers = (out / "stderr-rank0").read_text(), "1 -> 2"
        assert "processes" not in (out / "stderr-rank1").read_text()
    line = f"{name}: processes {numbers} after step {STOP}: the same data in the same order"
    assert told.count(line) == 1
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if "note" in row] == [STOP + 1]
    assert rows[STOP]["note"] in told
    assert_alike(folder, out / name / "one")


def assert_alike(folder: Path, one: Path) -> None:
    """The same data in the same order, and metrics up to rounding."""
    ours, theirs = learned(folder, 2), learned(one, 2)
    assert ours == theirs
    assert sorted(ours) == list(range(1, STEPS + 1))
    assert learned(folder, 3)[1] == learned(one, 3)[1]  # sampled by equal weights
    for a, b in zip(read_metrics(folder), read_metrics(one), strict=True):
        for key in ("loss", "entropy", "kl", "grad_norm", "learning_rate", "epoch"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), (a["step"], key)


@pytest.mark.parametrize("name", RUNS)
def test_one_process_two_and_one_again(out, name):
    folder = out / name / "there_and_back"
    run(make(name, folder))
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    notes = {row["step"]: row["note"] for row in rows if "note" in row}
    assert notes.keys() == {STOP, STOP + 2}
    assert "processes 1 -> 2" in notes[STOP]
    assert "processes 2 -> 1" in notes[STOP + 2]
    assert_alike(folder, out / name / "one")


@pytest.mark.parametrize("name", ["grpo", "lora"])
def test_what_two_ranks_have_saved_is_read_by_what_reads_checkpoints(out, name):
    saved = find_checkpoint(out / name / "parts")
    assert saved.step == STEPS
    base = out / name / "base"
    tiny_policy().save(base)
    saved.state["starts_from"] = str(base)
    model = restored(saved, str(base)).model
    weights = saved.tensors("model")
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == weights.keys()
    assert all(torch.equal(p, weights[n]) for n, p in found.items())


def test_ranks_that_find_other_checkpoints_are_refused(out):
    for rank in (0, 1):
        text = (out / f"refused-rank{rank}").read_text()
        assert "rank 0 step 4, rank 1 step None. All ranks need one filesystem" in text


if __name__ == "__main__":
    in_ranks(Path(sys.argv[1]))
