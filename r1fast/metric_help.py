"""What every number is that a row of metrics.jsonl can hold; the names are TRL's where TRL has one."""

# name -> (unit, meaning); <...> stands for any word
METRIC_HELP: dict[str, tuple[str, str]] = {
    "reward": ("", "mean reward of the step's completions"),
    "reward_std": ("", "standard deviation of the reward inside a group, mean over groups"),
    "frac_reward_zero_std": ("share", "groups whose completions all earned the same: no gradient"),
    "rewards/<name>/mean": ("", "mean of one reward, unweighted, where it applies"),
    "rewards/<name>/std": ("", "standard deviation of one reward over the step's completions"),
    "completions/mean_length": ("tokens", "mean length of a completion"),
    "completions/min_length": ("tokens", "shortest completion"),
    "completions/max_length": ("tokens", "longest completion"),
    "completions/mean_terminated_length": ("tokens", "mean length of completions that stopped"),
    "completions/mean_verified_length": ("tokens", "mean length where an answer can be verified"),
    "completions/clipped_ratio": ("share", "completions cut off at max_completion_tokens"),
    "verdicts/<verdict>": ("share", "completions with this verdict, of those that can be verified"),
    "sandbox/level": ("", "rung of the ladder that code runs on, 0 is the best; see sandbox.json"),
    "wait_rate": ("share", "verified completions with a reflection word (wait, re-check ...)"),
    "language_share": ("share", "words of the reasoning that are in the target language"),
    "kl": ("nats", "k3 estimate of KL(policy, reference) per token"),
    "entropy": ("nats", "entropy of the policy per completion token"),
    "clip_ratio/low_mean": ("share", "tokens clipped from below (ratio small, advantage below 0)"),
    "clip_ratio/high_mean": ("share", "tokens clipped from above (ratio large, advantage above 0)"),
    "clip_ratio/region_mean": ("share", "tokens clipped on either side"),
    "logprob_mismatch/mean": ("nats", "mean |sampler logprob - trainer logprob| per token"),
    "logprob_mismatch/max": ("nats", "largest |sampler logprob - trainer logprob|"),
    "logprob_mismatch/graph_max": (
        "nats",
        "largest |logprob in the loss - that of the forward with the gradient|, if batch_invariant",
    ),
    "rollout_correction/weight": (
        "",
        "mean of old over sampler probability, within its bounds; 1 where the engines agree",
    ),
    "rollout_correction/bounded": ("share", "tokens whose weight a bound has changed"),
    "vllm/servers": ("", "servers that sample, at the step's end"),
    "vllm/lost": ("", "times that a server was lost in this step, all ranks"),
    "vllm/retries": ("", "samples that failed and were sent again in this step, all ranks"),
    "vllm/weight_version": ("", "of the weights that the servers have"),
    "vllm/version_lag": (
        "versions",
        "that a sample's oldest weights are behind those that it trains, mean over tokens",
    ),
    "vllm/version_lag_max": ("versions", "and of the oldest sample"),
    "overlap/trainer_waited": ("s", "that the trainer waited for the step's samples"),
    "overlap/samples_waited": ("s", "that the step's samples, all there, waited for the trainer"),
    "vllm/sync_seconds": ("s", "from the trainer's weights to those of all servers, checked"),
    "vllm/sync_bytes": ("bytes", "of weights written or broadcast for it"),
    "vllm/canary_mean": (
        "nats",
        "mean |server logprob - trainer logprob| of the canaries, the worst server's",
    ),
    "vllm/canary_max": ("nats", "largest |server logprob - trainer logprob| of the canaries"),
    "rollout/preemptions": ("", "samples whose cache was taken away and computed again"),
    "rollout/stolen": ("", "groups that were sampled by another rank than their own"),
    "rollout/prefix_hit_rate": ("share", "prompt tokens that were found in the prefix cache"),
    "rollout/acceptance": ("share", "drafted tokens that were what was sampled"),
    "rollout/cache_mib": (
        "MiB",
        "keys and values held at once, at most since the start, all ranks",
    ),
    "train/token_budget": ("tokens", "a micro-batch may have; halved where memory ran out"),
    "rollout/groups_generated": ("", "groups begun in dynamic sampling, over all ranks"),
    "rollout/groups_kept": ("", "groups with signal that the step learns from"),
    "rollout/groups_missing": ("", "prompts_per_step less groups_kept: the batch was not filled"),
    "rollout/oversampling": ("", "groups begun over prompts_per_step"),
    "rollout/tokens_discarded": (
        "share",
        "sampled tokens of groups that the step does not learn from",
    ),
    "rollout/tokens_aborted": (
        "tokens",
        "of groups stopped because the batch was full before them",
    ),
    "train/tokens_forwarded": ("tokens", "forwarded by the policy in training, all ranks"),
    "train/rank_imbalance": ("", "largest number of tokens forwarded by a rank, over the mean"),
    "train/tokens_saved": (
        "share",
        "not forwarded: shared prompts, and completions without signal",
    ),
    "train/tokens_without_signal": ("share", "completion tokens dropped, their advantage being 0"),
    "train/tokens_masked": ("share", "completion tokens without loss: cut off, mask_truncated"),
    "train/old_logprobs_recomputed": ("", "1 where the sampler's were too far from the trainer's"),
    "judge/requests": ("", "sent to the judge in this step, retries included"),
    "judge/retries": ("", "requests to the judge that were sent again"),
    "judge/cached": ("", "judgements that were known from before"),
    "judge/failed": ("", "judgements that were not to be had: they count as no score"),
    "judge/tokens": ("tokens", "that the judge read and wrote in this step"),
    "judge/position_bias": (
        "",
        "first response preferred less second preferred, over judgements: 0 is none, 1 always the first",
    ),
    "judge/inconsistent": (
        "share",
        "comparisons whose two orders prefer different responses: ties",
    ),
    "hacking/fall": ("standard errors", "held-out pass@1 below the best evaluation looked back on"),
    "hacking/rise": ("standard errors", "training reward above that of the same evaluation"),
    "hacking/alarm": ("", "1 where both are above monitor.num_errors: the reward may be hacked"),
    "train/steps_without_signal": ("", "optimizer steps left out: nothing in them had signal"),
    "train/updates_skipped": ("", "optimizer steps not applied: their gradient was not finite"),
    "reference/version": ("", "optimizer step whose weights the reference had in this step's KL"),
    "ratio": ("", "mean of policy probability over sampler probability, per token; 1 on policy"),
    "loss": ("", "training loss"),
    "grad_norm": ("", "norm of the gradient before clipping"),
    "learning_rate": ("", "learning rate of the step"),
    "accuracy": ("share", "reward model: pairs in the right order, or labels on the right side"),
    "num_tokens": ("tokens", "tokens seen since the start of the stage"),
    "epoch": ("epochs", "passes over the training data"),
    "step_time": ("s", "wall time of the step"),
    "tokens_per_second": ("tokens/s", "prompt and completion tokens over step_time"),
    "time/<phase>": ("s", "wall time of one phase of the step"),
    "eval/pass@1": ("share", "mean correctness over k samples a problem"),
    "eval/pass@1_stderr": ("share", "standard error of pass@1 over problems"),
    "checkpoint/seconds": ("s", "that the step before waited for its checkpoint"),
    "checkpoint/write_seconds": (
        "s",
        "writing and reading back of the last checkpoint that is done",
    ),
    "checkpoint/bytes": ("bytes", "size of that checkpoint"),
    "eval/accuracy": ("share", "accuracy of a reward model on the held-out rows"),
    "eval/loss": ("", "loss of a reward model on the held-out rows"),
    "eval/cons@k": ("share", "problems whose majority answer is correct"),
    "eval/format_rate": ("share", "evaluation samples in the asked format"),
    "eval/language_share": ("share", "language_share of the evaluation samples"),
    "eval/wait_rate": ("share", "wait_rate of the evaluation samples"),
    "eval/mean_length": ("tokens", "mean length of the evaluation samples"),
    "eval/clip_rate": ("share", "evaluation samples cut off at the token limit"),
}


def metric_help(name: str) -> tuple[str, str]:
    """(unit, meaning) of a metric; ("", "") where the name is not one of ours."""
    if name in METRIC_HELP:
        return METRIC_HELP[name]
    for pattern, text in METRIC_HELP.items():
        head, sep, tail = pattern.partition("<")
        tail = tail.partition(">")[2]
        if sep and name.startswith(head) and name.endswith(tail):
            return text
    return "", ""
