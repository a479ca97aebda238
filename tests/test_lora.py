"""LoRA against PEFT (logits, gradients, files), against the merged model, and in the sampler."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import make_theirs
from tiny import tiny_config, tiny_model, tiny_policy

from r1fast import _C
from r1fast.config import LoraConfig
from r1fast.config_check import PROJECTIONS
from r1fast.kernels.attention import PackedAttention
from r1fast.lora import (
    adapters,
    adapters_off,
    add_lora,
    exchanged,
    lora_of,
    lora_tensors,
    merge_lora,
)
from r1fast.model import load_model, save_model
from r1fast.peft_folder import load_adapter, save_adapter
from r1fast.policy import load_policy
from r1fast.rollout.engine import Engine
from r1fast.rollout.native import _pack, is_supported, padded
from r1fast.rollout.sampler import SamplingParams

LORA = {
    "all": LoraConfig(rank=4, alpha=6.0),
    "some": LoraConfig(rank=3, alpha=8.0, targets=["v_proj", "q_proj", "down_proj"]),
    "rslora": LoraConfig(rank=4, alpha=6.0, rslora=True, targets=["k_proj", "up_proj", "o_proj"]),
}
IDS = torch.arange(4, 36) * 7 % 97


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def hidden(model, ids=IDS):  # (T,) -> (T, D)
    attend = PackedAttention(torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
    return model(ids, torch.arange(len(ids)), attend)


def logits(model, ids=IDS):
    return hidden(model, ids) @ model.head_weight.T


def with_lora(model, lora=LORA["all"], std=0.3):
    """Adapters that move the logits: B is random too."""
    add_lora(model, lora, seed=1)
    g = torch.Generator().manual_seed(2)
    for _, adapter in adapters(model):
        adapter.B.data.normal_(std=std, generator=g)
    return model


def on_theirs(peft, folder, adapter):
    """PEFT's model of the base in `folder` with its own reading of `adapter`."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)


@pytest.mark.parametrize("family", ["qwen2 tied", "qwen3 biased", "llama biased"])
@pytest.mark.parametrize("name", LORA)
def test_what_we_save_is_what_peft_loads(transformers, peft, tmp_path, family, name):
    """Equal logits, and equal gradients of A and B."""
    make_theirs(transformers, family).save_pretrained(tmp_path / "base")
    model = with_lora(load_model(tmp_path / "base"), LORA[name])
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    theirs = on_theirs(peft, tmp_path / "base", tmp_path / "adapter")
    ours, expected = logits(model), theirs(IDS[None]).logits[0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    with adapters_off(model):
        assert (logits(model) - expected).abs().max() > 0.1
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    grads = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if "lora" in n}
    for at, adapter in adapters(model):
        for part in adapter.parts:
            for key, grad in (("A", adapter.A.grad), ("B", adapter.B.grad)):
                whole = copy.deepcopy(adapter)
                getattr(whole, key).data.copy_(grad)
                own = whole.of_part(part)["AB".index(key)]
                expected = grads.pop(f"base_model.model.{at}{part}.lora_{key}.weight")
                scale = expected.abs().max()
                torch.testing.assert_close(own / scale, expected / scale, rtol=1e-5, atol=1e-5)
    assert not grads
    assert all(p.grad is None for n, p in model.named_parameters() if "adapter" not in n)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_is_what_we_load(transformers, peft, tmp_path, rslora):
    torch.manual_seed(0)  # of their factors
    base = make_theirs(transformers, "qwen2 untied")
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=5, use_rslora=rslora, target_modules="all-linear", task_type="CAUSAL_LM",
        init_lora_weights=False, lora_dropout=0.1,
    )  # fmt: skip
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "base")
    load_adapter(model, tmp_path / "adapter")
    assert lora_of(model).targets == list(PROJECTIONS)
    expected = theirs(IDS[None]).logits[0]
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert (logits(load_model(tmp_path / "base")) - expected).abs().max() > 0.1


