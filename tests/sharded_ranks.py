"""The ranks of test_sharding.py: `python THIS OUT` forks them for one case after the other, all imported once."""

import json
import os
import signal
import socket
import sys
import traceback
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._dynamo  # of optimizers, FSDP2 and DTensor: seconds that every child would take
import torch.distributed.fsdp
import torch.distributed.tensor
from safetensors.torch import save_file
from test_evaluate import ParityScorer
from tiny import random_groups, tiny_config, tiny_policy, tiny_problems

from r1fast import distributed
from r1fast.forward import hidden_states
from r1fast.interrupt import Stopped
from r1fast.sft import SFTTrainer
from r1fast.shards import Shard, local
from r1fast.trainer import GRPOTrainer
from r1fast.types import Sequence

FSDP = ("--parallel.mode=fsdp",)
LAYOUTS = {  # name -> number of ranks, overrides
    "ddp1": (1, ()),
    "fsdp1": (1, FSDP),
    "ddp2": (2, ()),
    "fsdp2": (2, FSDP),
    "kept2": (2, (*FSDP, "--parallel.reshard_after_forward=false")),
    "ddp4": (4, ()),
    "fsdp4": (4, FSDP),
    "hsdp4": (4, (*FSDP, "--parallel.replicas=2")),
}
# an eps far above the gradients' rounding: AdamW's first steps divide by the gradient's size
COMMON = (
    "--optim.eps=0.001", "--grpo.num_steps=2", "--sft.max_steps=2", "--grpo.token_budget=60",
    "--sft.token_budget=40", "--grpo.num_mini_batches=2",
)  # fmt: skip
RUNS = {  # name -> family (qwen2 is tied, qwen3 is not), dtype, overrides
    "grpo": ("qwen2", "float32", ("--grpo.ref_refresh_steps=2", "--eval.every_steps=1",
             "--model.activation_checkpointing=selective")),
    "grpo untied": ("qwen3", "float32", ("--grpo.num_iterations=2", "--grpo.ref_device=cpu",
                    "--model.activation_checkpointing=full")),
    "splinters": ("qwen2", "float32", ("--grpo.num_mini_batches=8", "--grpo.kl_coef=0",
                  "--model.activation_checkpointing=none")),
    "dynamic": ("qwen2", "float32", ("--grpo.dynamic_sampling=signal",
                "--model.activation_checkpointing=none")),
    "lora": ("qwen2", "float32", ("--lora.rank=3", "--grpo.ref_refresh_steps=1", "--eval.every_steps=1",
             "--model.activation_checkpointing=selective")),
    "grpo bfloat16": ("qwen2", "bfloat16", ("--model.activation_checkpointing=none",)),
    "sft": ("qwen3", "float32", ("--sft.batch_size=5", "--model.activation_checkpointing=none")),
    "sft tied": ("qwen2", "float32", ("--sft.batch_size=9", "--sft.loss=sequence",
                 "--model.activation_checkpointing=selective")),
    "sft lora bfloat16": ("qwen3", "bfloat16", ("--lora.rank=3", "--lora.targets=['q_proj', 'down_proj']",
                          "--model.activation_checkpointing=full")),
    "sft bfloat16": ("qwen3", "bfloat16", ("--model.activation_checkpointing=full",)),
}  # fmt: skip
ALWAYS = ("ddp1", "fsdp2")  # the other layouts train these runs alone:
MORE = {
    "fsdp1": ("grpo", "sft bfloat16", "lora"),
    "ddp2": ("grpo bfloat16", "sft bfloat16", "sft lora bfloat16"),
    "kept2": ("grpo untied", "lora"),
    "ddp4": ("grpo untied",),
    "fsdp4": ("grpo untied", "sft tied"),
    "hsdp4": ("grpo", "splinters", "sft", "grpo bfloat16", "lora"),
}


def runs_of(layout: str) -> tuple[str, ...]:
    return tuple(RUNS) if layout in ALWAYS else MORE[layout]


class Scorer(ParityScorer):
    """Keeps what was sampled."""

    def __init__(self):
        super().__init__()
        self.seen: list = []

    def score(self, groups, step_from_end=None):
        super().score(groups, step_from_end)
        self.seen += [[g.problem.id, [c.token_ids for c in g.completions]] for g in groups]


