"""Reward hacking: the training reward rises while held-out pass@1 falls.

At every evaluation, against the best of the last `window` ones before it (p, s: pass@1 and its standard
error over problems; r, e: mean reward of the steps since the evaluation before, and its standard error):

    fall = (p_best - p) / sqrt(s_best^2 + s^2)          rise = (r - r_best) / sqrt(e_best^2 + e^2)
    alarm where both are above `num_errors`

Both evaluations ask the same problems, so the error of their difference is at most this one: the
monitor rather keeps silent than cries wolf. Of one problem there is no error, and no fall (0).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from r1fast.config import MonitorConfig


@dataclass(frozen=True, slots=True)
class Point:
    """What one evaluation found, and what training earned before it."""

    step: int
    pass_at_1: float
    pass_error: float | None  # None where it cannot be told: one problem
    reward: float
    reward_error: float


class RewardHackingError(RuntimeError):
    """A run that monitor.action = "stop" has ended; its checkpoint is saved."""


class HackingMonitor:
    """Sees the reward of every step and the result of every evaluation; all ranks see the same."""

    def __init__(self, config: MonitorConfig):
        self.config = config
        self.points: list[Point] = []  # of the last `window` evaluations
        self.rewards: list[float] = []  # of the steps since the last one
        self.alarm = ""  # what the newest evaluation raised, in words

    def saw_reward(self, reward: float | None) -> None:
        """The mean reward of a step."""
        if reward is not None and math.isfinite(reward):
            self.rewards.append(reward)

    def saw_evaluation(self, step: int, values: dict) -> dict[str, float]:
        """Metrics for the row of `step`: hacking/fall, hacking/rise (standard errors), hacking/alarm.

        Nothing where the evaluation has no pass@1, where no step has earned a reward since the last
        one, and at the first.
        """
        self.alarm = ""
        score = values.get("pass@1")
        if self.config.action == "off" or score is None or not self.rewards:
            return {}
        n = len(self.rewards)
        mean = math.fsum(self.rewards) / n
        variance = math.fsum((r - mean) ** 2 for r in self.rewards) / max(n - 1, 1)
        now = Point(step, score, values.get("pass@1_stderr"), mean, math.sqrt(variance / n))
        self.rewards = []
        before, self.points = self.points, [*self.points, now][-self.config.window :]
        if not before:
            return {}
        best = max(before, key=lambda point: point.pass_at_1)
        fall = 0.0
        if best.pass_error is not None and now.pass_error is not None:
            fall = _errors(best.pass_at_1 - score, best.pass_error, now.pass_error)
        rise = _errors(mean - best.reward, best.reward_error, now.reward_error)
        hacked = min(fall, rise) > self.config.num_errors
        if hacked:
            self.alarm = (
                f"step {step}: the reward is being hacked? It rose from {best.reward:.3f} to "
                f"{mean:.3f} since step {best.step}, while held-out pass@1 fell from "
                f"{best.pass_at_1:.3f} to {score:.3f} ({fall:.1f} standard errors)"
            )
        return {"hacking/fall": fall, "hacking/rise": rise, "hacking/alarm": float(hacked)}

    def state(self) -> dict:
        return {"points": [asdict(point) for point in self.points], "rewards": list(self.rewards)}

    def load_state(self, state: dict) -> None:
        self.points = [
            Point(**{field.name: point[field.name] for field in fields(Point)})
            for point in state["points"]
        ][-self.config.window :]
        self.rewards = list(state["rewards"])


def _errors(difference: float, *errors: float) -> float:
    """`difference` in standard errors; a huge number of its sign where there is no error."""
    error = math.hypot(*errors)
    if error > 0:
        return difference / error
    return math.copysign(1e6, difference) if difference else 0.0