def test_a_saved_adapter_comes_back_bit_for_bit(tmp_path):
    model = with_lora(tiny_model(), LORA["rslora"])
    save_adapter(model, tmp_path / "a")
    again = tiny_model()
    load_adapter(again, tmp_path / "a")
    assert lora_of(again) == lora_of(model)
    for name, x in lora_tensors(model).items():
        assert torch.equal(lora_tensors(again)[name], x), name
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "up_proj"]


def test_new_adapters_begin_as_pefts(peft):
    """A uniform within 1 / sqrt(D), B zero: the model is the base, bit for bit. A seed repeats them."""
    model, base = tiny_model(), tiny_model()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    add_lora(model, LoraConfig(rank=16), seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        assert torch.equal(hidden(model), hidden(base))
    layer = torch.nn.ModuleDict({"q": torch.nn.Linear(32, 32)})
    theirs = peft.get_peft_model(layer, peft.LoraConfig(r=16, target_modules=["q"]))
    theirs = theirs.base_model.model.q.lora_A["default"].weight
    A, B = model.layers[0].qkv.adapter.of_part("q_proj")
    assert A.shape == theirs.shape
    for x in (A, theirs.detach()):
        assert 0.9 / 32**0.5 < x.abs().max() < 1 / 32**0.5
        assert abs(float(x.std()) - (1 / 3 / 32) ** 0.5) < 0.01
    assert not B.any()
    same, other = tiny_model(), tiny_model()
    add_lora(same, LoraConfig(rank=16), seed=5)
    add_lora(other, LoraConfig(rank=16), seed=6)
    assert torch.equal(same.layers[1].down.adapter.A, model.layers[1].down.adapter.A)
    assert not torch.equal(other.layers[1].down.adapter.A, model.layers[1].down.adapter.A)


@pytest.mark.parametrize("lora", LORA.values(), ids=LORA)
def test_merging_is_the_same_function(tmp_path, lora):
    """In place and on disk: equal files; the model that is saved stays as it is."""
    model = with_lora(tiny_model(), lora, std=0.1)
    expected = logits(model).detach()
    before = {n: p.clone() for n, p in model.named_parameters()}
    save_model(model, tmp_path / "disk", max_shard_bytes=20_000)
    assert len(list((tmp_path / "disk").glob("*.safetensors"))) > 1
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    merge_lora(model)
    assert lora_of(model) is None
    assert all(p.requires_grad for p in model.parameters())
    assert not any("adapter" in n for n, _ in model.named_parameters())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    disk = load_model(tmp_path / "disk").hf_tensors()
    for name, x in model.hf_tensors().items():
        assert torch.equal(disk[name], x), name


def test_merging_adds_in_float32_and_rounds_once():
    model = with_lora(tiny_model().to(torch.bfloat16), std=0.01)
    weight = model.layers[0].down.weight.detach().clone()
    A, B = model.layers[0].down.adapter.of_part("down_proj")
    assert A.dtype == torch.float32
    merge_lora(model)
    exact = weight.double() + 6.0 / 4 * (B.double() @ A.double())
    assert torch.equal(model.layers[0].down.weight, exact.float().bfloat16())


def test_adapters_off_is_the_base_bit_for_bit():
    base, model = tiny_model(), with_lora(tiny_model())
    with torch.no_grad():
        with adapters_off(model):
            assert torch.equal(hidden(model), hidden(base))
        assert not torch.allclose(hidden(model), hidden(base), atol=0.1)
        other = with_lora(tiny_model(), std=0.5)
        with exchanged(model, lora_tensors(other)):
            assert torch.equal(hidden(model), hidden(other))
            with adapters_off(model):
                assert torch.equal(hidden(model), hidden(base))
            assert torch.equal(hidden(model), hidden(other))
        assert not torch.allclose(hidden(model), hidden(other), atol=0.1)
        with adapters_off(model):
            with adapters_off(model):
                assert torch.equal(hidden(model), hidden(base))
            assert torch.equal(hidden(model), hidden(base))  # as it was before the inner one
        assert not torch.allclose(hidden(model), hidden(base), atol=0.1)


def rollout(model, ban=None, first=(), **options):
    """Four completions of each of three prompts, after those of `first`."""
    engine = Engine(model, [3], **options)
    prompts = [list(range(4, 4 + n)) for n in (5, 1, 20)]
    seeds = [[99] * 4] * len(first) + [[7 * p + g for g in range(4)] for p in range(3)]
    sampling = SamplingParams(max_tokens=24, logit_bias={} if ban is None else {ban: -math.inf})
    groups = engine.generate([*first, *prompts], None, sampling, seeds=seeds)
    return engine, prompts, groups


def test_an_engine_sees_what_counts_as_adapters():
    """Off, or exchanged for others: neither is a change of a parameter."""
    base, model, other = tiny_model(), with_lora(tiny_model()), with_lora(tiny_model(), std=0.5)
    engine, prompts = Engine(model, [3]), [[4, 5, 6]]

    def logprobs(engine):
        (group,) = engine.generate(prompts, 4, SamplingParams(max_tokens=8), seed=1)
        return [c.logprobs for c in group.completions]

    own = logprobs(engine)
    with adapters_off(model):
        assert logprobs(engine) == logprobs(Engine(base, [3])) != own
    with exchanged(model, lora_tensors(other)):
        assert logprobs(engine) == logprobs(Engine(other, [3])) != own
    assert logprobs(engine) == own


@pytest.mark.parametrize(
    ("family", "name", "native"),
    [
        *(("qwen3", name, True) for name in LORA),
        ("qwen2", "all", True),
        ("llama", "all", True),
        ("llama", "all", False),
    ],
)
def test_the_sampler_has_the_policy_that_is_trained(monkeypatch, family, name, native):
    from test_parity import TOLERANCE, trainer_logprobs

    if not native:
        monkeypatch.setattr("r1fast.rollout.runner.is_supported", lambda model: False)
    model = with_lora(tiny_model(family), LORA[name], std=0.1)
    engine, prompts, groups = rollout(model)
    completions = [g.completions for g in groups]
    logprobs, _ = trainer_logprobs(model, prompts, completions, 1.0)
    for c, expected in zip(sum(completions, []), logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(c.logprobs), expected, rtol=0, atol=TOLERANCE)
    with adapters_off(model):
        base, _ = trainer_logprobs(model, prompts, completions, 1.0)
    assert max(float((a - b).abs().max()) for a, b in zip(logprobs, base, strict=True)) > 0.05
    # an adapter that changes is noticed as any weight is
    _, adapter = list(adapters(model))[-1]
    adapter.B.data[0, 0] += 1.0
    tokens = [[c.token_ids for c in group] for group in completions]
    scored = sum(engine.score(prompts, tokens, 1.0), [])
    logprobs, _ = trainer_logprobs(model, prompts, completions, 1.0)
    for actual, expected in zip(scored, logprobs, strict=True):
        torch.testing.assert_close(torch.as_tensor(actual), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LORA)
def test_without_the_native_forward_sampling_stacks_the_factors(monkeypatch, name, dtype):
    """Once for each version: two products a layer, whatever the number of its parts, as near as training's."""
    from r1fast import lora

    monkeypatch.setattr("r1fast.rollout.runner.is_supported", lambda model: False)
    model = with_lora(tiny_model("qwen3").to(dtype), LORA[name], std=0.1)
    engine = Engine(model, [3])
    calls = {"stacked": 0, "lora_linear": 0}

    def count(owner, key):
        real = getattr(owner, key)

        def counted(*args, **kwargs):
            calls[key] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, key, counted)

    count(lora.Adapter, "stacked")
    count(lora, "lora_linear")
    rows = []
    for _ in range(2):
        (group,) = engine.generate([[4, 5, 6]], 2, SamplingParams(max_tokens=6), seed=1)
        rows.append([c.logprobs for c in group.completions])
    assert rows[0] == rows[1]
    assert calls == {"stacked": len(list(adapters(model))), "lora_linear": 0}
    x = torch.randn(5, model.spec.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    linear = model.layers[0].qkv
    with torch.no_grad():
        plain = linear(x)
        with lora.with_stacks(model, lora.stacks(model)):
            stacked = linear(x)
        exact = x.double() @ linear.weight.double().T
        for part, (start, end) in linear.adapter.parts.items():
            A, B = linear.adapter.of_part(part)
            exact[:, start:end] += linear.adapter.scale * (x.double() @ A.double().T @ B.double().T)
    if linear.bias is not None:
        exact += linear.bias.double()
    assert (stacked - exact).norm() <= 1.5 * (plain - exact).norm()
    assert all(adapter.stack is None for _, adapter in adapters(model))


needs_native = pytest.mark.skipif(not is_supported(tiny_model()), reason="needs AVX2")
needs_bf16 = pytest.mark.skipif(
    not is_supported(tiny_model().to(torch.bfloat16)), reason="needs AVX2"
)


@needs_bf16
def test_the_packed_product_keeps_what_a_merged_bfloat16_weight_loses():
    """Adapters below a weight's last bit: rounded into the weight, most of them would be gone."""
    linear = with_lora(tiny_model().to(torch.bfloat16), std=3e-4).layers[0].down
    weight, low_rank = _pack(linear)
    x, y = padded(9, 48 + 16 + 4, torch.bfloat16), torch.empty(9, 32)
    x[:9, :48] = torch.randn(9, 48, generator=torch.Generator().manual_seed(0))
    low_rank(x, x[:, 64:], 9, _C.After.store)  # the tail begins at a multiple of 32
    weight(x, y, 9, _C.After.store)
    x, base = x[:9, :48].double(), linear.weight.double()
    A, B = linear.adapter.of_part("down_proj")
    exact = x @ (1.5 * B.double() @ A.double()).T

    def lost(delta):
        return float((delta - exact).norm() / exact.norm())

    assert lost(y.double() - x @ base.T) < 0.01
    merged = linear.adapter.merged(linear.weight, "down_proj").double()
    assert lost(x @ (merged - base).T) > 0.5


@needs_bf16
def test_bfloat16_rounds_where_the_model_does():
    from test_native_forward import forward_both

    model = with_lora(tiny_model().to(torch.bfloat16), std=0.1)
    _, rows, _, _ = forward_both(model, IDS)
    with torch.no_grad():
        exact = hidden(copy.deepcopy(model).double())
        error, allowed = ((x.double() - exact).abs().mean() for x in (rows, hidden(model)))
    assert 0 < error < 1.3 * allowed


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 34])
def test_batch_invariant_bits_with_adapters(dtype, width):
    """Decode and score, whatever is in the batch; a width that leaves a gap before the tail too."""
    changes = {"hidden_size": width, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = with_lora(tiny_model("qwen3", **changes).to(dtype), LoraConfig(rank=5), std=0.1)
    if not is_supported(model):
        pytest.skip("needs AVX2")
    engine, prompts, groups = rollout(model, batch_invariant=True)
    for prompt, group in zip(prompts, groups, strict=True):
        for c in group.completions:
            (alone,) = engine.score([prompt], [[c.token_ids]], 1.0)
            assert alone[0].tolist() == c.logprobs


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=5),
        # a word of bfloat16 that q's product reads is half of it another product's
        LoraConfig(rank=1, targets=["q_proj", "gate_proj", "up_proj"]),
    ],
)
def test_a_broken_row_leaves_its_neighbours(lora, dtype):
    """A NaN in one row's x A^T stays in that row, and is gone when another sample takes its place."""
    model = with_lora(tiny_model("qwen3", hidden_size=34).to(dtype), lora, std=0.1)
    _, _, groups = rollout(model, ban=96)
    with torch.no_grad():
        model.embed.weight[96] = torch.nan
    _, _, mixed = rollout(model, ban=96, first=[[5, 96]], max_batch_size=5)
    assert all(c.finish_reason == "error" for c in mixed[0].completions)
    for group, expected in zip(mixed[1:], groups, strict=True):
        for c, e in zip(group.completions, expected.completions, strict=True):
            assert (c.token_ids, c.logprobs) == (e.token_ids, e.logprobs)


