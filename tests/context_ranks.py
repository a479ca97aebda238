"""The ranks of test_context_parallel.py: `python THIS OUT` forks them, as sharded_ranks.py does, whose runs most are."""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from sharded_ranks import CASES, FSDP, LAYOUTS, MOVED, MOVES, RUNS, launch, some_steps, train
from tiny import TokenScorer, tiny_config, tiny_model, tiny_policy, tiny_problems

from r1fast import distributed
from r1fast.batch import idle_batch, pack
from r1fast.context_parallel import UlyssesAttention, _Exchange, cut
from r1fast.forward import completion_logprobs, hidden_states, nothing, sequence_logprobs
from r1fast.kernels.attention import PackedAttention
from r1fast.trainer import GRPOTrainer
from r1fast.types import Sequence

TWO, FOUR = ("--parallel.context_parallel=2",), ("--parallel.context_parallel=4",)
OWN_RUNS = {  # beside those of sharded_ranks.py
    "apart": ("qwen3", "float32", ("--grpo.shared_prompt=false", "--grpo.balance_ranks=false", "--grpo.token_budget=50",
              "--model.activation_checkpointing=selective", "--grpo.loss_type=dapo")),
    "gspo": ("qwen2", "float32", ("--grpo.loss_type=gspo", "--grpo.num_iterations=2",
             "--model.activation_checkpointing=full")),
    "sequences": ("qwen3", "float32", ("--grpo.off_policy_mask_threshold=0.001", "--grpo.kl_in=reward",
                  "--grpo.rollout_correction=sequence_truncate", "--grpo.entropy_coef=0.01",
                  "--grpo.num_iterations=2", "--model.activation_checkpointing=none")),
    "corrected": ("qwen2", "float32", ("--grpo.rollout_correction=token_truncate", "--grpo.num_iterations=2",
                  "--model.activation_checkpointing=none")),
    "replaced": ("qwen2", "float32", ("--grpo.max_logprob_mismatch=1e-12",
                 "--model.activation_checkpointing=none")),
    "one kv head": ("llama", "float32", ("--model.activation_checkpointing=none",)),
}  # fmt: skip
CUT = {  # layout -> number of ranks, overrides, runs
    "cp2": (2, TWO, ("grpo", "grpo untied", "splinters", "dynamic", "grpo bfloat16", "sft", "sft tied",
            "sft bfloat16", "apart", "lora", "corrected", "replaced", "one kv head", "gspo", "sequences")),
    "cp4": (4, FOUR, ("grpo", "grpo untied", "sft", "one kv head", "gspo")),
    "ddp4 cp2": (4, TWO, ("grpo", "grpo untied", "splinters", "sft tied", "apart")),
    "fsdp2 cp2": (2, (*FSDP, *TWO), ("grpo", "sft bfloat16")),
    "fsdp4 cp2": (4, (*FSDP, *TWO), ("grpo", "grpo untied", "sft", "sft tied", "replaced", "sequences", "lora")),
    "hsdp4 cp2": (4, (*FSDP, *TWO, "--parallel.replicas=2"), ("splinters",)),
}  # fmt: skip
TRAINED = [(layout, name) for layout, (_, _, names) in CUT.items() for name in names]
STEPS = ("cp2", "ddp1", "fsdp4 cp2", "cp4", "fsdp1")  # of a run that moves
assert len(STEPS) == len(MOVES)


def trained(out: Path, num_ranks: int) -> None:
    if num_ranks == 1:
        for name in sorted({name for _, name in TRAINED}):
            train(name, out / "ddp1" / name)
    for layout, (n, overrides, names) in CUT.items():
        for name in names if n == num_ranks else ():
            train(name, out / layout / name, *overrides)


def moved(out: Path, layout: str) -> None:
    overrides = CUT[layout][1] if layout in CUT else LAYOUTS[layout][1]
    for name in MOVED:
        some_steps(name, out / "moved" / name, *overrides, num=1)


def batches(num_sequences: int, prompt: int, vocab_size: int, seed: int = 0, **options):
    """One micro-batch of these many completions of one prompt, of 1, 2, ... tokens."""
    generator = torch.Generator().manual_seed(seed)
    prompt_ids = torch.randint(vocab_size, (prompt,), generator=generator).tolist()
    sequences = [
        Sequence(prompt_ids, torch.randint(vocab_size, (n,), generator=generator).tolist())
        for n in range(1, num_sequences + 1)
    ]
    return pack(sequences, 10_000, [0.1 * (n + 1) for n in range(num_sequences)], **options)


