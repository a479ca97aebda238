"""`r1fast plan`: from config.json alone, for machines that are not here, in one table or for all stages."""

import json
import re

import pytest
from tiny import CONFIG as TINY
from tiny import FAMILIES, SHAPE, tiny_checkpoint

from r1fast.__main__ import main
from r1fast.jsonl import write_jsonl
from r1fast.report import write_report

QWEN_7B = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """A folder with a config.json and nothing else."""

    def make(config: dict) -> str:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return f"--model.path={folder}"

    return make


@pytest.fixture
def plan(tmp_path, capsys):
    def run(*words: str, config: str = "") -> tuple[int, str, str]:
        (tmp_path / "c.toml").write_text(config)
        code = main(["plan", str(tmp_path / "c.toml"), f"--output_dir={tmp_path / 'out'}", *words])
        out, err = capsys.readouterr()
        assert not (tmp_path / "out").exists()  # it only looks
        return code, " ".join(out.split()), err

    return run


def test_a_large_model_without_its_weights_and_without_a_gpu(model, plan):
    code, out, _ = plan(
        model(QWEN_7B), "--gpu", "h100", "--ranks=8", "--model.dtype=bfloat16",
        "--grpo.token_budget=auto", "--completion-tokens", "500",
    )  # fmt: skip
    assert code == 0
    assert "grpo: 7.62 B parameters, bfloat16, NVIDIA H100 SXM" in out
    assert "not measured: NVIDIA H100 SXM by its data sheet, 989 TFLOP/s" in out
    assert "which may not fit into memory" in out
    assert "more than is there" in out
    assert "with prompts of 1024 and completions of 500 tokens" in out
    for kind in ("weights 14.2 GiB", "optimizer 85.1 GiB", "reference 14.2 GiB"):
        assert kind in out
    code, out, _ = plan(
        model(QWEN_7B), "--model.device=cuda", "--lora.rank=16", "--model.dtype=bfloat16",
        "--grpo.token_budget=auto",
    )  # fmt: skip
    assert code == 0
    assert "40.4 M trained" in out
    assert "more than is there" not in out


def test_a_config_of_this_machine_reads_its_problems(files, plan):
    code, out, err = plan(*TINY, f"--model.path={files / 'model'}", "--completion-tokens=4",
                        f"--data.train={files / 'problems.jsonl'}",
                        f"--data.sft={files / 'examples.jsonl'}",
                        "--grpo.token_budget=4096")  # fmt: skip
    assert code == 0, err
    assert "grpo: " in out
    assert "sft: " in out
    assert re.search(r"with prompts of \d and completions of 4 tokens", out)
    assert "as configured" in out
    assert "MFU of training" in out


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tiny_checkpoint(folder / "model")
    problems = [{"id": f"p{i}", "prompt": f"What is {i} + 1?", "answer": "1"} for i in range(6)]
    write_jsonl(folder / "problems.jsonl", problems)
    write_jsonl(folder / "examples.jsonl", [{"prompt": "What is 1 + 1?", "completion": " 2."}] * 8)
    return folder


def test_no_more_is_planned_than_the_models_context(files, plan):
    words = [*TINY, f"--model.path={files / 'model'}", f"--data.train={files / 'problems.jsonl'}",
             "--rollout.max_completion_tokens=4000", "--gpu=h100"]  # fmt: skip
    code, _, err = plan(*words, "--completion-tokens=4000")
    assert code == 2
    assert re.search(
        r"--completion-tokens 4000 behind prompts of \d tokens is more than the model's context of "
        r"128 \(max_position_embeddings\)",
        err,
    )
    code, out, err = plan(*words)
    assert code == 0, err
    found = re.search(r"prompts of (\d) and completions of (\d+) tokens, all that the model's", out)
    assert int(found[1]) + int(found[2]) == 128
    assert "context of 128 leaves" in out


def test_every_stage_of_a_pipeline_and_one_of_them(plan):
    config = '[data]\ntask = "running_sum"\n[stages.rl_1]\ngrpo = { num_steps = 7 }\n'
    config += '[rollout]\nmax_completion_tokens = 50\n[template]\nname = "raw"\n'
    code, out, _ = plan("--gpu=l40s", config=config)
    assert code == 0
    for stage in ("base", "r1_zero", "cold_start", "rl_1", "sft", "rl_2", "distill", "small_rl"):
        assert f" {stage} " in out
    assert " rejection " not in out
    assert "rl_1: prompts of 10 and completions of 50 tokens, the longest" in out
    code, out, _ = plan("--gpu=l40s", "--stage", "rl_1", config=config)
    assert code == 0
    assert "rl_1: 300 k parameters" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu=tpu"], "--gpu must be one of a100, l40s, h100, h200, got 'tpu'"),
        (["--stage=magic"], "--stage must be one of base, small_base, r1_zero"),
        (["--stage=rejection"], "stage 'rejection' trains no policy; those that do: base, "),
        (["--ranks=x", "--gpu=h100"], "--ranks must be a whole number of at least 1, got 'x'"),
        (["--grpo.token_budget=100", "--gpu=h100"],
         'grpo.token_budget = 100 is less than the longest sequence, 2047 tokens: set it to that or '
         'more, or to "auto"'),
        (["--grpo.token_budget=100", "--parallel.context_parallel=2", "--ranks=2", "--gpu=h100"],
         "grpo.token_budget = 100 is less than the longest sequence, 1024 tokens a rank: set it to "),
        (["--parallel.context_parallel=4", "--ranks=6", "--gpu=h100"],
         "= 4 x 1 does not divide the 6 ranks: say a multiple of 4, --ranks"),
        (["--parallel.context_parallel=3", "--ranks=3", "--gpu=h100"],
         "parallel.context_parallel = 3 does not divide the 4 query heads of the model"),
        (["--parallel.mode=fsdp", "--parallel.replicas=3", "--ranks=4", "--gpu=h100"],
         "parallel.replicas = 3 does not divide the 4 ranks that have a share of the same weights"),
        (["--model.path=/nowhere"], "no such model folder: '/nowhere'"),
        (["--magic=1"], "unknown config key 'magic'"),
    ],
)  # fmt: skip
def test_wrong_words_are_named(model, plan, words, message):
    path = model(SHAPE | FAMILIES["qwen2"] | {"max_position_embeddings": 2048})
    code, _, err = plan(path, *words)
    assert code == 2
    assert message in err


def test_without_a_model_it_asks_for_one(plan):
    code, _, err = plan("--stage=rl_1", "--gpu=h100")
    assert code == 2
    assert "name a model: model.path, or pipeline.base" in err


def test_the_report_shows_what_was_planned_and_measured(tmp_path):
    measured = {"seconds": {"train": [1.5, 2.25]}, "memory_peak": [2**20, 3 * 2**20],
                "mfu": [0.5, 0.25], "tokens_per_second": [1000.0, None]}  # fmt: skip
    budget = {"num_tokens": 4096, "reason": "auto: <memory>"}
    (tmp_path / "plan.json").write_text(json.dumps({"token_budget": budget, "measured": measured}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "sft", "loss": 1.0}\n')
    page = write_report(tmp_path).read_text()
    assert "Planned and measured" in page
    for part in ("1.5 → 2.25", "1 MiB → 3 MiB", "50% → 25%", "auto: &lt;memory&gt;", "4,096"):
        assert part in page
    (tmp_path / "plan.json").write_text(json.dumps({"token_budget": budget, "measured": {}}))
    assert "Planned and measured" not in write_report(tmp_path).read_text()
