"""The whole recipe on a micro configuration: sums of two digits, a few steps a stage."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from r1fast import running_sum
from r1fast.config import load_config, stage_config
from r1fast.jsonl import read_jsonl, write_jsonl
from r1fast.metrics import read_metrics
from r1fast.pipeline import Pipeline, data_digests
from r1fast.recipe import RECIPE
from r1fast.trainer import GRPOTrainer

DEMO = Path(__file__).parent.parent / "configs" / "demo.toml"
MICRO = [
    "--model.device=cpu",
    "--data.max_train_problems=40",
    "--rollout.num_generations=4",
    "--rollout.max_completion_tokens=24",
    "--grpo.prompts_per_step=4",
    *(f"--stages.{name}.grpo.num_steps=2" for name in ("r1_zero", "rl_1", "rl_2", "small_rl")),
    "--stages.base.sft.max_steps=150",
    "--stages.base.sft.batch_size=48",
    "--stages.base.optim.warmup_steps=10",
    "--stages.small_base.sft.max_steps=3",
    "--stages.cold_start.sft.max_steps=40",
    "--stages.cold_start.optim.lr=0.004",
    "--stages.reward_models.sft.max_steps=2",
    "--stages.rl_2.rewards.preference_last_steps=1",
    "--sft.epochs=1",
    "--sft.batch_size=16",
    "--sample.num_problems=40",
    "--sample.num_samples=4",
    "--sample.min_language_share=0",
    "--cold_start.num_problems=40",
    "--cold_start.num_samples=4",
    "--eval.num_problems=3",
    "--eval.num_samples=2",
]


def pipeline(folder, *overrides, force=False) -> Pipeline:
    config = load_config(DEMO, [*MICRO, f"--output_dir={folder}", *overrides])
    return Pipeline(config, force=force)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    pipeline(folder).run()
    return folder


@pytest.fixture(autouse=True, scope="module")
def short_sums():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running_sum, "NUM_DIGITS", 2)
        yield


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def snapshot(folder: Path) -> dict[str, int]:
    """Modification times of every stage's files."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.parent != folder)
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in files}


