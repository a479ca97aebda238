"""The rollout engine against transformers' `generate` and continuous batching, and vLLM's CPU build.

    python benchmarks/bench_rollout.py [--shapes A B] [--dtypes fp32 bf16] [--cases equal long shared]
        [--engines r1fast generate "compiled generate" "continuous batching" vLLM] [--rounds N] [--vllm FOLDER] [--no-append]

Two Qwen2-shaped checkpoints of random weights - A: 4 layers, width 256, V = 2048; B: 8 layers, width
512, V = 16384 - heads of 64, two key-value heads, an MLP of four widths, tied embeddings. 8 prompts, end
tokens ignored, temperature 1:

    equal   8 samples a prompt of 64 tokens, each of 128 tokens
    long    the same with long-tailed lengths, mean a quarter of 128: every engine gets the same ones
    shared  16 samples a prompt of 512 tokens, each of 128 tokens

Every engine is a process of its own (rollout_peers.py) that stays for its shape and type; each round runs
every engine once, in turns. Quoted: medians of tokens a second and a CPU-second, resident memory at its
peak and above what the loaded model took, seconds from start to ready, and the rate of the bare matrix
products of the same decode steps in r1fast's process, right after its run (the share of it is the median of
pairs). `generate` makes no log-probabilities here, the others do. What is much slower than the rest runs in the first round only. vLLM is installed into a
virtual environment of its own at the first run (2 GB), and left out, with a note, where that fails; it
runs eagerly unless --vllm-compiled.

r1fast is run as `Engine.generate` runs it, up to 64 tokens a call while no sample ends. "Cache over what its tokens
need" is taken in a run of its own, one token a call, at the step after which most blocks are held: positions in them
over positions alive at that moment, a prompt once for all its running samples. That is the moment that
decides how large a cache must be, and the stricter of two readings: over the most that is alive at any time
(`needed_positions`, which is also said) a cache may look good because it is largest when less is needed.
"""

import argparse
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import append_rows, print_table
from rollout_peers import ENGINES, Case, VllmServer, Worker
from vllm_build import install_vllm

SHAPES = {"A": (4, 256, 2048), "B": (8, 512, 16384)}  # layers, width, vocabulary
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
CASES = {"equal": (64, 8), "long": (64, 8), "shared": (512, 16)}  # prompt tokens, samples a prompt
NUM_PROMPTS, MAX_TOKENS = 8, 128
BLOCK = 16
SETTLE = 1  # seconds before each run: vLLM's threads spin on after theirs, and took a core of the next one's two
GENERATE, CONTINUOUS, VLLM = "generate", "continuous batching", "vLLM"
COMPILED = "compiled generate"  # a static cache and torch.compile: minutes before its first token
BARS = {  # (case, type, peer): at least this many times its tokens a second
    ("equal", "fp32", GENERATE): 2.5,
    ("equal", "bf16", GENERATE): 3.5,
    ("long", "fp32", GENERATE): 5.0,
    ("long", "bf16", GENERATE): 5.0,
    ("shared", "bf16", GENERATE): 7.0,
    ("equal", "fp32", CONTINUOUS): 7.0,
    ("equal", "bf16", CONTINUOUS): 7.0,
    ("equal", "fp32", VLLM): 1.8,
    ("equal", "bf16", VLLM): 2.0,
}
GEMM_BAR, CACHE_BAR = 0.5, 1.05


def make_checkpoint(folder: Path, shape: str) -> str:
    """A random Qwen2 with a tokenizer of one word an id, which vLLM wants to see."""
    import transformers
    from tokenizers import Tokenizer, models

    from r1fast.model import Decoder, ModelSpec, save_model

    layers, width, vocab = SHAPES[shape]
    config = {
        "model_type": "qwen2", "vocab_size": vocab, "hidden_size": width,
        "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": width // 64, "num_key_value_heads": 2,
        "max_position_embeddings": 1024, "tie_word_embeddings": True,
    }  # fmt: skip
    words = models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w1")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), eos_token="w0"
    )
    model = Decoder(ModelSpec.from_hf_config(config), seed=0)
    save_model(model, folder, tokenizer=tokenizer, eos_token_id=0)
    return str(folder)


