"""Any checkpoint as a plain model folder."""

import json
import shutil

import pytest
import torch
from tiny import TokenScorer, tiny_checkpoint, tiny_config, tiny_problems

from r1fast.__main__ import main
from r1fast.checkpoint import load_checkpoint
from r1fast.hf_folder import read_tensors
from r1fast.policy import policy_of
from r1fast.reward_model import PreferencePair, load_reward_model
from r1fast.reward_training import RewardPolicy, RewardTrainer
from r1fast.trainer import GRPOTrainer

LORA = ("--lora.rank=2", "--lora.alpha=4")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "model")


def train(base, folder, *overrides) -> GRPOTrainer:
    config = tiny_config(
        f"--model.path={base}", "--checkpoint.every_steps=1", "--checkpoint.keep_last=4",
        "--grpo.num_steps=3", *overrides,
    )  # fmt: skip
    trainer = GRPOTrainer(policy_of(config), config, folder, tiny_problems(), TokenScorer())
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(base, folder)
    return folder


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "adapted"
    train(base, folder, *LORA)
    return folder


def tensors(folder, file: str = "") -> dict[str, torch.Tensor]:
    return {name: load().clone() for name, load, _ in read_tensors(folder, file)}


def same(a, b, file: str = "") -> bool:
    a, b = tensors(a, file), tensors(b, file)
    return a.keys() == b.keys() and all(torch.equal(x, b[n]) for n, x in a.items())


def test_the_newest_is_what_the_run_has_saved(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    assert "step-000003: model in" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {p.name for p in (run / "model").iterdir()}
    for path in (run / "model").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert main(["export", str(run), str(out)]) == 2
    assert "exists; not overwritten" in capsys.readouterr().err


def test_an_older_one_by_path_and_by_number(run, tmp_path):
    step = run / "checkpoints" / "step-000001"
    assert main(["export", str(step), str(tmp_path / "a")]) == 0
    assert main(["export", str(run), str(tmp_path / "b"), "--step", "1"]) == 0
    assert same(tmp_path / "a", tmp_path / "b")
    assert not same(tmp_path / "a", run / "model")
    saved = load_checkpoint(run / "checkpoints", up_to=1).tensors("model")
    assert torch.equal(tensors(tmp_path / "a")["model.norm.weight"], saved["norm.weight"])


def test_the_best(run, tmp_path):
    folder = run / "checkpoints"
    best = (folder / "best").read_text().strip()
    measures = {p.name: json.loads((p / "state.json").read_text())["measure"]["value"]
                for p in folder.glob("step-*")}  # fmt: skip
    assert measures[best] == max(measures.values())
    assert main(["export", str(run), str(tmp_path / "a"), "--step", "best"]) == 0
    assert main(["export", str(folder / best), str(tmp_path / "b")]) == 0
    assert same(tmp_path / "a", tmp_path / "b")


def test_another_type(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "a"), "--model.dtype=bfloat16"]) == 0
    whole = tensors(run / "model")
    assert all(torch.equal(x, whole[n].bfloat16()) for n, x in tensors(tmp_path / "a").items())
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"


def test_adapters_merged_or_alone(adapted, tmp_path):
    assert main(["export", str(adapted), str(tmp_path / "a")]) == 0
    assert same(tmp_path / "a", adapted / "model")
    assert main(["export", str(adapted), str(tmp_path / "b"), "--adapter-only"]) == 0
    file = "adapter_model.safetensors"
    assert same(tmp_path / "b", adapted / "adapter", file)
    assert (tmp_path / "b/adapter_config.json").read_text() == (
        adapted / "adapter/adapter_config.json"
    ).read_text()
    assert main(["export", str(adapted), str(tmp_path / "c"), "--step=1"]) == 0
    assert not same(tmp_path / "c", adapted / "model")


