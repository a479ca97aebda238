"""LoRA (rank 16, all linear layers) against training all weights, and against PEFT: the same rollouts, in turns.

    python benchmarks/bench_lora.py [--shapes A B] [--dtypes fp32 bf16] [--rounds N] [--no-append]

Checkpoints of bench_rollout.py: 8 prompts of 64 tokens, 8 completions of 128 each. A step is a rollout and one
optimizer step of all of it with the KL to a reference. One thread, CPU seconds, the best of the rounds: other
work on the machine disturbs them least. Memory is of a process of its own, at the peak of a step and above
what the loaded model took. PEFT is transformers' Qwen2 with its LoRA on r1fast's adapter, the same loss from
logits in memory, in micro-batches of 8: a forward without adapters, forward and backward. Its gradients are
compared with r1fast's.

In bfloat16 also what a sampler would lose by merging: of the change itself, |rounded(W + s B A) - W - s B A| /
|s B A| by the size of B's elements, and the mean |log-probability - trainer's| of sampled tokens.
"""

import argparse
import copy
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_rollout import DTYPES, MAX_TOKENS, SHAPES, make_case, make_checkpoint
from common import append_rows, print_table

from r1fast.config import load_config
from r1fast.grpo import rollout_advantages
from r1fast.lora import adapters, merge_lora
from r1fast.policy import Policy, load_policy
from r1fast.rollout.engine import Engine
from r1fast.rollout.sampler import SamplingParams
from r1fast.trainer import GRPOTrainer
from r1fast.types import Problem, Reward

FULL, LORA, PEFT = "all weights", "LoRA", "PEFT"
KL = 0.001
PEFT_ROWS = 8  # completions in one of its micro-batches
B_STD = 1e-3  # of the adapters that are timed


def make_trainer(policy: Policy, folder: Path, variant: str) -> GRPOTrainer:
    config = load_config(None, [
        "--template.name=raw", "--rollout.num_generations=8", f"--grpo.kl_coef={KL}",
        f"--rollout.max_completion_tokens={MAX_TOKENS}", "--rollout.prefix_cache=false",
        *(["--lora.rank=16", "--optim.lr=1e-5"] if variant == LORA else ["--optim.lr=1e-6"]),
    ])  # fmt: skip
    return GRPOTrainer(policy, config, folder, [Problem("w1", "1")], None)


def rollout(trainer: GRPOTrainer, prompts: list[list[int]], step: int) -> tuple[list, float]:
    start = time.process_time()
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    groups = trainer.engine.generate(prompts, 8, sampling, seed=step)
    seconds = time.process_time() - start
    rng = random.Random(step)
    for group in groups:
        group.rewards = [Reward(float(rng.random() < 0.5), {}, None) for _ in group.completions]
    return groups, seconds


