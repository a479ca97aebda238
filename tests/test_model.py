"""Decoder against transformers, one sequence at a time, without a cache and without a mask."""

import json
import os
from fnmatch import fnmatch

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from r1fast import hf_folder
from r1fast.kernels.attention import PackedAttention, varlen_attention_ref
from r1fast.kernels.rope import rotate_ref
from r1fast.model import (
    Decoder,
    ModelSpec,
    load_model,
    load_tokenizer,
    resolve_model_path,
    rope_frequencies,
    save_model,
)

LENGTHS = [7, 150, 1, 33]
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,  # with factor and 32 below, all three wavelength ranges occur
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {  # transformers' config class and its arguments
    "qwen2 tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2Config", {"rms_norm_eps": 1e-3}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 biased": ("Qwen3Config", {"head_dim": 12, "attention_bias": True}),
    "llama": ("LlamaConfig", {}),
    "llama biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "linear rope": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "large theta": ("Qwen2Config", {"rope_parameters": {"rope_theta": 1e6}}),
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def make_theirs(transformers, family: str):
    """A transformers model with weights large enough for every part to move the logits."""
    kind, kwargs = FAMILIES[family]
    config = getattr(transformers, kind)(**SHAPE | kwargs)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.2 if p.ndim == 2 else 0.5, generator=generator)
            if name.endswith("norm.weight"):
                p.add_(1)
    return model.float().eval()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, transformers, tmp_path_factory):
    """(their model, ours loaded from the folder theirs wrote, that folder)"""
    theirs = make_theirs(transformers, request.param)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder), folder


def make_batch(lengths=LENGTHS):
    """input_ids, position_ids and cu_seqlens of a packed batch."""
    input_ids = torch.randint(97, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return input_ids, position_ids, cu_seqlens


def our_logits(model: Decoder, lengths=LENGTHS) -> torch.Tensor:
    input_ids, position_ids, cu_seqlens = make_batch(lengths)
    hidden = model(input_ids, position_ids, PackedAttention(cu_seqlens, max(lengths)))
    return hidden @ model.head_weight.T


def their_logits(model, lengths=LENGTHS) -> torch.Tensor:
    # sequence by sequence: transformers' packed batches are only right under conditions
    sequences = make_batch(lengths)[0].split(lengths)
    return torch.cat([model(ids[None], use_cache=False).logits[0] for ids in sequences])


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def their_grads(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def our_grads(model: Decoder) -> dict[str, torch.Tensor]:
    """Gradients under Hugging Face's names: a decoder whose weights are the gradients."""
    named = Decoder(model.spec)
    with torch.no_grad():
        for target, source in zip(named.parameters(), model.parameters(), strict=True):
            target.copy_(source.grad)
    return named.hf_tensors()


def test_logits_and_gradients_equal_transformers(pair):
    theirs, ours, _ = pair
    logits = {"theirs": their_logits(theirs), "ours": our_logits(ours)}
    assert relative_error(logits["ours"], logits["theirs"]) < 1e-5

    targets = torch.randint(97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
    for model, name in ((theirs, "theirs"), (ours, "ours")):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[name], targets).backward()
    expected, actual = their_grads(theirs), our_grads(ours)
    assert set(actual) == set(expected)
    largest = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():  # a key bias has no gradient but noise: the floor
        error = (actual[name] - grad).abs().max()
        assert error <= 2e-5 * grad.abs().max() + 1e-7 * largest, (name, error)


def test_save_is_read_by_transformers_and_bit_equal(pair, transformers, tmp_path):
    theirs, ours, folder = pair
    save_model(ours, tmp_path / "saved", eos_token_id=[3, 5])
    again = load_model(tmp_path / "saved")
    assert again.spec == ours.spec
    for (name, p), q in zip(ours.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    source, saved = (
        {name: load() for name, load, _ in hf_folder.read_tensors(path)}
        for path in (folder, tmp_path / "saved")
    )
    assert set(saved) == set(source)
    assert all(torch.equal(saved[name], source[name]) for name in source)

    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager"
    )
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == [3, 5]
    assert loaded.dtype == torch.float32
    assert relative_error(their_logits(loaded), their_logits(theirs)) < 1e-5


def test_older_rope_spelling_reads_the_same(pair):
    _, ours, folder = pair
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope["type"] == "default" else rope
    assert ModelSpec.from_hf_config(config) == ours.spec
    assert ModelSpec.from_hf_config(ours.spec.to_hf_config()) == ours.spec


def tiny_spec(**changes) -> ModelSpec:
    config = {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True} | SHAPE
    return ModelSpec.from_hf_config(config | changes)


def test_bfloat16_round_trip_in_shards(tmp_path):
    model = Decoder(tiny_spec(tie_word_embeddings=False), dtype="bfloat16", seed=0)
    save_model(model, tmp_path / "m", max_shard_bytes=20_000)
    shards = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 2
    sizes = [sum(x.nbytes for x in load_file(tmp_path / "m" / name).values()) for name in shards]
    assert max(sizes) <= 20_000
    for dtype in ("bfloat16", torch.bfloat16, "float32"):
        again = load_model(tmp_path / "m", dtype=dtype)
        for (name, p), q in zip(model.named_parameters(), again.named_parameters(), strict=True):
            assert torch.equal(p.to(q[1].dtype), q[1]), name
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_bfloat16_logits_are_near_float32():
    exact = Decoder(tiny_spec(), seed=0)
    half = Decoder(tiny_spec(), dtype=torch.bfloat16, seed=0)
    half.load_state_dict(exact.state_dict())
    error = relative_error(our_logits(half).float(), our_logits(exact))
    assert error < 0.05


def test_config_keys_of_the_source_are_kept(tmp_path):
    save_model(Decoder(tiny_spec(), seed=0), tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    extra = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3, "torch_dtype": "half"}
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    (tmp_path / "a" / "generation_config.json").write_text('{"temperature": 0.6}')
    save_model(load_model(tmp_path / "a", dtype="bfloat16"), tmp_path / "b", pad_token_id=4)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 4)
    assert config["initializer_range"] == 0.3
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config
    generation = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert generation == {"temperature": 0.6, "pad_token_id": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "'mixtral'; supported: qwen2, qwen3, llama"),
        ({"model_type": None}, "None; supported: qwen2"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "sliding-window"),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"]}, "sliding-window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "'yarn'; supported: default, linear"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4}}, "no 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "gelu"}, "'gelu'; supported: silu"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"num_key_value_heads": 4}, "num_heads=6 is not a multiple of num_kv_heads=4"),
    ],
)
def test_unsupported_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_spec(**change)