def make(name: str, folder: Path, *overrides: str, seen: list | None = None):
    family, dtype, own = RUNS[name]
    policy = tiny_policy(family)
    policy.model.to(getattr(torch, dtype))
    config = tiny_config(*COMMON, *own, f"--model.dtype={dtype}", *overrides)
    if name.startswith("sft"):
        groups = random_groups(10, 2, policy.model.spec.vocab_size, seed=4)
        sequences = [Sequence(g.prompt_ids, c.token_ids) for g in groups for c in g.completions]
        trainer = SFTTrainer(policy, config, folder, sequences)
        trainer.scorer = Scorer()
    else:
        scorer = Scorer()

        def evaluate() -> dict[str, float]:
            """A sum of the weights, as whoever evaluates has them."""
            weights = policy.model.parameters()
            return {"pass@1": float(sum(p.detach().double().abs().sum() for p in weights))}

        trainer = GRPOTrainer(policy, config, folder, tiny_problems(), scorer, evaluate=evaluate)
    trainer.watch = lambda: None  # its probe takes longest
    return trainer


def whole_gradient(trainer) -> dict[str, torch.Tensor]:
    found = {}
    for (name, p), master in zip(trainer.optimizer.named, trainer.optimizer.masters, strict=True):
        x = master.grad
        if name in getattr(trainer.parallel, "shards", {}):
            x = trainer.parallel.shards[name].of(x).gather(x.dtype, p.device)
        found[name] = x.clone()
    return found


def train(name: str, out: Path, *overrides: str) -> None:
    trainer = make(name, out, *overrides)
    gradients: dict[str, torch.Tensor] = {}

    def on_gradient():
        step = trainer.optimizer_step
        gradients.update({f"{step}.{n}": x for n, x in whole_gradient(trainer).items()})

    trainer.on_gradient = on_gradient
    trainer.run()
    rank = distributed.rank()
    weights = {n: p.detach().clone() for n, p in trainer.policy.model.named_parameters()}
    save_file(weights, out / f"weights-{rank}.safetensors")
    if rank == 0:
        save_file(gradients, out / "gradients.safetensors")
    (out / f"facts-{rank}.json").write_text(json.dumps({"seen": trainer.scorer.seen}))


def layouts(out: Path, num_ranks: int) -> None:
    for layout, (n, overrides) in LAYOUTS.items():
        for name in runs_of(layout) if n == num_ranks else ():
            train(name, out / layout / name, *overrides)


MOVES = ("ddp1", "fsdp2", "ddp4", "hsdp4", "fsdp1")
MOVED = ("grpo", "lora", "sft bfloat16")


def steps(num: int) -> tuple[str, ...]:
    return (f"--grpo.num_steps={num}", f"--sft.max_steps={num}", "--checkpoint.every_steps=1",
            "--checkpoint.keep_last=20")  # fmt: skip


class Ended(Exception):
    """A run that was left between two steps, as by a kill."""


def some_steps(name: str, folder: Path, *overrides: str, num: int) -> None:
    """The next `num` steps of a run of len(MOVES), the last one saved."""
    trainer = make(name, folder, *steps(len(MOVES)), *overrides)
    train_step, last = trainer.train_step, trainer.step + num

    def limited(step: int):
        if step == last:
            raise Ended
        return train_step(step)

    trainer.train_step = limited
    try:
        trainer.run()
    except Ended:
        assert trainer.step == last
    else:
        assert trainer.step == len(MOVES)


def move(out: Path, layout: str) -> None:
    """One step of each run in this layout, wherever it stands."""
    _, overrides = LAYOUTS[layout]
    for name in MOVED:
        some_steps(name, out / "moved" / name, *overrides, num=1)


def straight(out: Path, layout: str, num: int = 0) -> None:
    """All of these steps in one layout, or the next `num` of them."""
    for name in MOVED:
        folder = out / f"{layout} {'in pieces' if num else 'straight'}" / name
        some_steps(name, folder, *LAYOUTS[layout][1], num=num or len(MOVES))


def not_finite(out: Path, *overrides: str) -> None:
    """The second rank's loss, then its gradient, is NaN in the second of three steps."""
    for name in ("grpo", "sft"):
        for what in ("loss", "gradient"):
            folder = out / "not_finite" / f"{name}-{what}"
            trainer = make(name, folder, *overrides, "--grpo.num_mini_batches=1",
                           "--sft.max_steps=3", "--grpo.num_steps=3")  # fmt: skip
            before: list = []

            def poisoned(model, batch, trainer=trainer, what=what):
                hidden = hidden_states(model, batch)
                if trainer.step != 1 or distributed.rank() != 1 or not torch.is_grad_enabled():
                    return hidden
                if what == "gradient":
                    hidden.register_hook(lambda g: g * torch.nan)
                    return hidden
                return hidden * torch.nan

            train_step = trainer.train_step

            def watched(step, trainer=trainer, train_step=train_step, before=before):
                before.append([local(x).clone() for x in trainer.trained().values()])
                return train_step(step)

            trainer.train_step = watched
            module = "sft" if name == "sft" else "policy_update"
            with mock.patch(f"r1fast.{module}.hidden_states", poisoned):
                trainer.run()
            before.append([local(x) for x in trainer.trained().values()])
            same = [all(map(torch.equal, a, b)) for a, b in pairwise(before)]
            (folder / f"same-{distributed.rank()}.json").write_text(json.dumps(same))


