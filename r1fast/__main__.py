"""r1fast COMMAND CONFIG.toml [--section.key=value ...]

commands
  pipeline   the whole R1 recipe, stage by stage   [--from STAGE] [--only STAGE]
  grpo       reinforcement learning with verifiable rewards
  sft        supervised fine-tuning on data.sft (or on GSM8K-style data.train)
  distill    the same, of a smaller model on the kept samples of a larger one
  sample     rejection sampling: correct and readable completions as JSONL
  evaluate   pass@1 over k samples, cons@k, format, language, length
  report     RUN: one self-contained HTML page of a run folder
  generate   CONFIG or MODEL --prompt TEXT [--num N]: sample from a model

Every value of the config can be set on the command line: --grpo.kl_coef=0 --data.train=gsm8k.jsonl
--force goes on with a run whose config has changed. On several processes:
  torchrun --nproc-per-node 2 -m r1fast grpo CONFIG.toml
A run that was stopped continues from its newest checkpoint with the same command. Ctrl-C saves
one at the end of the step. Exit codes: 1 failed, 2 wrong input, 130 stopped.
"""

import os
import sys

CONFIG_COMMANDS = ("pipeline", "grpo", "sft", "distill", "sample", "evaluate")
COMMANDS = (*CONFIG_COMMANDS, "report", "generate")
OPTIONS = {"pipeline": ("from", "only"), "generate": ("prompt", "num")}
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def parse(argv: list[str]) -> tuple[str, str, list[str], dict[str, str]]:
    """(command, target, overrides, options). Raises ValueError naming what is known."""
    command, *rest = argv
    if command not in COMMANDS:
        raise ValueError(f"unknown command {command!r}; known: {', '.join(COMMANDS)}")
    known = OPTIONS.get(command, ())
    positional, overrides, options = [], [], {}
    words = iter(rest)
    for word in words:
        name, sep, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            positional.append(word)
        elif word == "--force":
            options["force"] = "1"
        elif name in known:
            options[name] = value if sep else next(words, "")
            if not options[name]:
                raise ValueError(f"--{name} needs a value")
        elif "." in name or sep:
            overrides.append(word)
        else:
            names = ", ".join(f"--{n}" for n in (*known, "force"))
            raise ValueError(
                f"unknown option {word!r}; known: {names}, --section.key=value, --help"
            )
    if len(positional) != 1:
        what = "a run folder" if command == "report" else "a config file"
        raise ValueError(f"r1fast {command} takes {what}, got {len(positional)}: {positional}")
    return command, positional[0], overrides, options


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help") or "--help" in argv or "-h" in argv:
        sys.stdout.write(__doc__)
        return 0 if argv else EXIT_USAGE
    # before torch: idle threads that spin for long take the core another program is using
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        command, target, overrides, options = parse(argv)
        if command in CONFIG_COMMANDS:
            from r1fast.config import load_config

            target = load_config(target, overrides)  # before torch: a typo answers at once
        from r1fast import commands

        commands.run(command, target, overrides, options)
    except ValueError as error:
        return _fail(f"r1fast: {error}", EXIT_USAGE)
    except (RuntimeError, OSError, FloatingPointError) as error:
        hint = "(R1FAST_DEBUG=1 shows where)"
        return _fail(f"r1fast: {type(error).__name__}: {error} {hint}", EXIT_FAILED)
    except KeyboardInterrupt:
        sys.stderr.write("\nr1fast: stopped; the same command continues from the last checkpoint\n")
        return EXIT_INTERRUPTED
    return 0


def _fail(text: str, code: int) -> int:
    """One line on stderr; the traceback too where R1FAST_DEBUG is set."""
    if os.environ.get("R1FAST_DEBUG"):
        import traceback

        traceback.print_exc()
    sys.stderr.write(f"{text}\n")
    return code


if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from r1fast.distributed import leave

        leave(code)
    sys.exit(code)
