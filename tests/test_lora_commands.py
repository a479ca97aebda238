"""LoRA from the command line: train, merge, sample, and in a pipeline."""

import json

import pytest
import torch
from test_pipeline import pipeline, short_sums  # noqa: F401 (a fixture)
from tiny import CONFIG as TINY
from tiny import tiny_checkpoint

from r1fast.__main__ import main
from r1fast.checkpoint import load_checkpoint
from r1fast.jsonl import write_jsonl
from r1fast.model import load_model
from r1fast.peft_folder import load_adapter


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base model, and a run that trained an adapter on it."""
    folder = tmp_path_factory.mktemp("lora")
    tiny_checkpoint(folder / "base")
    examples = [{"prompt": f"What is {i} + 1?", "completion": f" {i + 1}."} for i in range(8)]
    write_jsonl(folder / "examples.jsonl", examples)
    (folder / "c.toml").write_text("[lora]\nrank = 4\nalpha = 8\n")
    words = ["sft", folder / "c.toml", *TINY, f"--model.path={folder / 'base'}",
             f"--data.sft={folder / 'examples.jsonl'}", f"--output_dir={folder / 'run'}"]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    return folder


def weights(folder):
    return load_model(folder).hf_tensors()


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_merge_gives_the_model_that_the_run_has_saved(trained, tmp_path, capsys):
    words = ["merge", str(trained / "base"), f"--adapter={trained / 'run' / 'adapter'}"]
    assert main([*words, f"--out={tmp_path / 'm'}", "--model.device=cpu"]) == 0
    assert "float32" in capsys.readouterr().out
    assert_equal(weights(tmp_path / "m"), weights(trained / "run" / "model"))
    assert (tmp_path / "m" / "tokenizer.json").is_file()
    half = [f"--out={tmp_path / 'half'}", "--model.device=cpu", "--model.dtype=bfloat16"]
    assert main([*words, *half]) == 0
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    # in the type that the model is stored in, unless another is asked for
    words[1] = str(tmp_path / "half")
    assert main([*words, f"--out={tmp_path / 'again'}", "--model.device=cpu"]) == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_merge_refuses(trained, tmp_path, capsys):
    base, adapter = str(trained / "base"), f"--adapter={trained / 'run' / 'adapter'}"
    for words, message in (
        ([base], "merge needs --adapter FOLDER"),
        ([base, adapter], "merge needs --adapter FOLDER"),
        ([base, adapter, f"--out={base}"], "exists; not overwritten"),
        ([base, f"--adapter={base}", f"--out={tmp_path / 'x'}"], "no adapter_config.json"),
        ([], "r1fast merge takes a config file or a model, got 0"),
    ):
        assert main(["merge", *words, "--model.device=cpu"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_commands_take_the_adapter(trained, capsys):
    """`generate` with model.adapter says what the merged model says."""
    texts = []
    adapter = f"--model.adapter={trained / 'run' / 'adapter'}"
    for words in ([trained / "base", adapter], [trained / "run" / "model"], [trained / "base"]):
        line = ["generate", *words, "--prompt=What is 3 + 1?", "--max-tokens=8", "--json",
                "--temperature=1", "--template.name=raw", "--model.device=cpu"]  # fmt: skip
        assert main([str(word) for word in line]) == 0
        texts.append(json.loads(capsys.readouterr().out.splitlines()[-1])["logprobs"])
    assert texts[0] == texts[1] != texts[2]


def test_sft_goes_on_from_an_adapter(trained, tmp_path, capsys):
    config = [str(trained / "c.toml"), *TINY, f"--model.path={trained / 'base'}"]
    adapter = f"--model.adapter={trained / 'run' / 'adapter'}"
    data = [f"--data.sft={trained / 'examples.jsonl'}", "--sft.max_steps=1"]
    assert main(["sft", *config, adapter, *data, f"--output_dir={tmp_path / 'more'}"]) == 0
    model = load_model(trained / "base")
    load_adapter(model, tmp_path / "more" / "adapter")
    assert main(["sft", *config, adapter, *data, "--lora.rank=2", f"--output_dir={tmp_path}"]) == 2
    assert "lora.rank = 4" in capsys.readouterr().err
    # without lora.rank the adapter is merged and all weights are trained
    full = ["--lora.rank=0", f"--output_dir={tmp_path / 'full'}"]
    assert main(["sft", *config, adapter, *data, *full]) == 0
    names = load_checkpoint(tmp_path / "full" / "checkpoints").tensors("model")
    assert "embed.weight" in names
    assert not (tmp_path / "full" / "adapter").exists()


def test_stages_of_a_pipeline_train_adapters(tmp_path):
    """Each on the merged model of the one before; a base from scratch is trained as a whole."""
    words = ['--pipeline.stages=["base","r1_zero"]', "--stages.base.sft.max_steps=3"]
    with pytest.raises(ValueError, match=r"model.adapter is of one model"):
        pipeline(tmp_path, *words, "--model.adapter=x")
    pipeline(tmp_path, *words, "--lora.rank=4").run()
    assert not (tmp_path / "base" / "adapter").exists()
    model = load_model(tmp_path / "base" / "model")
    load_adapter(model, tmp_path / "r1_zero" / "adapter")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert load_checkpoint(tmp_path / "r1_zero" / "checkpoints").tensors("model").keys() == trained
    # another rank is another stage, but for the base
    with pytest.raises(ValueError, match=r"stage r1_zero was run with other values:\n  lora.rank"):
        pipeline(tmp_path, *words, "--lora.rank=8").run()
