"""The ranks of test_tensor_parallel.py: `python THIS OUT` forks them for one case after the other, all imported once."""

import json
import sys
from pathlib import Path
from unittest import mock

import sharded_ranks
import torch
from sharded_ranks import CASES, FSDP, launch, make, some_steps, train
from tiny import tiny_config, tiny_model, tiny_policy, tiny_problems

from r1fast import distributed
from r1fast.forward import hidden_states
from r1fast.kernels.linear_cross_entropy import linear_cross_entropy
from r1fast.planning import held_bytes
from r1fast.sharding import make_parallel
from r1fast.shards import Shard
from r1fast.trainer import GRPOTrainer

TENSOR = ("--parallel.tensor_parallel=2",)
WHOLE_VOCABULARY = "--parallel.vocab_parallel=false"
LAYOUTS = {  # name -> number of ranks, overrides
    "ddp1": (1, ()),
    "tensor2": (2, TENSOR),
    "tensor2 whole vocabulary": (2, (*TENSOR, WHOLE_VOCABULARY)),
    "ddp2 tensor2": (4, TENSOR),
    "fsdp2 tensor2": (4, (*FSDP, *TENSOR)),
    "hsdp2 tensor2": (4, (*FSDP, *TENSOR, "--parallel.replicas=2", WHOLE_VOCABULARY)),
    "context2 tensor2": (4, (*TENSOR, "--parallel.context_parallel=2")),
    "fsdp2": (2, FSDP),
}
sharded_ranks.RUNS |= {
    "grpo unshared": ("qwen3", "float32", ("--grpo.shared_prompt=false",
                      "--model.activation_checkpointing=selective")),
    "grpo gspo": ("qwen2", "float32", ("--grpo.loss_type=gspo", "--grpo.num_iterations=2",
                  "--model.activation_checkpointing=full")),
}  # fmt: skip
TRAINED = {  # layout -> runs of sharded_ranks.RUNS
    "tensor2": ("grpo unshared", "dynamic", "sft tied", "sft bfloat16"),
    "tensor2 whole vocabulary": ("grpo untied",),
    "ddp2 tensor2": ("splinters", "grpo bfloat16"),
    "fsdp2 tensor2": ("grpo untied", "sft"),
    "hsdp2 tensor2": ("sft tied",),
    "context2 tensor2": ("grpo gspo", "sft"),
}
ALONE = sorted({name for names in TRAINED.values() for name in names})
MODELS = {  # name -> family, changes: every parameter that a decoder may have, and 97 tokens over 2 ranks, or 4
    "tied, bias of qkv": ("qwen2", {}),
    "untied, norms of q and k": ("qwen3", {}),
    "all biases": ("llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
}  # fmt: skip
MOVES = ("ddp1", "tensor2", "fsdp2", "fsdp2 tensor2", "ddp2 tensor2")


def layouts(out: Path, num_ranks: int) -> None:
    for layout, (n, overrides) in LAYOUTS.items():
        names = ALONE if layout == "ddp1" else TRAINED.get(layout, ())
        for name in names if n == num_ranks else ():
            train(name, out / layout / name, *overrides)


def move(out: Path, layout: str) -> None:
    """One step of each run in this layout, wherever it stands."""
    for name in ("grpo", "sft bfloat16"):
        some_steps(name, out / "moved" / name, *LAYOUTS[layout][1], num=1)


def straight(out: Path, layout: str, num: int = 0) -> None:
    """All steps in one layout, or the next `num` of them."""
    for name in ("grpo", "sft bfloat16") if layout == "ddp1" else ("grpo",):
        folder = out / f"{layout} {'in pieces' if num else 'straight'}" / name
        some_steps(name, folder, *LAYOUTS[layout][1], num=num or len(MOVES))


def passes(model, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss over two packed sequences with its gradients in the model, and the hidden states."""
    from r1fast.batch import pack
    from r1fast.types import Sequence

    ids = torch.randint(97, (24,), generator=torch.Generator().manual_seed(seed)).tolist()
    (batch,) = pack([Sequence(ids[:3], ids[3:11]), Sequence(ids[11:13], ids[13:])], 64, [0.1, 0.2])
    hidden = hidden_states(model, batch)
    loss = linear_cross_entropy(
        hidden, model.head_weight, batch.target_ids, token_weights=batch.token_weights,
        reduction="sum", process_group=model.head_group,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), hidden.detach()


def decoders(out: Path) -> None:
    """Loss, hidden states and every gradient of a divided decoder, by what layers keep, against the whole one's."""
    found, num_ranks = {}, distributed.world_size()
    for name, (family, changes) in MODELS.items():
        if num_ranks > 2:
            changes = changes | {"num_attention_heads": 8, "num_key_value_heads": 4}
        for vocab in ("true", "false"):
            for mode in ("none", "selective", "full"):
                whole = tiny_model(family, **changes)
                loss, hidden = passes(whole, 1)
                policy = tiny_policy()
                policy.model = tiny_model(family, **changes)
                over = f"--parallel.tensor_parallel={num_ranks}"
                config = tiny_config(over, f"--parallel.vocab_parallel={vocab}")
                parallel = make_parallel(policy, config, can_shard=True)
                parallel.model.checkpointing = mode
                optimizer = parallel.make_optimizer(config.optim)
                own_loss, own_hidden = passes(parallel.model, 1)
                parallel.sum_gradients(optimizer.masters)
                norm = optimizer._norm([m.grad for m in optimizer.masters])
                pairs = {"loss": (own_loss, loss), "hidden": (own_hidden, hidden)}
                for n, p in parallel.model.named_parameters():
                    grad = parallel.shards[n].of(p.grad).gather(p.dtype, p.device)
                    pairs[n] = grad, whole.get_parameter(n).grad
                expected = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()])
                pairs["norm"] = norm, expected
                key = f"{name}, vocab_parallel={vocab}, {mode}"
                found[key] = {n: float((a - b).norm() / b.norm()) for n, (a, b) in pairs.items()}
    (out / f"decoders-{num_ranks}-{distributed.rank()}.json").write_text(json.dumps(found))