REFUSED = {
    "use_dora": (True, "unsupported use_dora = True; supported: unset"),
    "modules_to_save": (["lm_head"], "unsupported modules_to_save"),
    "rank_pattern": ({"q_proj": 8}, "unsupported rank_pattern"),
    "alpha_pattern": ({"q_proj": 8}, "unsupported alpha_pattern"),
    "bias": ("all", "unsupported bias = 'all'; supported: 'none'"),
    "task_type": ("SEQ_CLS", "unsupported task_type = 'SEQ_CLS'; supported: 'CAUSAL_LM'"),
    "init_lora_weights": ("pissa", "unsupported init_lora_weights = 'pissa'"),
    "of_a_later_peft": (3, "unsupported of_a_later_peft = 3"),
    "peft_type": ("LOHA", "unsupported peft_type 'LOHA'; supported: LORA"),
    "r": (0, "'r' must be a whole number above 0, got 0"),
    "lora_alpha": ("x", "'lora_alpha' must be a number above 0, got 'x'"),
    "lora_alpha ": (math.inf, "'lora_alpha' must be a number above 0, got inf"),
    "lora_alpha  ": (10**400, "'lora_alpha' must be a number above 0, got 1000"),
    "use_rslora": ("false", "'use_rslora' must be true or false, got 'false'"),
    "use_rslora ": (1, "'use_rslora' must be true or false, got 1"),
    "target_modules": (None, "'target_modules' must be a list of names, .* got None"),
    "target_modules ": (["q_proj", 3], "'target_modules' must be a list of names"),
    "target_modules  ": ("(q_proj", "'target_modules' is no pattern: missing"),
    "r ": (3, r"lora_A.weight' has the shape \(4, 48\), and 'r' in adapter_config.json is 3"),
}


