"""What a rank holds, and what gathering costs: GRPO and SFT steps of two gloo ranks, ddp, fsdp and tensor parallel.

    python benchmarks/bench_sharding.py [--dtypes float32 bfloat16] [--variants ...] [--steps N] [--no-append]

A model of 98M parameters (12 layers of width 768, vocabulary 16,384, tied). GRPO: 4 prompts of 16 tokens x 4 completions of
at most 16, a reference; SFT: 8 sequences of 64. Few tokens, so that weights and not activations are the memory,
and gathering is as large a share of a step as it can be.

    kept          of tensors that are there between two steps: weights, masters, moments, reference (GRPO)
    gradients     of what an optimizer step is made of, on this rank
    peak          of the process in its steps, above what it had before it read the model
    step          seconds of a step by the clock, and of a processor, which other programs lengthen less
    gathering     of these, inside of what gathers weights or divides gradients; by the clock with what they wait
    summing       likewise, of sums over ranks: ddp's of its gradients, those of a tensor parallel layer
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

from bench_step import make_checkpoint
from common import append_rows, print_table
from rank_programs import run_ranks

MODEL = {
    "model_type": "qwen2", "vocab_size": 16384, "hidden_size": 768, "intermediate_size": 2048,
    "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
SHAPE, MIB, WARM_UP = "98M, 2 ranks", 2**20, 1
VARIANTS = {
    "ddp": [],
    "fsdp": ["--parallel.mode=fsdp"],
    "fsdp, layers kept": ["--parallel.mode=fsdp", "--parallel.reshard_after_forward=false"],
    "tensor parallel": ["--parallel.tensor_parallel=2"],
    "tensor parallel, whole vocabulary": [
        "--parallel.tensor_parallel=2", "--parallel.vocab_parallel=false"
    ],
    "ddp, LoRA": ["--lora.rank=16"],
    "fsdp, LoRA": ["--lora.rank=16", "--parallel.mode=fsdp"],
}  # fmt: skip
SECONDS = (
    "step", "step, processor", "gathering", "gathering, processor", "summing", "summing, processor"
)  # fmt: skip
COLLECTIVES = (  # by their names in PyTorch 2.13 and before
    "all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor",
)  # fmt: skip


def rank_program(path: str, kind: str, dtype: str, steps: int, overrides: list[str]) -> None:
    """One rank: a JSON line on stdout."""
    import torch
    import torch.distributed as dist

    from r1fast import distributed
    from r1fast.config import load_config
    from r1fast.machine import PeakMemory
    from r1fast.planning import held_bytes
    from r1fast.policy import load_policy
    from r1fast.sft import SFTTrainer
    from r1fast.shards import Cut
    from r1fast.trainer import GRPOTrainer
    from r1fast.types import Problem, Reward, Sequence

    class Scorer:
        def score(self, groups, step_from_end=None):
            for group in groups:
                group.rewards = [Reward(float(i % 2), {}, None) for i in range(4)]

    distributed.start()
    torch.set_num_threads(1)
    config = load_config(None, [
        "--template.name=raw", "--rollout.num_generations=4", "--rollout.max_completion_tokens=16",
        "--grpo.prompts_per_step=4", f"--grpo.num_steps={steps}", "--grpo.token_budget=512",
        f"--sft.max_steps={steps}", "--sft.batch_size=8", "--sft.token_budget=512", "--log.num_samples=0",
        "--model.activation_checkpointing=none", f"--model.dtype={dtype}", "--model.device=cpu", *overrides,
    ])  # fmt: skip
    rng, vocab = random.Random(0), MODEL["vocab_size"]
    policy = load_policy(path, dtype=dtype, device="cpu")
    folder = tempfile.mkdtemp(dir=Path(path).parent)
    if kind == "SFT":
        ids = [rng.choices(range(200, vocab), k=64) for _ in range(64)]
        trainer = SFTTrainer(policy, config, folder, [Sequence(x[:16], x[16:]) for x in ids])
    else:
        words = [" ".join(f"w{rng.randrange(200, vocab)}" for _ in range(16)) for _ in range(64)]
        problems = [Problem(text, "", str(i)) for i, text in enumerate(words)]
        trainer = GRPOTrainer(policy, config, folder, problems, Scorer())
    peak = PeakMemory(policy.device, held_bytes(trainer))
    spent, found = defaultdict(float), defaultdict(list)

    def timed(collective, name="gathering"):
        def call(*args, **kwargs):
            began, worked = time.perf_counter(), time.process_time()
            try:
                return collective(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - began
                spent[f"{name}, processor"] += time.process_time() - worked

        return call

    names = [name for name in COLLECTIVES if hasattr(dist, name)]
    patches = [mock.patch.object(dist, name, timed(getattr(dist, name))) for name in names[:2]]
    patches += [
        mock.patch.object(Cut, "whole_of", timed(Cut.whole_of)),
        mock.patch.object(dist, "all_reduce", timed(dist.all_reduce, "summing")),
    ]

    def on_gradient() -> None:
        found["gradients"].append(sum(m.grad.nbytes for m in trainer.optimizer.masters))

    trainer.on_gradient = on_gradient
    for patch in patches:
        patch.start()
    for step in range(steps):
        distributed.barrier()
        spent.clear()
        began, worked = time.perf_counter(), time.process_time()
        trainer.train_step(step)
        distributed.barrier()
        found["step"].append(time.perf_counter() - began)
        found["step, processor"].append(time.process_time() - worked)
        for name in SECONDS[2:]:
            found[name].append(spent[name])
    found["kept"], found["peak"] = [held_bytes(trainer)], [peak.read()]
    print(json.dumps({name: statistics.median(x[WARM_UP:] or x) for name, x in found.items()}))
    sys.stdout.flush()
    distributed.leave(0)


def launch(path: str, kind: str, dtype: str, steps: int, overrides: list[str]) -> dict[str, float]:
    """The mean over two ranks."""
    (said,) = run_ranks(__file__, [path, kind, dtype, steps, overrides], 2, timeout=1800)
    ranks = [json.loads(text.splitlines()[-1]) for text in said]
    return {name: statistics.mean(rank[name] for rank in ranks) for name in ranks[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kinds", nargs="+", default=["SFT", "GRPO"])
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--no-append", action="store_true")
    parser.add_argument("--rank-program", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_program:
        rank_program(*args.rank_program)
    rows, table = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder) / "model", MODEL, 1)
        for kind in args.kinds:
            for dtype in args.dtypes:
                for name in args.variants:
                    found = launch(path, kind, dtype, args.steps, VARIANTS[name])
                    values = {n: (found[n] / MIB, "MiB") for n in ("kept", "gradients", "peak")}
                    values |= {n: (found[n], "s") for n in SECONDS}
                    variant = f"{name}, {dtype}"
                    rows += [
                        (f"{kind}, {SHAPE}", variant, n, *value) for n, value in values.items()
                    ]
                    table.append(
                        [kind, variant, *(f"{x:.4g} {unit}" for x, unit in values.values())]
                    )
                    print(*table[-1], sep="  ", flush=True)
    print_table(["", "", "kept", "gradients", "peak", *SECONDS], table)
    if not args.no_append:
        append_rows("sharding", rows)


if __name__ == "__main__":
    main()
