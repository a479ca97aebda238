"""A replay on the terminal."""

from __future__ import annotations

from typing import Any

from r1fast.metrics import printable, say, table

ROUNDING = 1e-5  # of the largest coefficient: float32 on its way through a forward


def show(result: dict[str, Any]) -> None:
    say(
        f"step {result['step']} of {result['stage']}: {result['problems']} problems, "
        f"{result['completions']} completions of {result['tokens']:,} tokens"
    )
    say(f"weights before it: {result['start']}")
    if not result["is_complete"]:
        say("the recorded update did not come to its end: there is nothing to compare with")
        _metrics("replayed", ["replayed"], {n: [x] for n, x in result["replayed"].items()})
    elif result["is_identical"]:
        num_metrics = len(result["recorded"]) - 1
        say(
            "replayed: identical, to the last bit: the weights and the optimizer's state after it, "
            f"its loss and {num_metrics} other metrics"
        )
    else:
        _differs(result)
    if "comparison" in result:
        _comparison(result)


def _differs(result: dict[str, Any]) -> None:
    names = result["recorded"] | result["replayed"]
    rows = {n: [result["recorded"].get(n), result["replayed"].get(n)] for n in names}
    largest = max(
        (
            abs(a - b) / max(abs(a), abs(b))
            for a, b in rows.values()
            if None not in (a, b) and a != b
        ),
        default=0.0,
    )
    say(
        f"replayed: not identical ({', '.join(result['differing']) or 'the weights before it'}); "
        f"metrics differ by {largest:.1e} of their size at most"
    )
    if others := result["other_versions"]:
        say(f"rounding may differ between then and now: {'; '.join(others)}")
    else:
        say(
            "code, libraries and machine are those of the recording: an operation is not deterministic"
        )
    _metrics("metrics", ["recorded", "replayed"], rows)


def _comparison(result: dict[str, Any]) -> None:
    diff = result["comparison"]
    rows: list[list[str]] = []
    for name, values in (
        ("gradient, first optimizer step", diff["gradient"]),
        ("update of the weights, all of it", diff["update"]),
    ):
        if values is not None:
            rows.append([name, _number(values["cosine"], 9), _number(values["relative_difference"]),
                         *map(_number, values["norms"])])  # fmt: skip
    columns = ["", "cosine", "difference", "norm", "norm, changed"]
    table("; ".join(result["overrides"]) or "the same values", columns, rows)
    shares = {"tokens of coefficient 0": diff["zero_coefficient"]}
    _metrics("metrics", ["replayed", "changed"], diff["metrics"] | shares)
    note = (
        "coefficient: above 0 the token is made likelier, times the tokens of a mini-batch; ratio: of the "
        "policy's probability to the sampler's"
    )
    largest = max((abs(c) for row in diff["tokens"] for c in row["coefficient"]), default=0.0)
    rounding = ROUNDING * largest
    if diff["tokens"] and all(row["difference"] <= rounding for row in diff["tokens"]):
        say(
            "every token's coefficient is equal up to rounding: where the weights are still those that "
            "sampled, each ratio is 1, and clips and the level of the ratio change nothing"
        )
        return
    twice = any(row["pass"] > 1 for row in diff["tokens"])
    tokens = [
        [f"{row['problem_id']} #{row['sample']}", f"{row['token']}",
         *[str(row["pass"])] * twice, _marked(row),
         *map(_number, row["coefficient"]), *map(_number, row["ratio"])]
        for row in diff["tokens"] if row["difference"] > rounding
    ]  # fmt: skip
    if tokens:
        columns = ["completion", "token", *["pass"] * twice, "text"]
        columns += ["coefficient", "changed", "ratio", "changed"]
        table("tokens whose coefficient differs most", columns, tokens, note, whole=columns[:1])
    completions = [
        [f"{row['problem_id']} #{row['sample']}", f"{row['num_tokens']}", row["verdict"] or "",
         _number(row["reward"]), *map(_number, row["coefficient"]), _short(row["text"], 30)]
        for row in diff["completions"] if row["difference"]
    ]  # fmt: skip
    if completions:
        columns = ["completion", "tokens", "verdict", "reward", "coefficients", "changed", "text"]
        table("completions whose coefficients differ most", columns, completions, whole=columns[:1])


def _metrics(title: str, columns: list[str], values: dict[str, list[float | None]]) -> None:
    rows = [[name, *map(_number, own)] for name, own in values.items()]
    table(title, ["", *columns], rows)


def _number(value: float | None, digits: int = 6) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _marked(row: dict[str, Any]) -> str:
    """The token between marks, with a little of what is around it."""
    text = f"{row['before'][-16:]}⟦{row['text']}⟧{row['after'][:8]}"
    return printable(text.replace("\n", "⏎"))


def _short(text: str, room: int) -> str:
    text = printable(text.replace("\n", "⏎"))
    return text if len(text) <= room else text[: room - 1] + "…"