def touched(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """The stages of which any file is new, gone or rewritten."""
    return {name.split("/")[0] for name, _ in set(before.items()) ^ set(after.items())}


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_every_stage_leaves_its_artefacts(finished):
    stages = manifest(finished)["stages"]
    assert [s["name"] for s in stages] == list(RECIPE)
    assert {s["status"] for s in stages} == {"done"}
    assert manifest(finished)["claims"]
    assert "<html" in (finished / "report.html").read_text()
    for name, stage in RECIPE.items():
        own = manifest(finished / name)
        assert (own["status"], own["kind"]) == ("done", stage.kind)
        if stage.kind == "data":
            continue
        assert json.loads((finished / name / "eval.json").read_text())["num_samples"] == 6
        assert len((finished / name / "samples.jsonl").read_text().splitlines()) == 6
        assert (finished / name / "model" / "model.safetensors").is_file()
        assert read_metrics(finished / name)[-1]["step"] == len(read_metrics(finished / name))
        wanted = stage_config(load_config(DEMO, MICRO), name).grpo.num_steps
        assert stage.kind != "grpo" or len(read_metrics(finished / name)) == wanted == 2
    for name in ("helpfulness", "safety"):
        assert (finished / "reward_models" / name / "model.safetensors").is_file()
    assert set(json.loads((finished / "rl_2" / "general.json").read_text())) == {"before", "after"}
    # helpfulness is of the summary, which a model of so few steps may never write; safety of all
    first, last = read_metrics(finished / "rl_2")
    assert "rewards/safety/mean" not in first  # general prompts join in the last step only
    assert "rewards/safety/mean" in last
    assert "rewards/safety/mean" not in read_metrics(finished / "rl_1")[-1]


def test_the_accounting_adds_up(finished):
    for name in ("cold_start", "rejection"):
        accounting = json.loads((finished / name / "accounting.json").read_text())
        assert accounting["sampled"] == 160
        assert accounting["kept"] + sum(accounting["dropped"].values()) == 160
    examples = [row for _, row in read_jsonl(finished / "rejection" / "sft.jsonl")]
    assert len(examples) == accounting["reasoning"] + accounting["general"]
    assert accounting["reasoning"] == accounting["kept"] > 0


def test_a_second_run_keeps_everything(copied, capsys):
    before = snapshot(copied)
    pipeline(copied).run()
    assert touched(before, snapshot(copied)) == set()
    out = capsys.readouterr().out
    assert out.count("done before, kept") == len(RECIPE)
    assert re.search(rf"\nreport: .+\n{len(RECIPE)} stages in \w.+; this call .+s\n$", out)


def test_a_stage_without_its_manifest_runs_again_alone(copied):
    before = snapshot(copied)
    shutil.rmtree(copied / "distill" / "checkpoints")
    (copied / "distill" / "manifest.json").unlink()
    weights = (copied / "distill" / "model" / "model.safetensors").read_bytes()
    pipeline(copied).run()
    assert touched(before, snapshot(copied)) == {"distill"}
    assert (copied / "distill" / "model" / "model.safetensors").read_bytes() == weights


def test_a_kill_in_the_evaluation_trains_nothing_again(copied, capsys):
    """The last step's checkpoint is there: only the evaluation is done again."""
    rows = (copied / "small_rl" / "metrics.jsonl").read_bytes()
    for name in ("manifest.json", "eval.json", "samples.jsonl"):
        (copied / "small_rl" / name).unlink()
    pipeline(copied).run()
    assert "small_rl: all 2 steps were trained before" in capsys.readouterr().out
    assert (copied / "small_rl" / "metrics.jsonl").read_bytes() == rows
    assert (copied / "small_rl" / "eval.json").is_file()


def test_only_one_stage(copied, monkeypatch):
    before = snapshot(copied)
    monkeypatch.setattr("r1fast.pipeline.time.strftime", lambda *args: "20260101-000000")
    pipeline(copied).run(only="small_rl")
    pipeline(copied).run(only="small_rl")  # in the same second
    assert touched(before, snapshot(copied)) == {"small_rl", "replaced"}
    aside = sorted((copied / "replaced").iterdir())
    assert len(aside) == 2
    assert all((path / "small_rl" / "manifest.json").is_file() for path in aside)
    assert {s["status"] for s in manifest(copied)["stages"]} == {"done"}


def test_from_a_stage_on(copied):
    before = snapshot(copied)
    pipeline(copied).run(start="distill")
    assert touched(before, snapshot(copied)) == {"distill", "small_rl", "replaced"}
    (aside,) = (copied / "replaced").iterdir()
    assert sorted(p.name for p in aside.iterdir()) == ["distill", "small_rl"]


def test_an_interrupted_stage_goes_on(copied, monkeypatch):
    rows = read_metrics(copied / "small_rl")
    weights = (copied / "small_rl" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(copied / "small_rl")
    real, began = GRPOTrainer.train_step, []

    def train_step(self, step):
        began.append(step)
        if len(began) == 2:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(GRPOTrainer, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        pipeline(copied, "--checkpoint.every_steps=1").run()
    assert not (copied / "small_rl" / "manifest.json").exists()
    pipeline(copied, "--checkpoint.every_steps=1").run()
    assert began == [0, 1, 1]
    assert [r["reward"] for r in read_metrics(copied / "small_rl")] == [r["reward"] for r in rows]
    assert (copied / "small_rl" / "model" / "model.safetensors").read_bytes() == weights


def test_a_changed_value_is_refused_with_the_difference(copied):
    before = snapshot(copied)
    with pytest.raises(ValueError, match="stage r1_zero was run with other values") as error:
        pipeline(copied, "--grpo.kl_coef=0.5").run()
    assert "grpo.kl_coef: 0.001 -> 0.5" in str(error.value)
    assert "--from r1_zero" in str(error.value)
    with pytest.raises(ValueError, match=r"stage base .*\n  seed: 0 -> 1"):
        pipeline(copied, "--seed=1").run()
    with pytest.raises(ValueError, match=r"stage base .*\n  pipeline.base: '' -> 'x'"):
        pipeline(copied, "--pipeline.base=x").run()
    pipeline(copied, "--grpo.kl_coef=0.5", force=True).run()
    with pytest.raises(ValueError, match="stage cold_start was run"):  # the first that filters
        pipeline(copied, "--sample.max_paragraph_words=399").run()
    with pytest.raises(ValueError, match="stage rejection was run"):
        pipeline(copied, "--stages.rejection.sample.num_samples=5").run()
    assert touched(before, snapshot(copied)) == set()


def test_another_content_of_a_data_file_is_refused(copied, tmp_path, capsys):
    """Of the files that [data] names; an evaluation's is evaluated again."""
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    for file in (train, held_out):
        write_jsonl(file, [{"prompt": "1 + 1", "answer": "2"}])
    runner = pipeline(copied, f"--data.train={train}", f"--data.eval={held_out}")
    config = stage_config(runner.config, "rl_1")
    files = data_digests(config)
    assert files.keys() == {"data.train", "data.eval"}
    runner._close_stage("rl_1", config, 1.0, files)
    assert runner._is_done("rl_1", config)
    for file in (train, held_out):
        write_jsonl(file, [{"prompt": "1 + 1", "answer": "3"}])
    changed = f"data.train: the content of '{train}' has changed"
    with pytest.raises(ValueError, match="stage rl_1 was run with other values") as error:
        runner._is_done("rl_1", config)
    assert changed in str(error.value)
    assert "data.eval" not in str(error.value)
    runner.force = True
    assert runner._is_done("rl_1", config)
    runner.force = False
    write_jsonl(train, [{"prompt": "1 + 1", "answer": "2"}])
    asked = []
    runner.evaluate = lambda policy, config, name: asked.append(name)
    assert runner._is_done("rl_1", config)
    assert "evaluated again for data.eval: the content of" in capsys.readouterr().out
    assert runner._is_done("rl_1", config)
    assert asked == ["rl_1"]  # once


def test_another_evaluation_is_made_without_training(copied, capsys):
    weights = {p: p.stat().st_mtime_ns for p in copied.rglob("*.safetensors")}
    pipeline(copied, "--eval.num_samples=3", "--eval.every_num_samples=9").run()
    assert "evaluated again for eval.num_samples: 2 -> 3" in capsys.readouterr().out
    for name, stage in RECIPE.items():
        if stage.kind != "data":
            assert json.loads((copied / name / "eval.json").read_text())["k"] == 3
    assert weights == {p: p.stat().st_mtime_ns for p in copied.rglob("*.safetensors")}
    before = snapshot(copied)
    pipeline(copied, "--eval.num_samples=3").run()  # and is remembered
    assert touched(before, snapshot(copied)) == set()


def test_an_edited_collection_is_read_back_and_counted(copied, tmp_path):
    folder = copied / "cold_start"
    rows = [row for _, row in read_jsonl(folder / "cold_start.jsonl")]
    assert len(rows) > 3
    rows[0]["completion"] = rows[0]["completion"].replace("answer", "so answer")
    rows[1]["keep"] = False
    write_jsonl(folder / "cold_start.jsonl", rows)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="the training data: other rows"):  # it was learned before
        pipeline(copied).run()
    shutil.rmtree(folder / "checkpoints")
    pipeline(copied).run()
    accounting = json.loads((folder / "accounting.json").read_text())
    assert (accounting["edited"], accounting["rejected"], accounting["added"]) == (1, 1, 0)
    assert accounting["kept_by_hand"] == len(rows) - 2
    assert accounting["sampled"] == 160  # not sampled again


def test_a_collection_that_kept_none_is_made_again(copied):
    """Else the same command would find an empty file, whatever was loosened since."""
    folder = copied / "cold_start"
    before = (folder / "collected.jsonl").read_bytes()
    for name in ("manifest.json", "cold_start.jsonl"):
        (folder / name).unlink()
    (folder / "collected.jsonl").write_text("")
    accounting = json.loads((folder / "accounting.json").read_text())
    (folder / "accounting.json").write_text(json.dumps(accounting | {"kept": 0}))
    pipeline(copied).run()
    assert (folder / "collected.jsonl").read_bytes() == before
    assert json.loads((folder / "accounting.json").read_text()) == accounting


def test_an_edit_in_place_is_noticed_and_trained_on(copied, capsys):
    folder = copied / "cold_start"
    rows = [row for _, row in read_jsonl(folder / "cold_start.jsonl")]
    rows[0]["completion"] = rows[0]["completion"].replace("answer", "so answer")
    write_jsonl(folder / "cold_start.jsonl", rows)
    said = "cold_start.jsonl was edited since; --from cold_start trains on it"
    pipeline(copied).run()
    assert said in capsys.readouterr().out
    runner = pipeline(copied)
    runner.order = runner.order[: runner.order.index("cold_start") + 1]
    runner.run(start="cold_start")
    assert "nothing is sampled" in " ".join(capsys.readouterr().out.split())
    accounting = json.loads((folder / "accounting.json").read_text())
    assert (accounting["sampled"], accounting["edited"], accounting["rejected"]) == (160, 1, 0)
    trained = [row["completion"] for _, row in read_jsonl(folder / "trained.jsonl")]
    assert trained == [row["completion"] for row in rows]
    runner.run()
    assert said not in capsys.readouterr().out


def test_the_collection_is_used_again_only_where_it_would_be_the_same(copied):
    assert pipeline(copied)._may_reuse_collection()
    assert pipeline(copied, "--cold_start.edited_file=x", "--sft.epochs=3")._may_reuse_collection()
    assert not pipeline(copied, "--cold_start.num_samples=9")._may_reuse_collection()
    os.utime(copied / "r1_zero" / "model" / "config.json")  # another R1-Zero
    assert not pipeline(copied)._may_reuse_collection()


def test_all_missing_files_are_named_before_the_first_stage(tmp_path):
    runner = pipeline(
        tmp_path / "run", "--data.task=", "--data.train=no/train.jsonl", "--data.eval=no.jsonl",
        "--cold_start.edited_file=edit.jsonl", "--rewards.safety_model=./no/model",
        "--pipeline.base=org/name",
    )  # fmt: skip
    with pytest.raises(ValueError, match="do not exist") as error:
        runner.run()
    assert str(error.value).splitlines()[1:] == [
        "  data.train = 'no/train.jsonl'", "  data.eval = 'no.jsonl'",
        "  rewards.safety_model = './no/model'", "  cold_start.edited_file = 'edit.jsonl'",
    ]  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["start", "only"])
def test_an_unknown_stage(tmp_path, option):
    with pytest.raises(ValueError, match=r"stage 'rl_9' is not in .* its stages: base, small_base"):
        pipeline(tmp_path).run(**{option: "rl_9"})


def test_a_stage_says_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match=r"stage rl_1 needs cold_start first"):
        pipeline(tmp_path).run(only="rl_1")
    with pytest.raises(ValueError, match=r"stage sft needs base, rejection first"):
        pipeline(tmp_path, "--pipeline.stages=['sft']").run()
    cold = pipeline(tmp_path, "--pipeline.stages=['cold_start']")
    with pytest.raises(ValueError, match=r"stage cold_start needs base, r1_zero first"):
        cold.run()
    cold = pipeline(
        tmp_path, "--pipeline.stages=['cold_start']", "--cold_start.methods=['reflection']"
    )
    with pytest.raises(ValueError, match=r"stage cold_start needs base first"):
        cold.run()


