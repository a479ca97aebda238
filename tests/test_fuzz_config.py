"""Configs and overrides that nobody wrote on purpose: a Config, or a ValueError, and nothing else."""

import random
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1fast.config import Config, config_of, load_config, stage_config, to_dict

DEMO = (Path(__file__).parent.parent / "configs/demo.toml").read_text()
KEYS = ["seed", "output_dir", "stages"] + [
    f"{section.name}.{key.name}"
    for section in fields(Config)
    if is_dataclass(getattr(Config(), section.name))
    for key in fields(getattr(Config(), section.name))
]
SECTIONS = sorted({key.partition(".")[0] for key in KEYS})
scalars = st.one_of(
    st.integers(-(2**80), 2**80), st.integers(-3, 3), st.floats(), st.booleans(), st.text(max_size=6),
    st.sampled_from([10**400, -(10**400), 2**63, float("nan"), "auto", "all", "1-0", "٣", "{prompt}", "\ud800"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3),
    max_leaves=6,
)


def accepted(build) -> Config | None:
    """What `build` makes; None where it raises a ValueError that says something."""
    try:
        config = build()
    except ValueError:
        return None
    assert isinstance(config, Config)
    for stage in config.stages:
        stage_config(config, stage)
    assert config_of(to_dict(config)) == config
    return config


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(KEYS), values), min_size=1, max_size=3))
def test_any_value_of_any_key(items):
    nested: dict = {}
    for key, value in items:
        section, _, name = key.rpartition(".")
        table = nested.setdefault(section, {}) if section else nested
        if isinstance(table, dict):
            table[name] = value
    accepted(lambda: config_of(nested))


@settings(max_examples=80)
@given(st.dictionaries(st.sampled_from([*SECTIONS, "x", "", "grpo.kl_coef"]), values, max_size=3))
def test_any_sections(nested):
    accepted(lambda: config_of(nested))


texts = st.one_of(
    st.text(max_size=12), st.sampled_from([
        "[" * 5000, "{a=" * 3000, "[1,", "1e999", "-inf", "nan", "0x" + "f" * 400, "9" * 5000, "1979-05-27",
        "1\nseed = 3", "'a'\n[grpo]", '"""', "\0", "\ud800", "true # no", "=", "x" * 100000,
    ]),
)  # fmt: skip


@settings(max_examples=200)
@given(st.one_of(st.sampled_from(KEYS), st.text(alphabet="grpo.-=[] \0é", max_size=9)), texts)
def test_any_override(key, text):
    accepted(lambda: load_config(None, [f"--{key}={text}"]))
    accepted(lambda: load_config(None, [f"{key}{text}"]))


def test_a_value_of_several_lines_sets_no_other_key():
    text = "3\nseed = 4"
    assert load_config(None, [f"--output_dir={text}"]).output_dir == text
    with pytest.raises(ValueError, match="seed must be a whole number"):
        load_config(None, [f"--seed={text}"])


@pytest.mark.parametrize("value", [10**400, -(10**400), 2**63, -(2**63)])
@pytest.mark.parametrize("key", ["optim.lr", "seed", "grpo.num_steps", "grpo.token_budget"])
def test_numbers_beyond_64_bits_are_named(key, value):
    section, _, name = key.rpartition(".")
    with pytest.raises(ValueError, match=f"{key} must fit in 64 bits"):
        config_of({section: {name: value}} if section else {name: value})


def test_mutated_files(tmp_path):
    """Bytes of a shipped config changed, cut, doubled: a Config or a ValueError."""
    rng, path, taken = random.Random(0), tmp_path / "c.toml", 0
    data = DEMO.encode()
    for _ in range(100):
        bad = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at, kind = rng.randrange(len(bad) - 9), rng.randrange(4)
            if kind == 0:
                bad[at] = rng.randrange(256)
            elif kind == 1:
                del bad[at : at + rng.randrange(60)]
            elif kind == 2:
                bad[at:at] = rng.choice(
                    [b"[", b"{", b"=", b'"""', b"\0", b"\xff", b"[[a]]\n", b"9" * 30]
                )
            else:
                bad[at:at] = bad[at : at + rng.randrange(9)]
            if len(bad) < 20:
                break
        path.write_bytes(bad)
        taken += accepted(lambda: load_config(path)) is not None
    assert 0 < taken < 100


@pytest.mark.parametrize("text", [
    "x = " + "[" * 100000, "x = " + "{a=" * 20000, "[" + "a." * 5000 + "b]", "a" * 100000, "\0", "\ud800",
])  # fmt: skip
def test_bombs(tmp_path, text):
    path = tmp_path / "c.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"not valid TOML|unknown config key|nested"):
        load_config(path)


def test_files_that_are_none(tmp_path):
    huge = tmp_path / "huge.toml"
    with huge.open("wb") as file:
        file.truncate(1 << 33)  # of zeros, which take no room
    with pytest.raises(ValueError, match="has 8589934592 bytes; a config has at most"):
        load_config(huge)
    for name in ("x" * 5000, "\0", str(tmp_path), "/dev/zero"):
        with pytest.raises(ValueError, match="does not exist"):
            load_config(name)
    nested: dict = {}
    for _ in range(100000):
        nested = {"grpo": nested}
    with pytest.raises(ValueError, match="nested"):
        config_of(nested)
    assert tomllib.loads(DEMO)