def memory(out: Path, layout: str) -> None:
    """Bytes that a rank holds between two steps, and of its gradients."""
    overrides = ("--grpo.num_steps=1", "--model.activation_checkpointing=none")
    policy = tiny_policy(
        "qwen3", hidden_size=64, intermediate_size=192, head_dim=16, num_hidden_layers=4
    )
    config = tiny_config(
        *overrides, *LAYOUTS[layout][1], "--grpo.kl_coef=0", "--grpo.token_budget=60"
    )
    folder = out / "memory" / layout
    trainer = GRPOTrainer(policy, config, folder, tiny_problems(), sharded_ranks.Scorer())
    trainer.watch = lambda: None
    sizes = {}

    def on_gradient():
        sizes["gradients"] = sum(m.grad.nbytes for m in trainer.optimizer.masters)

    trainer.on_gradient = on_gradient
    trainer.run()
    job = trainer.job()
    sizes |= {
        "held": held_bytes(trainer),
        "steps": sum(x.nbytes for n, x in trainer.optimizer.state_tensors().items() if n[:5] == "step."),
        "planned": [job.divided and job.divided.kept(), job.divided and job.divided.gradients()],
        "peak": trainer.model.num_parameters(),
    }  # fmt: skip
    (folder / f"sizes-{distributed.rank()}.json").write_text(json.dumps(sizes))


def not_finite(out: Path) -> None:
    """The gradient of one rank of four is NaN in the second of three steps."""
    for layout in ("ddp2 tensor2", "fsdp2 tensor2"):
        folder = out / "not_finite" / layout
        trainer = make("sft", folder, *LAYOUTS[layout][1], "--sft.max_steps=3")

        def poisoned(model, batch, trainer=trainer):
            hidden = hidden_states(model, batch)
            if trainer.step == 1 and distributed.rank() == 3:
                hidden.register_hook(lambda g: g * torch.nan)
            return hidden

        with mock.patch("r1fast.sft.hidden_states", poisoned):
            trainer.run()


def odd_slices(out: Path) -> None:
    """Slices, and rows of slices, of tensors that divide evenly or not; fused parts."""
    from r1fast.shards import Cut, Slice

    data, tensor = distributed.mesh(1, "cpu", 2)
    for shape, dim, parts in (
        ((9, 3), 0, (9,)), ((6, 5), 1, (5,)), ((8, 2), 0, (4, 2, 2)), ((8,), 0, (4, 2, 2)), ((4, 6), None, ()), ((3, 2), 0, (3,))
    ):  # fmt: skip
        whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
        cut = None if dim is None else Cut(dim, parts, tensor)
        for group in (None, data.get_group()):
            probe = Slice(whole, whole.shape, group, cut, 2)
            own = Slice(probe.rows_of(whole), whole.shape, group, cut, 2)
            assert isinstance(own, Shard)
            found = own.gather(torch.float64, torch.device("cpu"))
            assert torch.equal(found, whole.double()), (shape, dim, group)
            for rank in range(4):
                found = own.gather_to(rank)
                assert (found is not None) == (rank == distributed.rank())
                assert found is None or torch.equal(found, whole)


CASES |= {
    f.__name__: f for f in (layouts, move, straight, decoders, memory, not_finite, odd_slices)
}


def main(out: Path) -> None:
    for n in (2, 4):
        launch(n, out, "decoders")
    launch(4, out, "odd_slices")
    for n in (1, 2, 4):
        launch(n, out, "layouts", n)
    for layout in MOVES:
        launch(LAYOUTS[layout][0], out, "move", layout)
    launch(2, out, "straight", "tensor2")
    for num in (2, len(MOVES) - 2):
        launch(2, out, "straight", "tensor2", num)
    launch(1, out, "straight", "ddp1")
    launch(4, out, "not_finite")
    launch(2, out, "signalled", "killed", *TENSOR)
    launch(2, out, "signalled", "again", *TENSOR)
    for layout in ("ddp1", "tensor2", "fsdp2 tensor2"):
        launch(LAYOUTS[layout][0], out, "memory", layout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