def test_sliding_window_keys_that_change_nothing_are_accepted():
    for change in (
        {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    ):
        assert tiny_spec(**change) == tiny_spec()


def test_weights_that_do_not_fit_are_named(tmp_path):
    save_model(Decoder(tiny_spec(), seed=0), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.rotary_emb.inv_freq"] = torch.ones(2)  # old files have it: no error
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied: nor this
    save_file(tensors, file)
    load_model(tmp_path / "m")

    tensors["extra.weight"] = tensors.pop("model.norm.weight")
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.ones(3, 48)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="do not fit") as error:
        load_model(tmp_path / "m")
    assert "missing: model.norm.weight" in str(error.value)
    assert "unexpected: extra.weight" in str(error.value)
    assert "wrong shape: model.layers.1.self_attn.k_proj.weight (3, 48), not (32, 48)" in str(
        error.value
    )


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_spec().to_hf_config()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match="pickles"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_model(tmp_path)
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names 'model-00001-of-00002"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="unknown dtype 'int8'; known: float32"):
        Decoder(tiny_spec(), dtype="int8")


def test_resolve_model_path(tmp_path, monkeypatch):
    assert resolve_model_path(tmp_path) == tmp_path
    for name in ("./nowhere", "/nowhere/at/all", "a/b/c", ""):
        with pytest.raises(ValueError, match="no such model folder"):
            resolve_model_path(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        resolve_model_path(tmp_path / "file")

    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def snapshot_download(name, **kwargs):
        asked.update(kwargs, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model_path("Qwen/Qwen3-0.6B") == tmp_path
    assert asked["name"] == "Qwen/Qwen3-0.6B"
    for wanted in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json"):
        assert any(fnmatch(wanted, pattern) for pattern in asked["allow_patterns"])
    for unwanted in ("pytorch_model.bin", "original/consolidated.00.pth", "modeling_qwen.py"):
        assert not any(fnmatch(unwanted, pattern) for pattern in asked["allow_patterns"])

    def fail(name, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="could not be fetched from the Hugging Face Hub"):
        resolve_model_path("Qwen/Qwen3-0.6B")


def test_save_replaces_a_model_whole_or_not_at_all(tmp_path, monkeypatch):
    old, new = Decoder(tiny_spec(), seed=0), Decoder(tiny_spec(), seed=1)
    target = tmp_path / "m"
    save_model(old, target)
    save_model(new, target)
    assert torch.equal(load_model(target).embed.weight, new.embed.weight)
    assert os.listdir(tmp_path) == ["m"]

    class BadTokenizer:
        def save_pretrained(self, folder):
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        save_model(old, target, tokenizer=BadTokenizer())
    assert torch.equal(load_model(target).embed.weight, new.embed.weight)
    assert os.listdir(tmp_path) == ["m"]

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not a model folder; not overwritten"):
        save_model(old, tmp_path / "notes")
    assert (tmp_path / "notes" / "thesis.tex").read_text() == "years of work"


def test_tokenizer_travels_with_the_model(transformers, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>")
    raw = tokenizers.Tokenizer(words)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    save_model(Decoder(tiny_spec(), seed=0), tmp_path / "m", tokenizer=tokenizer)
    assert load_tokenizer(tmp_path / "m").encode("two one three") == [2, 1, 0]


def test_random_weights_repeat_and_leave_the_global_rng_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = Decoder(tiny_spec(tie_word_embeddings=False), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    same = Decoder(tiny_spec(tie_word_embeddings=False), seed=3)
    other = Decoder(tiny_spec(tie_word_embeddings=False), seed=4)
    for (name, p), q in zip(model.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not torch.equal(model.embed.weight, other.embed.weight)
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.layers[0].down.weight.std().item() == pytest.approx(0.01, rel=0.1)  # 2 layers
    biased = Decoder(tiny_spec(model_type="qwen2"), seed=0)
    assert (biased.layers[0].qkv.bias == 0).all()


def test_num_parameters_and_the_tied_head():
    tied, untied = (Decoder(tiny_spec(tie_word_embeddings=tie), seed=0) for tie in (True, False))
    assert tied.head_weight is tied.embed.weight
    assert untied.head_weight is untied.lm_head.weight
    assert untied.num_parameters() - tied.num_parameters() == 97 * 48
    assert tied.num_parameters() == sum(x.numel() for x in tied.hf_tensors().values())


def test_attend_gets_each_layer_after_norm_and_rope():
    model = Decoder(tiny_spec(), seed=0)
    input_ids, position_ids, cu_seqlens = make_batch()
    seen = []

    def attend(layer, q, k, v):
        seen.append((layer, q.shape, k.shape, v.shape))
        # qk-norm with unit weights leaves unit rms, which a rotation keeps
        torch.testing.assert_close(q.square().mean(-1), torch.ones(q.shape[:2]), rtol=0, atol=2e-2)
        return varlen_attention_ref(q, k, v, cu_seqlens, max(LENGTHS))

    model(input_ids, position_ids, attend)
    T = sum(LENGTHS)
    shapes = (T, 6, 16), (T, 2, 16), (T, 2, 16)
    assert seen == [(0, *shapes), (1, *shapes)]


def test_rope_table_grows_and_does_not_depend_on_what_it_saw():
    spec = tiny_spec()
    fresh, grown = Decoder(spec).rope, Decoder(spec).rope
    for top in (1, 3, 100):
        grown(torch.arange(top))
    positions = torch.tensor([0, 700, 5, 1023])
    rotations = grown(positions)
    assert torch.equal(rotations, fresh(positions))
    assert rotations.shape == (4, 32)

    # a rotation: the dot product of two tokens depends on their distance alone
    x, y = torch.randn(2, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dots = []
    for p in (0, 40):
        at = fresh(torch.tensor([p + 3, p])).double()
        dots.append((rotate_ref(x, at[:1]) * rotate_ref(y, at[1:])).sum())
    torch.testing.assert_close(dots[0], dots[1], rtol=1e-4, atol=1e-4)


def test_llama3_rope_of_the_test_has_all_three_ranges():
    rope = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    plain, scaled = (
        rope_frequencies(tiny_spec(rope_theta=500.0, rope_scaling=scaling))
        for scaling in (None, rope)
    )
    ratio = scaled / plain
    assert ratio[0] == 1  # short wavelengths are kept
    assert ratio[-1] == pytest.approx(1 / 8)  # long ones are stretched
    assert ((ratio > 0.13) & (ratio < 0.99)).any()  # and some lie between


def test_a_full_disk_is_an_os_error_and_weights_have_a_usual_mode(tmp_path, monkeypatch):
    hf_folder.write_tensors(tmp_path, {"x": torch.ones(2)}, 1 << 20)
    (tmp_path / "other").touch()
    modes = {(tmp_path / n).stat().st_mode for n in ("model.safetensors", "other")}
    assert len(modes) == 1

    def full(*args, **kwargs):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"could not write .*model\.safetensors: No space"):
        hf_folder.write_tensors(tmp_path, {"x": torch.ones(2)}, 1 << 20)


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "accounting.json"
    hf_folder.write_json(path, {"kept": 1})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("full")))
        hf_folder.write_json(path, {"kept": 2})
    assert hf_folder.read_json(path) == {"kept": 1}
    assert list(tmp_path.iterdir()) == [path]
    for text in ('{"kept": ', "[1]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"accounting\.json (is not valid JSON|must hold)"):
            hf_folder.read_json(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "32"}, "'hidden_size' must be a whole number above 0, got '32'"),
        ({"num_hidden_layers": 2.5}, "'num_hidden_layers' must be a whole number above 0, got 2.5"),
        ({"vocab_size": -4}, "'vocab_size' must be a whole number above 0, got -4"),
        ({"num_attention_heads": 0}, "'num_attention_heads' must be a whole number above 0"),
        ({"head_dim": "8"}, "'head_dim' must be a whole number above 0, got '8'"),
        ({"max_position_embeddings": [1]}, "'max_position_embeddings' must be a whole number"),
        ({"rms_norm_eps": "1e-6"}, "'rms_norm_eps' must be a number above 0, got '1e-6'"),
        ({"rope_theta": "x"}, "'rope_theta' must be a number above 0"),
        ({"rope_scaling": 3}, "'rope_scaling' must be an object, got 3"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "'factor' must be a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "'factor' must be a number above 0"),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": -1}}, "'factor' must be a number above 0"),
        ({"rope_scaling": {"type": ["x"]}}, "unsupported rope type"),
    ],
)
def test_a_config_of_wrong_types_names_the_key(tmp_path, change, message):
    config = SHAPE | {"model_type": "llama"} | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*{message}"):
        load_model(tmp_path)


def test_weights_that_are_no_numbers_name_the_tensor(tmp_path):
    spec = ModelSpec.from_hf_config(SHAPE | {"model_type": "llama"})
    save_model(Decoder(spec, seed=0), tmp_path / "m")
    file, name = tmp_path / "m" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    good = load_file(file)
    nan, infinite = good[name].clone(), good[name].clone()
    nan[3, 4], infinite[0, 0] = float("nan"), float("inf")
    for bad, message in (
        (nan, "not finite"),
        (infinite, "not finite"),
        (nan.to(torch.int32), "floats"),
    ):
        save_file(good | {name: bad}, file)
        with pytest.raises(ValueError, match=rf"{name}.*{message}"):
            load_model(tmp_path / "m")
    file.rename(tmp_path / "m" / "a.safetensors")
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {"x": 3}}'):
        (tmp_path / "m" / hf_folder.INDEX).write_text(text)
        with pytest.raises(ValueError, match=r"index\.json: 'weight_map' must be"):
            load_model(tmp_path / "m")
