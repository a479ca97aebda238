"""What a second rank brings, and where the rest goes: GRPO steps of one and of two processes, a core each.

    python benchmarks/bench_scale.py [--models 3.5M 25M] [--variants NAME ...] [--steps N] [--rounds N] [--vllm VENV] [--no-append]

The global batch stays as it is (strong scaling): 8 prompts x 8 completions of at most 128 tokens, float32, the
models of bench_step.py, gloo on loopback. `one` is a process on one core; `two` is two ranks, each on its own core;
`two, FSDP` the same with parallel.mode = fsdp; in `8 slots` a rank samples 8 of its 32 at a time, with and without
rollout.work_stealing. `one, vLLM` is one process on one core and a server of vLLM's CPU build, made where it is not
there, on the other; in `ahead` they work at the same time (grpo.max_staleness = 1, an update waits). `apart` is two
processes that know nothing of each other, at the same time, each with the whole batch: what is slower there than in
`one` is the machine's (memory, caches, clock), not ours.

    efficiency           seconds of `one` / (2 x seconds of `two`)
    of what there is     seconds of `apart` / (2 x seconds of `two`)

Seconds lost are the mean over ranks and the median over steps: waiting for the other's rollout, waiting for the
other's last gradient, summing gradients, gathering the weights once before a rollout, and, with a server, giving it the
weights, with the check that it has them. What FSDP gathers and adds up layer by layer is in its seconds of training.
Ranks read one clock, the machine's.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

from bench_step import MODELS, config_of, make_checkpoint
from common import append_rows, print_table
from rank_programs import run_ranks
from step_orders import reward_of
from vllm_build import install_vllm

from r1fast.rollout.vllm.start import Child

PROMPTS, PROMPT_TOKENS, GROUP, MAX_TOKENS = 8, 64, 8, 128
WARM_UP = 2  # steps
SLOTS = "--rollout.max_batch_size=8"  # of a rank's 32 samples: most wait for a slot
VARIANTS = {  # name -> (ranks, processes that know nothing of each other, config)
    "one": (1, 1, []),
    "apart": (1, 2, []),
    "two": (2, 1, []),
    "two, FSDP": (2, 1, ["--parallel.mode=fsdp"]),
    "two, 8 slots": (2, 1, [SLOTS]),
    "two, 8 slots, stealing": (2, 1, [SLOTS, "--rollout.work_stealing=true"]),
    "one, vLLM": (1, 1, ["--rollout.engine=vllm"]),
    "one, vLLM ahead": (
        1,
        1,
        ["--rollout.engine=vllm", "--grpo.max_staleness=1", "--rollout.vllm.update=wait"],
    ),
}
LOSSES = {
    "waiting for a rollout": lambda ranks: _behind(ranks, "rollout ends"),
    "waiting for a gradient": lambda ranks: _behind(ranks, "gradient made"),
    "summing gradients": lambda ranks: (
        statistics.mean(r["sum ends"] for r in ranks) - max(r["sum begins"] for r in ranks)
    ),
    "gathering for the rollout": lambda ranks: statistics.mean(
        r.get("time/gather", 0.0) for r in ranks
    ),
}


def _behind(ranks: list[dict], event: str) -> float:
    times = [r[event] for r in ranks]
    return max(times) - statistics.mean(times)


def rank_program(path: str, steps: int, overrides: list[str]) -> None:
    """One rank: JSON lines of what each step took, on stdout."""
    from r1fast import distributed
    from r1fast.config import load_config
    from r1fast.policy import load_policy
    from r1fast.trainer import GRPOTrainer
    from r1fast.types import Problem, Reward

    class Scorer:
        def score(self, groups, step_from_end=None):
            for group in groups:
                group.rewards = [
                    Reward(reward_of(c.token_ids), {}, None) for c in group.completions
                ]

    distributed.start()
    config = load_config(None, [
        "--template.name=raw", f"--rollout.num_generations={GROUP}", "--optim.lr=1e-6",
        f"--rollout.max_completion_tokens={MAX_TOKENS}", f"--grpo.prompts_per_step={PROMPTS}",
        f"--grpo.num_steps={steps}", "--grpo.kl_coef=0", "--grpo.token_budget=4096",
        "--log.num_samples=0", "--checkpoint.every_steps=0", "--model.device=cpu", *overrides,
    ])  # fmt: skip
    rng, vocab = random.Random(0), config_of(Path(path).name)["vocab_size"]
    problems = [
        Problem(" ".join(f"w{rng.randrange(200, vocab)}" for _ in range(PROMPT_TOKENS)), "", str(i))
        for i in range(PROMPTS)
    ]
    policy = load_policy(path, dtype="float32", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(policy, config, folder, problems, Scorer())
        events: dict[str, float] = {}
        rollout, compared = trainer.rollout, trainer._mismatch
        sum_gradients = trainer.parallel.sum_gradients

        def sampled(step):
            found = rollout(step)
            events["rollout ends"] = time.monotonic()
            return found

        def compares(diffs):  # over all ranks: where those wait that have their gradient
            events["gradient made"] = time.monotonic()
            return compared(diffs)

        def summed(parameters):
            events["sum begins"] = time.monotonic()
            sum_gradients(parameters)
            events["sum ends"] = time.monotonic()

        trainer.rollout, trainer._mismatch = sampled, compares
        trainer.parallel.sum_gradients = summed
        for step in range(steps):
            distributed.barrier()
            events["begins"] = time.monotonic()
            row = trainer.train_step(step)
            distributed.barrier()
            events["ends"] = time.monotonic()
            tokens = {"tokens": row["train/tokens_forwarded"]}
            print(json.dumps(events | tokens | trainer.timer.take()), flush=True)
        trainer.engine.close()
    distributed.leave(0)


def launch(path: str, num_ranks: int, copies: int, steps: int, overrides: list[str]) -> list:
    """What each step took: of each of the `copies`, of each rank."""
    order = [path, steps, overrides]
    said = run_ranks(__file__, order, num_ranks, copies=copies, cores=CORES)
    return [
        list(zip(*([json.loads(line) for line in text.splitlines() if line[:1] == "{"]
                   for text in ranks), strict=True))
        for ranks in said
    ]  # fmt: skip


CORES = sorted(os.sched_getaffinity(0))


@contextmanager
def server_of(path: str, venv: Path) -> Iterator[list[str]]:
    """A server on the second core; what a config has to say of it."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "64"]
    with mock.patch.dict(os.environ, environment):
        os.sched_setaffinity(0, CORES[1:2])  # it keeps what it begins with
        try:
            child = Child(str(venv / "bin/python"), path, options, Path(path).parent / "server.log")
        finally:
            os.sched_setaffinity(0, CORES)
    try:
        child.wait(300)
        yield [
            f"--rollout.vllm.servers=['{child.url}']",
            f"--rollout.max_prompt_tokens={2 * PROMPT_TOKENS}",
        ]
    finally:
        child.close()


