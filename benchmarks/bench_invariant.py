"""What `rollout.batch_invariant` costs: the same rollout and the same update with and without it, in turns.

    python benchmarks/bench_invariant.py [--rounds N] [--no-append]

Checkpoint A of bench_rollout.py: 8 prompts of 64 tokens, 8 completions of 128 each, one optimizer step of all of
them. With it, the completions are forwarded once more in every optimizer step, by the native forward (2 FLOP a
weight and token beside the 6 of forward and backward); with a reference its own forward is replaced, not added.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from bench_rollout import DTYPES, MAX_TOKENS, make_case, make_checkpoint
from common import append_rows, print_table

from r1fast.config import load_config
from r1fast.policy import load_policy
from r1fast.rollout.sampler import SamplingParams
from r1fast.trainer import GRPOTrainer
from r1fast.types import Problem, Reward

VARIANTS = {"without": "false", "with": "true"}


class NoScorer:
    """The rewards are given below."""

    def score(self, groups, step_from_end=None):
        raise NotImplementedError


def make_trainer(path: str, folder: Path, dtype: str, kl_coef: float, invariant: str):
    config = load_config(None, [
        "--template.name=raw", "--rollout.num_generations=8", f"--grpo.kl_coef={kl_coef}",
        "--optim.lr=1e-6", f"--rollout.batch_invariant={invariant}", "--rollout.prefix_cache=false",
        f"--rollout.max_completion_tokens={MAX_TOKENS}",
    ])  # fmt: skip
    policy = load_policy(path, dtype=dtype, device="cpu")
    return GRPOTrainer(policy, config, folder, [Problem("w1", "1")], NoScorer())


def one_step(trainer: GRPOTrainer, prompts: list[list[int]], step: int) -> dict[str, float]:
    """Seconds of the rollout, of the update and of scoring alone."""
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    start = time.perf_counter()
    groups = trainer.engine.generate(prompts, 8, sampling, seed=step)
    seconds = {"rollout": time.perf_counter() - start}
    rng = random.Random(step)
    for group in groups:
        group.rewards = [Reward(float(rng.random() < 0.5), {}, None) for _ in group.completions]
    start = time.perf_counter()
    trainer.engine.score(prompts, [[c.token_ids for c in g.completions] for g in groups])
    seconds["score"] = time.perf_counter() - start
    start = time.perf_counter()
    row = trainer.update(groups, step)
    return seconds | {
        "update": time.perf_counter() - start, "mismatch": row["logprob_mismatch/max"],
    }  # fmt: skip


def measure(dtype: str, kl_coef: float, rounds: int) -> tuple[list, list[str]]:
    """(rows for results.csv, a line of the table)"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = make_checkpoint(folder / "A", "A")
        trainers = {
            variant: make_trainer(path, folder / variant, DTYPES[dtype], kl_coef, invariant)
            for variant, invariant in VARIANTS.items()
        }
        prompts = make_case("equal", 2048).prompts
        found = {variant: [] for variant in trainers}
        for step in range(rounds + 1):
            for variant, trainer in trainers.items():
                seconds = one_step(trainer, prompts, step)
                if step:  # the first one warms up
                    found[variant].append(seconds)
    medians = {
        variant: {key: statistics.median(s[key] for s in steps) for key in steps[0]}
        for variant, steps in found.items()
    }
    num_tokens = 64 * MAX_TOKENS
    shape = f"A {dtype} equal, kl_coef {kl_coef:g}"
    rows = []
    for variant, m in medians.items():
        name = f"{variant} batch_invariant"
        worst = max(s["mismatch"] for s in found[variant])
        rows += [
            (shape, name, "rollout, tokens/s", num_tokens / m["rollout"], "1/s"),
            (shape, name, "update", m["update"], "s"),
            (shape, name, "Engine.score, tokens/s", num_tokens / m["score"], "1/s"),
            (shape, name, "largest logprob mismatch", worst, "nats"),
        ]
    a, b = medians["without"], medians["with"]
    line = [
        shape,
        *(f"{num_tokens / m['rollout']:,.0f}" for m in (a, b)),
        *(f"{1e3 * m['update']:,.0f}" for m in (a, b)),
        f"{b['update'] / a['update']:.2f}",
        f"{1e3 * b['score']:,.0f}",
        *(f"{max(s['mismatch'] for s in steps):.1e}" for steps in found.values()),
    ]
    return rows, line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-append", action="store_true", help="leave results.csv alone")
    args = parser.parse_args()
    all_rows, lines = [], []
    for dtype in DTYPES:
        for kl_coef in (0, 0.001):
            rows, line = measure(dtype, kl_coef, args.rounds)
            all_rows += rows
            lines.append(line)
    print_table(
        [
            "medians, without and with", "tokens/s", "with", "update ms", "with", "times",
            "score ms", "mismatch", "with",
        ],
        lines,
    )  # fmt: skip
    if not args.no_append:
        append_rows("invariant", all_rows)


if __name__ == "__main__":
    main()
