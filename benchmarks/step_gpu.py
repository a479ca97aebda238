"""The training part of a GRPO step on a GPU: shapes of Qwen2.5-7B and 1.5B with random weights, against peers.

    python benchmarks/step_gpu.py [--shapes 7B 1.5B] [--budget SECONDS] [--json FILE] [--device cpu]

bfloat16, 4 prompts of 512 tokens, 16 completions each, geometric lengths of mean 448 cut at 1024, packs of 16384
tokens; DAPO's loss without a reference. Quoted are the better of two forward and backward passes: seconds from
the rewards to the gradient, and MFU, the FLOPs that the mathematics needs over those seconds and the
machine's dense bfloat16 peak: 2 a weight and token, 2 V D a prediction, 4 a pair of query and key for each element
of the heads, times 3 for the backward; each prompt once, no padding, nothing for what is recomputed. So what a
peer pads, repeats and recomputes lowers its share. Layers are recomputed at 7B, by all. `plain PyTorch` is
transformers' model with the completions' logits in memory. At 1.5B also whole steps, 256 new tokens a
completion: tokens a second with the generation, TRL's by transformers' `generate`. Trainers run one after
another in processes of their own (step_peers.py); what is not installed or does not fit is skipped with a note.
"""

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path

import torch
from bench_rollout import bar
from bench_step import Shape, make_checkpoint, make_rollouts, needed_tokens
from common import append_rows, measured_here, print_table
from rollout_gpu import SHAPES, config_of
from step_orders import Groups, Settings, Worker

PEAKS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12}  # dense bfloat16, FLOP/s
OURS, PEER, PLAIN = "r1fast", "TRL", "plain PyTorch"
MFU_BAR, STEP_BAR = 0.45, 3.0


def peak_flops(device: str) -> float:
    """By the data sheet where the chip is known, else of a square product here."""
    if device == "cuda":
        for name, value in PEAKS.items():
            if name in torch.cuda.get_device_name():
                return value
    n = 8192 if device == "cuda" else 1024
    a, best = torch.randn(n, n, device=device, dtype=torch.bfloat16), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def needed_flops(groups: Groups, config: dict) -> float:
    """Of forward and backward."""
    D, F, V = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    kv_width = D // heads * config["num_key_value_heads"]
    weights = layers * (D * (D + 2 * kv_width) + D * D + 3 * D * F)
    pairs = predictions = 0
    for group in groups:
        P = len(group["prompt_ids"])
        pairs += P * (P + 1) // 2
        for n in (len(c) - 1 for c in group["completions"]):
            pairs += n * P + n * (n + 1) // 2
            predictions += n + 1
    forward = 2 * weights * needed_tokens(groups) + 2 * V * D * predictions + 4 * layers * D * pairs
    return 3.0 * forward


def variants_of(shape: str, args: argparse.Namespace) -> dict[str, tuple[str, dict]]:
    recompute = shape == "7B"
    micro_batch = {"7B": 8, "1.5B": 8, "toy": 4}[shape]
    kept = "full" if recompute else "none"
    ours = {"grpo.token_budget": args.pack, "model.activation_checkpointing": kept}
    peer = {"micro_batch": micro_batch, "checkpointing": recompute}
    variants = {OURS: ("r1fast", ours), PLAIN: ("plain", peer), PEER: ("TRL", peer)}
    return {name: variants[name] for name in args.variants}