def test_without_a_small_base_the_small_stages_are_left_out(copied, capsys):
    config = ("--data.task=", "--data.train=x.jsonl", "--data.eval=y.jsonl",
              "--pipeline.base=somewhere")  # fmt: skip
    runner = pipeline(copied, *config)
    assert runner.order == [n for n in RECIPE if n not in ("small_base", "distill", "small_rl")]
    with pytest.raises(ValueError, match="stage base was run with other values"):
        runner.run()
    assert "pipeline.small_base is empty: without small_base, distill" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"'distill' is not in .*it needs pipeline\.small_base"):
        runner.run(only="distill")
    assert "distill" in pipeline(copied, *config, "--pipeline.small_base=z").order


def test_rl_2_without_preference_data_uses_rule_rewards(copied, capsys):
    """No reward model anywhere: one warning, no general prompts, no error."""
    for name in ("helpfulness", "safety"):
        shutil.rmtree(copied / "reward_models" / name)
    pipeline(copied, "--log.num_samples=4").run(only="rl_2")
    message = " ".join(capsys.readouterr().err.split())
    assert message.count("no model for rewards.helpfulness and rewards.safety: counted as 0") == 1
    rows = read_metrics(copied / "rl_2")
    assert len(rows) == 2
    assert not any("rewards/helpfulness/mean" in row for row in rows)
    sampled = [row["problem_id"] for _, row in read_jsonl(copied / "rl_2" / "completions.jsonl")]
    assert len(sampled) == 8
    assert not any(name.startswith("general") for name in sampled)
    assert not (copied / "rl_2" / "general.json").exists()


