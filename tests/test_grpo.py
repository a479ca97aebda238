import math

import pytest
import torch
from tiny import tiny_config

from r1fast.batch import pack
from r1fast.grpo import grpo_objective, loss_options, rollout_advantages, token_weights
from r1fast.kernels.fused_grpo_loss import fused_grpo_loss
from r1fast.types import Completion, Problem, Reward, RolloutGroup, Sequence

V, D, G, MAX_TOKENS = 23, 6, 3, 12


def make_rollout(seed=0, num_groups=4):
    """(groups with rewards, reference log-probabilities) of random tokens."""
    g = torch.Generator().manual_seed(seed)

    def integers(low, high, n):
        return torch.randint(low, high, (n,), generator=g).tolist()

    groups, ref = [], []
    for n in range(num_groups):
        completions = []
        for length in integers(1, MAX_TOKENS, G):
            # around log(1 / V), wide enough for tokens beyond both clips
            old = (-3.0 + 0.8 * torch.randn(length, generator=g)).tolist()
            completions.append(Completion(integers(0, V, length), old, "stop"))
        ref.append([(-3.0 + 0.5 * torch.randn(len(c.token_ids), generator=g)).tolist()
                    for c in completions])  # fmt: skip
        rewards = [Reward(float(r), {}, None) for r in integers(0, 3, G)]
        if n == 0:
            rewards = [Reward(1.0, {}, None)] * G  # a group without a gradient but for the KL
        groups.append(RolloutGroup(Problem("?", "1"), integers(0, V, 1 + n), completions, rewards))
    return groups, ref


def make_leaves(dtype=torch.float32):
    """A model of one token's memory: hidden state of position t = table[token t]."""
    g = torch.Generator().manual_seed(3)
    table = torch.randn(V, D, generator=g, dtype=torch.float64)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (table * 0.5, weight * 0.5)]


def engine_loss(groups, ref, config, budget):
    """The way the trainer goes: advantages, weights, packing, tiles. Returns loss, gradients."""
    table, weight = make_leaves()
    advantages = rollout_advantages(groups, config.grpo)
    sequences = [
        Sequence(group.prompt_ids, c.token_ids, c.logprobs, ref[n][i], advantages[n][i])
        for n, group in enumerate(groups)
        for i, c in enumerate(group.completions)
    ]
    lengths = [len(s.completion_ids) for s in sequences]
    weights = token_weights(
        config.grpo.loss_type,
        lengths,
        num_sequences=len(sequences),
        num_tokens=sum(lengths),
        max_completion_tokens=MAX_TOKENS,
    )
    total = 0.0
    for batch in pack(sequences, budget, weights):
        loss, _ = grpo_objective(
            table[batch.input_ids][batch.target_rows],
            weight,
            batch,
            config.grpo,
            temperature=config.rollout.temperature,
            num_tokens=sum(lengths),
        )
        loss.backward()
        total += float(loss.detach())
    return total, table.grad, weight.grad


