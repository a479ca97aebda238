"""r1fast COMMAND CONFIG.toml [--section.key=value ...]

commands
  pipeline   the whole R1 recipe, stage by stage   [--from STAGE] [--only STAGE]
  grpo       reinforcement learning with verifiable rewards
  sft        supervised fine-tuning on data.sft (or on GSM8K-style data.train)
  distill    the same, of a smaller model on the kept samples of a larger one
  sample     rejection sampling: correct and readable completions as JSONL
  evaluate   CONFIG or MODEL: pass@k, cons@k, win rate, format, language, length; samples stored
             [--preset NAME --data FILE [--baseline FILE]] [--judge-url URL --judge-model NAME]
             --rescore RUN: grade stored samples again; --compare RUN_A RUN_B: is b better? [--json]
  reward-model  helpfulness from data.preference (pairwise), safety from data.safety (pointwise)
  preferences   pairs for data.preference, by a judge, of prompts in data.general
  plan       memory, token budget, FLOPs and seconds of a step, from config.json alone
             [--stage NAME] [--gpu a100|l40s|h100|h200] [--ranks N] [--completion-tokens N]
             --gpus 8,64,512: clusters on paper, also of mixtures of experts, layouts that r1fast
             does not run included [--per-node 8] [--network 400: Gbit/s of a GPU]
  report     RUN: one self-contained HTML page of a run folder
  replay     RUN --step N [--json] [--section.key=value ...]: a recorded update again, to the
             last bit; with other values of grpo, optim: both losses on the same rollouts
  generate   CONFIG or MODEL --prompt TEXT [--prompt TEXT ...] [--num N]: sample from a model
             [--temperature 0.6 --top-p 0.95 --top-k 0 --min-p 0 --repetition-penalty 1 --seed 0
             --max-tokens 1024 --min-tokens 0 --stop TEXT ... --stop-token-id ID ...]
             [--json [--top-logprobs N]]: a line for each completion, with token ids and logprobs
  merge      CONFIG or MODEL --adapter FOLDER --out FOLDER: a LoRA adapter, as PEFT or a run with
             lora.rank writes it, and its base model as one plain model [--model.dtype=bfloat16]
  export     RUN or CHECKPOINT, OUT: any checkpoint as a plain Hugging Face folder, adapters merged
             [--step N|best] [--adapter-only] [--model.path=BASE] [--model.dtype=bfloat16]
  serve      CONFIG or MODEL: answer OpenAI's API on this machine
             [--host 127.0.0.1 --port 8000 --api-key KEY --model-name NAME --max-queued 1024
             --max-body-mib 16 --drain 30]; first come, first served

Every value of the config can be set on the command line: --grpo.kl_coef=0 --data.train=gsm8k.jsonl
(`r1fast grpo --help` lists them).
--force goes on with a run whose config has changed. --record (or --record=12,20-30) keeps the steps
of RL for replay; --profile N traces N steps of each training stage. On several processes:
  torchrun --nproc-per-node 2 -m r1fast grpo CONFIG.toml
A run that was stopped continues from its newest checkpoint with the same command. Ctrl-C, SIGTERM
and SIGUSR1 save one within checkpoint.deadline_seconds. Exit codes: 0 done, 1 failed, 2 wrong
input, 3 not finite, 4 out of memory, 69 no vLLM server left, 75 hung (log.watchdog_abort), 130
stopped, 141 nobody reads what generate or replay prints; docs/reliability.md says what to do about
each.
"""

import os
import signal
import sys
import time
from typing import NoReturn

CONFIG_COMMANDS = (
    "pipeline", "grpo", "sft", "distill", "sample", "reward-model", "preferences", "plan",
)  # fmt: skip
COMMANDS = (
    *CONFIG_COMMANDS,
    "evaluate",
    "report",
    "replay",
    "generate",
    "merge",
    "export",
    "serve",
)
_SAMPLING = "temperature top-p top-k min-p repetition-penalty max-tokens min-tokens seed"
OPTIONS = {
    "plan": "stage gpu ranks completion-tokens gpus per-node network".split(),
    "pipeline": ["from", "only"],
    "evaluate": "preset data baseline judge-url judge-model rescore compare json".split(),
    "replay": ["step", "json"],
    "generate": f"prompt num {_SAMPLING} stop stop-token-id json top-logprobs".split(),
    "merge": ["adapter", "out"],
    "export": ["step", "adapter-only"],
    "serve": "host port api-key model-name max-queued max-body-mib drain".split(),
}
FLAGS = ("force", "json", "adapter-only")  # take no value
REPEATED = ("prompt", "stop", "stop-token-id")  # may come several times
EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FINITE, EXIT_MEMORY = 1, 2, 3, 4  # 75: watchdog.EXIT_HUNG
EXIT_NO_SERVERS, EXIT_INTERRUPTED, EXIT_PIPE = 69, 130, 141  # 69: EX_UNAVAILABLE of sysexits
FIRST_WORD = 2.0  # seconds for the rank that failed: torchrun names the first one that it sees gone


Options = dict[str, str | list[str]]


