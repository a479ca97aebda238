"""What `state.json` of a training checkpoint holds, and the one place where it is checked.

Its hash says that it is as it was written, not by whom: a person may have edited both.
"""

from r1fast.checkpoint import MEASURE, Checkpoint
from r1fast.checkpoint_layout import STATE
from r1fast.json_fields import (
    COUNT,
    FINITE,
    FINITE_OR_NULL,
    FLAG,
    NUMBER,
    OBJECT,
    POSITIVE,
    ROW,
    TEXT,
    check_fields,
)

REFERENCE = "reference"  # the tensors of a reference policy, whose version is then in the state
_POINT = {
    "step": COUNT, "pass_at_1": FINITE, "pass_error": FINITE_OR_NULL, "reward": FINITE, "reward_error": FINITE,
}  # fmt: skip
FIELDS = {
    "stage?": TEXT,
    "data?": TEXT,  # digest of what is trained on
    "optimizer_step": COUNT,
    "num_tokens": COUNT,
    "token_budget?": {"num_tokens": POSITIVE, "was_halved": FLAG},
    "config": {"model": OBJECT, "lora?": OBJECT, "grpo?": OBJECT, "sft?": OBJECT},
    "tokenizer?": OBJECT,
    "world_size?": POSITIVE,
    "parallel?": TEXT,  # who held what of the model
    "starts_from?": TEXT,  # the model
    "base?": TEXT,  # of adapters: digest of the weights below them, and where those were
    "base_path?": TEXT,
    "reference_version?": COUNT,
    "monitor?": {"points": [_POINT], "rewards": [FINITE]},  # hacking_monitor.py
    "unfinished?": ROW,  # the row of a step whose evaluation was given up
    f"{MEASURE}?": {"metric": TEXT, "value": NUMBER},  # of checkpoint.keep_best
}


def checked(saved: Checkpoint) -> Checkpoint:
    """`saved`, whose state is a training stage's. Raises ValueError for one that nobody has written like this."""
    needs = {"reference_version": COUNT} if REFERENCE in saved.names() else {}
    if "unfinished" in saved.state:
        needs["unfinished"] = {"step_time": FINITE}
    remedy = (
        f"it was not written by r1fast, or edited since: put the file back, or remove {saved.path.name} "
        "to go on from the checkpoint before it"
    )
    for table in (FIELDS, needs):
        check_fields(saved.state, table, saved.path / STATE, remedy)
    return saved
