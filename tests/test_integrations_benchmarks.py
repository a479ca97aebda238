"""The benchmarks of the loss, the rollout engine and the training step, and gpu.sh, from end to end at toy shapes."""

import csv
import importlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


def run_gpu_script(folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [BENCHMARKS / "gpu.sh", *args],
        env=os.environ | {"OUT": str(folder), "PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_gpu_script_dry_run(tmp_path):
    before = (BENCHMARKS / "results.csv").read_bytes()
    done = run_gpu_script(tmp_path, "--dry-run", BUDGET="1500")
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads((tmp_path / "gpu.json").read_text())
    cells = {(row[1], row[2]) for row in measured["rows"] if "D=32" in row[0]}
    for variant in ("GEMMs", "r1fast fast", "materialised", "Liger", "TRL"):
        for metric in ("forward", "forward+backward", "frozen head", "half without signal"):
            assert (variant, metric) in cells
    assert ("TRL", "logprob error") in cells
    assert measured["bars"]
    measured = json.loads((tmp_path / "gpu_rollout.json").read_text())
    cells = {(row[1], row[2]): row[3] for row in measured["rows"]}
    for metric in ("tokens/s", "time to first token", "share of the floor", "cascade gain"):
        assert cells["r1fast", metric] > 0
    assert cells["generate", "tokens/s"] > 0
    assert "share of the bandwidth floor" in done.stdout
    measured = json.loads((tmp_path / "gpu_step.json").read_text())
    cells = {(row[1], row[2]): row[3] for row in measured["rows"]}
    for variant in ("r1fast", "plain PyTorch"):
        assert cells[variant, "MFU"] > 0
        if torch.cpu._is_avx512_supported():  # else the peak is of a product that this CPU lacks
            assert cells[variant, "MFU"] < 1
    assert cells["r1fast", "whole step, tokens/s"] > 0
    assert cells["r1fast", "tokens forwarded"] == cells["needed", "tokens forwarded"]
    assert "forward and backward, times plain PyTorch" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert "faster than TRL" in last
    assert (BENCHMARKS / "results.csv").read_bytes() == before


def test_gpu_script_without_a_gpu_says_so(tmp_path):
    done = run_gpu_script(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr


def test_what_a_gpu_brought_back_becomes_rows(tmp_path):
    for name in ("common.py", "results.csv"):
        (tmp_path / name).write_bytes((BENCHMARKS / name).read_bytes())
    head = ["2026-01-02 03:04", "abc1234", "A GPU", "2.11", "loss"]
    rows = [["T=1 D=2 V=3 bf16", "r1fast", "forward", 1.25, "ms"]]
    (tmp_path / "gpu.json").write_text(json.dumps({"head": head, "rows": rows, "bars": []}))
    subprocess.run([sys.executable, "common.py", "gpu.json"], cwd=tmp_path, check=True)
    with (tmp_path / "results.csv").open(newline="") as file:
        last = list(csv.reader(file))[-1]
    assert last == [*head, "T=1 D=2 V=3 bf16", "r1fast", "forward", "1.25", "ms"]
    assert "| T=1 D=2 V=3 bf16 | forward (ms) | 1.25 |" in (tmp_path / "RESULTS.md").read_text()


def test_every_bar_is_reported_with_its_number(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench_loss = importlib.import_module("bench_loss")
    both, memory = "forward+backward", "peak extra memory"
    cells = {("materialised", "logits"): 800.0, ("r1fast", memory): 90.0}
    cells |= {(name, both): 2.0 for name in ("r1fast", "GEMMs", "torch.mm", "materialised")}
    lines = bench_loss.cpu_bars("toy", "fp32", cells, "r1fast", "r1fast")
    assert "toy: over three GEMMs: 1 (<= 1.2: holds)" in lines
    assert "toy: over three torch.mm: 1 (<= 0.7: MISSED)" in lines
    assert "toy: faster than materialised: 1 (>= 1.7: MISSED)" in lines
    assert "toy: faster than TRL: not measured" in lines
    assert "toy: peak extra memory over logits (r1fast): 0.113 (<= 0.125: holds)" in lines
    cells |= {("TRL", both): 2.8, ("CCE", both): 2.7, ("Liger", both): 20.0}
    lines = bench_loss.gpu_bars("toy", cells)
    assert "toy: faster than the best per-token peer: 1.35 (>= 1.3: holds)" in lines
    assert "toy: faster than Liger: 10 (>= 8: holds)" in lines


def test_rollout_cases_and_bars(monkeypatch):
    """Lengths have the mean they are said to have, and what has to be cached is counted right."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_rollout")
    equal, long, shared = (bench.make_case(name, 2048) for name in bench.CASES)
    assert equal.num_tokens == 8 * 8 * 128
    assert shared.num_tokens == 8 * 16 * 128
    assert {len(p) for p in shared.prompts} == {512}
    flat = sum(long.lengths, [])
    assert long == bench.make_case("long", 2048)
    assert abs(sum(flat) / len(flat) - 32) < 1
    assert max(flat) == 128
    assert min(flat) >= 1
    assert sorted(flat)[32] < 28  # the median is below the mean
    assert bench.needed_positions(equal) == 8 * 64 + 64 * 127
    toy = bench.Case([[1] * 10, [1] * 5], [[3, 1], [2, 2]])
    # after one token 10 + 5 and one of each unfinished sample; after two only the first prompt's
    assert bench.needed_positions(toy) == 10 + 5 + 3
    assert bench.bar("x", 2.0, 1.5) == "x: 2 (>= 1.5: holds)"
    assert bench.bar("x", 2.0, 1.5, at_most=True) == "x: 2 (<= 1.5: MISSED)"
    assert bench.bar("x", 2.0, None) == "x: 2"


@pytest.mark.slow
def test_rollout_benchmark_runs(tmp_path, monkeypatch):
    """r1fast and both of transformers' ways on a toy checkpoint, the same lengths for all."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_rollout")
    peers = importlib.import_module("rollout_peers")
    monkeypatch.setitem(bench.SHAPES, "toy", (1, 128, 64))
    path = bench.make_checkpoint(tmp_path / "toy", "toy")
    case = bench.Case([[5] * 20, [6] * 20], [[4, 2], [1, 6]])
    with ThreadPoolExecutor() as pool:  # each imports torch first
        workers = pool.map(lambda name: peers.Worker(name, path, "float32", 1), peers.ENGINES)
    for worker in workers:
        found = worker.run(case)
        assert found.get("tokens") == case.num_tokens, found
        assert found["seconds"] > 0 < found["cpu_seconds"]
        assert found["peak_rss"] >= found["rss"] > 0
        if worker.name == "r1fast":
            watched = worker.watched(case)
            assert watched["tokens"] == case.num_tokens
            assert watched["positions"] >= bench.needed_positions(case)
            assert watched["positions"] >= watched["alive"] > 0
            assert worker.gemm_rate(4) > 0
        worker.close()
        assert worker.process.returncode is not None


def test_step_rollouts_counts_and_bars(monkeypatch, tmp_path):
    """Lengths have the mean they are said to have; what has to be forwarded, and what MFU counts, by hand."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench, gpu = (importlib.import_module(name) for name in ("bench_step", "step_gpu"))
    for shape in bench.SHAPES.values():
        lengths = bench.lengths_of(shape)
        assert len(lengths) == shape.prompts * shape.group
        assert abs(sum(lengths) / len(lengths) - shape.mean_tokens) < 0.5
        assert max(lengths) == shape.max_tokens
        assert sorted(lengths)[len(lengths) // 2] < 0.95 * shape.mean_tokens  # long-tailed
    toy = bench.Shape("3.5M", 3, 5, 4, 9, 4.0, silent=1)
    groups = bench.make_rollouts(toy, 50, 7)
    assert groups == bench.make_rollouts(toy, 50, 7)
    assert [len(set(g["rewards"])) for g in groups] == [4, 4, 1]
    for ids in (c for g in groups for c in g["completions"]):
        assert min(ids[:-1], default=7) >= 7  # no end inside
        assert len(ids) == 9 or ids[-1] < 7
    cut = bench.cut(groups, 2, 3)
    assert {len(g["prompt_ids"]) for g in cut} == {2}
    assert {len(c) for g in cut for c in g["completions"]} == {1, 2, 3}
    hand = [
        {"prompt_ids": [1, 2], "completions": [[3], [4, 5, 6]], "rewards": [0.0, 1.0]},
        {"prompt_ids": [1], "completions": [[3, 4], [4, 5]], "rewards": [1.0, 1.0]},
    ]
    assert bench.needed_tokens(hand) == 2 + 0 + 2
    assert bench.needed_tokens(hand, kl_coef=0.1) == 4 + 1 + 1 + 1
    config = {
        "hidden_size": 4, "intermediate_size": 3, "vocab_size": 10, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    # 2 layers of q, o (16 each), k, v (8 each), an MLP of 36: 168 weights on 4 tokens; 4 predictions of
    # 40 weights; pairs: 3 in the prompt, 2 x 2 with it, 3 in the completion
    wanted = 3 * (2 * 168 * 4 + 2 * 40 * 4 + 4 * 2 * 4 * 10)
    assert gpu.needed_flops(hand[:1], config) == wanted


def test_step_gradients_are_compared_over_all_tensors(monkeypatch, tmp_path):
    from safetensors.torch import save_file

    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_step")
    one = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    two = {"a": torch.tensor([3.0, 5.0]), "b": torch.tensor([4.0])}
    paths = [tmp_path / name for name in "xyz"]
    for path, tensors in zip(paths, (one, two, {"a": one["a"]}), strict=True):
        save_file(tensors, path)
    assert bench.compare_gradients(paths[0], paths[0]) == (1.0, 0.0)
    assert bench.compare_gradients(*paths[:2]) == pytest.approx((0.5**0.5, 0.5**0.5))
    with pytest.raises(AssertionError, match="different parameters"):
        bench.compare_gradients(paths[0], paths[2])


@pytest.mark.slow
def test_step_benchmark_runs(tmp_path, monkeypatch, capsys):
    """Training part and whole step of r1fast and TRL at a toy shape, half of it without signal."""
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_step")
    monkeypatch.setitem(bench.MODELS, "toy", (1, 128, 96, 300, 12))
    monkeypatch.setitem(bench.MICRO_BATCH, "toy", 4)
    monkeypatch.setitem(bench.TOKEN_BUDGET, "toy", 64)
    monkeypatch.setitem(bench.SHAPES, "b", bench.Shape("toy", 2, 5, 4, 10, 5.0, silent=1))
    words = "bench_step.py --shapes b --rounds 1 --threads 1 --no-append --variants".split()
    monkeypatch.setattr(sys, "argv", [*words, "r1fast", "TRL"])
    bench.main()
    out = capsys.readouterr().out
    assert "skipped" not in out
    needed = bench.needed_tokens(bench.make_rollouts(bench.SHAPES["b"], 300, 12))
    assert f"b training: tokens forwarded {needed}, needed {needed} (holds)" in out
    assert re.search(r"gradient of TRL: \S+ \(<= 1e-05: holds\)", out)
    for part in ("training", "step"):
        assert re.search(rf"b {part}: times faster than TRL: \S+ \(>= 4: (holds|MISSED)\)", out)
        assert re.search(rf"b {part}: peak memory over TRL's: \S+ \(<= 0.5: MISSED\)", out)
