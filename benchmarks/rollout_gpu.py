"""The rollout engine on a GPU: shapes of Qwen2.5-1.5B and 7B with random weights, against the bandwidth.

    python benchmarks/rollout_gpu.py [--shapes 1.5B 7B] [--budget SECONDS] [--json FILE] [--device cpu]

256 samples, 16 prompts of 512 tokens with 16 samples each, 1024 new tokens, bfloat16, end tokens ignored.
A decode step has to read every weight and every cached key and value once, a group's prompt once for the
group; the floor of a step is those bytes over the bandwidth of a large copy, measured here. The rate is
that of all tokens over all time, prefill included; the share of the floor is over the decode steps alone.
Gains are ratios of decode steps over 64 new tokens, and each variant's time to first token stands beside them:
cascade is shared blocks read once against once a sample; CUDA graphs are on against off, for the batch and
for one group alone, where launches weigh most; steps ahead is up to 8 steps between two looks of the host against one; flash-attn, where it is installed, is its kernel against ours
with nothing shared, in blocks of 256. transformers' `generate` makes 128 tokens of the same batch.
"""

import argparse
import functools
import gc
import importlib.util
import json
import random
import time
from typing import Any

import numpy as np
import torch
from common import append_rows, measured_here, print_table

SHAPES = {  # layers, width, MLP width, heads, key-value heads, vocabulary, tied
    "1.5B": (28, 1536, 8960, 12, 2, 151936, True),
    "7B": (28, 3584, 18944, 28, 4, 152064, False),
    "toy": (2, 128, 256, 2, 1, 500, True),
}
FLOOR_BAR = 0.6


def config_of(shape: str) -> dict:
    layers, width, mlp, heads, kv_heads, vocab, tied = SHAPES[shape]
    return {
        "model_type": "qwen2", "vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": tied,
    }  # fmt: skip


def copy_bandwidth(device: str, num_bytes: int) -> float:
    """Bytes a second, read and written, of the best of 10 copies."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * num_bytes / best


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def rollout(
    engine: Any, prompts: list[list[int]], group: int, new_tokens: int, at_once: int
) -> dict[str, float]:
    """Seconds until the first token, in all, and of a decode step with every sample running; at most `at_once` of
    them in a call, as in `Engine.generate`.
    """
    from r1fast.rollout.sampler import SamplingParams

    device = engine.device.type
    engine.reset_prefix_cache()
    synchronize(device)
    start = time.perf_counter()
    sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add(prompt, [1000 * i + j for j in range(group)], sampling, stream=False)
    first, decode, num_steps, num_tokens = 0.0, 0.0, 0, 0
    while engine.has_work:
        full, steps = engine.stats.num_running == group * len(prompts), engine.stats.decode_steps
        before = time.perf_counter()
        events = engine.step(at_once)
        if full and not events:  # neither the first step after prefill nor the last
            decode += time.perf_counter() - before
            num_steps += engine.stats.decode_steps - steps
        num_tokens += sum(len(event.token_ids) for event in events)
        if not first and engine.stats.num_running:
            synchronize(device)
            first = time.perf_counter() - start
    synchronize(device)
    seconds = time.perf_counter() - start
    assert num_tokens == len(prompts) * group * new_tokens, num_tokens
    return {"first": first, "seconds": seconds, "step": decode / max(1, num_steps)}


class Bench:
    """Rollouts of one model by fresh engines, so that no variant finds the graphs of another."""

    def __init__(self, model: Any, args: argparse.Namespace, prompts: list[list[int]]):
        self.model, self.args, self.prompts = model, args, prompts
        spec = model.spec
        self.position_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 2

    def run(
        self,
        new_tokens: int,
        *,
        shares: bool = True,
        num_prompts: int | None = None,
        attention: str = "auto",
        at_once: int = 8,
        **options: Any,
    ) -> dict[str, float]:
        """A rollout of the first prompts, after one that compiles, captures and warms up."""
        from r1fast.rollout import runner
        from r1fast.rollout.engine import Engine

        args, prompts = self.args, self.prompts[:num_prompts]
        num_samples = len(prompts) * args.group
        longest = args.prompt_tokens + new_tokens + options.get("block_size", 16)
        engine = Engine(
            self.model, [0], max_batch_size=num_samples,
            # nothing shared is the same memory: blocks are, though they are read once a sample
            cache_bytes=(num_samples + len(prompts)) * longest * self.position_bytes, **options,
        )  # fmt: skip
        if not shares:
            engine.rows._shared = lambda slots, starts: np.zeros(len(starts) - 1, np.int64)
        op = runner.paged_attention
        runner.paged_attention = functools.partial(op, backend=attention)
        try:
            rollout(engine, prompts, args.group, min(new_tokens, args.short_tokens), at_once)
            if new_tokens > args.short_tokens:  # wider tables have graphs of their own
                rollout(engine, prompts, args.group, new_tokens, at_once)
            return rollout(engine, prompts, args.group, new_tokens, at_once)
        finally:
            runner.paged_attention = op
            del engine
            free_memory(args.device)


def free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def generate_rate(config: dict, prompts: list, group: int, new_tokens: int, device: str) -> float:
    """Tokens a second of transformers' `generate`, the better of two runs."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**config), dtype=torch.bfloat16).eval()
    ids, best = torch.tensor(prompts, device=device), 0.0
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                num_return_sequences=group, max_new_tokens=new_tokens, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
        synchronize(device)
        made = out.shape[0] * (out.shape[1] - ids.shape[1])
        best = max(best, made / (time.perf_counter() - start))
    return best


