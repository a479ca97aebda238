"""A recorded update made again is the same to the last bit, and beside another loss what that loss would have done."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from test_token_budget import Memory
from test_trainer import Stopped
from tiny import TokenScorer, random_groups, tiny_checkpoint, tiny_config, tiny_problems

from r1fast import _C, provenance
from r1fast.__main__ import main
from r1fast.batch import pack
from r1fast.forward import completion_logprobs
from r1fast.grpo import token_coefficients
from r1fast.metrics import read_metrics
from r1fast.policy import load_policy
from r1fast.recording import digests, read_recording
from r1fast.replay import replay
from r1fast.replay.start import prepare
from r1fast.replay.update import run_update
from r1fast.trainer import GRPOTrainer
from r1fast.types import Sequence

TWICE = ("--grpo.num_mini_batches=2", "--grpo.num_iterations=2", "--optim.lr=0.01")
NO_KL = "--grpo.kl_coef=0"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "model")


class SomeSignal(TokenScorer):
    """Every second problem earns the same for all its completions."""

    def score(self, groups, step_from_end=None):
        super().score(groups, step_from_end)
        for group in groups:
            if int(group.problem.id[1:]) % 2:
                group.rewards = [group.rewards[0]] * len(group.rewards)


def train(folder: Path, base: str, *overrides, scorer=None) -> GRPOTrainer:
    folder.mkdir(exist_ok=True, parents=True)
    config = tiny_config("--log.record=all", "--grpo.num_steps=3", *overrides)
    policy = load_policy(base, dtype=config.model.dtype, device="cpu")
    trainer = GRPOTrainer(policy, config, folder, tiny_problems(), scorer or TokenScorer())
    trainer.run()
    return trainer


def content(folder: Path) -> dict[str, str]:
    """Every file of a run but what replay writes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("replay-")
    }


@pytest.mark.parametrize(
    "overrides",
    [
        ("--grpo.ref_refresh_steps=2", "--grpo.ref_dtype=bfloat16"),
        (*TWICE, "--grpo.scale_rewards=batch"),
        pytest.param(
            ("--rollout.batch_invariant=true", *TWICE),
            marks=pytest.mark.skipif(_C.native_level(False) == "baseline", reason="needs AVX2"),
        ),
        ("--model.dtype=bfloat16", "--optim.warmup_steps=2", "--grpo.entropy_coef=0.01",
         "--grpo.kl_in=reward", "--optim.weight_decay=0.1"),
        (NO_KL, "--grpo.num_mini_batches=4", "--grpo.loss_type=dapo", "--grpo.token_budget=40"),
        ("--lora.rank=4", *TWICE, "--grpo.ref_refresh_steps=6"),
        (NO_KL, "--grpo.mask_truncated=true", "--grpo.denominator=live", "--grpo.num_mini_batches=2",
         "--grpo.max_logprob_mismatch=1e-9"),
    ],
    ids=lambda x: " ".join(x),
)  # fmt: skip
def test_the_same_update_to_the_last_bit(tmp_path, base, capsys, overrides):
    """From a checkpoint and one recorded update, and from the first model and two."""
    keep = ("--checkpoint.every_steps=1", "--checkpoint.keep_last=3")
    train(tmp_path, base, *overrides, *keep, scorer=SomeSignal())
    shutil.rmtree(tmp_path / "checkpoints" / "step-000002")
    before = content(tmp_path)
    for start in ("the checkpoint of step 1, then the recorded update of 2", f"the model {base}, "):
        result = replay(tmp_path, 3)
        assert result["is_identical"], result["differing"]
        assert result["start"].startswith(start)
        assert result["replayed"] == read_recording(tmp_path, 3).state["row"]
        assert result["replayed"].items() <= read_metrics(tmp_path)[2].items()
        assert "identical, to the last bit" in capsys.readouterr().out
        assert content(tmp_path) == before
        assert json.loads((tmp_path / "replay-step-000003.json").read_text()) == result
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        before = content(tmp_path)


def test_an_update_that_was_not_the_same_is_seen(tmp_path, base, capsys):
    """A recording of other digests and another metric, with hashes that are right."""
    train(tmp_path, base, "--grpo.num_steps=1")
    folder = tmp_path / "recorded" / "step-000001"
    state = json.loads((folder / "state.json").read_text())
    state["after"]["digests"]["optimizer"] = "0"
    state["row"]["kl"] += 1e-9
    rewrite(folder, "state.json", json.dumps(state))
    result = replay(tmp_path, 1)
    assert not result["is_identical"]
    assert result["differing"] == ["optimizer", "kl"]
    assert "an operation is not deterministic" in capsys.readouterr().out


