"""What `--preset NAME` sets: how a set is read, put to the model, graded, and how often sampled.

The protocol is DeepSeek-R1's: temperature 0.6, top-p 0.95, up to 32,768 tokens, k by the set. Its
paper gives k = 64 for AIME and GPQA and 16 for MATH-500 and says "between 4 and 64" of the others:
those have 4 here where a set is large and 8 where it is small, as its LiveCodeBench. Open answers
are compared once, as AlpacaEval and ArenaHard do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from r1fast.evaluate import sets
from r1fast.problem_rows import choice_prompt
from r1fast.types import Problem

TEMPERATURE, TOP_P, MAX_COMPLETION_TOKENS = 0.6, 0.95, 32768
# asked of chat models; the template of R1-Zero has a place of its own for the answer
BOXED = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
SHORT = "{prompt}\nAnswer as shortly as possible."


@dataclass(frozen=True, slots=True)
class Preset:
    name: str
    kind: str  # math | choice | code | if | qa | open
    num_samples: int  # k
    read: Callable[..., list[Problem]]
    data: str  # what --data names, in words
    wording: str = "{prompt}"

    @property
    def needs_judge(self) -> bool:
        return self.kind in ("qa", "open")

    def load(
        self, path: str | Path, baseline: str | Path = "", *, is_chat: bool = True
    ) -> list[Problem]:
        """The problems of a file, worded for the model. ValueError names the file and the line.

        Without `is_chat` the template asks for the answer in its own words (R1-Zero's <answer>).
        """
        if baseline and self.kind != "open":
            raise ValueError(
                f"--baseline is of open answers; preset {self.name} has golds of its own"
            )
        files = [Path(path), Path(baseline)] if baseline else [Path(path)]
        try:
            found = self.read(*files)
        except ValueError as error:
            raise ValueError(f"{error}{self._hint(files[0], error)}") from None
        wording = self.wording if is_chat else "{prompt}"
        return [
            replace(
                p,
                prompt=word(p, wording),
                meta={**p.meta, "question": p.prompt} if self.needs_judge else p.meta,
            )
            for p in found
        ]

    def _hint(self, path: Path, error: ValueError) -> str:
        """Whose file it is where this preset cannot read its first row; "" where one row is bad."""
        found = re.match(rf"{re.escape(str(path))}:(\d+)", str(error))
        if found is None or int(found[1]) > sets.first_line(path):
            return ""
        others = [p.name for p in PRESETS if p.read is not self.read and _reads(p, path)]
        like = f"; the rows of this file are like those of {' or '.join(others)}" * bool(others)
        return f"; preset {self.name} reads {self.data}{like}"


def _reads(preset: Preset, path: Path) -> bool:
    try:
        return bool(preset.read(path))
    except ValueError:
        return False


def word(problem: Problem, wording: str) -> str:
    """The set's question with what is asked of the answer."""
    if problem.kind == "choice":
        return choice_prompt(problem.prompt, problem.meta["choices"])
    if problem.kind == "code":
        return code_prompt(problem)
    return wording.replace("{prompt}", problem.prompt).replace("{{}}", "{}")


def code_prompt(problem: Problem) -> str:
    if problem.meta.get("code_prompt"):
        return (
            "Complete the following Python function. Give the whole function, with its imports, "
            f"in one ```python block.\n\n```python\n{problem.prompt.rstrip()}\n```"
        )
    tests = "\n".join(problem.meta["test_list"])
    return (
        f"{problem.prompt.rstrip()}\nYour code should pass these tests:\n\n```python\n{tests}\n```\n\n"
        "Give all of the code in one ```python block."
    )


def find_preset(name: str) -> Preset:
    """ValueError with the known names where `name` is none of them."""
    presets = {preset.name: preset for preset in PRESETS}
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(presets)}")
    return presets[name]


PRESETS = (
    Preset("gsm8k", "math", 4, sets.read_gsm8k, "test.jsonl (question; answer with its ####)", BOXED),
    Preset("math500", "math", 16, sets.read_math, "test.jsonl (problem, answer)", BOXED),
    Preset("aime", "math", 64, sets.read_aime, "JSONL of problem and answer", BOXED),
    Preset("mgsm", "math", 4, sets.read_mgsm, "mgsm_de.tsv, or a folder of them", BOXED),
    Preset("humaneval", "code", 8, sets.read_humaneval,
           "HumanEval.jsonl.gz (prompt, entry_point, test)"),
    Preset("mbpp", "code", 8, sets.read_mbpp, "sanitized-mbpp.json (prompt, test_list)"),
    Preset("ifeval", "if", 4, sets.read_ifeval,
           "input_data.jsonl (prompt, instruction_id_list, kwargs)"),
    Preset("mmlu", "choice", 4, sets.read_mmlu, "JSONL of question, choices, answer; or CSV files"),
    Preset("gpqa", "choice", 64, sets.read_gpqa,
           "gpqa_diamond.csv (Question, Correct Answer, Incorrect Answer 1 to 3)"),
    Preset("simpleqa", "qa", 4, sets.read_simpleqa, "simple_qa_test_set.csv (problem, answer)", SHORT),
    Preset("alpaca_eval", "open", 1, sets.read_open, "alpaca_eval.json (instruction, output)"),
    Preset("arena_hard", "open", 1, sets.read_open, "question.jsonl, and --baseline ANSWERS.jsonl"),
)  # fmt: skip