def make_case(name: str, vocab: int, seed: int = 0) -> Case:
    """Random prompts. Long-tailed lengths are exponential, cut at the maximum."""
    rng = random.Random(seed)
    prompt_tokens, samples = CASES[name]
    prompts = [[rng.randrange(1, vocab) for _ in range(prompt_tokens)] for _ in range(NUM_PROMPTS)]
    if name != "long":
        return Case(prompts, [[MAX_TOKENS] * samples for _ in prompts])
    wanted = NUM_PROMPTS * samples * MAX_TOKENS // 4
    tails = [rng.expovariate(1) for _ in range(NUM_PROMPTS * samples)]
    tails[rng.randrange(len(tails))] = 1e9  # one runs into the limit, as one always does
    scale = MAX_TOKENS / 4
    for _ in range(50):  # the scale whose cut lengths have the mean
        flat = [min(MAX_TOKENS, max(1, round(scale * t))) for t in tails]
        scale *= wanted / sum(flat)
    return Case(prompts, [flat[i : i + samples] for i in range(0, len(flat), samples)])


def needed_positions(case: Case) -> int:
    """Most positions that have to be cached at once: each prompt once, and what is unfinished."""
    most = 0
    for t in range(1, MAX_TOKENS):
        alive = [sum(n > t for n in lengths) for lengths in case.lengths]
        prompts = sum(len(p) for p, n in zip(case.prompts, alive, strict=True) if n)
        most = max(most, prompts + t * sum(alive))
    return most


def takes_long(shape: str, dtype: str, case: str, engine: str) -> bool:
    """What is left out by default, because a minute or more buys no bar."""
    if engine == CONTINUOUS:
        return (shape, case) != ("A", "equal")
    return engine != "r1fast" and (dtype, case) == ("fp32", "shared")


def run_shape(
    shape: str, dtype: str, path: str, args: argparse.Namespace, log: Path
) -> tuple[list, list[str]]:
    """Measure one checkpoint in one type: (rows for results.csv, lines about the bars)."""
    engines: dict[str, Worker | VllmServer] = {}
    try:
        for name in args.engines:
            if not args.all and all(takes_long(shape, dtype, c, name) for c in args.cases):
                continue
            try:
                if name == VLLM:
                    engines[name] = VllmServer(
                        args.vllm,
                        path,
                        DTYPES[dtype],
                        log,
                        eager=not args.vllm_compiled,
                        timeout=180,
                    )
                else:
                    engines[name] = Worker(name, path, DTYPES[dtype], args.threads)
            except (RuntimeError, OSError) as error:
                print(f"skipped {name}: {error}")
        return measure(shape, dtype, engines, args)
    finally:
        for engine in engines.values():
            engine.close()


