"""A step of GRPO training: r1fast against TRL's GRPOTrainer, on one checkpoint, float32.

    python benchmarks/bench_step.py [--shapes a b c] [--parts training step] [--variants NAME ...]
        [--rounds N] [--kl COEF] [--micro-batches N ...] [--budgets N ...] [--no-append]

Qwen2-shaped random weights, heads of 64, two key-value heads, tied embeddings:

    a  3.5M parameters, V = 2048: 8 prompts of 24 tokens, G = 8, completions of at most 128, mean 68
    b  25M parameters, V = 16384: 4 prompts of 256 tokens, G = 16, completions of at most 256, mean 96
    c  as b, half of the groups without signal: equal rewards

Many token ids end a completion, so that its length is geometric, cut at the maximum: long-tailed. One
optimizer step of DAPO's loss without a reference (--kl: with one), AdamW, the same clipping.

    training  the same rollouts for all (random tokens, the quantiles of those lengths): from rewards to new weights
    step      each samples for itself, lengths differ by chance; TRL by transformers' `generate`

Every trainer is a process of its own (step_peers.py); each round runs every one once, in turns, from the same
weights; what is slow runs in the first one only. Quoted are medians of the seconds and the largest peak of resident
memory, that of Python and its libraries too. `TRL` is without recomputation, in micro-batches of 8, which are its
default and as fast as any other size; its chunked fused head is always on in 1.16. `TRL defaults` recomputes layers. `TRL
Liger` adds Liger's layers, Triton kernels that no CPU runs: skipped with the reason. `TRL + r1fast` has
r1fast.integrations.trl in it; `plain PyTorch` is a loop with all logits in memory. The bars are times the fastest of TRL's
variants, and the memory of `TRL`. What the mathematics needs to forward is each live group's prompt once, and
each completion but its last token.
"""

import argparse
import math
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_rollout import bar
from common import append_rows, print_table
from step_orders import Groups, Settings, Worker

MODELS = {  # layers, width, MLP width, vocabulary, ids that end a completion
    "3.5M": (4, 256, 704, 2048, 23),
    "25M": (8, 512, 960, 16384, 154),
}
OURS, PEER, PATCHED, PLAIN = "r1fast", "TRL", "TRL + r1fast", "plain PyTorch"
PARTS = ["training", "step"]


@dataclass(frozen=True)
class Shape:
    model: str
    prompts: int
    prompt_tokens: int
    group: int
    max_tokens: int
    mean_tokens: float
    silent: int = 0  # groups without signal


SHAPES = {
    "a": Shape("3.5M", 8, 24, 8, 128, 68),
    "b": Shape("25M", 4, 256, 16, 256, 96),
    "c": Shape("25M", 4, 256, 16, 256, 96, silent=2),
}
VARIANTS = {  # name -> engine, options
    OURS: ("r1fast", {}),
    PEER: ("TRL", {}),
    "TRL defaults": ("TRL", {"checkpointing": True, "micro_batch": 8}),
    "TRL, micro-batches of 2": ("TRL", {"micro_batch": 2}),
    "TRL Liger": ("TRL", {"liger": True}),
    PATCHED: ("TRL", {"patch": True}),
    PLAIN: ("plain", {}),
}
EXTRA = [name for name in VARIANTS if name not in (OURS, PEER)]
MICRO_BATCH = {"3.5M": 8, "25M": 8}  # of TRL; any from 2 to 16 takes as long
# of r1fast; 16384 takes a tenth longer at 25M, with twice the memory
TOKEN_BUDGET = {"3.5M": 4096, "25M": 2048}
SPEED_BARS = {("a", "training"): 1.7, ("b", "training"): 4, ("c", "training"): 7, ("b", "step"): 4}
MEMORY_BARS = {("b", "training"): 0.5, ("b", "step"): 0.5}
COSINE_BAR = 0.99999


def config_of(model: str) -> dict:
    layers, width, mlp, vocab, _ = MODELS[model]
    return {
        "model_type": "qwen2", "vocab_size": vocab, "hidden_size": width,
        "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": width // 64, "num_key_value_heads": 2,
        "max_position_embeddings": 1024, "tie_word_embeddings": True,
    }  # fmt: skip


