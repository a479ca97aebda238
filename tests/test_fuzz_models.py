"""Folders of models, adapters and checkpoints that nobody wrote on purpose: loaded, or a ValueError; sizes before memory."""

import hashlib
import json
import math
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import SHAPE, tiny_model, tiny_policy, tiny_tokenizer

from r1fast.checkpoint import (
    _best,
    load_checkpoint,
    read_step,
    save_checkpoint,
    steps_in,
)
from r1fast.config import LoraConfig, OptimConfig
from r1fast.hf_folder import INDEX, MAX_JSON, read_json, read_tensors
from r1fast.lora import add_lora
from r1fast.model import ModelSpec, load_model, load_tokenizer, save_model
from r1fast.optim import Optimizer
from r1fast.peft_folder import load_adapter, save_adapter
from r1fast.policy import load_policy
from r1fast.reward_model import load_reward_model

JUNK = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "x",
    "",
    [],
    [1],
    {},
    {"a": 1},
    "qwen3",
    "3",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder that loads."""
    folder = tmp_path_factory.mktemp("model") / "whole"
    save_model(tiny_model(), folder, tokenizer=tiny_tokenizer(), eos_token_id=0)
    return folder


@pytest.fixture
def model(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def loads(load, folder) -> bool:
    """Whether it loads; a ValueError where it does not."""
    try:
        load(folder)
    except ValueError:
        return False
    return True


# ---- config.json


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from([
    *SHAPE, "model_type", "head_dim", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias",
    "tie_word_embeddings", "rms_norm_eps", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types",
    "quantization_config", "partial_rotary_factor", "architectures",
]), st.sampled_from(JUNK)), max_size=3), st.sampled_from(["qwen2", "qwen3", "llama"]))  # fmt: skip
def test_any_config_is_a_spec_or_refused(changes, kind):
    try:
        spec = ModelSpec.from_hf_config({**SHAPE, "model_type": kind, **dict(changes)})
    except ValueError:
        return
    json.dumps(spec.to_hf_config())
    assert 0 < spec.vocab_size < 2**31


@given(st.dictionaries(
    st.sampled_from(["rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "rope_theta", "partial_rotary_factor",
                     "original_max_position_embeddings"]),
    st.sampled_from([*JUNK, "llama3", "linear", "default", "yarn"]), max_size=5,
))  # fmt: skip
def test_any_rope_is_read_or_refused(rope):
    for key in ("rope_scaling", "rope_parameters"):
        try:
            ModelSpec.from_hf_config({**SHAPE, "model_type": "llama", key: rope})
        except ValueError:
            pass


@pytest.mark.parametrize(("key", "value"), [
    ("vocab_size", 2**31 - 1), ("hidden_size", 2**30), ("intermediate_size", 2**31 - 1), ("num_hidden_layers", 2**31 - 1),
    ("num_hidden_layers", 10**6), ("num_attention_heads", 2**30), ("head_dim", 2**30), ("num_hidden_layers", 10**12),
])  # fmt: skip
def test_sizes_that_the_weights_do_not_have_take_no_memory(model, key, value):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    for load in (load_model, load_reward_model):
        with pytest.raises(ValueError, match=r"do not fit|whole number|multiple"):
            load(model)


def test_mutated_json(model):
    rng, path = random.Random(0), model / "config.json"
    data = path.read_bytes()
    for _ in range(150):
        bad = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(bad) - 9)
            bad[at : at + rng.randrange(3)] = rng.choice(
                [b"", b"9", b'"', b"[", b"{", b"-", b"\xff", b"\0", b"NaN", b"null"]
            )
        path.write_bytes(bad)
        try:
            ModelSpec.from_hf_config(read_json(path))
        except ValueError:
            pass


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200000,
        '{"a":' * 100000,
        '{"vocab_size": ' + "9" * 5000 + "}",
        "[1]",
        "\ud800",
        "",
        "\0",
    ],
)
@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json"],
)
def test_json_bombs(model, text, name):
    (model / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="JSON"):
        read_json(model / name)
    if name == "tokenizer_config.json":
        with pytest.raises(ValueError, match="JSON"):
            load_tokenizer(model)
    elif name != "adapter_config.json":
        with pytest.raises(ValueError, match="JSON"):
            load_model(model)


def test_json_files_that_are_none(model):
    huge = model / "config.json"
    huge.unlink()
    with huge.open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(ValueError, match=f"at most {MAX_JSON} of JSON"):
        load_model(model)
    huge.unlink()
    os.mkfifo(huge)  # reading it would wait for ever
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(model)
    huge.unlink()
    huge.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(model)
    huge.unlink()
    huge.symlink_to("config.json")  # a circle
    with pytest.raises((ValueError, OSError), match=r"config\.json"):
        load_model(model)


# ---- safetensors


def header_of(raw: bytes) -> tuple[dict, bytes]:
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(header: dict | bytes, data: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def test_mutated_weights(model):
    rng, path = random.Random(0), model / "model.safetensors"
    raw, loaded = path.read_bytes(), 0
    (size,) = struct.unpack("<Q", raw[:8])
    for _ in range(60):
        bad = bytearray(raw)
        for _ in range(rng.randint(1, 2)):
            match rng.randrange(3):
                case 0:
                    bad[rng.randrange(8 + size)] = rng.randrange(256)
                case 1:
                    del bad[rng.randrange(len(bad)) :]
                case 2:
                    bad += bytes(rng.randrange(9))
            if len(bad) < 8 + size:
                break
        path.write_bytes(bad)
        loaded += loads(load_model, model)
    assert loaded < 60
    path.write_bytes(raw)
    assert loads(load_model, model)


def edit(header: dict, name: str, **changes) -> dict:
    return {**header, name: header[name] | changes}


NAME = "model.norm.weight"
WRONG = {
    "a length of the header beyond the file": lambda h, d: with_header(h, d, 2**63),
    "a length of all bits": lambda h, d: with_header(h, d, 2**64 - 1),
    "a length of nothing": lambda h, d: with_header(h, d, 0),
    "no header": lambda h, d: b"",
    "a deep header": lambda h, d: with_header(b"[" * 100000, d),
    "another dtype": lambda h, d: with_header(edit(h, NAME, dtype="I32"), d),
    "a dtype of another width": lambda h, d: with_header(edit(h, NAME, dtype="F64"), d),
    "no dtype": lambda h, d: with_header(edit(h, NAME, dtype="X9"), d),
    "another shape": lambda h, d: with_header(edit(h, NAME, shape=[16, 2]), d),
    "a shape that overflows": lambda h, d: with_header(edit(h, NAME, shape=[2**32, 2**32]), d),
    "a negative shape": lambda h, d: with_header(edit(h, NAME, shape=[-32]), d),
    "a huge shape": lambda h, d: with_header(edit(h, NAME, shape=[2**40]), d),
    "offsets that overlap": lambda h, d: with_header(edit(h, NAME, data_offsets=[0, 128]), d),
    "offsets the wrong way round": lambda h, d: with_header(edit(h, NAME, data_offsets=[128, 0]), d),
    "offsets beyond the file": lambda h, d: with_header(edit(h, NAME, data_offsets=[2**40, 2**40 + 128]), d),
    "a name that escapes": lambda h, d: with_header({**h, "../../x": h[NAME]}, d),
    "fewer bytes": lambda h, d: with_header(h, d[:-4]),
    "not finite": lambda h, d: with_header(h, struct.pack("<f", float("nan")) * (len(d) // 4)),
    "a name less": lambda h, d: with_header({k: v for k, v in h.items() if k != NAME}, d),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_weights_are_refused(model, wrong):
    path = model / "model.safetensors"
    path.write_bytes(WRONG[wrong](*header_of(path.read_bytes())))
    with pytest.raises(ValueError, match=r"model"):
        load_model(model)


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.float64, torch.bfloat16],
)
def test_weights_of_any_dtype(model, dtype):
    tensors = {name: load().clone() for name, load, _ in read_tensors(model)}
    tensors[NAME] = tensors[NAME].to(dtype)
    save_file(tensors, model / "model.safetensors")
    taken = loads(load_model, model)
    assert taken == (dtype in (torch.float64, torch.bfloat16, torch.float8_e4m3fn))


@pytest.mark.parametrize("shard", [
    "../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "x.bin", "\0.safetensors", "model\\x.safetensors", "/dev/zero",
    "missing.safetensors", "x" * 5000 + ".safetensors",
])  # fmt: skip
def test_an_index_names_files_of_its_folder_alone(model, shard):
    shutil.copy(model / "model.safetensors", model.parent / "secret.safetensors")
    (model / "model.safetensors").rename(model / "one.safetensors")
    names = [name for name, _, _ in read_tensors(model, "one.safetensors")]
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises((ValueError, OSError), match=r"weight_map|not in|too long"):
        load_model(model)


@given(
    st.one_of(
        st.sampled_from(JUNK),
        st.dictionaries(st.text(max_size=3), st.sampled_from(JUNK), max_size=3),
    )
)
def test_any_index(tmp_path_factory, weight_map):
    folder = tmp_path_factory.getbasetemp() / "index"
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    try:
        assert list(read_tensors(folder)) == []
    except ValueError:
        pass


def test_links_are_followed_to_files_and_to_nothing_else(model):
    """As in the cache of huggingface_hub, whose folders are links."""
    path = model / "model.safetensors"
    path.rename(model.parent / "blob")
    path.symlink_to("../blob")
    assert loads(load_model, model)
    for target in ("/dev/zero", "model.safetensors", "/nowhere", "."):
        path.unlink()
        path.symlink_to(target)
        with pytest.raises((ValueError, OSError)):
            load_model(model)


# ---- adapters, tokenizers


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from([
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "bias", "task_type", "init_lora_weights", "rank_pattern",
    "modules_to_save", "unknown", "layers_to_transform",
]), st.sampled_from([*JUNK, "(a", "all-linear", "(" * 500, "(?P<a>", ["q_proj"], "(.*)*" * 10 + "!", "([a-z_.0-9]+)+!"])), max_size=3))  # fmt: skip
def test_any_adapter_config(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "adapter"
    if not folder.exists():
        taught = tiny_model()
        add_lora(taught, LoraConfig(rank=2, targets=["q_proj"]))
        save_adapter(taught, folder)
        shutil.copy(folder / "adapter_config.json", folder / "kept.json")
    sound = json.loads((folder / "kept.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(sound | dict(changes)))
    loads(lambda path: load_adapter(tiny_model(), path), folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_mutated_tokenizers(model, name):
    rng, path = random.Random(name), model / name
    data = path.read_bytes()
    for i in range(25):
        bad = bytearray(data)
        at = rng.randrange(len(bad) - 9)
        if i % 3:
            bad[at : at + rng.randrange(1, 9)] = rng.choice(
                [b"", b"9", b'"', b"[", b"{}", b"\xff", b"null", b"-1"]
            )
        else:
            del bad[at:]
        path.write_bytes(bad)
        loads(load_tokenizer, model)


@pytest.mark.parametrize(("name", "text"), [
    ("tokenizer.json", "{}"), ("tokenizer.json", "[]"), ("tokenizer.json", ""), ("tokenizer.json", "[" * 100000),
    ("tokenizer.json", "null"), ("tokenizer_config.json", '{"tokenizer_class": 3}'),
    ("tokenizer_config.json", '{"tokenizer_class": "os.system"}'), ("tokenizer_config.json", '{"chat_template": 7}'),
    ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}'),
    ("tokenizer_config.json", '{"eos_token": {"a": 1}}'), ("tokenizer_config.json", '{"added_tokens_decoder": 3}'),
])  # fmt: skip
def test_tokenizers_that_are_none(model, name, text):
    (model / "evil.py").write_text("import os; os._exit(77)\n")
    (model / name).write_text(text)
    loads(load_tokenizer, model)


NOT_WHOLE = [v for v in JUNK if v is not None and not (type(v) in (int, float) and v >= 1)]


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_a_length_that_is_no_number_is_named(model, value):
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": value}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: 'model_max_length' must be"):
        load_tokenizer(model)


@pytest.mark.parametrize("value", [None, 5, 10**400, 1e30, math.inf, 10**30])
def test_a_length_without_a_bound_is_taken(model, value):
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": value}))
    assert load_tokenizer(model).encode("What is 1 + 1?")


@pytest.mark.parametrize("key", ["eos_token", "chat_template", "anything", "model_max_length"])
def test_half_a_surrogate_pair_is_met_when_it_is_read(model, key):
    """And not when the trained model is written."""
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: ["a\ud800"]}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds half a surrogate pair"):
        load_tokenizer(model)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", [v for v in JUNK if type(v) is not int or not 0 <= v < 97], ids=repr)  # fmt: skip
def test_an_end_token_is_one_of_the_model(whole, tmp_path, file, value):
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    tiny_policy().save(folder)
    size = len(tiny_tokenizer())
    path = folder / file
    for wrong in (value, [0, value]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": wrong}))
        if wrong in (None, [], [1]):
            assert load_policy(folder).eos_ids[0] == 0
            continue
        told = rf"'eos_token_id' of {file} must be token ids of the model \(0 to {size - 1}\), got"
        with pytest.raises(ValueError, match=told):
            load_policy(folder)


# ---- checkpoints


def forged(folder: Path, state: str, manifest=None) -> Path:
    """A checkpoint whose hashes are right."""
    folder.mkdir(parents=True, exist_ok=True)
    path = save_checkpoint(folder, 3, {"model": {"w": torch.ones(2)}}, {"a": 1}).absolute()
    raw = state.encode("utf-8", "surrogatepass")
    (path / "state.json").write_bytes(raw)
    described = json.loads((path / "manifest.json").read_text())
    described["files"]["state.json"] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (path / "manifest.json").write_text(
        json.dumps(described if manifest is None else manifest(described))
    )
    return folder


@pytest.mark.parametrize(
    "state", ["[1]", "null", "3", '"x"', "[" * 200000, '{"a":' * 100000, "{", "", "\ud800", "NaN"]
)
def test_a_state_that_is_no_object(tmp_path, state):
    for load in (load_checkpoint, lambda folder: read_step(folder, 3)):
        with pytest.raises(ValueError, match=r"state\.json"):
            load(forged(tmp_path / "c", state))


MANIFESTS = [
    lambda m: [], lambda m: None, lambda m: {}, lambda m: m | {"files": []}, lambda m: m | {"files": list(m["files"])},
    lambda m: m | {"files": None}, lambda m: m | {"files": dict.fromkeys(m["files"])}, lambda m: m | {"version": "2"},
    lambda m: m | {"version": [2]}, lambda m: m | {"step": "3"}, lambda m: m | {"step": None},
    lambda m: m | {"files": m["files"] | {"../../etc/passwd": {"size": 1, "sha256": ""}}},
    lambda m: m | {"files": {k: v | {"size": "1"} for k, v in m["files"].items()}},
    lambda m: m | {"files": {k: {} for k in m["files"]}}, lambda m: m | {"files": {k: [v] for k, v in m["files"].items()}},
    lambda m: m | {"files": {k: v | {"sha256": 7} for k, v in m["files"].items()}},
    lambda m: m | {"files": "state.json"}, lambda m: m | {"files": {}},
]  # fmt: skip


@pytest.mark.parametrize("i", range(len(MANIFESTS)))
def test_a_wrong_manifest(tmp_path, i):
    folder = forged(tmp_path / "c", "{}", MANIFESTS[i])
    with pytest.raises(ValueError, match="no checkpoint in"):
        load_checkpoint(folder)
    (folder / "step-000003/manifest.json").write_text("[" * 200000)
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read"):
        load_checkpoint(folder)


@pytest.mark.parametrize("measure", ["x", [], 3, {"metric": "m", "value": "x"}, {"metric": "m", "value": None},
                                     {"metric": ["m"], "value": 1}, {"metric": "m", "value": float("nan")}])  # fmt: skip
def test_a_measure_that_is_none_is_the_best_of_nothing(tmp_path, measure):
    save_checkpoint(tmp_path, 1, {}, {"measure": {"metric": "m", "value": 1}}, keep_last=5)
    save_checkpoint(tmp_path, 2, {}, {"measure": measure}, keep_last=5)
    assert _best(tmp_path, 2, "m") == tmp_path / "step-000001"
    assert len(steps_in(tmp_path)) == 2


def test_tensors_of_a_forged_checkpoint(tmp_path):
    path = forged(tmp_path, "{}") / "step-000003"
    raw = b"\xff" * 64
    (path / "model.safetensors").write_bytes(raw)
    described = json.loads((path / "manifest.json").read_text())
    described["files"]["model.safetensors"] = {
        "size": 64,
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    (path / "manifest.json").write_text(json.dumps(described))
    checkpoint = load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        checkpoint.tensors("model")
    for name in ("../x", "", "optimizer", "/etc/passwd"):
        with pytest.raises(ValueError, match="holds no"):
            checkpoint.tensors(name)


def test_an_optimizer_state_of_other_shapes_is_refused_whole():
    """A moment of one number would be spread over all of them."""
    module = tiny_model()
    optimizer = Optimizer(module.named_parameters(), OptimConfig())
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.adamw.step()
    sound = optimizer.state_tensors()
    key = next(k for k in sound if k.startswith("exp_avg."))
    for wrong in ({key: torch.ones(1)}, {key: torch.ones(3, 5)}):
        with pytest.raises(ValueError, match="the optimizer state has"):
            optimizer.load_state_tensors(sound | wrong)
    with pytest.raises(ValueError, match="nothing"):
        optimizer.load_state_tensors({k: v for k, v in sound.items() if k != key})
    assert optimizer.adamw.state
    optimizer.load_state_tensors(sound)
