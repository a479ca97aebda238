"""r1fast's LigerFusedLinearGRPOLoss against Liger's own: loss, metrics and every gradient."""

import inspect

import pytest
import torch

from r1fast.integrations.liger import LigerFusedLinearGRPOLoss

chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")

B, C, D, V = 5, 7, 16, 61
TOKEN_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
SEQUENCE_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
DIFFERENTIABLE = ("_input", "lin_weight", "bias")


def make_batch(seed=0, *, padded=True, dtype=torch.float32) -> dict:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    lengths = torch.tensor([7, 3, 1, 6, 7]) if padded else torch.full((B,), C)
    return {
        "_input": randn(B, C, D).to(dtype),
        "lin_weight": (randn(V, D) / 2).to(dtype),
        "bias": (randn(V) / 2).to(dtype),
        "selected_token_ids": torch.randint(V, (B, C), generator=g),
        "attention_mask": (torch.arange(C) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.0, -0.7, 0.0, 0.3, -1.2]),
        "old": 0.5 * randn(B, C) - 4,
        "ref": 0.5 * randn(B, C) - 4,
        "ref_input": randn(B, C, D).to(dtype),
        "ref_weight": (randn(V, D) / 2).to(dtype),
        "ratio": 0.5 + torch.rand(B, C, generator=g),
    }


def run(cls, batch, *, given=(), scale=1.0, autocast=False, frozen=(), **options):
    """(loss, metrics, gradients). `given`: which of old, ref, ref_input, ratio, num_items."""
    batch = dict(batch)
    leaves = {
        n: batch.pop(n).clone().requires_grad_(n not in frozen)
        for n in DIFFERENTIABLE
        if batch.get(n) is not None
    }
    names = {"old": "old_per_token_logps", "ref": "ref_per_token_logps", "ratio": "vllm_is_ratio"}
    arguments = {n: batch[n] for n in ("selected_token_ids", "attention_mask", "advantages")} | {
        names[n]: batch[n] for n in names if n in given
    }
    if "ref_input" in given:
        arguments |= {"ref_input": batch["ref_input"], "ref_weight": batch["ref_weight"]}
    if "num_items" in given:
        arguments["num_items_in_batch"] = torch.tensor(51)
    loss_of = cls(compiled=False, use_ref_model="ref" in given or "ref_input" in given, **options)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, metrics = loss_of(**leaves, **arguments)
    (scale * loss).backward()
    return loss.detach(), metrics, {n: x.grad for n, x in leaves.items() if n not in frozen}


def compare(batch, tolerance=2e-5, **kwargs):
    theirs = run(chunked_loss.LigerFusedLinearGRPOLoss, batch, **kwargs)
    ours = run(LigerFusedLinearGRPOLoss, batch, **kwargs)
    assert type(ours[1]) is type(theirs[1])
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours[1], theirs[1], rtol=tolerance, atol=tolerance)
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in theirs[2].items():
        assert ours[2][name].dtype == gradient.dtype
        size = gradient.float().norm() + 1e-6
        assert (ours[2][name].float() - gradient.float()).norm() < tolerance * size, name
    return ours


@pytest.mark.parametrize("given", [(), ("old",), ("old", "ref", "ratio"), ("ref_input",)], ids=str)
@pytest.mark.parametrize(
    ("loss_type", "level"),
    [*((t, "token") for t in TOKEN_LOSSES), *((t, "sequence") for t in SEQUENCE_LOSSES)],
)
def test_every_loss_type_as_liger_computes_it(loss_type, level, given):
    # Liger's luspo adds up padding too, once its loss is one number a token
    batch = make_batch(padded=loss_type != "luspo")
    high = 1.3 if loss_type == "cispo" else 0.28
    _, metrics, _ = compare(
        batch, given=given, loss_type=loss_type, importance_sampling_level=level,
        max_completion_length=9, epsilon_high=high, temperature=0.9,
        beta=0.1 if "ref" in given or "ref_input" in given else 0.0,
    )  # fmt: skip
    assert len(metrics) == 1 + ("ref" in given or "ref_input" in given)


