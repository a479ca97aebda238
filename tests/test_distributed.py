"""Two gloo processes give what one gives: losses, weights, evaluation.

This file is also the program that torchrun starts: `torchrun --nproc-per-node 2 THIS OUT`.
"""

import faulthandler
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file, save_file
from test_evaluate import ParityScorer
from test_invariance import record_gradients
from tiny import alike, random_groups, tiny_checkpoint, tiny_config, tiny_policy, tiny_problems

from r1fast import cold_start, distributed
from r1fast.evaluate import evaluate
from r1fast.evaluate.replaced import set_other_aside
from r1fast.forward import hidden_states
from r1fast.interrupt import StopRequest
from r1fast.lora import merge_lora
from r1fast.metrics import read_metrics
from r1fast.policy import load_policy
from r1fast.recording import read_recording
from r1fast.rejection import rejection_sample
from r1fast.replay import replay
from r1fast.sft import SFTTrainer
from r1fast.trainer import GRPOTrainer
from r1fast.types import Reward, Sequence

# an eps far above the gradients' rounding: AdamW's first steps divide by the gradient's size
COMMON = ("--grpo.num_steps=2", "--sft.max_steps=2", "--optim.eps=0.001", "--grpo.token_budget=60")
RUNS = {
    "grpo": (),
    "dapo": ("--grpo.loss_type=dapo", "--grpo.num_mini_batches=3", "--grpo.prompts_per_step=5"),
    "dr_grpo": ("--grpo.loss_type=dr_grpo", "--grpo.num_iterations=2"),
    "batch": ("--grpo.scale_rewards=batch", "--grpo.std=sample", "--grpo.prompts_per_step=3"),
    # as many mini-batches as completions: a rank has nothing in most of them
    "splinters": ("--grpo.num_mini_batches=8", "--grpo.prompts_per_step=2",
                  "--grpo.ref_refresh_steps=8"),
    # a completion each: some have no signal, so a rank or both have nothing to forward
    "no_signal": ("--grpo.num_mini_batches=8", "--grpo.prompts_per_step=2", "--grpo.kl_coef=0"),
    "short_of_memory": (),  # the last rank, in micro-batches over 30 tokens
    # the sampler's logprobs are off on one rank alone, and the mean over both is above the bound
    "mismatch": ("--grpo.max_logprob_mismatch=0.05", "--grpo.num_mini_batches=2"),
    "dynamic": ("--grpo.dynamic_sampling=signal", "--grpo.prompts_per_step=3",
                "--grpo.num_mini_batches=2"),
    "masked": ("--grpo.mask_truncated=true", "--grpo.denominator=live", "--grpo.kl_coef=0",
               "--grpo.loss_type=dapo", "--grpo.prompts_per_step=5"),
    "lora": ("--lora.rank=3", "--optim.lr=0.03", "--grpo.ref_refresh_steps=1"),
    "sft": (),
    "sft_lora": ("--lora.rank=3", "--optim.lr=0.03"),
    "sft_sequence": ("--sft.loss=sequence", "--sft.batch_size=1"),
}  # fmt: skip


BALANCES = {
    "off": ("--grpo.balance_ranks=false",),
    "whole": (),
    "split": ("--grpo.num_mini_batches=3",),
    "unshared": ("--grpo.shared_prompt=false", "--grpo.kl_coef=0", "--grpo.loss_type=dapo"),
    "halves": ("--grpo.token_budget=40", "--grpo.whole_groups=true", "--grpo.num_mini_batches=2"),
}


class SecondRankOff(ParityScorer):
    """Changes the sampler's log-probabilities of odd problems, which the second rank has at first."""

    def score(self, groups, step_from_end=None):
        super().score(groups, step_from_end)
        for group in groups:
            if int(group.problem.id[1:]) % 2:
                for c in group.completions:
                    c.logprobs = [x + 0.2 for x in c.logprobs]


class SecondProblemOnly(ParityScorer):
    """Problems of an even number, which the first rank has in the first step, earn nothing."""

    def score(self, groups, step_from_end=None):
        super().score(groups, step_from_end)
        for group in groups:
            if int(group.problem.id[1:]) % 2 == 0:
                group.rewards = [Reward(0.0, {}, None) for _ in group.rewards]