def make_checkpoint(folder: Path, config: dict, num_ends: int, **factory: Any) -> str:
    """A random Qwen2 that the first `num_ends` ids end, with a tokenizer of one word an id."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from r1fast.model import Decoder, ModelSpec, save_model

    vocab = {f"w{i}": i for i in range(config["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w0", pad_token="w0", padding_side="left"
    )
    decoder = Decoder(ModelSpec.from_hf_config(config), seed=0, **factory)
    save_model(decoder, folder, tokenizer=tokenizer, eos_token_id=list(range(num_ends)))
    return str(folder)


def lengths_of(shape: Shape) -> list[int]:
    """The quantiles of a geometric distribution cut at the maximum, with the mean of the shape."""
    n = shape.prompts * shape.group
    scale = shape.mean_tokens
    for _ in range(100):
        tails = [-math.log(1 - (i + 0.5) / n) for i in range(n)]
        lengths = [min(shape.max_tokens, max(1, round(scale * t))) for t in tails]
        scale *= shape.mean_tokens * n / sum(lengths)
    random.Random(0).shuffle(lengths)
    return lengths


def make_rollouts(shape: Shape, vocab: int, num_ends: int) -> Groups:
    """Random tokens; the rewards of a group differ, or are equal in the last `silent` ones."""
    rng, lengths = random.Random(1), iter(lengths_of(shape))

    def words(n: int) -> list[int]:
        return [rng.randrange(num_ends, vocab) for _ in range(n)]

    groups = []
    for number in range(shape.prompts):
        prompt_ids = words(shape.prompt_tokens)
        completions = []
        for n in (next(lengths) for _ in range(shape.group)):
            end = [] if n == shape.max_tokens else [rng.randrange(num_ends)]
            completions.append(words(n - len(end)) + end)
        silent = number >= shape.prompts - shape.silent
        groups.append({
            "prompt": " ".join(f"w{i}" for i in prompt_ids), "prompt_ids": prompt_ids,
            "completions": completions,
            "rewards": [0.5 if silent else rng.random() for _ in completions],
        })  # fmt: skip
    return groups


def score(groups: Groups, path: str) -> None:
    """The old log-probabilities: the model's own."""
    from r1fast.policy import load_policy
    from r1fast.rollout.engine import Engine

    policy = load_policy(path, dtype="float32", device="cpu")
    scored = Engine(policy.model, policy.eos_ids).score(
        [g["prompt_ids"] for g in groups], [g["completions"] for g in groups]
    )
    for group, logprobs in zip(groups, scored, strict=True):
        group["logprobs"] = [x.tolist() for x in logprobs]


def cut(groups: Groups, prompt_tokens: int, completion_tokens: int) -> Groups:
    """Shortened, and so without the old log-probabilities."""
    return [
        {
            "prompt": g["prompt"],
            "prompt_ids": g["prompt_ids"][:prompt_tokens],
            "completions": [ids[:completion_tokens] for ids in g["completions"]],
            "rewards": g["rewards"],
        }
        for g in groups
    ]


def needed_tokens(groups: Groups, kl_coef: float = 0.0) -> int:
    """Of each group that has a gradient: its prompt, and each completion but the last token."""
    live = [g for g in groups if kl_coef or len(set(g["rewards"])) > 1]
    return sum(len(g["prompt_ids"]) + sum(len(c) - 1 for c in g["completions"]) for g in live)


def compare_gradients(path: Path, other: Path) -> tuple[float, float]:
    """(cosine, relative difference) of two files of tensors by name, over all of them."""
    from safetensors.torch import load_file

    a, b = load_file(path), load_file(other)
    if a.keys() != b.keys():
        raise AssertionError(f"gradients of different parameters: {sorted(a.keys() ^ b.keys())}")
    dot = aa = bb = dd = 0.0
    for name, x in a.items():
        x, y = x.double(), b[name].double()
        dot, aa, bb = (
            dot + float((x * y).sum()),
            aa + float(x.square().sum()),
            bb + float(y.square().sum()),
        )
        dd += float((x - y).square().sum())
    return dot / math.sqrt(aa * bb), math.sqrt(dd / bb)


Results = dict[tuple[str, str, str], list[dict]]  # (shape, part, variant) -> what each step took


