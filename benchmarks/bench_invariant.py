"""What `rollout.batch_invariant` costs and brings: the same rollout and the same update with and without it, in turns.

    python benchmarks/bench_invariant.py [--shapes A B] [--dtypes fp32 bf16] [--kl 0 0.001] [--rounds N] [--no-append]

Checkpoints of bench_rollout.py: 8 prompts of 64 tokens, 8 completions of 128 each, one optimizer step of all of
them. The mismatch is |log-probability when sampled - in the loss| of the first update, over all tokens: bars are of the
run without. With it, the completions are forwarded once more in every optimizer step, by the native forward (2 FLOP a
weight and token beside the 6 of forward and backward); with a reference its own forward is replaced, not added.
"""

import argparse
import itertools
import random
import statistics
import tempfile
import time
from pathlib import Path

from bench_rollout import DTYPES, MAX_TOKENS, SHAPES, bar, make_case, make_checkpoint
from common import append_rows, print_table

from r1fast.config import load_config
from r1fast.policy import load_policy
from r1fast.rollout.sampler import SamplingParams
from r1fast.trainer import GRPOTrainer
from r1fast.types import Problem, Reward

VARIANTS = {"without": "false", "with": "true"}
PARITY_BARS = {"fp32": ("max", 1e-5), "bf16": ("mean", 1e-3)}  # nats


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
        "update": time.perf_counter() - start,
        "max": row["logprob_mismatch/max"],
        "mean": row["logprob_mismatch/mean"],
    }


def measure(model: str, dtype: str, kl_coef: float, rounds: int) -> tuple[list, list[str], str]:
    """(rows for results.csv, a line of the table, the bar)"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = make_checkpoint(folder / model, model)
        trainers = {
            variant: make_trainer(path, folder / variant, DTYPES[dtype], kl_coef, invariant)
            for variant, invariant in VARIANTS.items()
        }
        prompts = make_case("equal", SHAPES[model][2]).prompts
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
    shape = f"{model} {dtype} equal, kl_coef {kl_coef:g}"
    rows = []
    for variant, m in medians.items():
        name = f"{variant} batch_invariant"
        worst = max(s["max"] for s in found[variant])
        rows += [
            (shape, name, "rollout, tokens/s", num_tokens / m["rollout"], "1/s"),
            (shape, name, "update", m["update"], "s"),
            (shape, name, "Engine.score, tokens/s", num_tokens / m["score"], "1/s"),
            (shape, name, "largest logprob mismatch", worst, "nats"),
            (shape, name, "mean logprob mismatch", m["mean"], "nats"),
        ]
    a, b = medians["without"], medians["with"]
    line = [
        shape,
        *(f"{num_tokens / m['rollout']:,.0f}" for m in (a, b)),
        *(f"{1e3 * m['update']:,.0f}" for m in (a, b)),
        f"{b['update'] / a['update']:.2f}",
        f"{1e3 * b['score']:,.0f}",
        *(f"{max(s['max'] for s in steps):.1e}" for steps in found.values()),
        *(f"{m['mean']:.1e}" for m in (a, b)),
    ]
    kind, limit = PARITY_BARS[dtype]
    value = a["mean"] if kind == "mean" else max(s["max"] for s in found["without"])
    return rows, line, bar(f"{shape}: {kind} logprob mismatch", value, limit, at_most=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["A"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--kl", nargs="+", type=float, default=[0, 0.001], help="kl_coef")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-append", action="store_true", help="leave results.csv alone")
    args = parser.parse_args()
    all_rows, lines, bars = [], [], []
    for model, dtype, kl_coef in itertools.product(args.shapes, args.dtypes, args.kl):
        rows, line, parity = measure(model, dtype, kl_coef, args.rounds)
        all_rows += rows
        lines.append(line)
        bars.append(parity)
    print_table(
        [
            "medians, without and with", "tokens/s", "with", "update ms", "with", "times",
            "score ms", "mismatch", "with", "mean", "with",
        ],
        lines,
    )  # fmt: skip
    print("\n".join(("", "bars", *bars)))
    if not args.no_append:
        append_rows("invariant", all_rows)


if __name__ == "__main__":
    main()
