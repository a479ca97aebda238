"""What a rank takes for one long sequence, alone and with pieces of it (parallel.context_parallel), on gloo ranks of a CPU.

    python benchmarks/bench_context.py [--tokens 8192] [--steps N] [--no-append]

SFT steps over one sequence, a model of 4 layers of width 256 (8 heads, 4 of keys, MLP 768, vocabulary 4,096, float32), so
that activations and not weights are the memory.

    peak        of the process in its steps, above what it held before them: activations, gradients, what is exchanged
    step        seconds of a step by the clock, and of a rank's processor
    exchange    of these, inside of the all-to-alls of attention; by the clock with what they wait
    sent        bytes that a rank sends to others in them, a step
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
    "model_type": "qwen2", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 1 << 17, "tie_word_embeddings": True,
}  # fmt: skip
MIB, WARM_UP = 2**20, 1
VARIANTS = [  # number of ranks, what layers keep
    (n, mode) for mode in ("none", "selective", "full") for n in (1, 2)
]
UNITS = {"peak": "MiB", "step": "s", "step, processor": "s", "exchange": "s", "sent": "MiB"}


def rank_program(path: str, tokens: int, steps: int, num_ranks: int, checkpointing: str) -> None:
    """One rank: a JSON line on stdout."""
    import torch
    import torch.distributed as dist

    from r1fast import distributed
    from r1fast.config import load_config
    from r1fast.machine import PeakMemory
    from r1fast.planning import held_bytes
    from r1fast.policy import load_policy
    from r1fast.sft import SFTTrainer
    from r1fast.types import Sequence

    distributed.start()
    torch.set_num_threads(1)
    config = load_config(None, [
        "--template.name=raw", f"--sft.max_steps={steps}", "--sft.batch_size=1",
        f"--sft.token_budget={tokens}", f"--parallel.context_parallel={num_ranks}",
        f"--model.activation_checkpointing={checkpointing}", "--model.device=cpu",
    ])  # fmt: skip
    rng = random.Random(0)
    ids = rng.choices(range(200, MODEL["vocab_size"]), k=tokens)
    policy = load_policy(path, device="cpu")
    folder = tempfile.mkdtemp(dir=Path(path).parent)
    trainer = SFTTrainer(policy, config, folder, [Sequence(ids[:16], ids[16:])])
    spent, found = defaultdict(float), defaultdict(list)
    exchange = dist.all_to_all_single

    def timed(received, sent, group=None):
        began = time.perf_counter()
        exchange(received, sent, group=group)
        spent["exchange"] += time.perf_counter() - began
        spent["sent"] += sent.nbytes * (num_ranks - 1) / num_ranks / MIB

    peak = PeakMemory(policy.device, held_bytes(trainer))
    with mock.patch.object(dist, "all_to_all_single", timed):
        for step in range(steps):
            distributed.barrier()
            spent.clear()
            began, worked = time.perf_counter(), time.process_time()
            trainer.train_step(step)
            distributed.barrier()
            found["step"].append(time.perf_counter() - began)
            found["step, processor"].append(time.process_time() - worked)
            for name in ("exchange", "sent"):
                found[name].append(spent[name])
    found["peak"] = [(peak.read() - held_bytes(trainer)) / MIB]
    print(json.dumps({name: statistics.median(x[WARM_UP:] or x) for name, x in found.items()}))
    sys.stdout.flush()
    distributed.leave(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--no-append", action="store_true")
    parser.add_argument("--rank-program", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_program:
        rank_program(*args.rank_program)
    rows, table = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder) / "model", MODEL, 1)
        for num_ranks, mode in VARIANTS:
            order = [path, args.tokens, args.steps, num_ranks, mode]
            (said,) = run_ranks(__file__, order, num_ranks)
            ranks = [json.loads(text.splitlines()[-1]) for text in said]
            values = {name: max(rank[name] for rank in ranks) for name in UNITS}
            variant = f"{num_ranks} rank{'s' * (num_ranks > 1)}, {mode}"
            shape = f"SFT, one sequence of {args.tokens} tokens"
            rows += [(shape, variant, name, x, UNITS[name]) for name, x in values.items()]
            table.append([variant, *(f"{x:.4g} {UNITS[name]}" for name, x in values.items())])
            print(*table[-1], sep="  ", flush=True)
    print_table(["", *UNITS], table)
    if not args.no_append:
        append_rows("context", rows)


if __name__ == "__main__":
    main()