@pytest.mark.parametrize("delta", [None, 1.1])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("ratio", ["(B,)", "(B, 1)", "(B, C)"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_options_as_liger_computes_them(delta, level, ratio, unbiased):
    batch = make_batch(1)
    batch["ratio"] = {
        "(B,)": batch["ratio"][:, 0], "(B, 1)": batch["ratio"][:, :1], "(B, C)": batch["ratio"],
    }[ratio]  # fmt: skip
    compare(
        batch, given=("old", "ref", "ratio", "num_items"), delta=delta, beta=0.2,
        importance_sampling_level=level, use_bias_correction_kl=unbiased, scale=0.25,
    )  # fmt: skip


@pytest.mark.parametrize("loss_type", ["cispo", "sapo"])
def test_unbiased_kl_of_soft_losses(loss_type):
    compare(
        make_batch(2), given=("old", "ref"), loss_type=loss_type, use_bias_correction_kl=True,
        epsilon_high=2.0, sapo_temperature_pos=0.7, sapo_temperature_neg=1.4,
    )  # fmt: skip


@pytest.mark.parametrize("ratio", [0, 1, 2])
def test_vespo_options(ratio):
    batch = make_batch(3)
    batch["ratio"] = (batch["ratio"][:, 0], batch["ratio"][:, :1], batch["ratio"])[ratio]
    batch["ratio"] = torch.where(
        torch.arange(C) < batch["attention_mask"].sum(1, keepdim=True), batch["ratio"], 1.0
    ) if ratio == 2 else batch["ratio"]  # fmt: skip
    compare(
        batch, given=("old", "ref", "ratio"), loss_type="vespo", beta=0.1, vespo_k_pos=1.5,
        vespo_lambda_pos=2.5, vespo_k_neg=2.0, vespo_lambda_neg=1.0,
    )  # fmt: skip


def test_no_bias_and_frozen_head():
    compare(make_batch() | {"bias": None}, given=("old",), frozen=("lin_weight",), beta=0.0)


@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_dtypes(autocast):
    # float32 weights under bfloat16 hidden states, or autocast: the gradient of the weight is float32
    batch = make_batch()
    if not autocast:
        batch["_input"] = batch["_input"].bfloat16()
    ours = compare(batch, tolerance=3e-2, given=("old",), beta=0.0, autocast=autocast)
    weight_gradient = ours[2]["lin_weight"]
    assert weight_gradient.dtype == torch.float32
    assert not torch.equal(weight_gradient, weight_gradient.bfloat16().float())


def test_luspo_counts_completion_tokens_only():
    batch = make_batch(4)
    _, _, expected = run(LigerFusedLinearGRPOLoss, batch, loss_type="luspo", beta=0.0)
    for n in range(B):  # each sequence by itself, without its padding
        length = int(batch["attention_mask"][n].sum())
        one = dict(batch)
        for name in ("_input", "selected_token_ids", "attention_mask"):
            one[name] = batch[name][n : n + 1, :length]
        one["advantages"] = batch["advantages"][n : n + 1]
        theirs = run(chunked_loss.LigerFusedLinearGRPOLoss, one, loss_type="luspo", beta=0.0)
        torch.testing.assert_close(
            expected["_input"][n : n + 1, :length] * B, theirs[2]["_input"], rtol=1e-4, atol=1e-5
        )


def test_masked_tokens_are_never_read():
    batch = make_batch(5)
    expected = run(LigerFusedLinearGRPOLoss, batch, given=("old", "ref", "ratio"))
    outside = batch["attention_mask"] == 0
    for name in ("_input", "old", "ref", "ratio"):
        batch[name] = batch[name].clone()
        batch[name][outside] = torch.nan
    batch["selected_token_ids"] = batch["selected_token_ids"].masked_fill(outside, -100)
    actual = run(LigerFusedLinearGRPOLoss, batch, given=("old", "ref", "ratio"))
    assert torch.equal(actual[0], expected[0])
    for name, gradient in expected[2].items():
        assert torch.equal(actual[2][name], gradient), name


def test_empty_mask_is_a_zero_loss():
    batch = make_batch()
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    loss, metrics, gradients = run(LigerFusedLinearGRPOLoss, batch, given=("ref",))
    assert [loss.item(), *(m.item() for m in metrics)] == [0, 0, 0]
    assert gradients["_input"].abs().sum() == 0
    assert gradients["lin_weight"].abs().sum() == 0


def test_signatures_are_ligers():
    theirs = chunked_loss.LigerFusedLinearGRPOLoss
    for name in ("__init__", "forward"):
        ours, expected = (
            [(p.name, p.default) for p in inspect.signature(getattr(c, name)).parameters.values()]
            for c in (LigerFusedLinearGRPOLoss, theirs)
        )
        assert ours == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of grpo, .*, got 'ppo'"),
        ({"importance_sampling_level": "word"}, "must be token or sequence, got 'word'"),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, "defined per token"),
        ({"delta": 0.0}, "delta must be positive, got 0.0"),
        ({"loss_type": "dr_grpo"}, "needs max_completion_length"),
        ({"given": ()}, "use_ref_model=False does without"),
        ({"given": ("ref_input",), "ref_weight": None}, "ref_input needs ref_weight"),
        ({"ratio": torch.ones(B, 2)}, r"vllm_is_ratio must be \(5,\), .*, got \(5, 2\)"),
        ({"attention_mask": torch.ones(B, C + 1)}, r"must be \(B, C\) = \(5, 7\)"),
        ({"loss_type": "vespo", "use_bias_correction_kl": True}, "vespo with use_bias_correction"),
    ],
)
def test_bad_input(options, message):
    batch = make_batch()
    options = {"given": ("old", "ref", "ratio")} | options
    for name in [n for n in options if n in batch]:
        batch[name] = options.pop(name)
    if options["given"] == ():
        with pytest.raises(ValueError, match=message):
            LigerFusedLinearGRPOLoss()(
                *(batch[n] for n in ("_input", "lin_weight", "selected_token_ids")),
                batch["attention_mask"], batch["advantages"],
            )  # fmt: skip
        return
    with pytest.raises(ValueError, match=message):
        run(LigerFusedLinearGRPOLoss, batch, **options)