def signalled(out: Path, when: str, *overrides: str) -> None:
    """A signal to the second rank alone, inside of a backward of the second step, and no time left."""
    deadline = "--checkpoint.deadline_seconds=0.001"
    trainer = make(
        "grpo", out / "signalled", *overrides, *steps(2), "--grpo.token_budget=30", deadline
    )
    if when == "again":
        trainer.run()
        return
    num = [0]

    def killed(model, batch):
        num[0] += trainer.step == 1
        if num[0] == 1 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return hidden_states(model, batch)

    with mock.patch("r1fast.policy_update.hidden_states", killed):
        try:
            trainer.run()
        except Stopped:
            facts = {"forwards": num[0], "step": trainer.step, "saved": trainer.saved_step}
            (out / f"signalled-{distributed.rank()}.json").write_text(json.dumps(facts))
        else:
            raise AssertionError("the run was not stopped")


def uneven(out: Path, *overrides: str) -> None:
    """The first rank has what is long, and more micro-batches, in the reference's forward too."""
    trainer = make("grpo", out / "uneven", *overrides, "--grpo.balance_ranks=false",
                   "--grpo.prompts_per_step=6", "--grpo.num_mini_batches=1")  # fmt: skip
    n, rank = distributed.world_size(), distributed.rank()
    groups = random_groups(6, 4, trainer.model.spec.vocab_size, longest=30)
    for position, group in enumerate(groups):
        for i, (c, reward) in enumerate(zip(group.completions, group.rewards, strict=True)):
            length = 1 if position % 2 else 20 + 2 * i
            c.token_ids, c.logprobs = (c.token_ids * 30)[:length], (c.logprobs * 30)[:length]
            reward.total = float((position + i) % 3)
    row = trainer.update(groups[rank::n], 0)
    (out / f"uneven-{n}-{rank}.json").write_text(json.dumps(row["loss"]))


def odd_shapes(out: Path) -> None:
    """Tensors of fewer rows than ranks, and of rows that do not divide by them."""
    mesh, _ = distributed.mesh(1, "cpu")
    for rows in (1, 3, 4, 6, 9):
        whole = torch.arange(2.0 * rows).view(rows, 2)
        shard = Shard(whole, whole.shape, mesh.get_group(0))
        shard = Shard(shard.rows_of(whole), whole.shape, mesh.get_group(0))
        assert torch.equal(shard.gather(torch.float64, torch.device("cpu")), whole.double())
        for rank in range(4):
            found = shard.gather_to(rank)
            assert (found is not None) == (rank == distributed.rank())
            assert found is None or torch.equal(found, whole)
    with pytest.raises(ValueError, match="replicas = 3 does not divide the 4 processes"):
        distributed.mesh(3, "cpu")


CASES = {
    f.__name__: f for f in (layouts, move, straight, not_finite, signalled, uneven, odd_shapes)
}


def launch(num_ranks: int, out: Path, case: str, *words: str | int) -> None:
    """`num_ranks` processes of a case; all must end well."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(num_ranks):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            distributed.start()
            CASES[case](out, *words)
            distributed.barrier()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * num_ranks, f"{case} {words}: {codes}"


def main(out: Path) -> None:
    for n in (1, 2, 4):
        launch(n, out, "layouts", n)
    for layout in MOVES:
        launch(LAYOUTS[layout][0], out, "move", layout)
    launch(2, out, "straight", "fsdp2")
    for num in (2, len(MOVES) - 2):
        launch(2, out, "straight", "fsdp2", num)
    launch(1, out, "straight", "ddp1")
    launch(2, out, "not_finite", *FSDP)
    launch(2, out, "signalled", "killed", *FSDP)
    launch(2, out, "signalled", "again", *FSDP)
    launch(1, out, "uneven")
    launch(2, out, "uneven", *FSDP)
    launch(4, out, "odd_shapes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
