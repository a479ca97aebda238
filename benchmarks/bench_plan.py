"""What a step is planned to take against what it takes: memory, and the seconds of its phases.

    python benchmarks/bench_plan.py [--shapes NAME ...] [--budget N|auto] [--checkpointing MODE] [--no-append]

Random Llama-shaped models with tied embeddings, heads of 64; so many of the first ids end a completion that its
length is geometric with the mean below, cut at the maximum. Each shape is a process of its own on one thread that
trains three steps; what is compared is PlanWatch's: means of the second and third, planned for the lengths that
were sampled. Seconds are CPU seconds, in the probe too, so that other work on the machine disturbs them least.
Memory is the growth of the peak of resident memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from common import append_rows, print_table

PHASES = ("rollout", "reference", "train")


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    mlp: int
    vocab: int
    prompts: int
    prompt_tokens: int
    group: int
    max_tokens: int
    mean_tokens: int
    kl: float = 0.0
    dtype: str = "float32"
    budget: str = "16384"
    kind: str = "grpo"


DEMO = (4, 64, 192, 36, 16, 10, 16, 120, 36)
SMALL = (4, 256, 768, 2048, 8, 24, 8, 128, 68)
MIDDLE = (6, 384, 1024, 8192, 4, 64, 16, 192, 80)
LARGE = (8, 512, 1536, 16384, 4, 256, 16, 256, 96)
SHAPES = {
    "demo, KL": Shape(*DEMO, 0.001, budget="32768"),
    "demo, KL, auto": Shape(*DEMO, 0.001, budget="auto"),
    "3.7M": Shape(*SMALL),
    "3.7M, KL": Shape(*SMALL, 0.001),
    "3.7M, bfloat16, KL": Shape(*SMALL, 0.001, "bfloat16"),
    "3.7M, SFT": Shape(*SMALL, kind="sft"),
    "34M": Shape(*LARGE, budget="4096"),
    "34M, KL, auto": Shape(*LARGE, 0.001, budget="auto"),
    "34M, bfloat16, KL": Shape(*LARGE, 0.001, "bfloat16", "4096"),
    "13M, KL, auto": Shape(*MIDDLE, 0.001, budget="auto"),
    "13M, bfloat16, auto": Shape(*MIDDLE, 0.0, "bfloat16", "auto"),
}


class Scorer:
    """Rewards by the tokens alone."""

    def as_one_call(self):
        return nullcontext()

    def score(self, groups, step_from_end=None) -> None:
        from r1fast.types import Reward

        for group in groups:
            totals = [sum(t % 2 for t in c.token_ids) / 512 for c in group.completions]
            group.rewards = [Reward(x, {"stub": x}, None) for x in totals]


class Words:
    """A tokenizer of one word an id."""

    eos_token_id, unk_token_id, chat_template = 0, None, None

    def __init__(self, vocab: int):
        self.vocab = vocab

    def __len__(self) -> int:
        return self.vocab

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(w) for w in text.split()]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))

    def save_pretrained(self, folder) -> None:
        pass


def measure(s: Shape, folder: Path) -> dict:
    """plan.json's `measured` and a few facts, of a run in this process."""
    import random

    import torch

    from r1fast import planning
    from r1fast.config import load_config
    from r1fast.model import Decoder, ModelSpec
    from r1fast.plan import FILE
    from r1fast.policy import Policy
    from r1fast.sft import SFTTrainer
    from r1fast.timer import Timer
    from r1fast.trainer import GRPOTrainer
    from r1fast.types import Problem, Sequence

    torch.set_num_threads(1)
    probe_seconds, real = [], planning.measure_speed

    def probe(*args, **kwargs):
        began = time.process_time()
        found = real(*args, **kwargs, clock=time.process_time)
        probe_seconds.append(time.process_time() - began)
        return found

    planning.measure_speed = probe
    heads = max(s.width // 64, 2)
    spec = ModelSpec(
        "llama", s.vocab, s.width, s.mlp, s.layers, heads, max(heads // 2, 1), s.width // heads,
        tie_word_embeddings=True, max_position_embeddings=1024,
    )  # fmt: skip
    model = Decoder(spec, dtype=s.dtype, seed=0)
    ends = list(range(max(1, round(s.vocab / s.mean_tokens))))
    policy = Policy(model, Words(s.vocab), ends)
    config = load_config(None, [
        "--template.name=raw", f"--model.dtype={s.dtype}", "--log.num_samples=0",
        f"--rollout.num_generations={s.group}", f"--rollout.max_completion_tokens={s.max_tokens}",
        f"--rollout.max_prompt_tokens={s.prompt_tokens}", f"--grpo.prompts_per_step={s.prompts}",
        "--grpo.num_steps=3", f"--grpo.kl_coef={s.kl}", f"--grpo.token_budget={s.budget}",
        f"--sft.token_budget={s.budget}", f"--sft.batch_size={s.prompts * s.group}",
        "--sft.max_steps=3", *sys.argv[sys.argv.index("--") + 1 :],
    ])  # fmt: skip
    rng = random.Random(0)

    def words(n: int) -> list[int]:
        return [rng.randrange(len(ends), s.vocab) for _ in range(n)]

    if s.kind == "grpo":
        problems = [
            Problem(" ".join(map(str, words(s.prompt_tokens))), "", str(i))
            for i in range(3 * s.prompts)
        ]
        trainer = GRPOTrainer(policy, config, folder, problems, Scorer())
    else:
        lengths = [
            min(s.max_tokens, 1 + int(rng.expovariate(1 / s.mean_tokens)))
            for _ in range(3 * s.prompts * s.group)
        ]
        trainer = SFTTrainer(
            policy, config, folder, [Sequence(words(s.prompt_tokens), words(n)) for n in lengths]
        )
    trainer.timer = Timer(clock=time.process_time)
    if s.kind == "grpo":
        trainer.engine.part = trainer.timer.part
    trainer._train()
    plan = json.loads((folder / FILE).read_text())
    return plan["measured"] | {
        "budget": plan["token_budget"]["num_tokens"], "probe": sum(probe_seconds),
        "mode": plan["activation_checkpointing"]["mode"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--budget", default="")
    parser.add_argument("--checkpointing", default="none", choices=["none", "selective", "full"])
    parser.add_argument("--no-append", action="store_true")
    args = parser.parse_args()
    table = []
    for name in args.shapes:
        rows = []
        options = [f"--model.activation_checkpointing={args.checkpointing}"]
        if args.budget:
            options += [f"--{kind}.token_budget={args.budget}" for kind in ("grpo", "sft")]
        done = subprocess.run(
            [sys.executable, __file__, "--one", name, "--", *options],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        label = name + (f", {args.checkpointing}" if args.checkpointing != "none" else "")
        label += f", budget {args.budget}" if args.budget else ""
        memory = [x / 2**20 for x in found["memory_peak"]]
        cells = [
            label,
            f"{found['budget']:,}",
            "{:.0f} / {:.0f} = {:.2f}".format(*memory, memory[0] / memory[1]),
        ]
        rows += [
            (label, v, "peak memory", x, "MiB")
            for v, x in zip(("planned", "measured"), memory, strict=True)
        ]
        for phase in PHASES:
            if phase not in found["seconds"]:
                cells.append("")
                continue
            a, b = found["seconds"][phase]
            cells.append(f"{a:.3g} / {b:.3g} = {a / b:.2f}")
            rows += [(label, v, phase, x, "CPU s") for v, x in (("planned", a), ("measured", b))]
        table.append([*cells, f"{found['probe']:.1f}"])
        print(table[-1], flush=True)
        if not args.no_append:
            append_rows("plan", rows)
    print_table(["planned / measured", "budget", "MiB", *PHASES, "probe, s"], table)


if __name__ == "__main__":
    if "--one" in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(SHAPES[sys.argv[2]], Path(folder))))
    else:
        main()
