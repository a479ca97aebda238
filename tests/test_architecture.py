"""Holds the arrows of docs/architecture.md: imports only point down, and only metrics.py prints."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = {  # bottom first; a module may import from layers below its own
    "leaves": "types chat_template chat_template_worker config config_check metrics metric_help progress timer rollout_metrics distributed protocol hf_folder interrupt watchdog partial aside run_lock jsonl columns problem_rows data_order tensor_file config_diff checkpoint_layout checkpoint_check json_fields metric_rows tokenizer_check file_errors worker_process shards",
    "compute": "kernels _C",
    "model": "lora recompute model tensor_parallel peft_folder policy",
    "stages": "rollout rewards batch grpo step_plan optim checkpoint data templates",
    "loop": "running_sum token_budget provenance machine costs probe sharded_memory planner roofline plan planning paper_shape cluster_plan profiling checkpoint_state checkpoint_writer context_parallel forward sharded_optimizer sharding training_state training recorded_fields recording reference balance policy_update dynamic_sampling rollouts_ahead trainer sft evaluate examples rejection cold_start reward_model reward_training assemble preferences judge_engine hacking_monitor hf_classifier preference_pairs",
    "entry": "__init__ __main__ config_keys commands evaluate_command evaluation_table plan_config cluster_report replay pipeline recipe report generate export serve integrations claims",
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules.split()}
RANK = {layer: rank for rank, layer in enumerate(LAYERS)}


def module_names(package: Path) -> set[str]:
    """The modules directly in `package`, by name."""
    files = {p.stem for p in package.glob("*.py")} | {p.stem for p in package.glob("*.pyi")}
    return files | {p.parent.name for p in package.glob("*/*.py")}


def imported_modules(tree: ast.AST, inside: list[str], modules: set[str]) -> set[str]:
    """Top-level r1fast modules that a file imports, at its head or in a function.

    `inside` is the file's package, as ["r1fast", "rollout"]. A name that r1fast/__init__.py exports
    counts as an import of __init__.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            dotted = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for package, *rest in dotted:
            if package == "r1fast":
                found.add(rest[0] if rest and rest[0] in modules else "__init__")
    return found


def violations(root: Path) -> list[str]:
    """Every broken rule in the tree under `root`, as 'file: what is wrong'."""
    package = root / "r1fast"
    modules = module_names(package)
    found = [
        f"r1fast/{name}: in no layer; add it to LAYERS in tests/test_architecture.py"
        for name in sorted(modules - set(LAYER_OF))
    ]
    # rglob follows no links before Python 3.13
    for path in sorted({*package.rglob("*.py"), *(package / "kernels").rglob("*.py")}):
        parts = path.relative_to(root).with_suffix("").parts
        module, name = parts[1], "/".join(parts) + ".py"
        if module not in LAYER_OF:
            continue
        tree = ast.parse(path.read_text(), str(path))
        for other in sorted(imported_modules(tree, list(parts[:-1]), modules) - {module}):
            mine, theirs = LAYER_OF[module], LAYER_OF.get(other)
            if theirs is None:
                continue  # reported above
            if RANK[theirs] > RANK[mine]:
                found.append(f"{name}: imports r1fast.{other}: {mine} must not know {theirs}")
            elif mine == theirs == "stages":
                found.append(f"{name}: imports r1fast.{other}: stages never import each other")
            elif module == "kernels" and other != "_C":
                found.append(f"{name}: imports r1fast.{other}: kernels know tensors only")
        if parts[1:] != ("metrics",):
            found += [
                f"{name}:{node.lineno}: print(); only metrics.py prints"
                for node in ast.walk(tree)
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "print"
            ]
    return found


def test_arrows_only_point_down():
    assert not violations(ROOT), "\n" + "\n".join(violations(ROOT))


def test_kernels_is_a_link_to_a_folder_that_is_no_package():
    # a package called `kernels` on sys.path shadows the one that transformers imports
    assert (ROOT / "r1fast/kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels/__init__.py").exists()


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("r1fast/batch.py", "from r1fast.grpo import x", "stages never import each other"),
        ("r1fast/batch.py", "from r1fast import trainer", "stages must not know loop"),
        ("r1fast/batch.py", "from . import trainer", "stages must not know loop"),
        ("r1fast/rollout/engine.py", "from ..pipeline import x", "stages must not know entry"),
        ("r1fast/rollout/engine.py", "def f():\n  import r1fast.grpo", "stages never import"),
        ("r1fast/model.py", "from r1fast import linear_logprobs", "model must not know entry"),
        ("r1fast/types.py", "import r1fast.model as m", "leaves must not know model"),
        ("kernels/rope.py", "from r1fast.config import Config", "kernels know tensors only"),
        ("kernels/rope.py", "from r1fast.model import Decoder", "compute must not know model"),
        ("kernels/rope.py", "print(1)", r"r1fast/kernels/rope.py:1: print\(\); only metrics.py"),
        ("r1fast/trainer.py", "x = 1\nprint(x)", r"r1fast/trainer.py:2: print\(\); only metrics"),
        ("r1fast/misc.py", "", "r1fast/misc: in no layer; add it to LAYERS"),
    ],
)
def test_the_check_finds(tmp_path, path, source, message):
    for name in ["grpo", "trainer", "pipeline", "config", "model", "metrics"]:
        (tmp_path / "r1fast").mkdir(exist_ok=True)
        (tmp_path / f"r1fast/{name}.py").write_text("print()" if name == "metrics" else "")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "r1fast/kernels").symlink_to("../kernels")
    assert violations(tmp_path) == []
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(source)
    (found,) = violations(tmp_path)
    assert re.search(message, found), found


def test_what_points_down_is_allowed(tmp_path):
    (tmp_path / "r1fast/rollout").mkdir(parents=True)
    (tmp_path / "r1fast/model.py").write_text("import torch\nfrom r1fast.types import Problem")
    (tmp_path / "r1fast/types.py").write_text("")
    (tmp_path / "r1fast/rollout/engine.py").write_text(
        "from r1fast.model import Decoder\nfrom r1fast.rollout.cache import x\nfrom . import cache"
    )
    (tmp_path / "r1fast/rollout/cache.py").write_text("")
    assert violations(tmp_path) == []


def test_help_answers_without_importing_torch():
    code = (
        "import sys, time; start = time.perf_counter(); sys.argv = ['r1fast', '--help']\n"
        "from r1fast.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'triton', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.perf_counter() - start < 1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pipeline" in done.stdout