def parse(argv: list[str]) -> tuple[str, str, list[str], Options]:
    """(command, target, overrides, options). Raises ValueError naming what is known."""
    command, *rest = argv
    if command not in COMMANDS:
        raise ValueError(f"unknown command {command!r}; known: {', '.join(COMMANDS)}")
    known = (*OPTIONS.get(command, ()), "force")
    positional, overrides, options = [], [], {}
    words = iter(rest)
    for word in words:
        name, sep, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            positional.append(word)
        elif name in known and name in FLAGS and not sep:
            options[name] = "1"
        elif name in known and name not in FLAGS:
            value = value if sep else next(words, "")
            if not value:
                raise ValueError(f"--{name} needs a value")
            options[name] = [*options.get(name, []), value] if name in REPEATED else value
        elif name == "record" and command in ("grpo", "pipeline"):
            overrides.append(f'--log.record="{value if sep else "all"}"')
        elif name == "profile" and command in ("grpo", "sft", "distill", "pipeline"):
            overrides.append(f"--log.profile_steps={value if sep else next(words, '')}")
        elif "." in name or sep:
            overrides.append(word)
        else:
            names = ", ".join(f"--{n}" for n in known)
            raise ValueError(
                f"unknown option {word!r}; known: {names}, --section.key=value, --help"
            )
    if command == "evaluate" and "rescore" in options:
        positional.append(options["rescore"])
    if command == "export" and len(positional) == 2:
        options["out"] = positional.pop()
    if len(positional) != 1:
        if "compare" in options:
            raise ValueError(f"--compare takes two run folders, got {1 + len(positional)}")
        what = {"report": "a run folder", "replay": "a run folder", "generate": "a config file or a model",
                "merge": "a config file or a model", "serve": "a config file or a model",
                "evaluate": "a config file or a model", "export": "two folders, RUN or CHECKPOINT and OUT",
                }.get(command, "a config file")  # fmt: skip
        raise ValueError(f"r1fast {command} takes {what}, got {len(positional)}: {positional}")
    return command, positional[0], overrides, options


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help") or "--help" in argv or "-h" in argv:
        sys.stdout.write(__doc__)
        if argv and argv[0] in (*CONFIG_COMMANDS, "evaluate"):
            from r1fast.config_keys import describe_keys

            sys.stdout.write(f"\nThe config, with its defaults:\n\n{describe_keys()}\n")
        return 0 if argv else EXIT_USAGE
    # before torch: idle threads that spin for long take the core another program is using
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        _command(argv)
    except FloatingPointError as error:  # a ValueError too where it was found in a checkpoint
        return _fail(f"r1fast: {type(error).__name__}: {error}", EXIT_NOT_FINITE)
    except ValueError as error:
        return _fail(f"r1fast: {error}", EXIT_USAGE)
    except (RuntimeError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and argv[0] in (
            "generate",
            "replay",
        ):  # as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
            return EXIT_PIPE
        if _is_of_another_rank(error):
            time.sleep(FIRST_WORD)
            text = str(error).strip().partition("\n")[0]
            return _fail(
                f"r1fast: another rank has ended or does not answer, see what it said; this one ends with it ({text})",
                EXIT_FAILED,
            )
        hint = "(R1FAST_DEBUG=1 shows where)"
        code = EXIT_MEMORY if _is_memory(error) else EXIT_FAILED
        return _fail(f"r1fast: {type(error).__name__}: {error} {hint}", code)
    except KeyboardInterrupt as error:
        if type(error).__name__ == "ServersLost":  # of r1fast.interrupt
            return _fail(f"r1fast: {error}", EXIT_NO_SERVERS)
        goes_on = "; the same command continues from the last checkpoint, if there is one"
        if argv[0] in ("generate", "merge", "export", "serve", "report", "replay"):
            goes_on = ""
        elif any(
            word.startswith(("--from", "--only")) for word in argv
        ):  # which begin a stage again
            goes_on = "; the command without --from and --only continues from the last checkpoint, if there is one"
        sys.stderr.write(f"\nr1fast: stopped{goes_on}\n")
        return EXIT_INTERRUPTED
    return 0


def _command(argv: list[str]) -> None:
    command, target, overrides, options = parse(argv)
    if command in CONFIG_COMMANDS:
        from r1fast.config import load_config

        target = load_config(target, overrides)  # before torch: a typo answers at once
    elif command == "evaluate" and not options.keys() & {"rescore", "compare"}:
        from r1fast.config import load_config

        load_config(target if target.endswith(".toml") else None, overrides)
    from r1fast import commands
    from r1fast.interrupt import interrupts

    with interrupts():
        commands.run(command, target, overrides, options)


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if "torch" not in sys.modules:  # nothing that could run out of it
        return False
    from r1fast.token_budget import is_out_of_memory

    return is_out_of_memory(error)


def _is_of_another_rank(error: BaseException) -> bool:
    """Whether it is what PyTorch says where a rank it exchanges with is gone."""
    if "torch" not in sys.modules or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    lost = (
        "gloo/transport",
        "Connection closed by peer",
        "remote process exited",
    )  # the last is NCCL's
    return any(words in str(error) for words in lost)


def _fail(text: str, code: int) -> int:
    """One line on stderr; the traceback too where R1FAST_DEBUG is set."""
    if os.environ.get("R1FAST_DEBUG"):
        import traceback

        traceback.print_exc()
    sys.stderr.write(f"{text}\n")
    return code


def _stop_at_once(number: int, frame: object) -> None:
    """While it starts there is nothing to save, and an exception amid the import of a library may be swallowed by it."""
    os.write(
        2,
        b"\nr1fast: stopped while it started; nothing was changed, and the same command goes on\n",
    )
    os._exit(EXIT_INTERRUPTED)


def run() -> NoReturn:
    """The command of a shell, which ends the process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell's `&` sets for SIGINT
            signal.signal(number, _stop_at_once)
    code = main()
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)  # all is done and said: torch takes a while to leave
    stopped = code == EXIT_INTERRUPTED and "torch" in sys.modules  # a reward's thread may hang
    if stopped or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from r1fast.distributed import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