def rewrite(folder: Path, name: str, text: str) -> None:
    """Another content of a recorded file, under a manifest that knows it."""
    (folder / name).write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / name).read_bytes()
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_of_dynamic_sampling(tmp_path, base):
    """Positions with holes between; and a step of no group at all."""
    overrides = ("--grpo.dynamic_sampling=signal", "--grpo.max_rollout_factor=2", *TWICE)
    train(tmp_path / "some", base, *overrides, scorer=SomeSignal())
    positions = [g.position for g in read_recording(tmp_path / "some", 2).groups]
    assert positions != list(range(len(positions)))
    result = replay(tmp_path / "some", 3, ["--grpo.loss_type=gspo"])
    assert result["is_identical"]
    assert {row["position"] for row in result["comparison"]["completions"]} <= {
        g.position for g in read_recording(tmp_path / "some", 3).groups
    }
    train(tmp_path / "none", base, *overrides, NO_KL, scorer=TokenScorer(lambda ids: 1.0))
    assert read_recording(tmp_path / "none", 2).groups == []
    assert replay(tmp_path / "none", 2, ["--grpo.loss_type=gspo"])["is_identical"]


@pytest.mark.parametrize(
    "changes",
    [
        ("--grpo.loss_type=gspo", "--grpo.clip_eps_low=0.01"),
        ("--grpo.kl_coef=0", "--grpo.loss_type=dr_grpo"),
        ("--optim.lr=0.02", "--optim.beta1=0.5", "--grpo.scale_rewards=none"),
    ],
    ids=lambda x: " ".join(x),
)
def test_another_loss_does_what_a_run_of_it_would_have_done(tmp_path, base, capsys, changes):
    """The first step of both runs has the same rollouts, so a run of the other loss is the oracle."""
    one = train(tmp_path / "one", base, *TWICE, "--grpo.num_steps=1")
    other = train(tmp_path / "other", base, *TWICE, "--grpo.num_steps=1", *changes)
    result = replay(tmp_path / "one", 1, changes)
    assert result["is_identical"]
    diff = result["comparison"]
    rows = [read_recording(tmp_path / name, 1).state["row"] for name in ("one", "other")]
    assert {k: v[0] for k, v in diff["metrics"].items() if v[0] is not None} == rows[0]
    assert {k: v[1] for k, v in diff["metrics"].items() if v[1] is not None} == rows[1]
    start = load_policy(base).model
    moved = [
        torch.cat([(p.cpu() - q.cpu()).detach().double().flatten() for p, q in zip(m.parameters(), start.parameters(), strict=True)])
        for m in (one.model, other.model)
    ]  # fmt: skip
    assert diff["update"]["cosine"] == pytest.approx(float(torch.cosine_similarity(*moved, dim=0)))
    assert diff["update"]["cosine"] < 0.9999
    assert diff["update"]["norms"] == pytest.approx([float(x.norm()) for x in moved])
    assert diff["gradient"]["cosine"] <= 1
    shown = capsys.readouterr().out
    for change in changes:
        key, _, value = change.removeprefix("--").partition("=")
        assert key in shown
        assert value in shown
    path = tmp_path / "one" / f"replay-step-000001-{'-'.join(c[2:] for c in changes)}.json"
    assert json.loads(path.read_text()) == result


@pytest.mark.parametrize(
    "changes", [(), ("--grpo.loss_type=gspo",), ("--grpo.loss_type=cispo", NO_KL)]
)
def test_the_gradient_is_the_sum_of_the_tokens_times_their_coefficients(tmp_path, base, changes):
    """In the second pass, where ratios are not 1: the coefficient against autograd of the log-probabilities."""
    train(tmp_path, base, "--grpo.num_steps=1", "--optim.lr=0.01", *changes)
    trainer = prepare(tmp_path, 1).trainer
    recording = read_recording(tmp_path, 1)
    run_update(trainer, recording)  # the weights have left the sampler's
    seen = {}

    def keep(keys, batch, logprobs):
        type(trainer).on_logprobs(trainer, keys, batch, logprobs)
        seen[0] = keys, batch

    trainer.on_logprobs = keep
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    outcome = run_update(trainer, recording)
    (keys, batch), passes = seen[0], outcome.passes
    assert any((x.ratios - 1).abs().max() > 0.1 for x in (p[0] for p in passes.values()))
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            p.copy_(start[name])
    logprobs, _ = completion_logprobs(trainer.model, batch)
    coefficients = torch.cat([passes[keys[i]][0].coefficients for i in batch.sequence_index])
    (-coefficients @ logprobs).backward()
    for (name, p), expected in zip(trainer.model.named_parameters(), outcome.gradient, strict=True):
        assert (p.grad - expected).norm() <= 1e-5 * expected.norm() + 1e-7, name