def change(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("key", REFUSED)
def test_other_kinds_of_adapters_are_refused(tmp_path, key):
    save_adapter(with_lora(tiny_model()), tmp_path / "a")
    value, message = REFUSED[key]
    change(tmp_path / "a", **{key.strip(): value})
    with pytest.raises(ValueError, match=message):
        load_adapter(tiny_model(), tmp_path / "a")


ALL, LAYERS = list(PROJECTIONS), r"model\.layers\.\d+\..*_proj"


@pytest.mark.parametrize("targets", [ALL, "all-linear", "ALL-LINEAR", LAYERS, [*ALL, "c_attn"]])
def test_targets_that_mean_what_there_is(transformers, peft, tmp_path, targets):
    """To PEFT too: it finds no weight that is missing, and none that it does not know."""
    make_theirs(transformers, "qwen2 untied").save_pretrained(tmp_path / "base")
    model = with_lora(load_model(tmp_path / "base"))
    save_adapter(model, tmp_path / "a")
    change(tmp_path / "a", target_modules=targets)
    other = load_model(tmp_path / "base")
    load_adapter(other, tmp_path / "a")
    assert all(torch.equal(x, lora_tensors(model)[name]) for name, x in lora_tensors(other).items())
    assert not peft_misses(peft, tmp_path)


def peft_misses(peft, folder) -> list[str]:
    """Weights that PEFT expects and the folder has not, or the other way round."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, folder / "a")
    found = theirs.load_adapter(folder / "a", adapter_name="again")
    return [name for name in (*found.missing_keys, *found.unexpected_keys) if "lora" in name]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj"], "there are weights for model.layers.0.mlp.down_proj, .* and 9 more"),
        ([*ALL, "lm_head"], "there are no weights for lm_head$"),
        ([*ALL, "embed_tokens"], "there are no weights for model.embed_tokens$"),
        (r".*layers\.0\..*_proj", "there are weights for model.layers.1.mlp.down_proj"),
        (".*(_proj|lm_head)", "there are no weights for lm_head$"),
        ("q_proj", "there are weights for model.layers.0.mlp.down_proj"),
        ([], "there are weights for"),
    ],
)
def test_targets_that_mean_something_else_are_refused(
    transformers, peft, tmp_path, targets, message
):
    make_theirs(transformers, "qwen2 untied").save_pretrained(tmp_path / "base")
    save_adapter(with_lora(load_model(tmp_path / "base")), tmp_path / "a")
    change(tmp_path / "a", target_modules=targets)
    model = load_model(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path / "a")
    assert lora_of(model) is None
    try:
        assert peft_misses(peft, tmp_path)
    except ValueError:
        assert targets in ([], "q_proj")  # to PEFT they mean no module at all


def test_adapters_that_are_there_stay(tmp_path):
    """Whatever is wrong with the ones that should come."""
    model = with_lora(tiny_model())
    save_adapter(model, tmp_path / "a")
    before = {name: x.clone() for name, x in lora_tensors(model).items()}
    with pytest.raises(ValueError, match="does not fit this model: the model has adapters already"):
        load_adapter(model, tmp_path / "a")
    change(tmp_path / "a", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="has adapters already"):
        load_adapter(model, tmp_path / "a")
    assert lora_of(model) is not None
    assert lora_tensors(model).keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in lora_tensors(model).items())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "adapter" not in n)


def test_weights_that_do_not_fit_are_named(tmp_path):
    save_adapter(with_lora(tiny_model()), tmp_path / "a")
    file, model = tmp_path / "a" / "adapter_model.safetensors", tiny_model()
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    def refused(changed, message):
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path / "a")
        assert lora_of(model) is None  # as it was before
        assert all(p.requires_grad for p in model.parameters())

    refused({k: x for k, x in tensors.items() if k != key}, rf"missing: {key}")
    refused(tensors | {key: tensors[key][:, :2].clone()}, rf"wrong shape: {key} \(48, 2\)")
    refused(tensors | {key: tensors[key] * torch.nan}, "not finite")
    head = "base_model.model.lm_head.lora_A.weight"
    refused(tensors | {head: torch.ones(4, 32)}, "lm_head cannot have an adapter")
    refused(tensors | {key.replace("lora_B", "lora_C"): torch.ones(1)}, "unexpected: .*lora_C")
    file.unlink()
    with pytest.raises(ValueError, match=r"no adapter_model.safetensors in"):
        load_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match=r"no adapter_config.json in"):
        save_model(model, tmp_path / "m")
        load_adapter(model, tmp_path / "m")


def test_wrong_kinds_and_places():
    for lora, message in (
        (LoraConfig(rank=0), "rank of at least 1"),
        (LoraConfig(rank=2, targets=["lm_head"]), "lm_head cannot have an adapter"),
        (LoraConfig(rank=2, targets=["c_attn"]), "unknown projection 'c_attn'; known: q_proj"),
        (LoraConfig(rank=2, targets=[]), "must be a list of projections"),
    ):
        with pytest.raises(ValueError, match=message):
            add_lora(tiny_model(), lora)
    model = with_lora(tiny_model())
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, LoraConfig(rank=2))
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(tiny_model(), "never")
    for override, message in (
        ("--lora.rank=-1", "lora.rank must be at least 0"),
        ("--lora.alpha=0", "lora.alpha must be above 0"),
        ('--lora.targets=["lm_head"]', "lora.targets: lm_head cannot"),
        ("--lora.targets=[3]", "lora.targets must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_config(override)


def test_a_policy_is_loaded_with_its_adapter(tmp_path):
    policy = tiny_policy()
    policy.save(tmp_path / "base")
    with_lora(policy.model)
    policy.save_adapter(tmp_path / "adapter")
    policy.save(tmp_path / "merged")
    merged = load_policy(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu")
    expected = load_policy(tmp_path / "merged", device="cpu").model.hf_tensors()
    for name, x in merged.model.hf_tensors().items():
        assert torch.equal(x, expected[name]), name
    apart = load_policy(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu", merge=False)
    assert lora_of(apart.model) == lora_of(policy.model)
    assert apart.path == str(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(hidden(apart.model), hidden(policy.model))