def test_a_base_that_is_gone(run, adapted, tmp_path, capsys):
    other = tiny_checkpoint(tmp_path / "other", seed=5)
    for name, source in (("whole", run), ("adapted", adapted)):
        shutil.copytree(source, tmp_path / name)
        for state in (tmp_path / name).glob("checkpoints/*/state.json"):
            value = json.loads(state.read_text())
            value["starts_from"] = value["base_path"] = "/nowhere/model"
            state.write_text(json.dumps(value))
            manifest = state.with_name("manifest.json")
            from r1fast.checkpoint import _write

            listed = json.loads(manifest.read_text())
            listed["files"]["state.json"] = _write(state, [state.read_bytes()])
            manifest.write_text(json.dumps(listed))
    # of a whole model the run's own folder has all that is needed; frozen weights must be the right ones
    assert main(["export", str(tmp_path / "whole"), str(tmp_path / "a")]) == 0
    assert same(tmp_path / "a", run / "model")
    assert main(["export", str(tmp_path / "adapted"), str(tmp_path / "b")]) == 2
    assert "no such model folder: '/nowhere/model'" in capsys.readouterr().err
    words = ["export", str(tmp_path / "adapted"), str(tmp_path / "b"), f"--model.path={other}"]
    assert main(words) == 2
    assert "were trained on other weights" in capsys.readouterr().err
    small = tiny_checkpoint(tmp_path / "small", hidden_size=16)
    words = ["export", str(run), str(tmp_path / "b"), f"--model.path={small}"]
    assert main(words) == 2
    assert "do not fit" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}"], "takes two folders: r1fast export RUN|CHECKPOINT OUT"),
        (["{run}", "{out}", "x"], "takes two folders, RUN or CHECKPOINT and OUT, got 3"),
        (["{run}/absent", "{out}"], "no such folder"),
        (["{run}/model", "{out}"], "holds no checkpoints"),
        (["{run}/..", "{out}"], "whole"),
        (["{run}", "{out}", "--step=9"], "no checkpoint of step 9; steps: 1, 2, 3"),
        (["{run}", "{out}", "--step=x"], "--step must be a whole number or best, got 'x'"),
        (["{run}/checkpoints/step-000001", "{out}", "--step=2"], "of step 1, and --step asks for 2"),
        (["{run}/checkpoints/step-000001", "{out}", "--step=best"], "and --step asks for best"),
        (["{run}", "{run}/checkpoints/out"], "would lie among the checkpoints in"),
        (["{run}", "{run}/checkpoints/step-000004"], "would lie among the checkpoints in"),
        (["{run}", "{run}/checkpoints/step-000002/a/b"], "where its run writes and removes: name a folder outside"),
        (["{run}", "{out}", "--adapter-only"], "has no adapters"),
        (["{run}", "{out}", "--model.dtype=int8"], "model.dtype must be"),
        (["{run}", "{out}", "--grpo.kl_coef=0"], "no part of an export"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported(run, tmp_path, words, message, capsys):
    assert main(["export", *(w.format(run=run, out=tmp_path / "out") for w in words)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert len(list((run / "checkpoints").iterdir())) == 5  # three steps, latest and best


def test_leading_zeros_are_of_no_matter(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "a"), "--step=002"]) == 0
    step = run / "checkpoints" / "step-000002"
    assert main(["export", str(step), str(tmp_path / "b"), "--step", "02"]) == 0
    assert same(tmp_path / "a", tmp_path / "b")


def test_a_pointer_that_points_nowhere(run, tmp_path, capsys):
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    for text, told in (("../../x\n", "must name a step folder, got '../../x'"), ("", "got ''"),
                       ("step-000009\n", "has no checkpoint of step 000009; steps: 1, 2, 3")):  # fmt: skip
        (tmp_path / "checkpoints" / "best").write_text(text)
        assert main(["export", str(tmp_path), str(tmp_path / "a"), "--step=best"]) == 2
        assert told in capsys.readouterr().err


def test_a_damaged_one_is_refused(run, tmp_path, capsys):
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "step-000003"
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (path / "model.safetensors").write_bytes(data)
    assert main(["export", str(path), str(tmp_path / "a")]) == 2
    assert "step-000003 is damaged: the content of model.safetensors" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "a")]) == 0  # the one before, and says so
    told = capsys.readouterr()
    assert "step-000003 IS DAMAGED" in told.err
    assert "step-000002: model in" in told.out


def test_a_reward_model(base, tmp_path):
    config = tiny_config("--sft.max_steps=2", "--sft.batch_size=2", "--checkpoint.every_steps=1")
    policy = policy_of(tiny_config(f"--model.path={base}"))
    pairs = [PreferencePair([1, 2], [3, 4], [5]), PreferencePair([1], [6], [7, 8])]
    trainer = RewardTrainer(
        RewardPolicy(load_reward_model(base), policy.tokenizer, base), config, tmp_path / "r", pairs
    )
    trainer.run()
    assert main(["export", str(tmp_path / "r"), str(tmp_path / "out")]) == 0
    assert same(tmp_path / "out", tmp_path / "r" / "model")