def gains(bench: Bench, end: float) -> dict[str, tuple[float, str]]:
    """What graphs, cascade and flash-attn change, as far as there is time."""
    values, short, steps = {}, bench.args.short_tokens, {}
    alone = {"num_prompts": 1}
    unshared = {"shares": False, "block_size": 256}
    variants = {
        "as it is": {}, "without CUDA graphs": {"cuda_graphs": False}, "without cascade": {"shares": False},
        "step by step": {"at_once": 1},
        "one group": alone, "one group without CUDA graphs": alone | {"cuda_graphs": False},
    }  # fmt: skip
    if bench.args.device == "cuda" and importlib.util.find_spec("flash_attn"):
        variants |= {"flash-attn": unshared | {"attention": "flash"}, "blocks of 256": unshared}
    for name, options in variants.items():
        if time.monotonic() > end:
            break
        found = bench.run(short, **options)
        steps[name] = found["step"]
        values[f"decode step, {name}"] = (1000 * found["step"], "ms")
        values[f"time to first token, {name}"] = (1000 * found["first"], "ms")
    for gain, slow, fast in (
        ("CUDA-graph gain", "without CUDA graphs", "as it is"),
        ("CUDA-graph gain, one group", "one group without CUDA graphs", "one group"),
        ("cascade gain", "without cascade", "as it is"),
        ("steps ahead gain", "step by step", "as it is"),
        ("flash-attn gain, nothing shared", "blocks of 256", "flash-attn"),
    ):
        if slow in steps and fast in steps:
            values[gain] = (steps[slow] / steps[fast], "ratio")
    return values


def run_shape(
    shape: str, args: argparse.Namespace, bandwidth: float, end: float
) -> tuple[list, list]:
    """Measure one shape: (rows for results.csv, lines about the bars)."""
    from r1fast.model import Decoder, ModelSpec

    config, rng = config_of(shape), random.Random(0)
    spec = ModelSpec.from_hf_config(config)
    label = (
        f"{shape}, batch {args.prompts * args.group}, {args.prompt_tokens}+{args.new_tokens}, bf16"
    )
    prompts = [
        [rng.randrange(spec.vocab_size) for _ in range(args.prompt_tokens)]
        for _ in range(args.prompts)
    ]
    model = Decoder(spec, dtype=torch.bfloat16, device=args.device, seed=0)
    bench = Bench(model, args, prompts)
    found = bench.run(args.new_tokens)
    num_samples = args.prompts * args.group
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if model.lm_head is not None:
        weight_bytes -= model.embed.weight.nbytes  # of which a step reads a row a sample
    cached = args.prompts * args.prompt_tokens + num_samples * args.new_tokens / 2
    floor = (weight_bytes + cached * bench.position_bytes) / bandwidth
    values = {
        "tokens/s": (num_samples * args.new_tokens / found["seconds"], "1/s"),
        "time to first token": (1000 * found["first"], "ms"),
        "decode step": (1000 * found["step"], "ms"),
        "floor of a decode step": (1000 * floor, "ms"),
        "share of the floor": (floor / found["step"], "ratio"),
        "copy bandwidth": (bandwidth / 1e9, "GB/s"),
    }
    values |= gains(bench, end)
    del bench, model
    free_memory(args.device)
    rows = [(label, "r1fast", name, *value) for name, value in values.items()]
    lines = [
        bar(f"{label}: share of the bandwidth floor", values["share of the floor"][0], FLOOR_BAR)
    ]
    if time.monotonic() < end:
        rate = generate_rate(config, prompts, args.group, args.generate_tokens, args.device)
        rows.append((label, "generate", "tokens/s", rate, "1/s"))
        lines.append(f"{label}: times generate: {values['tokens/s'][0] / rate:.3g}")
    print(f"\n{label}")
    print_table(["", "value", "unit"], [[f"{v} {m}", f"{x:,.4g}", u] for _, v, m, x, u in rows])
    return rows, lines


def bar(name: str, value: float, limit: float) -> str:
    return f"{name}: {value:.3g} (>= {limit:g}: {'holds' if value >= limit else 'MISSED'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1.5B", "7B"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=16, help="samples a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=1024)
    parser.add_argument("--short-tokens", type=int, default=64, help="for the gains")
    parser.add_argument("--generate-tokens", type=int, default=128)
    parser.add_argument(
        "--budget", type=float, default=240, help="seconds; then extras are left out"
    )
    parser.add_argument("--json", help="write the rows there too")
    parser.add_argument("--no-append", action="store_true", help="leave results.csv alone")
    args = parser.parse_args()
    bandwidth = copy_bandwidth(args.device, 2**31 if args.device == "cuda" else 2**26)
    all_rows, all_lines, began = [], [], time.monotonic()
    for n, shape in enumerate(args.shapes, 1):
        end = began + args.budget * n / len(args.shapes)
        rows, lines = run_shape(shape, args, bandwidth, end)
        all_rows += rows
        all_lines += lines
        if not args.no_append and args.device == "cuda":
            append_rows("rollout on a GPU", rows)
        if args.json:
            with open(args.json, "w") as file:
                head = measured_here("rollout on a GPU")
                json.dump({"head": head, "rows": all_rows, "bars": all_lines}, file, indent=1)
    print("\nbars")
    for line in all_lines:
        print(f"  {line}")


if __name__ == "__main__":
    main()