def test_coefficients_are_taken_where_the_loss_is():
    """Under batch_invariant that is at other log-probabilities than the forward's."""
    (group,) = random_groups(1, 3, 97, seed=2)
    given = [[-3.0] * len(c.token_ids) for c in group.completions]
    sequences = [
        Sequence(group.prompt_ids, c.token_ids, c.logprobs, advantage=i - 1.0, policy_logprobs=x)
        for i, (c, x) in enumerate(zip(group.completions, given, strict=True))
    ]
    (batch,) = pack(sequences, 100, [0.1] * 3)
    config, own = tiny_config("--grpo.entropy_coef=0.1", NO_KL).grpo, batch.policy_logprobs
    coefficients = token_coefficients(own - 1, batch, config)
    batch.policy_logprobs = None
    assert torch.equal(coefficients, token_coefficients(own, batch, config))
    assert not torch.equal(coefficients, token_coefficients(own - 1, batch, config))


def test_what_differs_most_is_shown(tmp_path, base, capsys):
    """dr_grpo weighs a completion's tokens by 1 / its limit, grpo by 1 / its length: short ones differ most."""
    train(tmp_path, base, NO_KL, "--grpo.num_steps=1", scorer=SomeSignal())
    result = replay(tmp_path, 1, ["--grpo.loss_type=dr_grpo"])
    diff, (groups, G) = result["comparison"], (read_recording(tmp_path, 1).groups, 4)
    num_tokens = [len(c.token_ids) for g in groups for c in g.completions]
    dead = sum(
        len(c.token_ids)
        for g in groups
        for c, r in zip(g.completions, g.rewards, strict=True)
        if len({r.total for r in g.rewards}) == 1
    )
    assert 0 < dead < sum(num_tokens)
    assert diff["zero_coefficient"] == pytest.approx([dead / sum(num_tokens)] * 2)
    trainer = prepare(tmp_path, 1).trainer
    advantages = {k: s.advantage for k, s in trainer._plan(groups)[0].items()}
    for row in diff["tokens"]:
        completion = groups[row["position"]].completions[row["sample"]]
        A, n, N = (
            advantages[row["position"], row["sample"]],
            len(completion.token_ids),
            sum(num_tokens),
        )
        assert row["token_id"] == completion.token_ids[row["token"]]
        assert row["coefficient"] == pytest.approx(
            [A * N / (4 * G * n), A * N / (4 * G * 8)], rel=1e-4
        )
        assert row["ratio"] == pytest.approx([1, 1], rel=1e-4)
    differences = [row["difference"] for row in diff["tokens"]]
    assert differences == sorted(differences, reverse=True)
    assert all(
        len(groups[r["position"]].completions[r["sample"]].token_ids) < 8
        for r in diff["tokens"][:1]
    )
    top = diff["completions"][0]
    assert top["text"] == groups[top["position"]].completions[top["sample"]].text
    shown = capsys.readouterr().out
    assert f"{top['problem_id']} #{top['sample']}" in shown
    assert "⟦" in shown


def test_gradients_of_other_completions_are_not_compared(tmp_path, base):
    train(tmp_path, base, "--grpo.num_steps=1", "--grpo.num_mini_batches=2")
    diff = replay(tmp_path, 1, ["--grpo.num_mini_batches=4"])["comparison"]
    assert diff["gradient"] is None
    assert 0 < diff["update"]["cosine"] < 1


def test_a_step_without_what_leads_to_it(tmp_path, base):
    only_the_last = (
        "--checkpoint.every_steps=1",
        "--checkpoint.keep_last=1",
        "--checkpoint.keep_best=",
    )
    train(tmp_path, base, '--log.record="3"', *only_the_last)
    with pytest.raises(ValueError, match=r"from the beginning on, the updates of steps 1-2 are not "
                       r"recorded\. Recorded steps: 3; checkpoints: 3\. .*--record=1-3.*keep_last"):  # fmt: skip
        replay(tmp_path, 3)
    with pytest.raises(ValueError, match=r"step 2 of .* is not recorded; recorded are 3"):
        replay(tmp_path, 2)
    with pytest.raises(ValueError, match="nowhere' does not exist"):
        replay(tmp_path / "nowhere", 1)