def paper_loss(groups, ref, config):
    """DeepSeek-R1, equations 1 to 3, token by token in float64 and without packing."""
    c = config.grpo
    table, weight = make_leaves(torch.float64)
    eps_low, eps_high, beta = c.clip_eps_low, c.clip_eps_high, c.kl_coef
    terms, num_tokens = [], 0
    for n, group in enumerate(groups):
        rewards = [r.total for r in group.rewards]
        mean = sum(rewards) / G
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / G)
        for i, completion in enumerate(group.completions):
            A = (rewards[i] - mean) / (std + c.std_eps)
            whole = group.prompt_ids + completion.token_ids
            sequence = 0.0
            for t, token in enumerate(completion.token_ids):
                before = whole[len(group.prompt_ids) + t - 1]
                logits = table[before] @ weight.T / config.rollout.temperature
                logp = logits[token] - torch.logsumexp(logits, 0)
                r = torch.exp(logp - completion.logprobs[t])
                clipped = torch.clamp(r, 1 - eps_low, 1 + eps_high)
                surrogate = torch.min(r * A, clipped * A)
                d = ref[n][i][t] - logp
                kl = torch.exp(d) - d - 1
                sequence = sequence + surrogate - beta * kl
            num_tokens += len(completion.token_ids)
            scale = {"grpo": len(completion.token_ids), "dapo": 1, "dr_grpo": MAX_TOKENS}
            terms.append(sequence / scale[c.loss_type])
    count = num_tokens if c.loss_type == "dapo" else len(terms)
    loss = -sum(terms) / count
    loss.backward()
    return float(loss.detach()), table.grad, weight.grad


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("clip", [(0.2, 0.28), (10.0, 10.0)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_objective_and_gradient_are_the_papers(loss_type, clip, temperature):
    groups, ref = make_rollout()
    config = tiny_config(
        f"--grpo.loss_type={loss_type}",
        f"--grpo.clip_eps_low={clip[0]}",
        f"--grpo.clip_eps_high={clip[1]}",
        f"--rollout.temperature={temperature}",
    )
    exact = paper_loss(groups, ref, config)
    for budget in (17, 1000):
        loss, dtable, dweight = engine_loss(groups, ref, config, budget)
        assert loss == pytest.approx(exact[0], rel=1e-5)
        for actual, expected in ((dtable, exact[1]), (dweight, exact[2])):
            assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_both_clips_bind_in_the_test_above():
    groups, ref = make_rollout()
    config = tiny_config("--grpo.clip_eps_low=0.2", "--grpo.clip_eps_high=0.28")
    free = tiny_config("--grpo.clip_eps_low=100", "--grpo.clip_eps_high=100")
    only_low = tiny_config("--grpo.clip_eps_low=0.2", "--grpo.clip_eps_high=100")
    losses = {paper_loss(groups, ref, c)[0] for c in (config, free, only_low)}
    assert len(losses) == 3


def test_token_weights_by_definition():
    lengths = [4, 1, 5]
    kwargs = {"num_sequences": 3, "num_tokens": 10, "max_completion_tokens": 8}
    assert token_weights("grpo", lengths, **kwargs) == [1 / 12, 1 / 3, 1 / 15]
    assert token_weights("dapo", lengths, **kwargs) == [1 / 10] * 3
    assert token_weights("dr_grpo", lengths, **kwargs) == [1 / 24] * 3
    # half of the sequences on another rank: the same weights
    assert token_weights("grpo", lengths[:1], **kwargs) == [1 / 12]
    assert token_weights("grpo", [], **kwargs) == []
    assert token_weights("gspo", lengths, **kwargs) == token_weights("grpo", lengths, **kwargs)
    assert token_weights("cispo", lengths, **kwargs) == [1 / 10] * 3
    assert token_weights("luspo", lengths, **kwargs) == [1 / 3] * 3
    with pytest.raises(ValueError, match=r"must be one of grpo, dapo, .*, got 'bnpo'"):
        token_weights("bnpo", lengths, **kwargs)


def test_weights_sum_to_one():
    lengths = [3, 7, 2, 30]
    kwargs = {"num_sequences": 4, "num_tokens": 42, "max_completion_tokens": 30}
    for kind in ("grpo", "dapo"):
        weights = token_weights(kind, lengths, **kwargs)
        assert sum(n * w for n, w in zip(lengths, weights, strict=True)) == pytest.approx(1)


def test_without_kl_the_reference_is_not_read():
    groups, ref = make_rollout()
    config = tiny_config("--grpo.kl_coef=0")
    nan = [[[math.nan] * len(x) for x in row] for row in ref]
    loss, dtable, _ = engine_loss(groups, nan, config, 1000)
    assert math.isfinite(loss)
    assert dtable.isfinite().all()
    assert loss == pytest.approx(paper_loss(groups, ref, config)[0], rel=1e-5)


def test_metric_sums_by_hand():
    config = tiny_config("--grpo.clip_eps_low=0.2", "--grpo.clip_eps_high=0.28").grpo
    old = [math.log(p) for p in (0.5, 0.5, 0.5, 0.5)]
    sequences = [
        Sequence([1], [2, 3], old[:2], [math.log(0.25)] * 2, advantage=1.0),
        Sequence([1], [2, 3], old[:2], [math.log(0.25)] * 2, advantage=-1.0),
    ]
    (batch,) = pack(sequences, 100, [1.0, 1.0])
    ratios = torch.tensor([1.4, 0.5, 1.4, 0.5])  # high clips the first, low the last
    hidden = torch.zeros(len(batch.target_ids), 4)  # logits, through a head that is the identity
    p = (0.5 * ratios)[:, None]
    hidden[:] = torch.log((1 - p) / 3)
    hidden[torch.arange(4), batch.target_ids] = p[:, 0].log()
    loss, sums = grpo_objective(hidden, torch.eye(4), batch, config, temperature=1.0, num_tokens=4)
    torch.testing.assert_close(sums["logprobs"], p[:, 0].log())
    assert sums["num_tokens"] == 4
    assert sums["clip_ratio/high_mean"] == sums["clip_ratio/low_mean"] == 1
    assert sums["clip_ratio/region_mean"] == 2
    assert sums["ratio"] == pytest.approx(3.8)
    kl = [0.25 / (0.5 * r) - math.log(0.25 / (0.5 * r)) - 1 for r in ratios.tolist()]
    assert sums["kl"] == pytest.approx(sum(kl), rel=1e-5)
    surrogate = 1.28 + 0.5 - 1.4 - 0.8
    assert loss == pytest.approx(0.05 * sum(kl) - surrogate, rel=1e-5)
    assert not any(x.requires_grad for x in sums.values())


def test_rollout_advantages():
    groups, _ = make_rollout()
    rows = rollout_advantages(groups, tiny_config().grpo)
    assert rows[0] == [0.0] * G
    assert all(abs(sum(row)) < 1e-9 for row in rows)
    none = rollout_advantages(groups, tiny_config("--grpo.scale_rewards=none").grpo)
    totals = [r.total for r in groups[1].rewards]
    assert none[1] == pytest.approx([t - sum(totals) / G for t in totals])
    groups[1].rewards.pop()
    groups[1].completions.pop()
    with pytest.raises(ValueError, match="groups must have 3 rewards each, got one of 2"):
        rollout_advantages(groups, tiny_config().grpo)
    assert rollout_advantages([], tiny_config().grpo) == []


def test_the_decoupled_objective_by_its_formula():
    """Clip of policy / proximal, weighed by proximal / behaviour, at most C (docs/grpo.md, eq. 32), in float64."""
    g = torch.Generator().manual_seed(5)
    lengths, vocabulary, width, tau, C, eps = [4, 1, 7], 11, 5, 0.7, 1.5, 0.2
    T = sum(lengths)
    hidden = torch.randn(T, width, generator=g, dtype=torch.float64).requires_grad_()
    head = torch.randn(vocabulary, width, generator=g, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, vocabulary, (T,), generator=g)

    def policy() -> torch.Tensor:
        logits = hidden @ head.T / tau
        return logits.log_softmax(-1)[torch.arange(T), targets]

    now = policy().detach()
    proximal = now + 0.4 * torch.randn(T, generator=g, dtype=torch.float64)
    behaviour = proximal + 0.6 * torch.randn(T, generator=g, dtype=torch.float64)
    advantages = torch.tensor([1.3, -0.4, -0.9], dtype=torch.float64)
    A = advantages.repeat_interleave(torch.tensor(lengths))
    u, weight = (policy() - proximal).exp(), (proximal - behaviour).exp().clamp(max=C)
    terms = weight * torch.minimum(u * A, u.clamp(1 - eps, 1 + eps) * A)
    expected = -sum(part.mean() for part in terms.split(lengths)) / len(lengths)
    assert 0 < (weight == C).sum() < T  # some are bounded,
    assert 0 < ((u - 1).abs() > eps).sum() < T  # some are outside of the clip
    gradients = torch.autograd.grad(expected, (hidden, head))

    words = ["--grpo.rollout_correction=token_truncate", f"--grpo.rollout_clip_max={C}"]
    options = loss_options(tiny_config(*words, "--grpo.kl_coef=0").grpo)
    loss, _ = fused_grpo_loss(
        hidden, head, targets, advantages, cu_seqlens=torch.tensor([0, 4, 5, 12]),
        old_logprobs=proximal, rollout_logprobs=behaviour, temperature=tau, **options,
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(hidden.grad, gradients[0], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(head.grad, gradients[1], rtol=1e-10, atol=1e-13)
