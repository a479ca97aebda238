"""Work stealing between two gloo ranks, of which one is slow. This file is also their program."""

import json
import sys
import time
from pathlib import Path

import pytest
from ranks import Ranks
from test_evaluate import ParityScorer
from tiny import tiny_config, tiny_policy, tiny_problems

from r1fast import distributed
from r1fast.interrupt import Stopped
from r1fast.metrics import read_metrics
from r1fast.rollout.stealing import Claims
from r1fast.trainer import GRPOTrainer

POSITIONS, GROUP = 12, 4
CONFIG = (
    f"--grpo.prompts_per_step={POSITIONS}", f"--rollout.num_generations={GROUP}",
    "--grpo.num_steps=3", "--rollout.batch_invariant=true",
)  # fmt: skip
CASES = {  # name -> (slots, seconds that a round of the second rank takes)
    "even": (GROUP, 0.0),
    "slow": (GROUP, 0.4),
    "room for all": (POSITIONS * GROUP, 0.4),  # nothing waits, so there is nothing to take
}


def trainer_of(folder: Path, slots: int, *overrides: str) -> GRPOTrainer:
    config = tiny_config(*CONFIG, f"--rollout.max_batch_size={slots}", *overrides)
    return GRPOTrainer(tiny_policy(), config, folder, tiny_problems(16), ParityScorer())


def facts_of(groups) -> dict:
    return {
        str(g.position): [g.problem.id, [c.token_ids for c in g.completions],
                          [c.logprobs for c in g.completions]]
        for g in groups
    }  # fmt: skip


def main(out: Path) -> None:
    distributed.start()
    rank, facts = distributed.rank(), {}
    for name, (slots, seconds) in CASES.items():
        trainer = trainer_of(out / name, slots, "--rollout.work_stealing=true")
        step = trainer.engine.step

        def slowly(*args, step=step, seconds=seconds):
            time.sleep(seconds * rank)
            return step(*args)

        trainer.engine.step = slowly
        facts[name] = [facts_of(trainer.rollout(n)) for n in (0, 1)]
        distributed.barrier()
    trainer = trainer_of(out / "given up", GROUP, "--rollout.work_stealing=true")
    if rank == 1:  # it does not come to its claims, and the numbers of the steps go apart
        Claims.numbers += 5
        trainer.engine.step = stopped
        try:
            trainer.rollout(0)
        except Stopped:
            stats = trainer.engine.stats
            facts["given up"] = stats.num_running + stats.num_waiting
        del trainer.engine.step
    else:
        trainer.rollout(0)
    facts["after"] = [facts_of(trainer.rollout(1))]
    for key in ("--rollout.work_stealing=true", "--rollout.work_stealing=false"):
        trainer_of(out / f"run {key[-4:]}", GROUP, key).run()
    (out / f"rank{rank}.json").write_text(json.dumps(facts))
    distributed.barrier()
    distributed.leave(0)


def stopped(*args):
    raise Stopped


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stealing")
    Ranks(__file__, folder).succeed()
    return folder


@pytest.fixture(scope="module")
def ranks(out) -> list[dict]:
    return [json.loads((out / f"rank{n}.json").read_text()) for n in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[dict]:
    """Two steps of one process that has room for all."""
    trainer = trainer_of(tmp_path_factory.mktemp("alone"), POSITIONS * GROUP)
    return [facts_of(trainer.rollout(n)) for n in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_each_group_is_sampled_once_and_as_anywhere(ranks, alone, name):
    for step in (0, 1):
        parts = [facts[name][step] for facts in ranks]
        assert not parts[0].keys() & parts[1].keys()
        assert parts[0] | parts[1] == alone[step]


def test_a_slow_rank_is_helped(ranks):
    for step in range(2):
        of_slow = {int(p) for p in ranks[1]["slow"][step]}
        assert 1 <= len(of_slow) <= POSITIONS // 2 - 2
        assert of_slow < set(range(1, POSITIONS, 2))  # nothing of the other's


def test_what_fits_at_once_stays_where_it_is(ranks):
    for step in (0, 1):
        for rank in (0, 1):
            assert sorted(map(int, ranks[rank]["room for all"][step])) == list(range(rank, POSITIONS, 2))  # fmt: skip


def test_after_a_step_that_one_rank_gave_up(ranks, alone):
    assert ranks[1]["given up"] == 0  # its requests are gone
    parts = [facts["after"][0] for facts in ranks]
    assert parts[0] | parts[1] == alone[1]
    assert not parts[0].keys() & parts[1].keys()


def test_a_run_learns_the_same(out):
    """Up to the order in which gradients are added up."""
    stealing, fixed = (
        read_metrics(out / f"run {key}" / "metrics.jsonl") for key in ("true", "alse")
    )
    for a, b in zip(stealing, fixed, strict=True):
        assert a["reward"] == b["reward"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["rollout/stolen"] >= 0
        assert "rollout/stolen" not in b


def test_what_balances_by_itself_refuses_it():
    for key, why in (
        ("--rollout.engine=vllm", "with rollout.engine = vllm"),
        ("--grpo.dynamic_sampling=signal", r"with grpo\.dynamic_sampling"),
    ):
        with pytest.raises(ValueError, match=rf"rollout\.work_stealing must be false {why}"):
            tiny_config("--rollout.work_stealing=true", "--rollout.vllm.servers=['http://a']", key)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