def test_a_crash_between_recording_and_checkpoint(tmp_path, base, monkeypatch):
    def crash(self, *, wait):
        raise Stopped

    monkeypatch.setattr(GRPOTrainer, "save", crash)
    with pytest.raises(Stopped):
        train(tmp_path, base, "--checkpoint.every_steps=2")
    assert not (tmp_path / "checkpoints").exists()
    assert replay(tmp_path, 2)["is_identical"]
    monkeypatch.undo()
    train(tmp_path, base, "--checkpoint.every_steps=2")
    assert replay(tmp_path, 3)["is_identical"]


def test_the_model_that_it_started_from(tmp_path, base):
    """Gone, elsewhere, another one, and not needed where there is a checkpoint."""
    first = tmp_path / "first"
    shutil.copytree(base, first)
    train(tmp_path / "run", str(first), "--grpo.num_steps=2", "--checkpoint.every_steps=1",
          "--checkpoint.keep_last=2")  # fmt: skip
    first.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"no such model folder.*--model.path=FOLDER says"):
        replay(tmp_path / "run", 1)
    assert replay(tmp_path / "run", 1, [f"--model.path={tmp_path / 'moved'}"])["is_identical"]
    assert replay(tmp_path / "run", 2)["is_identical"]
    with pytest.raises(ValueError, match=r"state before step 1 is not the recorded one \(model, "
                       r"reference\): the model, the checkpoint or"):  # fmt: skip
        replay(tmp_path / "run", 1, [f"--model.path={tmp_path / 'run' / 'model'}"])


@pytest.mark.parametrize(
    ("name", "now", "said"),
    [
        ("processor", "Other CPU", "-> 'Other CPU'"),
        ("levels", {"float32": "baseline", "bfloat16": "older"}, "levels.bfloat16: "),
        ("has_bf16_products", None, "bfloat16_products: "),
    ],
)  # fmt: skip
def test_other_rounding_is_named(tmp_path, base, monkeypatch, capsys, name, now, said):
    """The recorded updates in between leave other weights: a warning where the machine explains it."""
    train(tmp_path, base)
    path = tmp_path / "recorded" / "step-000002"
    state = json.loads((path / "state.json").read_text())
    rewrite(path, "state.json", json.dumps(state | {"before": {**state["before"], "digests": {
        **state["before"]["digests"], "model": "1"}}}))  # fmt: skip
    with pytest.raises(ValueError, match=r"the state before step 2 is not the recorded one \(model\): "):  # fmt: skip
        replay(tmp_path, 3)
    monkeypatch.setattr(provenance, name, lambda: now)
    result = replay(tmp_path, 3)
    assert not result["is_identical"]
    assert any(said in line for line in result["other_versions"])
    shown = capsys.readouterr()
    assert said in shown.err
    assert "rounding may differ between then and now" in shown.out


def test_a_recording_of_before_the_levels_were_written_down(tmp_path, base):
    train(tmp_path, base)
    path = tmp_path / "recorded" / "step-000002"
    state = json.loads((path / "state.json").read_text())
    assert state["versions"].pop("levels") == provenance.levels()
    del state["versions"]["bfloat16_products"]
    rewrite(path, "state.json", json.dumps(state))
    result = replay(tmp_path, 2)
    assert result["is_identical"]
    assert any(line.startswith("levels.float32: (not set) ->") for line in result["other_versions"])


def test_a_manifest_names_the_level(monkeypatch):
    found = []
    for float32, bfloat16, has_bf16 in (
        ("avx512", "amx", True),
        ("avx512", "avx512", True),
        ("avx512", "avx512", False),
        ("avx2", "avx2", False),
        ("baseline", "baseline", False),
    ):
        own = {"float32": float32, "bfloat16": bfloat16}
        monkeypatch.setattr(provenance, "levels", lambda own=own: own)
        monkeypatch.setattr(provenance._C, "has_avx512_bf16", lambda has=has_bf16: has)
        found.append(provenance.hardware(torch.device("cpu")).split(", ")[-1])
    assert found == ["AVX-512 with AMX", "AVX-512 with bfloat16", "AVX-512", "AVX2", "baseline"]