class Peer:
    """PEFT's model on the adapter that r1fast has saved."""

    def __init__(self, path: str, adapter: Path, dtype: str):
        import peft
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        self.model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)

    def logprobs(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        logits = self.model(ids[:, :-1]).logits[:, start - 1 :].float()
        return logits.log_softmax(-1).gather(-1, ids[:, start:, None])[..., 0]

    def step(self, groups: list, advantages: list) -> float:
        """Seconds of a reference forward, forward and backward; the gradients stay."""
        self.model.zero_grad()
        began = time.process_time()
        num = sum(len(g.completions) for g in groups)
        for group, row in zip(groups, advantages, strict=True):
            rows = list(zip(group.completions, row, strict=True))
            for n in range(0, len(rows), PEFT_ROWS):
                part = rows[n : n + PEFT_ROWS]
                ids = torch.tensor([group.prompt_ids + c.token_ids for c, _ in part])
                start = len(group.prompt_ids)
                old = torch.tensor([c.logprobs for c, _ in part])
                advantage = torch.tensor([a for _, a in part])[:, None]
                with torch.no_grad(), self.model.disable_adapter():
                    ref = self.logprobs(ids, start)
                new = self.logprobs(ids, start)
                ratio, d = (new - old).exp(), ref - new
                gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                loss = -(gain - KL * (d.exp() - d - 1)).mean(1).sum() / num
                loss.backward()
        return time.process_time() - began

    def gradients(self) -> dict[str, torch.Tensor]:
        named = self.model.named_parameters()
        return {n.replace(".default", ""): p.grad for n, p in named if p.grad is not None}


def own_gradients(trainer: GRPOTrainer, groups: list, step: int) -> dict[str, torch.Tensor]:
    """PEFT's names -> gradients of A and B; no step is made."""
    found, take = {}, trainer.optimizer.step

    def keep(lr):
        for at, adapter in adapters(trainer.model):
            whole = copy.deepcopy(adapter)
            whole.A.data, whole.B.data = adapter.A.grad.clone(), adapter.B.grad.clone()
            for part in adapter.parts:
                for key, x in zip("AB", whole.of_part(part), strict=True):
                    found[f"base_model.model.{at}{part}.lora_{key}.weight"] = x
        trainer.optimizer.zero_grad()
        return torch.tensor(1.0)

    trainer.optimizer.step = keep
    trainer.update(groups, step)
    trainer.optimizer.step = take
    return found


def cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    x, y = (torch.cat([named[n].double().flatten() for n in sorted(named)]) for named in (a, b))
    return float(x @ y / x.norm() / y.norm())


def mismatch(trainer: GRPOTrainer, prompts: list[list[int]], merged: bool) -> float:
    """Mean |sampler's log-probability - trainer's| of tokens that the sampler draws."""
    model = trainer.model
    if merged:
        model = copy.deepcopy(model)
        merge_lora(model)
    engine = Engine(model, [0])
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    groups = engine.generate(prompts, 8, sampling, seed=99)
    for group in groups:
        group.rewards = [Reward(float(i % 2), {}, None) for i in range(len(group.completions))]
    take, trainer.optimizer.step = trainer.optimizer.step, lambda lr: torch.tensor(1.0)
    row = trainer.update(groups, 0)
    trainer.optimizer.step = take
    trainer.optimizer.zero_grad()
    return row["logprob_mismatch/mean"]


@torch.no_grad()
def lost_by_merging(trainer: GRPOTrainer, std: float) -> float:
    """Share of the adapters' change that rounding the merged weights takes away or adds, at B of this size."""
    model, lost, change = copy.deepcopy(trainer.model), 0.0, 0.0
    for layer in model.layers:
        for linear, _, _ in layer.projections():
            adapter = linear.adapter
            adapter.B.normal_(std=std, generator=torch.Generator().manual_seed(0))
            for part, (start, end) in adapter.parts.items():
                A, B = adapter.of_part(part)
                exact, base = adapter.scale * (B @ A), linear.weight[start:end]
                lost += float((adapter.merged(base, part).float() - base - exact).square().sum())
                change += float(exact.square().sum())
    return (lost / change) ** 0.5


def memory(path: str, dtype: str, variant: str) -> dict[str, float]:
    """Of one step in this process: MiB above the loaded model at the peak, and of a checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        policy = load_policy(path, dtype=dtype, device="cpu")
        rng = random.Random(0)
        vocab = policy.model.spec.vocab_size
        prompts = [[rng.randrange(1, vocab) for _ in range(64)] for _ in range(8)]
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        trainer = make_trainer(policy, Path(name), variant)
        groups, _ = rollout(trainer, prompts, 0)
        trainer.update(groups, 0)
        peak = resident("VmHWM")
        trainer.save()
        size = sum(p.stat().st_size for p in Path(name).rglob("*.safetensors"))
    return {"memory": peak - before, "checkpoint": size / 2**20}


def resident(key: str) -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def measure(shape: str, dtype: str, rounds: int) -> tuple[list, list[list[str]]]:
    """(rows for results.csv, lines of the table)"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = make_checkpoint(folder / "model", shape)
        trainers = {
            variant: make_trainer(
                load_policy(path, dtype=DTYPES[dtype], device="cpu"), folder / variant, variant
            )
            for variant in (FULL, LORA)
        }
        prompts = make_case("equal", SHAPES[shape][2]).prompts
        lora, found = trainers[LORA], {FULL: [], LORA: [], PEFT: []}
        for _, adapter in adapters(lora.model):  # as after some training: all products count
            adapter.B.data.normal_(std=B_STD, generator=torch.Generator().manual_seed(0))
        lora.policy.save_adapter(folder / "adapter")
        peer = Peer(path, folder / "adapter", DTYPES[dtype])
        groups, _ = rollout(lora, prompts, 0)
        advantages = rollout_advantages(groups, lora.config.grpo)
        peer.step(groups, advantages)
        similar = cosine(own_gradients(lora, groups, 0), peer.gradients())
        for step in range(rounds + 1):
            for variant, trainer in trainers.items():
                groups, seconds = rollout(trainer, prompts, step)
                start = time.process_time()
                trainer.update(groups, step)
                found[variant].append([seconds, time.process_time() - start])
            advantages = rollout_advantages(groups, lora.config.grpo)
            found[PEFT].append([0.0, peer.step(groups, advantages)])
        extra = []
        if dtype == "bf16":
            for kind in ("apart", "merged"):
                value = mismatch(lora, prompts, kind == "merged")
                extra.append((f"adapters {kind}", "mean logprob mismatch", value, "nats"))
            for std in (1e-3, 1e-4, 1e-5):
                value = lost_by_merging(lora, std)
                extra.append(("adapters merged", f"change lost, B of {std:g}", value, ""))
        held = {}
        for variant in (FULL, LORA):
            command = [sys.executable, __file__, "--memory-of", path, DTYPES[dtype], variant]
            held[variant] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    rows, lines, case, tokens = [], [], f"{shape} {dtype} equal", 64 * MAX_TOKENS
    for variant, steps in found.items():
        first, second = (min(s[i] for s in steps[1:]) for i in (0, 1))
        rows.append((case, variant, "update", second, "CPU s"))
        line = [f"{case}, {variant}", "", f"{second:.3f}", "", ""]
        if variant != PEFT:
            kept = held[variant]
            rows += [
                (case, variant, "rollout, tokens a CPU s", tokens / first, "1/s"),
                (case, variant, "memory above the model", kept["memory"], "MiB"),
                (case, variant, "checkpoint", kept["checkpoint"], "MiB"),
            ]
            line[1] = f"{tokens / first:,.0f}"
            line[3:] = [f"{kept['memory']:.0f}", f"{kept['checkpoint']:.1f}"]
        lines.append(line)
    extra.append((PEFT, "1 - cosine of the gradient with r1fast's", 1 - similar, ""))
    for variant, metric, value, unit in extra:
        rows.append((case, variant, metric, value, unit))
        print(f"{case}, {variant}: {metric} {value:.3g} {unit}")
    return rows, lines


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--memory-of"]:
        print(json.dumps(memory(*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["A", "B"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-append", action="store_true", help="leave results.csv alone")
    args = parser.parse_args()
    all_rows, lines = [], []
    for shape in args.shapes:
        for dtype in args.dtypes:
            rows, own = measure(shape, dtype, args.rounds)
            all_rows += rows
            lines += own
    header = [
        "best of the rounds",
        "tokens a CPU s",
        "update, CPU s",
        "memory MiB",
        "checkpoint MiB",
    ]
    print_table(header, lines)
    if not args.no_append:
        append_rows("lora", all_rows)


if __name__ == "__main__":
    main()
