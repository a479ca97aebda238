"""The numbers of eval.json from stored samples.

    score     1 correct, 0 otherwise; of a pairwise judgement 1 win, 0.5 tie, 0 loss
    pass@1    mean over problems of the mean score of its k samples          DeepSeek-R1, section 3
    pass@k    mean over problems of 1 - C(n-c, k) / C(n, k)      unbiased: Chen et al. 2021, eq. 1
    cons@k    mean over problems of the share of the most voted answer that is correct, 0 or 1 where
              equality is transitive; ties count 1 / tied answers

"The same answer" need not be transitive (25, 25% and 0.25): votes go to the connected components of
the relation, in either direction, so that the order of samples means nothing.

Two standard errors: over the choice of problems, sqrt(var(means) / N), and of a repeated run on the
same problems, sqrt(sum of var(scores of a problem) / n) / N. A sample whose grader failed (verdict
"error") is no zero: it is left out and counted. An error that cannot be estimated from one problem,
or from one sample a problem, is None.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from r1fast.rollout_metrics import wait_rate

SameAnswer = Callable[[str, str], bool]
VOTED_KINDS = ("math", "choice")  # whose extracted answers fall into classes


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k samples, drawn from n of which c are correct, is correct.

    In logarithms, so that neither large n nor a chance near 0 loses digits. ValueError unless
    0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if c == 0:
        return 0.0
    if n - c < k:
        return 1.0
    # C(n-c, k) / C(n, k) is a product over k or over c factors; the fewer
    few, other = min(k, c), max(k, c)
    return -math.expm1(math.fsum(math.log1p(-other / (n - i)) for i in range(few)))


def score_of(row: Mapping) -> float | None:
    """What a sample counts; None where nothing judged it."""
    verdict = row["verdict"]
    if verdict is None or verdict == "error":
        return None
    score = row.get("score")
    return float(verdict == "correct") if score is None else float(score)


def by_problem(rows: Iterable[dict]) -> dict[str, list[dict]]:
    grouped: dict[str, list[dict]] = {}
    for row in rows:
        grouped.setdefault(row["problem_id"], []).append(row)
    return grouped


def summarise(rows: list[dict], same_answer: SameAnswer) -> dict:
    """Everything that eval.json says of these samples, as flat numbers; tables only by subset.

    Of pairwise judgements the mean score is `win_rate`, and there is no pass@k.
    """
    grouped = by_problem(rows)
    k = max((len(samples) for samples in grouped.values()), default=0)
    result: dict = {"num_problems": len(grouped), "k": k, "num_samples": len(rows)}
    verified = {p: s for p, s in grouped.items() if s[0]["verdict"] is not None}
    result |= _scores(verified, k, same_answer)
    if verified:
        verdicts = Counter(r["verdict"] for s in verified.values() for r in s)
        result["verdicts"] = dict(verdicts)
    result |= {
        "format_rate": mean(r["format"] for r in rows),
        "language_share": mean(r["language_share"] for r in rows),
        "wait_rate": wait_rate([r["text"] for r in rows]),
        "mean_length": mean(r["num_tokens"] for r in rows),
        "clip_rate": mean(float(r["finish_reason"] == "length") for r in rows),
    }
    result |= _of_kinds(rows)
    if subsets := _tables(verified, k, same_answer, "subset"):
        result["subsets"] = subsets
    if len(kinds := _tables(verified, k, same_answer, "kind")) > 1:
        result["kinds"] = kinds
    return result


def _scores(verified: Mapping[str, list[dict]], k: int, same_answer: SameAnswer) -> dict:
    """Mean score with both errors, the pass@k curve, cons@k, and what could not be judged.

    Where open problems are among others, the win rate is of those and pass@1 of the others.
    """
    is_pair = {p: any(r.get("outcome") for r in s) for p, s in verified.items()}
    if len(set(is_pair.values())) < 2:
        return _scores_alike(verified, k, same_answer)
    parts = [
        _scores_alike({p: verified[p] for p in verified if is_pair[p] == pair}, k, same_answer)
        for pair in (False, True)
    ]
    result = parts[0] | parts[1]
    for name in ("num_errors", "num_unjudged_problems"):
        if any(name in part for part in parts):
            result[name] = sum(part.get(name, 0) for part in parts)
    return result


def _scores_alike(verified: Mapping[str, list[dict]], k: int, same_answer: SameAnswer) -> dict:
    result: dict = {}
    scores = {p: [x for r in s if (x := score_of(r)) is not None] for p, s in verified.items()}
    judged = {p: values for p, values in scores.items() if values}
    num_errors = sum(len(s) - len(scores[p]) for p, s in verified.items())
    if num_errors:
        result["num_errors"] = num_errors
    if len(judged) < len(verified):
        result["num_unjudged_problems"] = len(verified) - len(judged)
    if not judged:
        return result
    pairwise = any(r.get("outcome") for s in verified.values() for r in s)
    name = "win_rate" if pairwise else "pass@1"
    result[name] = mean(mean(v) for v in judged.values())
    result[f"{name}_stderr"] = error_of_mean([mean(v) for v in judged.values()])
    result[f"{name}_run_stderr"] = run_error(judged.values())
    if pairwise:
        return result
    for at in curve_points(min(map(len, judged.values()))):
        if at == 1:
            continue
        values = [pass_at_k(len(v), round(sum(v)), at) for v in judged.values()]
        result[f"pass@{at}"] = mean(values)
        result[f"pass@{at}_stderr"] = error_of_mean(values)
    voters = [verified[p] for p in judged if verified[p][0]["kind"] in VOTED_KINDS]
    if voters:
        result["cons@k"] = mean(vote(s, same_answer) for s in voters)
    return result


def curve_points(n: int) -> list[int]:
    """1, 2, 4, ... and n: where the pass@k curve is taken."""
    points = [2**i for i in range(n.bit_length()) if 2**i <= n]
    return points if not n or points[-1] == n else [*points, n]


def error_of_mean(values: Sequence[float]) -> float | None:
    """The standard error of a mean over independent values; None for fewer than two."""
    n = len(values)
    if n < 2:
        return None
    middle = math.fsum(values) / n
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (n - 1) / n)


def run_error(scores: Iterable[Sequence[float]]) -> float | None:
    """The standard error of the mean of means over repeated runs; None where a problem has one sample."""
    parts = [error_of_mean(values) for values in scores]
    if not parts or any(part is None for part in parts):
        return None
    return math.sqrt(math.fsum(part**2 for part in parts if part is not None)) / len(parts)


def vote(samples: list[dict], same_answer: SameAnswer) -> float:
    """Share of the most voted answer classes that is correct.

    Samples without an answer, and those whose grader failed, do not vote.
    """
    votes: dict[str, list[bool]] = {}
    for row in samples:
        if row["extracted"] is not None and row["verdict"] != "error":
            votes.setdefault(row["extracted"], []).append(row["verdict"] == "correct")
    if not votes:
        return 0.0
    classes = [
        [right for answer in members for right in votes[answer]]
        for members in answer_classes(sorted(votes), same_answer)
    ]
    most = max(map(len, classes))
    return mean(mean(c) for c in classes if len(c) == most) or 0.0


def answer_classes(answers: Sequence[str], same_answer: SameAnswer) -> list[list[str]]:
    """The connected components of the relation over different answers."""
    classes: list[list[str]] = []
    for new in answers:
        joined, others = [new], []
        for own in classes:
            if any(same_answer(old, new) or same_answer(new, old) for old in own):
                joined = own + joined
            else:
                others.append(own)
        classes = [*others, joined]
    return classes


def _of_kinds(rows: list[dict]) -> dict:
    """What single kinds of problems report besides."""
    result: dict = {}
    if checked := [r for r in rows if r.get("instructions")]:
        strict = [ok for r in checked for ok in r["followed"]]
        loose = [ok for r in checked for ok in r["followed_loosely"]]
        result |= {
            "prompt_strict": mean(all(r["followed"]) for r in checked),
            "prompt_loose": mean(all(r["followed_loosely"]) for r in checked),
            "instruction_strict": mean(strict),
            "instruction_loose": mean(loose),
        }
        result["instructions"] = instruction_table(checked)
    short = [r for r in rows if r["kind"] == "qa" and r["verdict"] not in (None, "error")]
    if short:
        correct = sum(r["verdict"] == "correct" for r in short)
        attempted = sum(r["verdict"] != "no_answer" for r in short)
        result["attempted_rate"] = attempted / len(short)
        result["correct_given_attempted"] = correct / attempted if attempted else 0.0
        # the harmonic mean of correct over all and correct over attempted (SimpleQA)
        result["f_score"] = 2 * correct / (attempted + len(short))
    if compared := [r for r in rows if r.get("outcome")]:
        result["outcomes"] = dict(Counter(r["outcome"] for r in compared))
        result |= judge_bias([r["grades"] for r in compared if r.get("grades")])
        for side in ("summary", "baseline"):
            result[f"{side}_chars"] = mean(r[f"{side}_chars"] for r in compared)
    return result


def judge_bias(grades: Sequence[Sequence[int | None]]) -> dict[str, float]:
    """Of a judge's grades of our answer, shown first and second (positive: ours is better).

    position_bias in [-1, 1]: how much more often the answer shown first was preferred than the
    second, over all judgements; inconsistent: share of comparisons whose two orders prefer different
    answers.
    """
    first = sum((a or 0) > 0 for a, _ in grades) + sum((b or 0) < 0 for _, b in grades)
    second = sum((a or 0) < 0 for a, _ in grades) + sum((b or 0) > 0 for _, b in grades)
    judged = sum(grade is not None for pair in grades for grade in pair)
    whole = [(a, b) for a, b in grades if a is not None and b is not None]
    found = {}
    if judged:
        found["position_bias"] = (first - second) / judged
    if whole:
        found["inconsistent"] = sum(a * b < 0 for a, b in whole) / len(whole)
    return found


def instruction_table(rows: Iterable[dict]) -> dict[str, dict]:
    """Of each instruction: how often it was asked, how often followed strictly and loosely."""
    counts: dict[str, list[int]] = {}
    for row in rows:
        columns = zip(row["instructions"], row["followed"], row["followed_loosely"], strict=True)
        for name, strict, loose in columns:
            entry = counts.setdefault(name, [0, 0, 0])
            entry[0], entry[1], entry[2] = entry[0] + 1, entry[1] + strict, entry[2] + loose
    return {
        name: {"num": n, "strict": strict / n, "loose": loose / n}
        for name, (n, strict, loose) in sorted(counts.items())
    }


def _tables(
    verified: Mapping[str, list[dict]], k: int, same_answer: SameAnswer, column: str
) -> dict[str, dict]:
    """The scores of the problems that have the same in a column."""
    names = sorted({s[0][column] for s in verified.values() if s[0][column]})
    table = {}
    for name in names:
        own = {p: s for p, s in verified.items() if s[0][column] == name}
        rows = [r for s in own.values() for r in s]
        table[name] = {
            "num_problems": len(own),
            **_scores(own, k, same_answer),
            "mean_length": mean(r["num_tokens"] for r in rows),
            "clip_rate": mean(float(r["finish_reason"] == "length") for r in rows),
        }
    return table


def mean(values: Iterable[float | bool | None]) -> float | None:
    """The mean of what is there; None where nothing is."""
    kept = [v for v in values if v is not None]
    return math.fsum(kept) / len(kept) if kept else None