def test_micro_batches_are_those_that_fitted(tmp_path, base, monkeypatch):
    """The first step ran out of memory and halved its budget, which later ones began with."""
    with monkeypatch.context() as patch:
        Memory(60, "forward").install(patch)
        train(tmp_path, base, NO_KL, "--grpo.token_budget=200")
    first, second = (read_recording(tmp_path, step).state for step in (1, 2))
    assert first["before"]["counters"]["token_budget"] == {"num_tokens": 200, "was_halved": False}
    budget = second["before"]["counters"]["token_budget"]
    assert budget == first["after"]["counters"]["token_budget"] != first["before"]
    assert replay(tmp_path, 3)["is_identical"]
    ready = prepare(tmp_path, 1)
    assert ready.trainer.token_budget.num_tokens == budget["num_tokens"] < 200
    assert ready.differences == ["micro-batches: those that step 1 began with did not fit"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--rollout.top_p=0.5", r"rollout.top_p is no part .* grpo\.\*, optim\.\*, rollout.batc"),
        ("--rewards.format=2", "rewards.format is no part"),
        ("--grpo.loss=x", "unknown config key 'grpo.loss'"),
        ("--grpo.clip_eps_low=-1", "clip_eps_low must be at least 0"),
        ("--grpo.kl_in=reward --grpo.kl_estimator=k3_unbiased", "grpo.kl_estimator k3_unbiased"),
    ],
)  # fmt: skip
def test_what_cannot_be_changed(tmp_path, base, override, message):
    if not (tmp_path / "recorded").exists():
        train(tmp_path, base, "--grpo.num_steps=1")
    with pytest.raises(ValueError, match=message):
        replay(tmp_path, 1, override.split())


def test_a_reference_that_there_was_not(tmp_path, base):
    train(tmp_path, base, NO_KL, "--grpo.num_steps=1")
    with pytest.raises(ValueError, match="needs the reference of the run, which had none"):
        replay(tmp_path, 1, ["--grpo.kl_coef=0.1"])


def test_a_failed_update_is_replayed(tmp_path, base, monkeypatch, capsys):
    def fail(self):
        raise FloatingPointError("five in a row")

    monkeypatch.setattr(GRPOTrainer, "optimize", fail)
    with pytest.raises(FloatingPointError):
        train(tmp_path, base)
    monkeypatch.undo()
    result = replay(tmp_path, 1)
    assert not result["is_complete"]
    assert result["replayed"]["grad_norm"] > 0
    assert "did not come to its end" in capsys.readouterr().out


def test_the_command(tmp_path, base, capsys):
    train(tmp_path / "run" / "r1_zero", base, "--grpo.num_steps=1")
    folder = str(tmp_path / "run" / "r1_zero")
    assert main(["replay", folder, "--step", "1"]) == 0
    assert "identical, to the last bit" in capsys.readouterr().out
    assert main(["replay", folder, "--step=1", "--json", "--grpo.loss_type=sapo"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["overrides"] == ["grpo.loss_type: 'grpo' -> 'sapo'"]
    assert main(["replay", folder, "--step=1", "--grpo.importance_sampling_level=sequence"]) == 0
    shown = capsys.readouterr().out  # every ratio is 1 at the first step
    assert "every token's coefficient is equal up to rounding" in shown
    assert "most" not in shown
    assert main(["replay", str(tmp_path / "run"), "--step", "1"]) == 2
    assert "is a run of several stages: name one of" in capsys.readouterr().err
    for words in ([], ["--step", "0"], ["--step", "x"]):
        assert main(["replay", folder, *words]) == 2
        assert "needs --step N" in capsys.readouterr().err


def test_a_digest_is_of_every_bit():
    x = torch.arange(6.0).reshape(2, 3)
    (first,) = digests({"a": {"x": x, "y": x[:0]}}).values()
    for other in ({"x": x.clone(), "y": x[:0]}, {"y": x[:0], "x": x}):
        assert digests({"a": other})["a"] == first
    changed = x.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    negative = x.clone()
    negative[0, 0] = -0.0
    for other in (
        {"x": changed, "y": x[:0]}, {"x": negative, "y": x[:0]}, {"z": x, "y": x[:0]},
        {"x": x.reshape(3, 2), "y": x[:0]}, {"x": x.int(), "y": x[:0]}, {"x": x.t().contiguous().t() + 1, "y": x[:0]},
    ):  # fmt: skip
        assert digests({"a": other})["a"] != first
    assert digests({"a": {"x": x.t().contiguous().t(), "y": x[:0]}})["a"] == first
