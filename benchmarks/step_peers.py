"""The trainers that bench_step.py and step_gpu.py compare; the program of step_orders.Worker.

r1fast is `GRPOTrainer.update`, or `train_step`, with the old log-probabilities that are given. TRL is its
GRPOTrainer's own loop, nothing of it replaced: orders arrive in its callbacks, given rollouts through its
`rollout_func`; `_generate` and the clipping are only timed. Its aligned step takes the current log-probabilities
for the old ones, without a forward. "plain" is the loop that one would write: transformers' model, padded
micro-batches of neighbours in length, and all logits of the completions in memory; training part alone.
Where no old log-probabilities are given, r1fast's model makes them before the clock starts.
On a CPU the weights are the checkpoint's before each step.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from step_orders import CLIP, LEARNING_RATE, MAX_GRAD_NORM, Meter, Settings, reward_of


def run_r1fast(s: Settings, orders: Iterator[dict], answer: Callable, folder: str) -> None:
    """Options: overrides of the config."""
    import torch

    from r1fast.batch import pack
    from r1fast.config import load_config
    from r1fast.forward import completion_logprobs
    from r1fast.hf_folder import fill_tensors
    from r1fast.policy import load_policy
    from r1fast.trainer import GRPOTrainer
    from r1fast.types import Completion, Problem, Reward, RolloutGroup, Sequence

    class Scorer:
        def score(self, groups, step_from_end=None):
            for group in groups:
                silent = group.problem.prompt in order["silent"]
                ids = [[] if silent else c.token_ids for c in group.completions]
                group.rewards = [Reward(reward_of(x), {}, None) for x in ids]

    def own_logprobs(g: dict) -> list[list[float]]:
        sequences = [Sequence(g["prompt_ids"], ids) for ids in g["completions"]]
        found = {}
        for batch in pack(
            sequences, 16384, [0.0] * s.group, device=s.device, share_prompts=True
        ):  # fmt: skip
            with torch.no_grad():
                logprobs = completion_logprobs(trainer.model, batch)[0].tolist()
            for n, i in enumerate(batch.sequence_index):
                found[i] = logprobs[batch.cu_seqlens[n] : batch.cu_seqlens[n + 1]]
        return [found[i] for i in range(s.group)]

    def given(g: dict) -> RolloutGroup:
        logprobs = g.get("logprobs") or own_logprobs(g)
        completions = zip(g["completions"], logprobs, strict=True)
        return RolloutGroup(
            Problem(g["prompt"], ""), g["prompt_ids"],
            [Completion(ids, logprobs, "stop") for ids, logprobs in completions],
            [Reward(x, {}, None) for x in g["rewards"]],
        )  # fmt: skip

    def step(lr: float) -> Any:
        meter.mark("gradient")
        if "gradients" in order:
            with meter.paused():
                mirror = copy.deepcopy(trainer.model)  # has a gradient where the model has a weight
                for p, q in zip(trainer.model.parameters(), mirror.parameters(), strict=True):
                    q.data.copy_(p.grad)
                save(mirror.hf_tensors(), order["gradients"])
        if s.optimizer:
            return own_step(lr)
        trainer.optimizer.zero_grad()
        return 0.0, True

    config = load_config(None, [
        "--template.name=raw", f"--rollout.num_generations={s.group}",
        f"--rollout.max_completion_tokens={s.max_tokens}", f"--grpo.prompts_per_step={len(s.prompts)}",
        "--grpo.num_steps=1000000", "--grpo.loss_type=dapo", "--grpo.std=sample",
        f"--grpo.clip_eps_low={CLIP}", f"--grpo.clip_eps_high={CLIP}", f"--grpo.kl_coef={s.kl_coef}",
        "--grpo.ref_refresh_steps=0", f"--optim.lr={LEARNING_RATE}",
        f"--optim.max_grad_norm={MAX_GRAD_NORM}", "--log.num_samples=0",
        *(f"--{key}={value}" for key, value in s.options.items()),
    ])  # fmt: skip
    policy = load_policy(s.path, dtype=s.dtype, device=s.device)
    problems = [Problem(prompt, "", str(n)) for n, prompt in enumerate(s.prompts)]
    trainer = GRPOTrainer(policy, config, folder, problems, Scorer())
    sampling, prompt_tokens = trainer.sampling, s.group * sum(map(len, trainer.prompt_ids))
    meter, own_step, order = Meter(s.device), trainer.optimizer.step, {}
    trainer.optimizer.step = step
    answer({"loaded": meter.loaded()})
    for number, received in enumerate(orders):
        order.clear()
        order.update(received)
        if s.device == "cpu":
            fill_tensors(Path(s.path), trainer.model.hf_tensors())
        cut = order.get("max_tokens", s.max_tokens)
        trainer.sampling = dataclasses.replace(sampling, max_tokens=cut)
        groups = [given(g) for g in order.get("groups", [])]
        trainer.timer.take()
        tokens_before = trainer.num_tokens
        meter.start()
        row = trainer.update(groups, number) if groups else trainer.train_step(number)
        answer(meter.stop() | {
            "tokens": trainer.num_tokens - tokens_before - prompt_tokens,
            "forwarded": row["train/tokens_forwarded"],
            "generation": trainer.timer.take().get("time/rollout", 0.0),
        })  # fmt: skip


def run_trl(s: Settings, orders: Iterator[dict], answer: Callable, folder: str) -> None:
    """Options: micro_batch, checkpointing (TRL's default is true), liger, patch (r1fast's loss in it)."""
    import datasets
    import torch
    import transformers
    import trl

    micro_batch = s.options["micro_batch"]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(s.path)
    meter, order, seen = Meter(s.device), {}, {}

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
            if s.device == "cpu":
                restore(trainer.model, s.path)
            meter.start()

        def on_step_end(self, args, state, control, **kwargs):
            answer(meter.stop() | seen)

    def rollout(prompts: list[str], trainer: Any) -> dict[str, list]:
        """The given members of each prompt's group, one for each time that it is asked for."""
        members = {}
        for g in order["groups"]:
            logprobs = g.get("logprobs") or [[0.0] * len(ids) for ids in g["completions"]]
            rest = (g["completions"], logprobs, g["rewards"])
            members[g["prompt"]] = zip([g["prompt_ids"]] * s.group, *rest, strict=True)
        columns = zip(*(next(members[prompt]) for prompt in prompts), strict=True)
        names = ("prompt_ids", "completion_ids", "logprobs", "given")
        return dict(zip(names, map(list, columns), strict=True))

    def reward(prompts, completion_ids, given=None, **kwargs) -> list[float]:
        if given is not None:
            return given
        pairs = zip(prompts, completion_ids, strict=True)
        return [reward_of([] if prompt in order["silent"] else ids) for prompt, ids in pairs]

    config = trl.GRPOConfig(
        output_dir=folder, use_cpu=s.device == "cpu", bf16=s.dtype == "bfloat16",
        report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, shuffle_dataset=False, max_steps=1_000_000,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=len(s.prompts) * s.group // micro_batch,
        gradient_checkpointing=s.options.get("checkpointing", False),
        use_liger_kernel=s.options.get("liger", False), model_init_kwargs={"dtype": s.dtype},
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
        meter.mark("gradient")
        if "gradients" in order:
            with meter.paused():
                named = trainer.model.named_parameters()
                save({name: p.grad for name, p in named}, order["gradients"])
        return own_clip(parameters, *args)

    def count(module, args, kwargs) -> None:
        if torch.is_grad_enabled():  # in training, and not again for a recomputed layer
            seen["forwarded"] += (args[0] if args else kwargs["input_ids"]).numel()

    trainer._generate, trainer.accelerator.clip_grad_norm_ = generate, clip
    trainer.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    answer({"loaded": meter.loaded()})
    trainer.train()


def run_plain(s: Settings, orders: Iterator[dict], answer: Callable, folder: str) -> None:
    """Options: micro_batch, checkpointing."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(s.path, dtype=getattr(torch, s.dtype))
    model.to(s.device).train()
    if s.options.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, weight_decay=0, fused=True
    )  # fmt: skip
    meter = Meter(s.device)

    def backward(rows: list[tuple], num_tokens: int) -> int:
        """Of one micro-batch; the number of positions that it forwards."""
        prompts = [torch.tensor(row[0]).flip(0) for row in rows]
        completions = [torch.tensor(row[1]) for row in rows]
        advantages = torch.tensor([row[3] for row in rows], device=s.device)[:, None]
        pad = torch.nn.utils.rnn.pad_sequence
        left = pad([p + 1 for p in prompts], True).flip(1)  # 0 where there is nothing
        right = pad([c + 1 for c in completions], True)
        ids = torch.cat((left, right), 1).to(s.device)
        mask, targets = (ids > 0).long(), right.to(s.device)
        hidden = {"logits_to_keep": right.shape[1] + 1, "attention_mask": mask, "use_cache": False}
        logits = model((ids - 1).clamp(min=0), **hidden).logits[:, :-1].float()
        chosen = (targets - 1).clamp(min=0)[..., None]
        logprobs = logits.log_softmax(-1).gather(2, chosen)[..., 0]
        old = logprobs.detach()
        if rows[0][2] is not None:
            old = pad([torch.tensor(row[2]) for row in rows], True).to(s.device)
        ratio = (logprobs - old).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        (-(gain * (targets > 0)).sum() / num_tokens).backward()
        return ids.numel()

    if s.kl_coef:
        raise ValueError("the plain loop has no reference model")
    answer({"loaded": meter.loaded()})
    for order in orders:
        if s.device == "cpu":
            restore(model, s.path)
        meter.start()
        rows = []
        for g in order["groups"]:
            rewards = torch.tensor(g["rewards"])
            advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()
            prompts, old = [g["prompt_ids"]] * s.group, g.get("logprobs", [None] * s.group)
            rows += zip(prompts, g["completions"], old, advantages, strict=True)
        num_tokens = sum(len(row[1]) for row in rows)
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        size = s.options["micro_batch"]
        forwarded = sum(backward(rows[i : i + size], num_tokens) for i in range(0, len(rows), size))
        meter.mark("gradient")
        if "gradients" in order:
            with meter.paused():
                save({name: p.grad for name, p in model.named_parameters()}, order["gradients"])
        if s.optimizer:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
        optimizer.zero_grad()
        answer(meter.stop() | {"tokens": num_tokens, "forwarded": forwarded, "generation": 0.0})


def restore(model: Any, path: str) -> None:
    """The checkpoint's weights into a transformers model, in place."""
    import torch
    from safetensors import safe_open

    with safe_open(Path(path) / "model.safetensors", "pt") as file, torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(file.get_tensor(name))


def save(tensors: dict, path: str) -> None:
    from safetensors.torch import save_file

    save_file({name: x.contiguous() for name, x in tensors.items()}, path)


ENGINES = {"r1fast": run_r1fast, "TRL": run_trl, "plain": run_plain}


def main() -> None:
    """Settings are the first line, orders the others; an error is the last answer."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer

    def answer(body: dict) -> None:
        out.write(json.dumps(body) + "\n")
        out.flush()

    try:
        import torch

        s = Settings(**json.loads(sys.stdin.readline()))
        torch.set_num_threads(s.threads)
        with tempfile.TemporaryDirectory() as folder:
            ENGINES[s.engine](s, map(json.loads, sys.stdin), answer, folder)
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
