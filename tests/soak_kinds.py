"""The faults that the soak puts into runs: what each is, how a run may end by it, and whether it may change a bit."""

import random
import signal
from dataclasses import dataclass

from faults import DAMAGES

TERM, INT, USR1, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL
GOES_ON = None
STOPPED, HUNG = 130, 75  # docs/reliability.md
FILLS_PAGE = 600  # seconds of a soak whose table goes into the page
SAVE_OPERATIONS = 60  # about as many as a save of these runs has


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault. `how`: by a signal, by damage to the newest checkpoint after a kill, or by what the
    run does itself (soak_child.py)."""

    name: str
    how: str
    ends: tuple[int | None, ...]  # exit codes that are right; None: the run goes on
    signals: tuple[int, ...] = ()
    exact: bool = True  # the resumed run is to the bit what it would have been
    saves_fail: bool = False  # so that more work than that of one interval may be lost
    is_limit: bool = False  # it lasts for a while, and so may any number of saves fail
    stage: str = ""  # where alone it can happen
    training: bool = False  # not in an evaluation, or while sampling
    said: str = ""  # what the log must hold then: this run's, or for damage the next one's
    slow: bool = False  # not for a short soak

    def order(self, rng: random.Random) -> dict:
        """What a run is told to do to itself."""
        return {
            "kind": self.name,
            "seed": rng.random(),
            "point": rng.randint(1, SAVE_OPERATIONS),
            "seconds": rng.choice([-86400, 86400]) if "clock" in self.name else rng.uniform(0.5, 2),
            "lasts": self.name.endswith("for good"),
        }


def _signal(name: str, *numbers: int, ends: tuple = (STOPPED,), **more) -> Kind:
    return Kind(name, "signal", ends, numbers, **more)


def _child(name: str, *ends: int | None, **more) -> Kind:
    return Kind(name, "child", ends or (GOES_ON,), **more)


FAILED = "reward 'soak' failed"
KINDS = (
    _signal("kill -9", KILL, ends=(-KILL,)),
    _child("kill -9 inside a save", -KILL, training=True),
    *(Kind(name, "damage", (-KILL,), (KILL,), said="IS DAMAGED") for name in DAMAGES),
    _signal("SIGTERM", TERM),
    _signal("SIGINT", INT),
    _signal("SIGUSR1", USR1),
    # the second acts at once
    _signal("SIGTERM twice", TERM, TERM, ends=(STOPPED, -TERM)),
    _signal("SIGSTOP, SIGCONT", signal.SIGSTOP, signal.SIGCONT, ends=(GOES_ON,)),
    _child("ENOSPC in a save", saves_fail=True, training=True),
    _child("EIO in a save", saves_fail=True, training=True),
    # beside saves and metrics: an evaluation, the model at the end
    # the process that judges symbolic answers cannot be started then: a verdict is "error", and does not count
    _child("no descriptors", GOES_ON, 1, saves_fail=True, is_limit=True, exact=False),
    _child("no room for files", GOES_ON, 1, saves_fail=True, is_limit=True),
    _child("no memory", GOES_ON, 1, 4, saves_fail=True, is_limit=True, exact=False),
    _child("NaN in the loss", exact=False, training=True, said="gradient is not finite, update skipped"),
    _child("NaN in a gradient", exact=False, training=True, said="gradient is not finite, update skipped"),
    _child("NaN in a weight", 3, training=True, said="not finite"),
    _child("OOM in a forward", exact=False, training=True, said="out of memory in a micro-batch"),
    _child("OOM for good", 4, training=True, said="OutOfMemoryForGood"),
    # in the first call of an evaluation it is an error
    _child("a reward hangs", GOES_ON, 1, stage="r1_zero", training=True, said=FAILED),
    _child("a reward crashes", GOES_ON, 1, stage="r1_zero", training=True, said=FAILED),
    _child("a reward leaves", GOES_ON, 1, stage="r1_zero", training=True, said=FAILED),
    _child("a reward crashes for good", 1, stage="r1_zero", training=True, said=FAILED),
    _child("a reward is slow", stage="r1_zero", training=True),
    _child("a reward returns NaN", stage="r1_zero", training=True),
    _child("a reward returns rubbish", 2, stage="r1_zero", training=True, said="a score is a number, or None"),
    _child("the clock jumps"),
    _child("a hang", HUNG, said="NOTHING HAS MOVED", slow=True),
)  # fmt: skip
BY_NAME = {kind.name: kind for kind in KINDS}
KILL_AND_FLIP = tuple(k.name for k in KINDS if -KILL in k.ends)  # --exact


class Deck:
    """Kinds in an order drawn from the seed: each comes once before any comes again."""

    def __init__(self, names: list[str], rng: random.Random):
        self.names, self.rng, self.left = names, rng, []

    def draw(self, fits) -> Kind | None:
        """The next that `fits(kind)`; None where none does."""
        if not self.left:
            self.left = self.rng.sample(self.names, len(self.names))
        for name in self.left:
            if fits(BY_NAME[name]):
                self.left.remove(name)
                return BY_NAME[name]
        fitting = [BY_NAME[name] for name in self.names if fits(BY_NAME[name])]
        return self.rng.choice(fitting) if fitting else None

    def put_back(self, kind: Kind) -> None:
        """It was drawn, and did not happen."""
        self.left.append(kind.name)