class Bench:
    """The variants' workers on one checkpoint, and what their steps took."""

    def __init__(self, model: str, shapes: list[str], args: argparse.Namespace, folder: Path):
        self.shapes, self.args, self.folder = shapes, args, folder
        config, num_ends = config_of(model), MODELS[model][-1]
        path = make_checkpoint(folder / model, config, num_ends)
        self.rollouts = {}
        for name in shapes:
            groups = make_rollouts(SHAPES[name], config["vocab_size"], num_ends)
            score(groups, path)
            self.rollouts[name] = groups
        self.workers: dict[str, Worker] = {}
        self.results: Results = {}
        shape, groups = SHAPES[shapes[0]], self.rollouts[shapes[0]]
        prompts = [group["prompt"] for group in groups]
        for name, (engine, options) in args.chosen.items():
            if engine == "r1fast":
                options = {"grpo.token_budget": TOKEN_BUDGET[model]} | options
            else:
                options = {"micro_batch": MICRO_BATCH[model]} | options
            settings = Settings(
                engine, path, prompts, shape.group, shape.max_tokens, args.kl, args.threads,
                options=options,
            )  # fmt: skip
            try:
                worker = self.workers[name] = Worker(settings, self._file(name, "log"))
                worker.step(groups=cut(groups, 32, 16))  # the first step warms up
                if "step" in args.parts and name != PLAIN:
                    worker.step(silent=[], max_tokens=8)
            except RuntimeError as error:
                print(f"skipped {name}: {str(error).splitlines()[0]}", flush=True)
                self.workers.pop(name, None)

    def _file(self, name: str, suffix: str) -> Path:
        return self.folder / f"{name}.{suffix}".replace(" ", "_")

    def run(self) -> None:
        for number in range(self.args.rounds):
            for label in self.shapes:
                for part in self.args.parts:
                    for name in list(self.workers):
                        if self._is_due(number, label, part, name):
                            self._step(number, label, part, name)

    def _is_due(self, number: int, label: str, part: str, name: str) -> bool:
        """What buys no bar comes with --all, what is slow in the first round only."""
        if part == "step" and name == PLAIN:
            return False
        wanted = name not in EXTRA or (part, label) in (("training", "a"), ("training", "b"))
        if not self.args.all and (not wanted or (part, label) == ("step", "c")):
            return False
        done = self.results.get((label, part, name))
        return not done or done[0]["seconds"] < self.args.slow * (1 if name in EXTRA else 4)

    def _step(self, number: int, label: str, part: str, name: str) -> None:
        groups, order = self.rollouts[label], {}
        if part == "training":
            order["groups"] = groups
            if not number:
                order["gradients"] = str(self._file(f"{label} {name}", "safetensors"))
        else:
            live = len(groups) - SHAPES[label].silent
            order["silent"] = [group["prompt"] for group in groups[live:]]
        found = self.workers[name].step(**order)
        print(f"{label} {part}: {name} {found['seconds']:.2f} s", flush=True)
        if order.get("gradients") and name != OURS and OURS in self.workers:
            own = self._file(f"{label} {OURS}", "safetensors")
            found["cosine"], found["difference"] = compare_gradients(
                own, self._file(f"{label} {name}", "safetensors")
            )
        self.results.setdefault((label, part, name), []).append(found)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def summary(label: str, part: str, bench: Bench) -> tuple[list, list[str]]:
    """Print one table; (rows for results.csv, lines about the bars)."""
    kl_coef = bench.args.kl
    title = f"{label} {part}" + f", kl_coef {kl_coef:g}" * bool(kl_coef)
    rows, table, seconds, peaks, lines = [], [], {}, {}, []
    for name, worker in bench.workers.items():
        done = bench.results.get((label, part, name))
        if not done:
            continue

        def median(value, done=done):
            return statistics.median(value(found) for found in done)

        seconds[name] = median(lambda found: found["seconds"])
        peaks[name] = max(found["peak"] for found in done)
        values = {
            "step": (seconds[name], "s"),
            "generation": (median(lambda found: found["generation"]), "s"),
            "training": (median(lambda found: found["seconds"] - found["generation"]), "s"),
            "CPU": (median(lambda found: found["cpu_seconds"]), "s"),
            "completion tokens/s": (
                median(lambda found: found["tokens"] / found["seconds"]),
                "1/s",
            ),
            "tokens forwarded": (median(lambda found: found["forwarded"]), "tokens"),
            "peak resident memory": (peaks[name] / 2**20, "MiB"),
            "above the loaded trainer": ((peaks[name] - worker.loaded) / 2**20, "MiB"),
        }
        rows += [(title, name, metric, *value) for metric, value in values.items()]
        table.append([name, *(f"{value:,.4g}" for value, _ in values.values()), str(len(done))])
        if "cosine" in done[0]:
            off = 1 - done[0]["cosine"]
            rows.append((title, name, "gradient: 1 - cosine with r1fast's", off, "ratio"))
            rows.append(
                (title, name, "gradient: relative difference", done[0]["difference"], "ratio")
            )
            lines.append(
                bar(f"{title}: 1 - cosine with the gradient of {name}", off, 1 - COSINE_BAR, True)
            )
    print(f"\n{title}, medians")
    print_table([
        "", "step s", "generation", "training", "CPU s", "tokens/s", "forwarded", "peak MiB",
        "above loaded", "runs",
    ], table)  # fmt: skip
    if OURS in seconds:
        peers = [n for n in seconds if n.startswith(PEER) and n != PATCHED]
        best = min(peers, key=seconds.get, default=None)
        for name in (n for n in seconds if n != OURS):
            faster = SPEED_BARS.get((label, part)) if name == best and not kl_coef else None
            smaller = MEMORY_BARS.get((label, part)) if name == PEER and not kl_coef else None
            lines += [
                bar(f"{title}: times faster than {name}", seconds[name] / seconds[OURS], faster),
                bar(
                    f"{title}: peak memory over {name}'s", peaks[OURS] / peaks[name], smaller, True
                ),
            ]
        if part == "training":
            needed = needed_tokens(bench.rollouts[label], kl_coef)
            rows.append((title, "needed", "tokens forwarded", needed, "tokens"))
            forwarded = bench.results[label, part, OURS][-1]["forwarded"]
            holds = "holds" if forwarded == needed else "MISSED"
            lines.append(f"{title}: tokens forwarded {forwarded:,.0f}, needed {needed:,} ({holds})")
    return rows, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--micro-batches", nargs="+", type=int, default=[], help="of TRL, as variants"
    )
    parser.add_argument("--budgets", nargs="+", type=int, default=[], help="of r1fast, as variants")
    parser.add_argument("--kl", type=float, default=0.0, help="coefficient; no bars then")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--slow",
        type=float,
        default=15,
        help="seconds: longer steps come once, TRL's over 4 times that",
    )
    parser.add_argument("--all", action="store_true", help="also what no bar needs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-append", action="store_true", help="leave results.csv alone")
    args = parser.parse_args()
    args.chosen = {name: VARIANTS[name] for name in args.variants}
    for n in args.micro_batches:
        args.chosen[f"TRL, micro-batches of {n}"] = ("TRL", {"micro_batch": n})
    for n in args.budgets:
        args.chosen[f"r1fast, budget {n}"] = ("r1fast", {"grpo.token_budget": n})
    began, all_lines = time.monotonic(), []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no trainer is left behind
    for label in args.shapes:  # TRL keeps to the prompts that it began with
        with tempfile.TemporaryDirectory() as folder:
            rows, lines = measure(SHAPES[label].model, [label], args, Path(folder))
        all_lines += lines
        if not args.no_append:
            append_rows("step", rows)
    print("\nbars")
    for line in all_lines:
        print(f"  {line}")
    print(f"took {time.monotonic() - began:.0f} s")


def measure(
    model: str, labels: list[str], args: argparse.Namespace, folder: Path
) -> tuple[list, list]:
    """Everything on one checkpoint: (rows for results.csv, lines about the bars)."""
    bench = Bench(model, labels, args, folder)
    try:
        bench.run()
    finally:
        bench.close()
    rows, lines = [], []
    for label in labels:
        for part in args.parts:
            if any(key[:2] == (label, part) for key in bench.results):
                found = summary(label, part, bench)
                rows, lines = rows + found[0], lines + found[1]
    return rows, lines


if __name__ == "__main__":
    main()