OF_TWO_ENGINES = {  # what was begun before the batch was known to be full
    "rollout/groups_generated", "rollout/oversampling", "rollout/tokens_discarded",
    "rollout/tokens_aborted", "rollout/prefix_hit_rate", "rollout/cache_mib",
}  # fmt: skip
SCORERS = {"no_signal": SecondProblemOnly, "mismatch": SecondRankOff, "dynamic": SecondProblemOnly}


def is_short_on_the_last_rank(model, batch):
    if batch.num_tokens > 30 and distributed.rank() == distributed.world_size() - 1:
        raise torch.OutOfMemoryError
    return hidden_states(model, batch)


def train(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Two steps of the named run in this process (or this rank); its final weights."""
    policy, config = tiny_policy(), tiny_config(*COMMON, *RUNS[name])
    if name.startswith("sft"):
        groups = random_groups(10, 2, policy.model.spec.vocab_size, seed=4)
        sequences = [Sequence(g.prompt_ids, c.token_ids) for g in groups for c in g.completions]
        trainer = SFTTrainer(policy, config, folder, sequences)
    else:
        scorer = SCORERS.get(name, ParityScorer)()
        trainer = GRPOTrainer(policy, config, folder, tiny_problems(), scorer)
    if name == "short_of_memory":
        with mock.patch("r1fast.policy_update.hidden_states", is_short_on_the_last_rank):
            trainer.run()
        budgets = distributed.gather_objects(trainer.token_budget.num_tokens)
        assert set(budgets) == {trainer.token_budget.num_tokens}, budgets
        assert budgets[0] <= 30
    else:
        trainer.run()
    if config.lora.rank:
        merge_lora(policy.model)
    return {n: p.detach() for n, p in trainer.model.named_parameters()}


def everything(out: Path) -> None:
    for name in RUNS:
        weights = train(name, out / name)
        save_file(weights, out / f"{name}-rank{distributed.rank()}.safetensors")
    config = tiny_config("--eval.num_samples=3")
    result = evaluate(
        tiny_policy(), tiny_problems(5), config, ParityScorer(), folder=out / "evaluation"
    )
    for num in (5, 3):  # the same again replaces nothing, fewer problems would
        problems = tiny_problems(num)
        set_other_aside(out / "evaluation", tiny_policy(), problems, config, ParityScorer())
        (out / f"aside-{num}-rank{distributed.rank()}").write_text(
            str(len(list((out / "evaluation").glob("replaced/*"))))
        )
        distributed.barrier()
    with StopRequest("", deadline=60.0, gives_up=lambda left: False):  # as amid training
        few = evaluate(tiny_policy(), tiny_problems(1), config, ParityScorer())  # rank 1 has none
    (out / f"evaluation-rank{distributed.rank()}.json").write_text(json.dumps([result, few]))


def balance(out: Path) -> None:
    """The first rank has what is long: gradients and loads with `balance_ranks` and without."""
    facts = {}
    for name, overrides in BALANCES.items():
        options = ("--grpo.prompts_per_step=6", "--grpo.num_iterations=2", *overrides)
        policy, config = tiny_policy(), tiny_config(*options)
        trainer = GRPOTrainer(policy, config, out / "balance", tiny_problems(), ParityScorer())
        groups = random_groups(6, 4, policy.model.spec.vocab_size, longest=30)
        for position, group in enumerate(groups):
            for i, c in enumerate(group.completions):
                n = 1 if position % 2 else 20 + 2 * i
                c.token_ids, c.logprobs = (c.token_ids * 30)[:n], (c.logprobs * 30)[:n]
            for i, reward in enumerate(group.rewards):
                reward.total = float((position + i) % 3)
        seen, loads = record_gradients(trainer), []
        policy.model.register_forward_pre_hook(
            lambda _, args, loads=loads: loads.append(len(args[0]))
        )
        row = trainer.update(groups[distributed.rank() :: distributed.world_size()], 0)
        gradients = {f"{n}.{key}": x for n, part in enumerate(seen) for key, x in part.items()}
        save_file(gradients, out / f"balance-{name}-rank{distributed.rank()}.safetensors")
        loss = {key: row[key] for key in ("loss", "ratio", "entropy", "logprob_mismatch/max")}
        facts[name] = loss | {"load": sum(loads), "imbalance": row.get("train/rank_imbalance")}
    (out / f"balance-rank{distributed.rank()}.json").write_text(json.dumps(facts))


class Right(ParityScorer):
    """Calls every text right and well-formed, except that of every third problem."""

    prompt_opens_think = False

    def score(self, groups, step_from_end=None):
        super().score(groups, step_from_end)
        for group in groups:
            wrong = int(group.problem.id[1:]) % 3 == 1
            for j, (c, reward) in enumerate(zip(group.completions, group.rewards, strict=True)):
                c.text = (
                    f"<think> {'so ' * j}it is {c.text.split()[:1]} </think> <answer> 1 </answer>"
                )
                c.finish_reason, reward.verdict = "stop", "wrong" if wrong else "correct"


def collect(out: Path) -> None:
    """Rejection sampling and a cold start that keeps fewer than it has."""
    config = tiny_config("--sample.max_kept=2", "--cold_start.max_kept=3", "--sample.num_samples=3",
                         "--cold_start.num_samples=2", "--sample.min_language_share=0")  # fmt: skip
    policy, problems = tiny_policy(), tiny_problems(7)
    rejection_sample(policy, problems, config, Right(), out / "rejection")
    policies, asked, scorers = ({"r1_zero": x} for x in (policy, config, Right()))
    (out / "cold_start").mkdir(exist_ok=True)
    cold_start.collect(policies, problems, asked, scorers, config, out / "cold_start")


def record(out: Path) -> None:
    """Two recorded steps, three prompts each, and their updates again in the same ranks."""
    if distributed.is_main():
        tiny_checkpoint(out / "base")
    distributed.barrier()
    config = tiny_config(*COMMON, *RUNS["batch"], "--log.record=all", "--grpo.num_mini_batches=2")
    policy = load_policy(out / "base", device="cpu")
    GRPOTrainer(policy, config, out / "recorded", tiny_problems(), ParityScorer()).run()
    replay(out / "recorded", 2)
    replay(out / "recorded", 1, ["--grpo.loss_type=gspo"])


def collectives(out: Path) -> None:
    r = distributed.rank()
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), r + 1.0)
    if r:  # a gradient that is missing on rank 0 counts as zero
        model.bias.grad = torch.ones(2)
    distributed.sum_gradients(model.parameters())
    facts = {
        "rank": r,
        "world_size": distributed.world_size(),
        "is_main": distributed.is_main(),
        "sum": float(distributed.all_reduce(torch.tensor(r + 1.0))),
        "max": float(distributed.all_reduce(torch.tensor(float(r)), "max")),
        "dict": distributed.sum_dict({"both": 1.5, f"only{r}": 2.0}),
        "gathered": distributed.gather_objects(["äß" * (3 * r), None, {"x": 0.1 + r}]),
        "nothing": distributed.gather_objects([]),
        "weight": model.weight.grad.tolist(),
        "bias": model.bias.grad.tolist(),
    }
    (out / f"collectives-rank{r}.json").write_text(json.dumps(facts))


def main(out: Path) -> None:
    faulthandler.enable()
    distributed.start()
    collectives(out)
    everything(out)
    balance(out)
    collect(out)
    record(out)
    distributed.barrier()
    distributed.leave(0)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, Path]:
    """The folders of one process and of two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--master-addr", "127.0.0.1", "--master-port", str(port), __file__, str(two)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    everything(one)  # meanwhile
    balance(one)
    collect(one)
    record(one)
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, output[-4000:]
    return one, two


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_as_one(both, name):
    one, two = both
    expected = load_file(one / f"{name}-rank0.safetensors")
    ranks = [load_file(two / f"{name}-rank{r}.safetensors") for r in (0, 1)]
    start = dict(tiny_policy().model.named_parameters())
    moved = 0.0
    for key, x in expected.items():
        assert torch.equal(ranks[0][key], ranks[1][key]), key  # the ranks never drift apart
        change = (x - start[key].detach()).norm()
        error = (ranks[0][key] - x).norm()
        assert error <= 1e-4 * change + 1e-6, (key, error, change)
        moved = max(moved, float(change))
    assert moved > 1e-2
    rows = [read_metrics(folder / name) for folder in both]
    assert len(rows[0]) == len(rows[1]) == 2
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys() - {"train/rank_imbalance", "time/balance"}
        for key, value in a.items():
            if "time" in key or key in ("stage", "tokens_per_second"):
                continue
            if key in ("train/tokens_forwarded", "train/tokens_saved", "train/token_budget"):
                # a prompt that two ranks have is forwarded by both, in other micro-batches
                continue
            if key == "rollout/cache_mib":  # each rank's last block of tails is partly empty
                assert b[key] >= value
                continue
            atol = 2e-5 if key.startswith("logprob_mismatch") else 1e-6
            assert b[key] == pytest.approx(value, rel=1e-4, abs=atol), key


@pytest.mark.parametrize("name", BALANCES)
def test_completions_move_to_where_there_is_less_to_compute(both, name):
    one, *two = (load_file(folder / f"balance-{name}-rank{r}.safetensors")
                 for folder, r in zip((both[0], both[1], both[1]), (0, 0, 1), strict=True))  # fmt: skip
    for key, x in one.items():
        assert torch.equal(two[0][key], two[1][key]), key
        assert (two[0][key] - x).norm() <= 2e-5 * x.norm() + 1e-7, key
    alone = json.loads((both[0] / "balance-rank0.json").read_text())[name]
    ranks = [json.loads((both[1] / f"balance-rank{r}.json").read_text())[name] for r in (0, 1)]
    for key in ("loss", "ratio", "entropy", "logprob_mismatch/max"):
        assert ranks[0][key] == ranks[1][key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6)
    loads = [facts["load"] for facts in ranks]
    assert ranks[0]["imbalance"] == pytest.approx(max(loads) / (sum(loads) / 2))
    assert alone["imbalance"] is None
    if name == "off":
        assert ranks[0]["imbalance"] > 1.7
    else:
        assert ranks[0]["imbalance"] < 1.15


def test_the_ranks_left_out_the_same_steps(both):
    """Those in which neither had signal; in the others one of them had nothing to forward."""
    rows = [row for folder in both for row in read_metrics(folder / "no_signal")]
    assert all(0 < row["train/steps_without_signal"] < 8 for row in rows)


def test_the_ranks_drew_until_their_common_batch_was_full(both):
    rows = [row for folder in both for row in read_metrics(folder / "dynamic")]
    assert [row["rollout/groups_kept"] for row in rows] == [3] * 4
    assert all(row["rollout/groups_generated"] > 3 for row in rows)


def test_the_ranks_agreed_on_what_was_off(both):
    rows = [row for folder in both for row in read_metrics(folder / "mismatch")]
    assert all(row["train/old_logprobs_recomputed"] == 1 for row in rows)


def test_two_ranks_evaluate_as_one(both):
    one, two = both
    (expected,) = [json.loads((one / "evaluation-rank0.json").read_text())]
    for r in (0, 1):
        actual = json.loads((two / f"evaluation-rank{r}.json").read_text())
        for a, b in zip(actual, expected, strict=True):
            assert a.keys() == b.keys()
            assert a.pop("verdicts") == b["verdicts"]
            assert a == pytest.approx({k: v for k, v in b.items() if k != "verdicts"})
    stored = [(f / "evaluation" / "samples.jsonl").read_text().splitlines() for f in both]
    assert stored[0] == stored[1]  # in the same order
    assert [(two / f"aside-{num}-rank{r}").read_text() for num in (5, 3) for r in (0, 1)] == list(
        "0011"
    )
    (aside,) = (two / "evaluation" / "replaced").iterdir()
    assert (aside / "samples.jsonl").read_text().splitlines() == stored[1]


def test_rows_come_in_the_order_of_their_problems(monkeypatch):
    """Problems a b c d e on two ranks: a c e and b d."""
    parts = [[{"problem_id": p, "n": n} for p in share for n in (0, 1)] for share in ("ace", "bd")]
    monkeypatch.setattr(distributed, "gather_objects", lambda rows: parts)
    rows = distributed.gather_problems(parts[0], "abcde")
    assert [(r["problem_id"], r["n"]) for r in rows] == [(p, n) for p in "abcde" for n in (0, 1)]


@pytest.mark.parametrize("name", ["rejection", "cold_start"])
def test_two_ranks_collect_as_one(both, name):
    files = [
        sorted(p for p in (f / name).iterdir() if not p.name.startswith("heartbeat")) for f in both
    ]
    assert [f.name for f in files[0]] == [f.name for f in files[1]] != []
    for a, b in zip(*files, strict=True):
        assert a.read_text() == b.read_text(), a.name


def test_two_ranks_record_and_replay(both, capsys):
    """The same bits in two ranks; in one process the same but for rounding, and it says so."""
    one, two = (folder / "recorded" for folder in both)
    a, b = (read_recording(folder, 1) for folder in (one, two))
    assert (a.ranks, b.ranks) == ([0, 0, 0], [0, 1, 0])
    assert len(b.groups) == len(a.groups)
    for one_group, other_group in zip(a.groups, b.groups, strict=True):
        for c, other in zip(one_group.completions, other_group.completions, strict=True):
            assert other.logprobs == alike(c.logprobs)
            other.logprobs = c.logprobs
        assert one_group == other_group
    again = json.loads((two / "replay-step-000002.json").read_text())
    assert again["is_identical"]
    assert again["versions"]["processes"] == 2
    other = replay(two, 2)
    assert not other["is_identical"]
    assert "processes: 2 -> 1" in other["other_versions"]
    shown = capsys.readouterr()
    assert "metrics differ by" in shown.out
    assert "processes: 2 -> 1" in shown.err  # of the weights before it, too
    for key, value in other["recorded"].items():
        if key not in ("train/tokens_forwarded", "train/tokens_saved", "train/rank_imbalance"):
            atol = 2e-5 if key.startswith("logprob_mismatch") else 1e-6
            assert other["replayed"][key] == pytest.approx(value, rel=1e-4, abs=atol), key
    name = "replay-step-000001-grpo.loss_type=gspo.json"
    diffs = [json.loads((folder / name).read_text())["comparison"] for folder in (one, two)]
    for key in ("gradient", "update"):
        assert diffs[0][key]["cosine"] == pytest.approx(diffs[1][key]["cosine"], abs=1e-4)
    for key in ("tokens", "completions"):  # of both ranks, but for what differs by rounding alone
        places = [{(r["position"], r["sample"], r.get("token")) for r in d[key]
                   if r["difference"] > 1e-4} for d in diffs]  # fmt: skip
        assert places[0]
        assert places[0] == places[1]
        assert {position % 2 for position, *_ in places[1]} == {0, 1}


def test_collectives(both):
    facts = [json.loads((both[1] / f"collectives-rank{r}.json").read_text()) for r in (0, 1)]
    assert [f["rank"] for f in facts] == [0, 1]
    assert [f["is_main"] for f in facts] == [True, False]
    for f in facts:
        assert f["world_size"] == 2
        assert f["sum"] == 3
        assert f["max"] == 1
        assert f["dict"] == {"both": 3.0, "only0": 2.0, "only1": 2.0}
        assert f["gathered"] == [["", None, {"x": 0.1}], ["äß" * 3, None, {"x": 1.1}]]
        assert f["nothing"] == [[], []]
        assert f["weight"] == [[3, 3], [3, 3]]
        assert f["bias"] == [1, 1]


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.start() == (0, 1)
    distributed.barrier()
    assert distributed.is_main()
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    assert distributed.sum_dict({"a": 1.0}) == {"a": 1.0}
    x = torch.tensor([2.0])
    assert distributed.all_reduce(x) is x
    distributed.sum_gradients([torch.nn.Parameter(torch.ones(1))])
    distributed.stop()


def test_gathering_makes_no_object_a_byte(tmp_path):
    """Megabytes of samples are gathered in evaluations; a list of small ints is 8 times as large."""
    code = (
        "import tracemalloc, torch.distributed as dist\n"
        "from r1fast.distributed import gather_objects, leave\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=0, world_size=1)\n"
        "text = 'x' * 4_000_000\n"
        "tracemalloc.start()\n"
        "assert gather_objects(text) == [text]\n"
        "peak = tracemalloc.get_traced_memory()[1]\n"
        "assert peak < 6 * len(text), peak\n"
        "leave(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_more_processes_than_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    with pytest.raises(ValueError, match="prompts_per_step = 4 is less than the 8 processes"):
        GRPOTrainer(tiny_policy(), tiny_config(), tmp_path, tiny_problems(), ParityScorer())


FAILS = """
import sys
from r1fast import __main__ as cli, commands, distributed

def run(*given):
    distributed.start()
    distributed.barrier()
    if distributed.rank() == 1:
        raise ValueError("a reward is not finite")
    distributed.gather_objects(1)

commands.run = run
sys.exit(cli.main(["report", "x"]))
"""


def test_a_rank_whose_neighbour_fails_says_so(tmp_path):
    """What gloo says of it would be read as the reason."""
    (tmp_path / "fails.py").write_text(FAILS)
    (code, _, said), (other, _, reason) = Ranks(tmp_path / "fails.py").wait()
    assert (code, other) == (1, 2), (said, reason)
    assert "r1fast: another rank has ended or does not answer, see what it said" in said
    assert "r1fast: a reward is not finite" in reason


if __name__ == "__main__":
    main(Path(sys.argv[1]))