def run_shape(
    shape: str, args: argparse.Namespace, peak: float, end: float, folder: Path
) -> tuple[list, list[str]]:
    """Measure one shape: (rows for results.csv, lines about the bars)."""
    config = config_of(shape)
    layout = Shape(shape, args.prompts, args.prompt_tokens, args.group, args.new_tokens, args.mean)
    path = make_checkpoint(folder / shape, config, 1, dtype=torch.bfloat16, device=args.device)
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    groups = make_rollouts(layout, config["vocab_size"], 1)
    flops, needed = needed_flops(groups, config), needed_tokens(groups)
    label = f"{shape}, {args.prompts} x {args.group}, {args.prompt_tokens}+{args.mean:g}, bf16"
    rows, table, shares, rates = (
        [(label, "needed", "tokens forwarded", needed, "tokens")],
        [],
        {},
        {},
    )
    for name, (engine, options) in variants_of(shape, args).items():
        if time.monotonic() > end:
            print(f"skipped {name} at {shape}: no time left", flush=True)
            continue
        settings = Settings(
            engine, path, [g["prompt"] for g in groups], args.group, args.new_tokens,
            device=args.device, dtype="bfloat16", optimizer=shape != "7B", options=options,
        )  # fmt: skip
        try:
            worker = Worker(settings, folder / f"{name}.log".replace(" ", "_"))
        except RuntimeError as error:
            print(f"skipped {name} at {shape}: {str(error).splitlines()[0]}", flush=True)
            continue
        try:
            done = [worker.step(groups=groups) for _ in range(3)][1:]  # the first one warms up
            if shape != "7B" and engine != "plain" and time.monotonic() < end:
                worker.step(silent=[], max_tokens=8)
                whole = worker.step(silent=[], max_tokens=args.step_tokens)
                rates[name] = whole["tokens"] / whole["seconds"]
        except RuntimeError as error:
            print(f"stopped {name} at {shape}: {str(error).splitlines()[0]}", flush=True)
            continue
        finally:
            worker.close()
        best = min(done, key=lambda found: found["gradient"] - found["generation"])
        seconds = best["gradient"] - best["generation"]
        shares[name] = flops / seconds / peak
        values = {
            "forward and backward": (seconds, "s"),
            "MFU": (shares[name], "ratio"),
            "tokens forwarded": (best["forwarded"], "tokens"),
            "peak memory": (max(found["peak"] for found in done) / 2**30, "GiB"),
        }
        if name in rates:
            values["whole step, tokens/s"] = (rates[name], "1/s")
        rows += [(label, name, metric, *value) for metric, value in values.items()]
        table.append([name, *(f"{value:,.4g}" for value, _ in values.values())])
        table[-1] += [""] * (5 - len(values))
    print(f"\n{label}: {flops / 1e12:,.4g} TFLOP needed, peak {peak / 1e12:,.4g} TFLOP/s")
    print_table(["", "seconds", "MFU", "forwarded", "peak GiB", "step tokens/s"], table)
    lines = []
    if OURS in shares:
        lines.append(bar(f"{label}: MFU", shares[OURS], MFU_BAR if shape == "7B" else None))
        for name in (n for n in shares if n != OURS):
            ratio = shares[OURS] / shares[name]
            lines.append(bar(f"{label}: forward and backward, times {name}", ratio, None))
    if OURS in rates and PEER in rates:
        lines.append(bar(f"{label}: whole step, times {PEER}", rates[OURS] / rates[PEER], STEP_BAR))
    return rows, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["7B", "1.5B"])
    names = [OURS, PLAIN, PEER]
    parser.add_argument("--variants", nargs="+", choices=names, default=names)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=16, help="completions a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=1024, help="at most")
    parser.add_argument("--mean", type=float, default=448, help="mean of the completion lengths")
    parser.add_argument(
        "--step-tokens", type=int, default=256, help="of a completion in a whole step"
    )
    parser.add_argument("--pack", type=int, default=16384, help="tokens in a micro-batch of r1fast")
    parser.add_argument(
        "--budget", type=float, default=240, help="seconds; then peers are left out"
    )
    parser.add_argument("--json", help="write the rows there too")
    parser.add_argument("--no-append", action="store_true", help="leave results.csv alone")
    args = parser.parse_args()
    began, all_rows, all_lines = time.monotonic(), [], []
    peak = peak_flops(args.device)
    for n, shape in enumerate(args.shapes, 1):
        end = began + args.budget * n / len(args.shapes)
        with tempfile.TemporaryDirectory() as folder:
            rows, lines = run_shape(shape, args, peak, end, Path(folder))
        all_rows += rows
        all_lines += lines
        if not args.no_append and args.device == "cuda":
            append_rows("step on a GPU", rows)
        if args.json:
            head = measured_here("step on a GPU")
            body = {"head": head, "rows": all_rows, "bars": all_lines}
            Path(args.json).write_text(json.dumps(body, indent=1))
    print("\nbars")
    for line in all_lines:
        print(f"  {line}")


if __name__ == "__main__":
    main()
