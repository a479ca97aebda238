"""A short trace of two tiny runs that a refactor must not move.

After a change that is meant to move it, and after reading why it moved:
    R1FAST_UPDATE_GOLDEN=1 .venv/bin/pytest tests/test_golden.py
"""

import json
import os
from pathlib import Path

import pytest
from tiny import TokenScorer, random_groups, tiny_config, tiny_model, tiny_problems

from r1fast.metrics import read_metrics
from r1fast.policy import Policy
from r1fast.sft import SFTTrainer
from r1fast.trainer import GRPOTrainer
from r1fast.types import Sequence

FILE = Path(__file__).with_name("golden.json")
# an eps above the gradients' rounding, so that AdamW does not magnify it
OVERRIDES = ("--grpo.num_steps=3", "--sft.max_steps=3", "--optim.eps=0.001",
             "--grpo.num_mini_batches=2", "--grpo.ref_refresh_steps=4", "--grpo.token_budget=40",
             "--sft.token_budget=40", "--rollout.temperature=0.8",
             "--optim.min_lr_ratio=0.1", "--optim.warmup_steps=1",
             "--optim.weight_decay=0.01")  # fmt: skip
KEYS = {
    "grpo": ("loss", "reward", "reward_std", "grad_norm", "kl", "entropy", "learning_rate",
             "completions/mean_length", "ratio", "num_tokens"),
    "sft": ("loss", "grad_norm", "entropy", "learning_rate", "num_tokens"),
}  # fmt: skip


class ByteTokenizer:
    """Bytes as ids from 1 on; independent of any tokenizer library's training."""

    eos_token_id, unk_token_id, chat_template = 0, None, None

    def __len__(self):
        return 129

    def encode(self, text, add_special_tokens=True):
        return [b + 1 for b in text.encode("ascii")]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i - 1) for i in ids if i)

    def save_pretrained(self, folder):
        pass


def trace(kind: str, folder: Path) -> list[dict]:
    config = tiny_config(*OVERRIDES)
    policy = Policy(tiny_model(seed=0, std=0.15, vocab_size=129), ByteTokenizer(), [0])
    if kind == "grpo":
        trainer = GRPOTrainer(policy, config, folder, tiny_problems(), TokenScorer())
    else:
        groups = random_groups(10, 2, 129, seed=4)
        sequences = [Sequence(g.prompt_ids, c.token_ids) for g in groups for c in g.completions]
        trainer = SFTTrainer(policy, config, folder, sequences)
    trainer.run()
    return [{key: row[key] for key in KEYS[kind]} for row in read_metrics(folder)]


@pytest.mark.parametrize("kind", KEYS)
def test_trace(kind, tmp_path):
    actual = trace(kind, tmp_path)
    golden = json.loads(FILE.read_text()) if FILE.exists() else {}
    if os.environ.get("R1FAST_UPDATE_GOLDEN"):
        FILE.write_text(json.dumps(golden | {kind: actual}, indent=1) + "\n")
        return
    assert len(actual) == len(golden[kind]) == 3
    for step, (row, expected) in enumerate(zip(actual, golden[kind], strict=True), 1):
        for key in KEYS[kind]:
            assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), (step, key)
