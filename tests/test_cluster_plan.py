"""Plans on paper: parameters that the publishers state, numbers made by hand, and what must hold for any."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from r1fast import cluster_plan
from r1fast.__main__ import main
from r1fast.cluster_plan import Cluster, Layout, Load, layouts, make_plan, plan_cluster
from r1fast.machine import GPUS
from r1fast.model import Decoder, ModelSpec
from r1fast.paper_shape import read_shape

SHAPES = Path(__file__).parent.parent / "configs" / "shapes"
LOAD = Load(512, 16, 2048, 8192, 32768, updates=16)


def config_of(name: str) -> dict:
    return json.loads((SHAPES / name / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [  # in billions, as the models' reports state them; active counts no embedding here
        ("deepseek-v3", 671, 37), ("qwen3-235b-a22b", 235, 22), ("qwen2.5-1.5b", 1.54, 1.54),
        ("qwen2.5-7b", 7.61, 7.07), ("qwen2.5-32b", 32.5, 32), ("llama-3.3-70b", 70.6, 69.5),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_reports(name, total, active):
    shape = read_shape(config_of(name))
    assert shape.total / 1e9 == pytest.approx(total, rel=0.01)
    assert shape.active / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "qwen2.5-7b", "llama-3.3-70b"])
def test_dense_models_have_the_parameters_of_ours(name):
    model = Decoder(ModelSpec.from_hf_config(config_of(name)), device="meta")
    assert read_shape(config_of(name)).total == pytest.approx(model.num_parameters(), rel=1e-3)


def test_a_small_mixture_by_hand():
    shape = read_shape({
        "model_type": "qwen3_moe", "hidden_size": 8, "num_hidden_layers": 4, "vocab_size": 100,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 24,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 10,
        "decoder_sparse_step": 2, "mlp_only_layers": [3], "tie_word_embeddings": True,
    })  # fmt: skip
    assert shape.moe_layers == 1  # 1 and 3 are sparse, and 3 is dense after all
    attention = 8 * 64 + 2 * 8 * 32 + 64 * 8
    assert shape.shared == 4 * attention + 3 * (3 * 8 * 24) + 8 * 8
    assert shape.experts == 8 * (3 * 8 * 10)
    assert shape.total == shape.shared + shape.experts + 800
    assert shape.active == shape.shared + 2 * 240 + 800
    assert (shape.cache_width, shape.pair_flops) == (64, 4 * 64)
    assert shape.experts_met(1) == pytest.approx(0.25)
    assert shape.experts_met(2) == pytest.approx(1 - 0.75**2)


def test_latent_attention_is_cached_as_its_latent():
    shape = read_shape(config_of("deepseek-v3"))
    assert shape.cache_width == 512 + 64
    assert shape.moe_layers == 58


def test_one_gpu_by_hand():
    shape = read_shape(config_of("qwen2.5-1.5b"))
    load = Load(4, 8, 100, 200, 300, updates=2)
    cluster = Cluster(1, GPUS["h200"])
    plan = make_plan(shape, cluster, load, Layout(False, 1, 1, 1))
    P = shape.total
    training = plan.memory["training"]
    assert (training["weights"], training["gradients"], training["optimizer"]) == (
        2 * P,
        4 * P,
        12 * P,
    )
    assert training["activations"] == 2 * 1536 * 400 * (28 + 20) + 2 * 2048 * 151936
    assert plan.network == {}
    assert not plan.is_offloaded
    tokens, pairs = 4 * 100 + 32 * 200, 4 * 100**2 / 2 + 32 * (200 * 100 + 200**2 / 2)
    assert load.forwarded == tokens
    peak = 989e12
    products = 8 * P * tokens / (0.7 * peak)
    attention = 4.5 * shape.pair_flops * 28 * pairs / (0.35 * peak)
    update = 2 * 28 * P / (0.7 * 4.8e12)
    assert plan.seconds["training"] == pytest.approx(products + attention + update, rel=1e-6)
    # 32 samples, in the mean 32 x 200 / 300 of them run; weights are read once a step
    step = 2 * P / (0.7 * 4.8e12) + 1e-3
    keys = 32 * 2 / 3 * (2 * shape.cache_width * 28) * (100 / 8 + 100) / (0.7 * 4.8e12)
    rollout = 300 * (step + keys) + 2 * P * 400 / (0.7 * peak)
    assert plan.seconds["rollout"] == pytest.approx(rollout, rel=1e-6)


def test_what_a_network_carries_by_hand():
    shape = read_shape(config_of("qwen2.5-7b"))
    cluster = Cluster(16, GPUS["h200"])
    load = Load(16, 16, 1000, 1000, 4000, updates=4, has_reference=False)
    whole, sharded = (make_plan(shape, cluster, load, Layout(s, 1, 1, 1)) for s in (False, True))
    assert whole.network == {"gradients": pytest.approx(4 * 2 * 4 * shape.total * 15 / 16)}
    micro_batches = max(-(-(16 * 1000 + 256 * 1000) // 16 // 5000), 4)
    assert sharded.network == {
        "weights": pytest.approx(micro_batches * 2 * 2 * shape.total * 15 / 16),
        "gradients": pytest.approx(micro_batches * 4 * shape.total * 15 / 16),
        "to rollouts": 2 * shape.total,
    }
    assert sharded.memory["training"]["optimizer"] * 16 == whole.memory["training"]["optimizer"]
    experts = read_shape(config_of("deepseek-v3"))
    plan = make_plan(experts, cluster, load, Layout(True, 8, 1, 16))
    tokens = load.forwarded / 16
    assert plan.network["to experts"] == pytest.approx(3 * 2 * 2 * 8 * 7168 * tokens * 58 * 7 / 8)


@pytest.mark.parametrize("name", [p.name for p in SHAPES.iterdir()])
@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_more_gpus_never_take_longer_or_more_memory(name, gpu):
    shape = read_shape(config_of(name))
    plans = [plan_cluster(shape, Cluster(n, GPUS[gpu]), LOAD) for n in (8, 32, 128, 512, 2048)]
    seen = [p for p in plans if p.fits]
    assert seen, "2,048 GPUs hold any of these"
    assert [p.fits for p in plans] == sorted(p.fits for p in plans)  # once it fits, it does
    seconds = [p.total_seconds for p in seen]
    assert seconds == sorted(seconds, reverse=True)
    for p in seen:
        assert 0 < p.mfu < cluster_plan.PRODUCTS * 3 / 4
        assert p.peak <= 0.9 * GPUS[gpu].memory


def test_the_chosen_layout_is_the_fastest_that_fits():
    shape, cluster = read_shape(config_of("qwen2.5-32b")), Cluster(64, GPUS["h100"])
    all_plans = [make_plan(shape, cluster, LOAD, x) for x in layouts(shape, cluster)]
    chosen = plan_cluster(shape, cluster, LOAD)
    assert len({p.layout for p in all_plans}) == len(all_plans) > 20
    assert chosen.total_seconds == min(p.total_seconds for p in all_plans if p.fits)
    assert any(not p.fits for p in all_plans)


def test_ranks_without_a_sequence_do_not_help():
    shape = read_shape(config_of("qwen2.5-1.5b"))
    few = replace(LOAD, prompts=2, group=4, updates=1)
    layout = Layout(False, 1, 1, 1)
    eight, many = (make_plan(shape, Cluster(n, GPUS["h200"]), few, layout) for n in (8, 64))
    assert many.seconds["reference"] == pytest.approx(eight.seconds["reference"], rel=0.01)


@pytest.fixture
def run(capsys):
    def run(*words: str) -> tuple[int, str, str]:
        code = main(["plan", str(SHAPES.parent / "r1_zero.toml"), *words])
        out, err = capsys.readouterr()
        return code, " ".join(out.split()), err

    return run


def test_the_command(run):
    code, out, _ = run(
        f"--model.path={SHAPES / 'deepseek-v3'}", "--gpus=8,512", "--completion-tokens", "8192",
        "--network=200",
    )  # fmt: skip
    assert code == 0
    assert "671 B parameters, 36.6 B active, bfloat16, NVIDIA H100 SXM, on paper" in out
    assert "DOES NOT FIT" in out
    assert "nothing here was measured" in out
    assert "of 25 GB/s beyond" in out
    assert "16 completions of 8,192 tokens (at most 32,768), 16 updates" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus=8"], "name a model: --model.path"),
        (["--gpus=0"], "--gpus must be whole numbers from 1 to 65,536, as 8,64,512; got '0'"),
        (["--gpus=8,"], "got '8,'"),
        (["--gpus=12"], "--gpus 12 are no whole nodes of 8"),
        (["--gpus=8", "--stage=r1_zero"], "--stage is of a plan of this machine"),
        (["--gpus=8", "--gpu=tpu"], "--gpu must be one of a100"),
        (["--gpus=8", "--completion-tokens=99999"], "--completion-tokens 99999 is more than"),
        (["--network=400"], "--network is of a cluster: say how many GPUs it has, --gpus N"),
    ],
)
def test_bad_input(run, words, message):
    path = [] if "name a model" in message else [f"--model.path={SHAPES / 'qwen2.5-7b'}"]
    code, _, err = run(*path, *words)
    assert code == 2
    assert message in " ".join(err.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "knows model_type llama, mistral, .* got 'mamba'"),
        (
            {"hidden_size": None},
            "config.json needs hidden_size, a whole number of at least 1, got None",
        ),
        ({"num_hidden_layers": 0}, "needs num_hidden_layers"),
        ({"num_experts_per_tok": 512}, "a token passes 512 of 256 experts"),
        ({"kv_lora_rank": "x"}, "needs kv_lora_rank"),
    ],
)
def test_a_shape_that_cannot_be_read(change, message):
    with pytest.raises(ValueError, match=message):
        read_shape(config_of("deepseek-v3") | change)
