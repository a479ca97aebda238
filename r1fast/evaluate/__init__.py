"""Evaluation: sample, grade, store, sum up; presets of the usual sets; comparing and rescoring runs.

`run.evaluate` is what commands, trainers and pipelines call; `statistics.py` has the formulas.
"""

from r1fast.evaluate.run import evaluate, short_evaluation
from r1fast.evaluate.sampling import sample_groups
from r1fast.evaluate.statistics import pass_at_k, summarise, vote

__all__ = ["evaluate", "pass_at_k", "sample_groups", "short_evaluation", "summarise", "vote"]