def measure(shape: str, dtype: str, engines: dict, args: argparse.Namespace) -> tuple[list, list]:
    results: dict[tuple[str, str], list[dict]] = {}
    cases = {name: make_case(name, SHAPES[shape][2]) for name in args.cases}
    warm = Case(cases[args.cases[0]].prompts[:2], [[8, 8]] * 2)
    for name, engine in engines.items():
        engine.run(warm)
        if name in (GENERATE, COMPILED, VLLM):  # its first large batch is up to four times slower
            engine.run(Case(make_case("equal", SHAPES[shape][2]).prompts, [[16] * 8] * NUM_PROMPTS))
    gemms, shares = [], []
    for number in range(args.rounds):
        for case_name, case in cases.items():
            for name, engine in engines.items():
                if not args.all and takes_long(shape, dtype, case_name, name):
                    continue
                if number and results[case_name, name][0].get("seconds", 1e9) > args.slow:
                    continue
                time.sleep(SETTLE)
                found = engine.run(case)
                if "error" in found:
                    print(f"{name} failed at {case_name}: {found['error']}")
                elif found["tokens"] != case.num_tokens:
                    raise AssertionError((name, case_name, found["tokens"], case.num_tokens))
                else:
                    rate = found["tokens"] / found["seconds"]
                    print(f"{shape} {dtype} {case_name}: {name} {rate:,.0f} tokens/s", flush=True)
                    if case_name == "equal" and name == "r1fast":
                        # at once: what a core gives varies
                        gemms.append(engine.gemm_rate(64))
                        shares.append(rate / gemms[-1])
                results.setdefault((case_name, name), []).append(found)
    rows, lines = [], []
    for case_name, case in cases.items():
        label = f"{shape} {dtype} {case_name}"
        rates, table = {}, []
        for name, engine in engines.items():
            done = [r for r in results.get((case_name, name), []) if "seconds" in r]
            if not done:
                continue

            def median(value, done=done):
                return statistics.median(value(r) for r in done)

            rates[name] = median(lambda r: r["tokens"] / r["seconds"])
            values = {
                "tokens/s": rates[name],
                "tokens per CPU-second": median(lambda r: r["tokens"] / r["cpu_seconds"]),
                "peak resident memory": max(r["peak_rss"] for r in done) / 2**20,
                "above the loaded model": (max(r["peak_rss"] for r in done) - done[0]["rss"])
                / 2**20,
                "start-up": engine.start_seconds,
            }
            units = ("1/s", "1/s", "MiB", "MiB", "s")
            rows += [
                (label, name, m, v, u) for (m, v), u in zip(values.items(), units, strict=True)
            ]
            table.append([name, *(f"{v:,.0f}" for v in values.values()), str(len(done))])
        print(f"\n{label}: {case.num_tokens} tokens, medians")
        print_table(
            [
                "engine",
                "tokens/s",
                "a CPU-second",
                "peak MiB",
                "above model MiB",
                "start s",
                "runs",
            ],
            table,
        )
        for peer, rate in rates.items():
            if peer != "r1fast" and "r1fast" in rates:
                limit = BARS.get((case_name, dtype, peer))
                lines.append(bar(f"{label}: times {peer}", rates["r1fast"] / rate, limit))
        if "r1fast" in rates:
            if case_name == "equal":
                gemm = statistics.median(gemms)
                rows.append((label, "GEMMs", "tokens/s", gemm, "1/s"))
                print(f"bare GEMMs of the decode steps: {gemm:,.0f} tokens/s")
                share = statistics.median(shares)
                lines.append(bar(f"{label}: share of the bare GEMMs", share, GEMM_BAR))
            cache = engines["r1fast"].watched(case)
            found = cache["positions"] / cache["alive"]
            of_most = cache["positions"] / needed_positions(case)
            rows.append((label, "r1fast", "cached positions over those alive", found, "ratio"))
            rows.append((label, "r1fast", "cached positions over needed ones", of_most, "ratio"))
            lines += [
                bar(f"{label}: cache over what its tokens need", found, CACHE_BAR, at_most=True),
                bar(f"{label}: cache over the most that is alive at any time", of_most, None),
            ]
    return rows, lines


def bar(name: str, value: float, limit: float | None, at_most: bool = False) -> str:
    if limit is None:
        return f"{name}: {value:.3g}"
    holds = value <= limit if at_most else value >= limit
    return f"{name}: {value:.3g} ({'<=' if at_most else '>='} {limit:g}: {'holds' if holds else 'MISSED'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    names = [*ENGINES, VLLM]
    default = [name for name in names if name != COMPILED]
    parser.add_argument("--engines", nargs="+", choices=names, default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow", type=float, default=4, help="seconds: longer runs come once")
    parser.add_argument("--all", action="store_true", help="also what no bar needs; 15 minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--vllm", type=Path, default=Path("~/.cache/r1fast/vllm").expanduser(),
        help="virtual environment of vLLM, made where it is not there",
    )  # fmt: skip
    parser.add_argument(
        "--vllm-compiled", action="store_true", help="with torch.compile: 20 to 40 s later, faster"
    )
    parser.add_argument("--no-append", action="store_true", help="leave results.csv alone")
    args = parser.parse_args()
    if VLLM in args.engines:
        try:
            install_vllm(args.vllm)
        except (RuntimeError, OSError) as error:
            print(f"skipped vLLM: {error}")
            args.engines.remove(VLLM)
    began, all_lines = time.monotonic(), []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left behind
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            path = make_checkpoint(Path(folder) / shape, shape)
            for dtype in args.dtypes:
                rows, lines = run_shape(shape, dtype, path, args, Path(folder) / "vllm.log")
                all_lines += lines
                if not args.no_append:
                    append_rows("rollout", rows)
    print("\nbars")
    for line in all_lines:
        print(f"  {line}")
    print(f"took {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
