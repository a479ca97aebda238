"""Real input through the command line: GSM8K, a random Qwen2, SFT, GRPO, evaluation, transformers.

The excerpt in fixtures/ always runs; the full file runs where it lies beside the repository.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import tiny_checkpoint, tiny_tokenizer

from r1fast.__main__ import main
from r1fast.data import load_problems
from r1fast.evaluate import summarise
from r1fast.jsonl import read_jsonl
from r1fast.kernels.attention import PackedAttention
from r1fast.metrics import read_metrics
from r1fast.model import load_model
from r1fast.rewards.math import MathReward

ROOT = Path(__file__).parent.parent
EXCERPT = Path(__file__).parent / "fixtures" / "gsm8k_excerpt.jsonl"
FULL = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
SMOKE = ROOT / "configs" / "gsm8k_smoke.toml"


@pytest.fixture(scope="module", params=["excerpt", "full"])
def data(request) -> Path:
    if request.param == "excerpt":
        return EXCERPT
    if not FULL.exists():
        pytest.skip("GSM8K's train.jsonl is not beside the repository (../shared/data/gsm8k)")
    return FULL


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """(the folder of all runs, the base model): base -> sft -> grpo -> evaluate by commands."""
    folder = tmp_path_factory.mktemp(data.parent.name)
    texts = [row["question"] + row["answer"] for _, row in read_jsonl(data)][:500]
    base = tiny_checkpoint(
        folder / "base",
        tokenizer=tiny_tokenizer(tuple(texts), 512),
        std=0.05,
        max_position_embeddings=1024,
    )

    def command(name: str, model, *overrides: str) -> Path:
        out = folder / name
        code = main([name, str(SMOKE), f"--model.path={model}", f"--data.train={data}",
                     "--data.max_train_problems=32", "--rollout.max_completion_tokens=16",
                     f"--output_dir={out}", *overrides])  # fmt: skip
        assert code == 0
        return out

    sft = command(
        "sft",
        base,
        "--sft.max_steps=12",
        "--sft.batch_size=4",
        "--optim.lr=0.003",
        "--optim.warmup_steps=3",
    )
    grpo = command("grpo", sft / "model", "--grpo.num_steps=2", "--optim.lr=0.001",
                   "--rewards.overlong=1.0", "--rewards.overlong_cache=16")  # fmt: skip
    command("evaluate", grpo / "model", f"--data.eval={data}", "--data.max_eval_problems=3",
            "--eval.num_samples=2")  # fmt: skip
    return folder


def test_sft_lowers_the_loss(run):
    losses = [row["loss"] for row in read_metrics(run / "sft")]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5, losses


def test_two_grpo_steps(run):
    rows = read_metrics(run / "grpo")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
        assert row["logprob_mismatch/max"] < 1e-4
        assert -1 <= row["reward"] < 0  # nothing is right, and length costs
        assert row["grad_norm"] > 0
        assert row["completions/max_length"] <= 16
    stored = [row for _, row in read_jsonl(run / "grpo" / "completions.jsonl")]
    assert stored[0]["prompt"]
    assert stored[0]["answer"]
    manifest = json.loads((run / "grpo" / "manifest.json").read_text())
    assert manifest["kind"] == "grpo"


def test_evaluation_is_recomputed_from_its_samples(run, data):
    result = json.loads((run / "evaluate" / "eval.json").read_text())
    rows = [row for _, row in read_jsonl(run / "evaluate" / "samples.jsonl")]
    assert len(rows) == result["num_samples"] == 6
    assert [r["answer"] for r in rows[::2]] == [
        p.answer for p in load_problems(data, format="gsm8k", max_problems=3)
    ]
    grader = MathReward()
    try:
        assert summarise(rows, grader.equivalent).items() <= result.items()
    finally:
        grader.close()


def test_reports_are_written(run):
    for name in ("sft", "grpo", "evaluate"):
        assert (run / name / "report.html").stat().st_size > 1000


def test_transformers_computes_the_same_logits(run):
    transformers = pytest.importorskip("transformers")
    folder = run / "grpo" / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_model(folder)
    ids = torch.tensor(tokenizer.encode("Natalia sold 48/2 = 24 clips in May.\n#### 72"))
    with torch.no_grad():
        attend = PackedAttention(torch.tensor([0, len(ids)]), len(ids))
        actual = ours(ids, torch.arange(len(ids)), attend) @ ours.head_weight.T
        expected = theirs(ids[None]).logits[0]
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    base = load_model(run / "base")
    assert not torch.equal(base.embed.weight, ours.embed.weight)  # it was trained


def test_a_missing_model_is_an_answer_not_a_traceback(capsys, tmp_path):
    code = main(["grpo", str(SMOKE), f"--data.train={EXCERPT}", f"--output_dir={tmp_path}"])
    assert code == 2
    assert "model.path is empty" in capsys.readouterr().err


def test_wrong_data_names_file_and_line(capsys, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n{"question": "x"\n')
    base = tiny_checkpoint(tmp_path / "base")
    code = main(["grpo", str(SMOKE), f"--model.path={base}", f"--data.train={bad}",
                 f"--output_dir={tmp_path / 'out'}"])  # fmt: skip
    assert code == 2
    assert "bad.jsonl:2" in capsys.readouterr().err