def test_the_commands_exit_codes(copied, capsys):
    from r1fast.__main__ import main

    overrides = [*MICRO, f"--output_dir={copied}"]
    assert main(["pipeline", str(DEMO), *overrides]) == 0
    assert main(["pipeline", str(DEMO), *overrides, "--only", "nothing"]) == 2
    assert "stage 'nothing' is not in this pipeline" in capsys.readouterr().err
    os.remove(copied / "report.html")
    assert main(["report", str(copied)]) == 0
    assert (copied / "report.html").is_file()


@pytest.mark.parametrize(("change", "told"), [
    ({"seconds": "long"}, "'seconds' must be a number, got 'long'"),
    ({"seconds": None}, "'seconds' must be a number, got None"),
    ({"config": []}, r"'config' must be an object, got \[\]"),
    ({"files": 3}, "'files' must be an object, got 3"),
    ({"status": 1}, "'status' must be a text, got 1"),
])  # fmt: skip
def test_a_stage_whose_manifest_was_edited_is_named(copied, change, told):
    path = copied / "cold_start" / "manifest.json"
    path.write_text(json.dumps(manifest(copied / "cold_start") | change))
    with pytest.raises(ValueError, match=rf"cold_start/manifest\.json: {told}; --from cold_start"):
        pipeline(copied).run()


def test_a_stage_whose_manifest_lacks_a_field(copied):
    path = copied / "r1_zero" / "manifest.json"
    path.write_text(json.dumps({"status": "done", "seconds": 1}))
    with pytest.raises(ValueError, match=r"r1_zero/manifest\.json has no 'config'; --from r1_zero"):
        pipeline(copied).run()


def test_a_kill_while_stages_are_set_aside_leaves_those_that_fit(copied, monkeypatch):
    """Else a stage would be kept whose beginning is made again."""
    order, real, calls = pipeline(copied).order, Path.rename, []

    def rename(path, target):
        calls.append(path.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        pipeline(copied).run(start=order[1])
    assert [name for name in order if (copied / name).exists()] == order[:-3]