def measure(path: str, variants: list[str], steps: int, rounds: int, venv: Path) -> dict[str, list]:
    """variant -> steps, each with what its ranks have noted."""
    found: dict[str, list] = {name: [] for name in variants}
    for number in range(rounds):
        for name in variants:
            num_ranks, copies, overrides = VARIANTS[name]
            with server_of(path, venv) if "vLLM" in name else nullcontext([]) as more:
                copied = launch(path, num_ranks, copies, steps + WARM_UP, overrides + more)
            for copy in copied:
                found[name] += copy[WARM_UP:]
            seconds = statistics.median(seconds_of(step) for step in found[name])
            print(f"round {number + 1}: {name}: {seconds:.2f} s", flush=True)
    return found


def seconds_of(ranks) -> float:
    return max(r["ends"] for r in ranks) - min(r["begins"] for r in ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--vllm", type=Path, default=Path("~/.cache/r1fast/vllm").expanduser(),
        help="virtual environment of vLLM, made where it is not there",
    )  # fmt: skip
    parser.add_argument("--no-append", action="store_true")
    parser.add_argument("--rank-program", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_program:
        rank_program(*args.rank_program)
    if len(CORES) < 2:
        raise SystemExit("this needs two cores")
    if any("vLLM" in name for name in args.variants):
        try:
            install_vllm(args.vllm)
        except (RuntimeError, OSError) as error:
            print(f"skipped vLLM: {error}")
            args.variants = [name for name in args.variants if "vLLM" not in name]
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            path = make_checkpoint(Path(folder) / model, config_of(model), MODELS[model][-1])
            found = measure(path, args.variants, args.steps, args.rounds, args.vllm)
        report(model, found, append=not args.no_append)


def report(model: str, found: dict[str, list], *, append: bool) -> None:
    rows, table = [], []
    seconds = {n: statistics.median(map(seconds_of, steps)) for n, steps in found.items()}
    for name, steps in found.items():
        num_ranks = VARIANTS[name][0]
        values = {"step": (seconds[name], "s")}
        for part in ("rollout", "train"):
            slowest = [max(r[f"time/{part}"] for r in ranks) for ranks in steps]
            values[part] = (statistics.median(slowest), "s")
        if "vLLM" in name:
            values["weight sync"] = (statistics.median(r[0]["time/sync"] for r in steps), "s")
        values["tokens forwarded"] = (statistics.median(r[0]["tokens"] for r in steps), "tokens")
        if num_ranks > 1:
            for ratio, peer in (("efficiency", "one"), ("of what there is", "apart")):
                if peer in seconds:
                    values[ratio] = (seconds[peer] / (num_ranks * seconds[name]), "ratio")
            for loss, of in LOSSES.items():
                if "gradient" not in loss or "FSDP" not in name:
                    values[loss] = (statistics.median(map(of, steps)), "s")
        rows += [(f"GRPO, {model}", name, metric, *value) for metric, value in values.items()]
        table += [[f"{name}: {m}", f"{x:.4g}", unit] for m, (x, unit) in values.items()]
    print(f"\n{model}, medians of {len(next(iter(found.values())))} steps")
    print_table(["", "", ""], table)
    if append:
        append_rows("scaling over ranks", rows)


if __name__ == "__main__":
    main()
