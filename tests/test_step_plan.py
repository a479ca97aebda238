"""Mini-batches of a step: every completion once, the same on all ranks, denominators as stated."""

import pytest
from tiny import TokenScorer, random_groups, tiny_config, tiny_policy, tiny_problems

from r1fast.step_plan import Fact, StepPlan
from r1fast.trainer import GRPOTrainer

G = 4


def make_plan(num: int, *overrides, masked=(), silent=(), drops=True, reverse=False) -> StepPlan:
    """Four groups; completion (p, i) has 10 p + i + 1 tokens."""
    facts = {
        (p, i): Fact(0, 5, 10 * p + i + 1, (p, i) not in silent, (p, i) in masked)
        for p in range(4)
        for i in range(G)
    }
    if reverse:  # as another rank may gather them
        facts = dict(reversed(facts.items()))
    config = tiny_config(f"--grpo.num_mini_batches={num}", *overrides)
    return StepPlan(facts, config.grpo, drops=drops)


@pytest.mark.parametrize("num", [1, 2, 3, 5])
def test_mini_batches_cover_the_rollout_once(num):
    plan = make_plan(num)
    keys = [(p, i) for p in range(4) for i in range(G)]
    parts = [part.keys for part in plan.mini_batches("0/0")]
    assert len(parts) == num
    assert sorted(sum(parts, [])) == keys
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert (sum(parts, []) != keys) == (num > 1)  # at random
    assert parts == [part.keys for part in make_plan(num, reverse=True).mini_batches("0/0")]
    if num > 1:
        assert parts != [part.keys for part in plan.mini_batches("1/0")]
        assert parts != [part.keys for part in plan.mini_batches("0/1")]


def test_whole_groups_stay_together():
    parts = make_plan(2, "--grpo.whole_groups=true").mini_batches("0/0")
    assert [len(part.keys) for part in parts] == [8, 8]
    positions = [{p for p, _ in part.keys} for part in parts]
    assert [len(p) for p in positions] == [2, 2]
    assert positions != [{0, 1}, {2, 3}]  # at random
    with pytest.raises(ValueError, match=r"at most prompts_per_step \(whole_groups\) = 4, got 5"):
        make_plan(5, "--grpo.whole_groups=true")
    assert len(make_plan(5).mini_batches("0/0")) == 5


def test_what_is_masked_is_in_no_count_of_tokens_and_what_is_silent_is():
    masked, silent = {(1, 0), (2, 3)}, {(0, 0), (1, 0), (3, 1)}
    plan = make_plan(1, masked=masked, silent=silent)
    (part,) = plan.mini_batches("0/0")
    assert len(part.keys) == 16
    assert set(part.keys) - set(part.live) == masked | silent
    assert part.num_tokens == plan.num_tokens() - 11 - 24
    (part,) = make_plan(1, masked=masked, silent=silent, drops=False).mini_batches("0/0")
    assert set(part.keys) - set(part.live) == masked


def test_nothing_at_all_is_as_many_empty_mini_batches():
    config = tiny_config("--grpo.num_mini_batches=3").grpo
    parts = StepPlan({}, config, drops=True).mini_batches("0/0")
    assert [(part.keys, part.live, part.num_tokens) for part in parts] == [([], [], 0)] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, c: c.logprobs.pop(), r"'g1', completion 2: {short} log-probabilities for {n} tokens"),
        (lambda g, c: c.logprobs.append(-1.0), r"'g1', completion 2: {long} log-probabilities for {n} "),
        (lambda g, c: c.token_ids.__setitem__(-1, 10**6), r"'g1', completion 2: token {last} has the id 10+; "
                                                         r"the model's are 0 to 319"),
        (lambda g, c: c.token_ids.__setitem__(0, -5), r"'g1', completion 2: token 0 has the id -5"),
        (lambda g, c: c.token_ids.__setitem__(0, 320), r"'g1', completion 2: token 0 has the id 320"),
        (lambda g, c: (c.token_ids.clear(), c.logprobs.clear()), r"'g1', completion 2 is empty"),
        (lambda g, c: g.prompt_ids.append(320), r"'g1', prompt: token {prompt} has the id 320"),
        (lambda g, c: g.prompt_ids.clear(), r"'g1', prompt is empty"),
        (lambda g, c: g.completions.pop(), r"'g1' has 3 completions, rollout.num_generations is 4"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("has_signal", [True, False])
def test_malformed_groups_are_named(tmp_path, change, message, has_signal):
    """Also where the completion would have been dropped, its advantage being 0."""
    policy = tiny_policy()
    assert policy.model.spec.vocab_size == 320
    trainer = GRPOTrainer(
        policy, tiny_config("--grpo.kl_coef=0"), tmp_path, tiny_problems(), TokenScorer()
    )
    groups = random_groups(3, 4, 320)
    for group in groups:
        for i, reward in enumerate(group.rewards):
            reward.total = float(has_signal * i)
    n, prompt = len(groups[1].completions[2].token_ids), len(groups[1].prompt_ids)
    change(groups[1], groups[1].completions[2])
    named = message.format(n=n, short=n - 1, long=n + 1, last=n - 1, prompt=prompt)
    with pytest.raises(ValueError, match=f"^problem {named}"):
        trainer.update(groups, 0)
    assert trainer.optimizer_step == 0
