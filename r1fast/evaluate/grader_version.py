"""Which grader gave a verdict: a digest of the code that decides, and the libraries that it asks."""

from __future__ import annotations

from hashlib import blake2b
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

SOURCES = {  # what a verdict of each kind depends on, under r1fast/
    "math": ("protocol", "rewards/math", "rewards/answers", "rewards/algebra", "rewards/equivalence",
             "rewards/latex", "rewards/expression", "rewards/symbolic", "rewards/symbolic_worker"),
    "choice": ("protocol", "rewards/choice"),
    "if": ("protocol", "rewards/instructions", "rewards/text_language"),
    "code": ("protocol", "rewards/code", "rewards/code_answer", "rewards/code_problem",
             "rewards/referee", "rewards/candidate", "rewards/program_output"),
    "qa": ("protocol", "rewards/judge"),
    "open": ("protocol", "rewards/judge"),
}  # fmt: skip
LIBRARIES = {  # kind -> module and package
    "math": ("math_verify", "math-verify"),
    "if": ("lingua", "lingua-language-detector"),
}


def version_of(kind: str, judge_name: str = "") -> str:
    """ "math-1f2e3d4c math-verify-0.9.0"; of "rules" every kind's code counts. A judge is named, too.

    It changes where a file that decides changes, whether or not the verdicts do.
    """
    root = Path(__file__).parents[1]
    every = sorted({name for names in SOURCES.values() for name in names})
    digest = blake2b(digest_size=4)
    for name in SOURCES.get(kind, every):
        path = root / f"{name}.py"
        digest.update(path.read_bytes() if path.is_file() else b"")
    parts = [f"{kind}-{digest.hexdigest()}"]
    for of, (module, package) in LIBRARIES.items():
        if kind in (of, "rules") and find_spec(module) is not None:
            parts.append(f"{package}-{metadata.version(package)}")
    return " ".join([*parts, *[judge_name] * bool(judge_name)])
