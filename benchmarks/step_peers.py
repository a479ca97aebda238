"""The trainers that bench_step.py compares, each in a process of its own.

    python benchmarks/step_peers.py SETTINGS

takes `Settings` as JSON, then one order a line, makes one optimizer step of each and answers with what it
took. An order with "groups" is the training part alone: those rollouts, with those rewards and, in r1fast,
those old log-probabilities (TRL's own aligned step takes its current ones for the old, without a forward).
An order without is a whole step: generation, rewards (equal for the "silent" prompts), training. The weights are the checkpoint's before each.

r1fast is `GRPOTrainer.update`, or `train_step`. TRL is its GRPOTrainer's own loop, nothing of it replaced:
orders arrive in its callbacks, given rollouts through its `rollout_func`, and `_generate` is only timed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout_peers import peak_bytes, reset_peak

CLIP, MAX_GRAD_NORM, LEARNING_RATE = 0.2, 1.0, 1e-6
Groups = list[dict[str, Any]]  # each: prompt, prompt_ids; completions, logprobs, rewards of G


@dataclass
class Settings:
    """What a worker is to train, and how; `options` are the variant's own."""

    engine: str
    path: str  # a Hugging Face folder
    prompts: list[str]
    group: int  # G
    max_tokens: int  # of a completion
    kl_coef: float = 0.0
    threads: int = 2
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def reward_of(completion_ids: list[int]) -> float:
    """In [0, 1), by the tokens alone and as good as random."""
    return zlib.crc32(array("i", completion_ids).tobytes()) / 2**32


class Meter:
    """Seconds, CPU seconds and memory of what is between `start` and `stop`, pauses left out."""

    def start(self) -> None:
        self.before = reset_peak([os.getpid()])
        self.peak = self.before
        self.seconds, self.cpu_seconds = -time.perf_counter(), -time.process_time()

    def stop(self) -> dict[str, float]:
        self._halt()
        return {
            "seconds": self.seconds, "cpu_seconds": self.cpu_seconds,
            "rss": self.before, "peak_rss": self.peak,
        }  # fmt: skip

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._halt()
        yield
        reset_peak([os.getpid()])
        self.seconds -= time.perf_counter()
        self.cpu_seconds -= time.process_time()

    def _halt(self) -> None:
        self.seconds += time.perf_counter()
        self.cpu_seconds += time.process_time()
        self.peak = max(self.peak, peak_bytes([os.getpid()]))


def run_r1fast(s: Settings, orders: Iterator[dict], answer: Callable, folder: str) -> None:
    import copy

    from r1fast.config import load_config
    from r1fast.hf_folder import fill_tensors
    from r1fast.policy import load_policy
    from r1fast.trainer import GRPOTrainer
    from r1fast.types import Completion, Problem, Reward, RolloutGroup

    class Scorer:
        def score(self, groups, step_from_end=None):
            for group in groups:
                silent = group.problem.prompt in order["silent"]
                ids = [[] if silent else c.token_ids for c in group.completions]
                group.rewards = [Reward(reward_of(x), {}, None) for x in ids]

    config = load_config(None, [
        "--template.name=raw", f"--rollout.num_generations={s.group}",
        f"--rollout.max_completion_tokens={s.max_tokens}", f"--grpo.prompts_per_step={len(s.prompts)}",
        "--grpo.num_steps=1000000", "--grpo.loss_type=dapo", "--grpo.std=sample",
        f"--grpo.clip_eps_low={CLIP}", f"--grpo.clip_eps_high={CLIP}", f"--grpo.kl_coef={s.kl_coef}",
        "--grpo.ref_refresh_steps=0", f"--optim.lr={LEARNING_RATE}",
        f"--optim.max_grad_norm={MAX_GRAD_NORM}", "--log.num_samples=0",
        *(f"--{key}={value}" for key, value in s.options.items()),
    ])  # fmt: skip
    policy = load_policy(s.path, dtype="float32", device="cpu")
    problems = [Problem(prompt, "", str(n)) for n, prompt in enumerate(s.prompts)]
    trainer = GRPOTrainer(policy, config, folder, problems, Scorer())
    sampling, prompt_tokens = trainer.sampling, s.group * sum(map(len, trainer.prompt_ids))
    meter, own_step, order = Meter(), trainer.optimizer.step, {}

    def step(lr: float) -> Any:
        if order.get("gradients"):
            with meter.paused():
                mirror = copy.deepcopy(trainer.model)  # has a gradient where the model has a weight
                for p, q in zip(trainer.model.parameters(), mirror.parameters(), strict=True):
                    q.data.copy_(p.grad)
                save(mirror.hf_tensors(), order["gradients"])
        return own_step(lr)

    trainer.optimizer.step = step
    answer({"rss": reset_peak([os.getpid()])})
    for number, received in enumerate(orders):
        order.clear()
        order.update(received)
        fill_tensors(Path(s.path), trainer.model.hf_tensors())
        trainer.sampling = dataclasses.replace(
            sampling, max_tokens=order.get("max_tokens", s.max_tokens)
        )
        trainer.timer.take()
        tokens_before = trainer.num_tokens
        if "groups" in order:
            groups = [
                RolloutGroup(
                    Problem(g["prompt"], ""),
                    g["prompt_ids"],
                    [
                        Completion(ids, logprobs, "stop")
                        for ids, logprobs in zip(g["completions"], g["logprobs"], strict=True)
                    ],
                    [Reward(x, {}, None) for x in g["rewards"]],
                )
                for g in order["groups"]
            ]
            meter.start()
            row = trainer.update(groups, number)
        else:
            meter.start()
            row = trainer.train_step(number)
        found = meter.stop()
        found |= {
            "tokens": trainer.num_tokens - tokens_before - prompt_tokens,
            "forwarded": row["train/tokens_forwarded"],
            "generation": trainer.timer.take().get("time/rollout", 0.0),
        }
        answer(found)