def pieces(out: Path) -> None:
    """Hidden states, log-probabilities and gradients of pieces, of any length, are those of the whole."""
    group, rank = torch.distributed.group.WORLD, distributed.rank()
    for family, changes in (
        ("qwen2", {}),
        ("qwen3", {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8}),
        ("llama", {}),
    ):
        for num, prompt, share in ((1, 1, False), (1, 2, False), (3, 2, True), (4, 9, True), (5, 3, False)):  # fmt: skip
            model = tiny_model(family, **changes).double()
            (batch,) = batches(num, prompt, 97, seed=num, share_prompts=share)
            batch.advantages += torch.arange(len(batch.advantages))
            part = cut(batch, group)
            for mode in ("none", "selective", "full"):
                model.checkpointing = mode
                hidden = hidden_states(model, batch)
                coefficients = torch.arange(1.0, 1 + hidden.numel(), dtype=torch.float64)
                coefficients = coefficients.view_as(hidden).sin()
                (hidden * coefficients).sum().backward()
                expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}  # fmt: skip
                model.zero_grad()
                own, targets = hidden_states(model, part), part.context.targets
                torch.testing.assert_close(own, hidden[targets], rtol=1e-9, atol=1e-11)
                ((own * coefficients[targets]).sum() + nothing(own, model.head_weight)).backward()
                for name, p in model.named_parameters():
                    total = distributed.all_reduce(p.grad)
                    if name in expected:
                        torch.testing.assert_close(total, expected[name], rtol=1e-7, atol=1e-9)
                model.zero_grad()
            torch.testing.assert_close(part.advantages, batch.advantages[targets])
            assert torch.equal(part.target_ids, batch.target_ids[targets])
            assert part.cu_seqlens[-1] == len(targets) == len(part.target_rows)
            assert (part.cu_seqlens.diff() > 0).all()
            counted = distributed.gather_objects([part.num_tokens, len(targets)])
            assert [sum(x) for x in zip(*counted, strict=True)] == [batch.num_tokens, len(batch.target_ids)]  # fmt: skip
            found = sequence_logprobs(model, [part, cut(idle_batch(), group)])
            whole = sequence_logprobs(model, [batch])
            for a, b in zip(found, whole, strict=True):
                assert a == pytest.approx(b, abs=1e-9)
            assert len(completion_logprobs(model, part)[0]) == len(targets)
    assert cut(idle_batch(), group).num_tokens == 0
    (out / f"pieces-{rank}").touch()


def exchanged(out: Path) -> None:
    """What a rank sends in attention, of any type, and how it comes back."""
    group, rank = torch.distributed.group.WORLD, distributed.rank()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = (10 * rank + torch.arange(4.0)).to(dtype).view(4, 1).requires_grad_()
        y = _Exchange.apply(x, group)
        assert y[:, 0].tolist() == [10 * r + rank for r in range(4)]
        (y * (1 + torch.arange(4.0).to(dtype).view(4, 1) + rank)).sum().backward()
        assert x.grad[:, 0].tolist() == [1 + rank + r for r in range(4)]
    sent = []
    with mock.patch("torch.distributed.all_to_all_single",
                    lambda received, x, group: (sent.append(x.numel()), received.copy_(x))):  # fmt: skip
        attend = UlyssesAttention(
            PackedAttention(torch.tensor([0, 10], dtype=torch.int32), 10), 10, group
        )
        q, k, v = (torch.zeros(3, h, 16) for h in (12, 2, 2))
        attend(0, q, k, v)
    # 3 tokens a rank; R = 4
    assert sent == [3 * 12 * 16, 3 * 4 * 16, 3 * 4 * 16, 3 * 12 * 16]
    (out / f"exchanged-{rank}").touch()


def kept(out: Path) -> None:
    """Bytes that the layers keep for the backward: of a whole sequence, and of a rank's piece."""
    model, group = tiny_policy("qwen3").model, torch.distributed.group.WORLD
    (batch,) = batches(1, 2000, 97)
    found = {}
    for mode in ("none", "selective", "full"):
        model.checkpointing = mode
        for name, x in (("whole", batch), ("piece", cut(batch, group))):
            storages: dict[int, torch.Tensor] = {}

            def keep(saved, storages=storages):
                if not isinstance(saved, torch.nn.Parameter):
                    storages[saved.untyped_storage().data_ptr()] = saved
                return saved

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
                hidden = hidden_states(model, x)
            found[f"{mode} {name}"] = sum(s.untyped_storage().nbytes() for s in storages.values())
            nothing(hidden, model.head_weight).backward()
    (out / f"kept-{distributed.rank()}.json").write_text(json.dumps(found))


def refused(out: Path) -> None:
    """What two ranks cannot share."""

    def make(*overrides: str, **changes) -> GRPOTrainer:
        config = tiny_config(*overrides)
        return GRPOTrainer(tiny_policy(**changes), config, out / "refused", tiny_problems(), TokenScorer())  # fmt: skip

    with pytest.raises(
        ValueError, match="3 x 1 does not divide the number of processes, 2: start a multiple of 3"
    ):
        make("--parallel.context_parallel=3")
    with pytest.raises(
        ValueError,
        match=r"context_parallel = 2 does not divide the 3 query heads .* take one of 1, 3",
    ):
        make(*TWO, num_attention_heads=3, num_key_value_heads=3, head_dim=16)
    with pytest.raises(
        ValueError,
        match=r"token_budget = 5 .* over 2 ranks \(parallel.context_parallel\). Set .* to \d+ or",
    ):
        make(*TWO, "--grpo.token_budget=5")


OWN_CASES = {f.__name__: f for f in (trained, moved, pieces, exchanged, kept, refused)}


def main(out: Path) -> None:
    RUNS.update(OWN_RUNS)
    CASES.update(OWN_CASES)
    for n in (1, 2, 4):
        launch(n, out, "trained", n)
    for layout in STEPS:
        n = CUT[layout][0] if layout in CUT else LAYOUTS[layout][0]
        launch(n, out, "moved", layout)
    launch(1, out, "straight", "ddp1")
    for n in (2, 4):
        launch(n, out, "pieces")
    launch(4, out, "exchanged")
    launch(2, out, "kept")
    launch(2, out, "refused")
    launch(2, out, "not_finite", *TWO)
    launch(2, out / "gspo", "not_finite", *TWO, "--grpo.loss_type=gspo")
    launch(2, out, "signalled", "killed", *TWO)
    launch(2, out, "signalled", "again", *TWO)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
