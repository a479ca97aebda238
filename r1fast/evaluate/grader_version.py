"""Which grader gave a verdict: a digest of the code that decides, and the libraries that it asks."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from r1fast.rewards.graders import JUDGED_KINDS

_ALL = ("protocol.py", "rewards/graders.py")
_CHAT = ("rewards/chat.py", "judge_engine.py")
SOURCES = {  # what a verdict of each kind depends on, under r1fast/
    "math": (*_ALL, "rewards/math.py", "rewards/answers.py", "rewards/algebra.py", "rewards/equivalence.py",
             "rewards/expression.py", "rewards/latex.py", "rewards/regions.py", "rewards/symbolic.py",
             "rewards/symbolic_worker.py", "rewards/trigonometry.py", "rewards/units.py", "rewards/messages.py",
             "worker_process.py"),
    "choice": (*_ALL, "rewards/choice.py"),
    "if": (*_ALL, "rewards/instructions.py", "rewards/text_language.py"),
    "code": (*_ALL, "rewards/code.py", "rewards/code_answer.py", "rewards/code_problem.py", "rewards/math.py",
             "rewards/referee.py", "rewards/candidate.py", "rewards/candidate.hpp",
             "rewards/program_output.py", "rewards/sandbox.py", "rewards/sandbox_box.py",
             "rewards/sandbox_cgroup.py", "rewards/sandbox_filter.py", "rewards/sandbox_ladder.py",
             "rewards/sandbox_launcher.py", "rewards/sandbox_pool.py", "rewards/sandbox_trial.py",
             "rewards/sandbox_usage.py", "rewards/sandbox_files.py", "rewards/cpp_calls.py",
             "rewards/confine.py", "rewards/messages.py"),
    "qa": (*_ALL, *_CHAT, "rewards/judge.py"),
    "open": (*_ALL, *_CHAT, "rewards/pairwise.py"),
}  # fmt: skip
LIBRARIES = {  # kind -> module and package
    "math": ("math_verify", "math-verify"),
    "if": ("lingua", "lingua-language-detector"),
}


def version_of(kind: str, judge_name: str = "") -> str:
    """ "math-1f2e3d4c math-verify-0.9.0" of a kind; a judge is named, too. "" of general prompts.

    It changes where a file that decides changes, whether or not the verdicts do.
    """
    if kind not in SOURCES:
        return ""
    root = Path(__file__).parents[1]
    digest = blake2b(digest_size=4)
    for name in SOURCES[kind]:
        digest.update((root / name).read_bytes())
    parts = [f"{kind}-{digest.hexdigest()}"]
    module, package = LIBRARIES.get(kind, ("", ""))
    if module and find_spec(module) is not None:
        parts.append(f"{package}-{metadata.version(package)}")
    return " ".join([*parts, *[judge_name] * bool(judge_name and kind in JUDGED_KINDS)])


def versions_of(kinds: Iterable[str], judge_name: str = "") -> dict[str, str]:
    return {kind: version_of(kind, judge_name) for kind in sorted(set(kinds))}