def run_trl(s: Settings, orders: Iterator[dict], answer: Callable, folder: str) -> None:
    """Options: micro_batch, checkpointing (TRL's default is true), liger, patch (r1fast's loss in it)."""
    import datasets
    import torch
    import transformers
    import trl
    from safetensors import safe_open

    micro_batch = s.options["micro_batch"]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(s.path)
    meter, order, seen = Meter(), {}, {}

    def restore() -> None:
        with safe_open(Path(s.path) / "model.safetensors", "pt") as file, torch.no_grad():
            for name, p in trainer.model.named_parameters():
                p.copy_(file.get_tensor(name))

    class Turns(transformers.TrainerCallback):
        """Waits for an order before each optimizer step, and answers after it."""

        def on_step_begin(self, args, state, control, **kwargs):
            received = next(orders, None)
            if received is None:
                raise SystemExit
            order.clear()
            order.update(received)
            trainer.rollout_func = rollout if "groups" in order else None
            trainer.generation_config.max_new_tokens = order.get("max_tokens", s.max_tokens)
            seen.update(forwarded=0, generation=0.0, tokens=0)
            restore()
            meter.start()

        def on_step_end(self, args, state, control, **kwargs):
            answer(meter.stop() | seen)

    def rollout(prompts: list[str], trainer: Any) -> dict[str, list]:
        """The given members of each prompt's group, one for each time that it is asked for."""
        fields = ("prompt_ids", "completions", "logprobs", "rewards")
        members = {
            g["prompt"]: zip([g["prompt_ids"]] * s.group, *(g[f] for f in fields[1:]), strict=True)
            for g in order["groups"]
        }
        columns = zip(*(next(members[prompt]) for prompt in prompts), strict=True)
        names = ("prompt_ids", "completion_ids", "logprobs", "given")
        return dict(zip(names, map(list, columns), strict=True))

    def reward(prompts, completion_ids, given=None, **kwargs) -> list[float]:
        if given is not None:
            return given
        return [
            reward_of([] if prompt in order["silent"] else ids)
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]

    config = trl.GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to="none", logging_strategy="no",
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, shuffle_dataset=False,
        max_steps=1_000_000, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=len(s.prompts) * s.group // micro_batch,
        gradient_checkpointing=s.options.get("checkpointing", False),
        use_liger_kernel=s.options.get("liger", False),
        num_generations=s.group, max_completion_length=s.max_tokens, loss_type="dapo",
        beta=s.kl_coef, use_bias_correction_kl=False, epsilon=CLIP, scale_rewards="group",
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=MAX_GRAD_NORM,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=s.path, reward_funcs=reward, args=config, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"prompt": s.prompts * 100}), callbacks=[Turns()],
    )  # fmt: skip
    torch.set_num_threads(s.threads)
    if s.options.get("patch"):
        from r1fast.integrations.trl import patch

        patch(trainer)
    own_generate, own_clip = trainer._generate, trainer.accelerator.clip_grad_norm_

    def generate(prompts: list) -> tuple:
        start = time.perf_counter()
        found = own_generate(prompts)
        seen["generation"] += time.perf_counter() - start
        seen["tokens"] += sum(map(len, found[1]))
        return found

    def clip(parameters, *args):
        if order.get("gradients"):
            with meter.paused():
                named = trainer.model.named_parameters()
                save({name: p.grad for name, p in named}, order["gradients"])
        return own_clip(parameters, *args)

    def count(module, args, kwargs) -> None:
        if torch.is_grad_enabled():  # in training, and not again for a recomputed layer
            seen["forwarded"] += (args[0] if args else kwargs["input_ids"]).numel()

    trainer._generate, trainer.accelerator.clip_grad_norm_ = generate, clip
    trainer.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    answer({"rss": reset_peak([os.getpid()])})
    trainer.train()


def save(tensors: dict, path: str) -> None:
    from safetensors.torch import save_file

    save_file({name: x.contiguous() for name, x in tensors.items()}, path)


ENGINES = {"r1fast": run_r1fast, "TRL": run_trl}


def worker(settings: str) -> None:
    """Take orders, answer with what they took; the first error is the last answer."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer

    def answer(body: dict) -> None:
        out.write(json.dumps(body) + "\n")
        out.flush()

    import torch

    s = Settings(**json.loads(settings))
    torch.set_num_threads(s.threads)
    random.seed(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ENGINES[s.engine](s, map(json.loads, sys.stdin), answer, folder)
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        raise


class Worker:
    """A trainer in a process of its own. Raises RuntimeError where it cannot be had."""

    def __init__(self, settings: Settings, log: Path):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(dataclasses.asdict(settings))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, stderr=log.open("w"),
            env=os.environ | {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
                              "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self.rss = self._read()["rss"]  # of the loaded trainer

    def step(self, **order: Any) -> dict[str, float]:
        """seconds, cpu_seconds, rss, peak_rss, tokens, forwarded, generation (seconds)"""
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"error": f"it ended with {self.process.wait()}"}
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


if __name__ == "__main__":
    worker(sys.argv[1])
