"""Every knob of a run. A TOML file sets them; `--section.key=value` on the command line overrides."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from r1fast.config_check import PREFERENCE_REWARDS, REWARDS, STAGES, check

MAX_BYTES = 1 << 24  # of a config file


@dataclass(frozen=True, slots=True)
class ModelConfig:
    path: str = ""  # HF folder or model id: config.json, *.safetensors, tokenizer
    adapter: str = ""  # PEFT folder of LoRA: merged, or with lora.rank what training goes on from
    dtype: Literal["bfloat16", "float32"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # what layers make again in the backward instead of keeping it (recompute.py), with the same
    # gradient; "auto": nothing, as long as the memory is there
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Low-rank adapters: SFT, distillation and RL train them alone, the model itself is frozen."""

    rank: int = 0  # 0 = off: all weights are trained
    alpha: float = 32.0  # an adapter counts alpha / rank times
    rslora: bool = False  # alpha / sqrt(rank) times instead
    # of q_proj k_proj v_proj o_proj gate_proj up_proj down_proj
    targets: list = field(default_factory=lambda: ["all-linear"])


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """What each process of a torchrun launch holds of the model, and which of them train the same sequences."""

    # ddp: all of it. fsdp (FSDP2): a share of weights, masters and moments; layers are gathered one after the
    # other in training, the whole model once a rollout or evaluation
    mode: Literal["ddp", "fsdp"] = "ddp"
    replicas: int = 1  # fsdp: times that the model is held by all processes together (HSDP)
    # fsdp: a layer is freed after its forward, and gathered again for its backward
    reshard_after_forward: bool = True
    cpu_offload: bool = False  # fsdp on GPUs: shares and the optimizer lie in the host's memory
    # neighbouring processes that train the same sequences, each a piece of their tokens, for sequences whose
    # activations no process has room for; they exchange attention's heads (Ulysses)
    context_parallel: int = 1
    # neighbouring processes that train the same tokens, each with its heads and MLP channels of every layer; a
    # rollout has the whole model on each of them
    tensor_parallel: int = 1
    vocab_parallel: bool = True  # with tensor_parallel: the embedding and the head too, by tokens


@dataclass(frozen=True, slots=True)
class DataConfig:
    train: str = ""  # file; the task itself when empty and `task` is set
    eval: str = ""
    general: str = ""  # non-reasoning JSONL: prompts for RL stage 2; with completions for SFT too
    sft: str = ""  # JSONL of prompt + completion for `r1fast sft`
    preference: str = ""  # JSONL of prompt + chosen + rejected: trains the helpfulness model
    safety: str = ""  # JSONL of prompt + response + safe: trains the safety model
    format: Literal["auto", "jsonl", "gsm8k", "math", "mgsm", "humaneval", "mbpp"] = "auto"
    task: Literal["", "running_sum"] = ""  # an embedded task that makes its own data
    max_train_problems: int = 0  # 0 = all
    max_eval_problems: int = 0
    language: str = ""  # target language where a row names none; empty = en


@dataclass(frozen=True, slots=True)
class TemplateConfig:
    name: Literal["r1_zero", "cold_start", "chat", "raw"] = "r1_zero"  # how a prompt is put
    protocol: Literal["think_answer", "cold_start", "think"] = (
        "think_answer"  # how an answer is read
    )
    special_token: str = "|special_token|"  # of the cold-start pattern
    system: str = ""  # system message of the chat template
    prompt: str = "{prompt}"  # wording around the question in `raw` and `cold_start`


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """vLLM servers that sample in place of the embedded engine: rollout.engine = "vllm" (docs/scale.md)."""

    servers: list = field(default_factory=list)  # their addresses, such as http://127.0.0.1:8000
    # Python of vLLM's own environment: the trainer starts `num_servers` on this machine, and ends them
    start: str = ""
    num_servers: int = 1
    options: list = field(default_factory=list)  # more words of their command line
    # auto: nccl from a GPU to servers that were started elsewhere, else file
    weight_transfer: Literal["auto", "file", "nccl"] = "auto"
    # of file: a folder that trainer and servers see; empty: in memory (/dev/shm), on this machine
    weight_folder: str = ""
    # what an update does to samples in flight: waits for them, lets them go on with the new weights, or
    # has them sampled again; auto: keep with grpo.max_staleness, else wait
    update: Literal["auto", "wait", "keep", "abort"] = "auto"
    sleep: bool = False  # servers give their GPU's memory back while the trainer trains
    request_timeout: float = 900.0  # seconds in which one completion must be there
    sync_timeout: float = 600.0  # seconds in which a server must have taken new weights
    num_retries: int = 3  # times a sample is sent again, to another server, before the run stops
    wait_seconds: float = 120.0  # without any server before the run stops with exit code 69
    # mean |server - trainer| in nats of the samples that check every update; above it the run stops.
    # 0 = by dtype: 0.002 in float32, 0.1 in bfloat16 or float16, of either side
    max_canary: float = 0.0


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    # who samples: r1fast's own engine on the trainer's weights, or servers of vLLM
    engine: Literal["embedded", "vllm"] = "embedded"
    num_generations: int = 16  # completions per prompt, G in the paper
    max_prompt_tokens: int = 1024  # longer prompts are dropped, counted and reported
    max_completion_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0  # 0 = off
    max_batch_size: int = 256  # decode slots, B; of a rank's samples under way where vLLM samples
    cache_gib: float = (
        0.0  # of keys and values; 0 = what the slots need, at most half the free memory
    )
    block_size: int = 16  # positions in a block of the cache, a multiple of 16
    prefix_cache: bool = True  # equal prompts are prefilled once, until the weights change
    prefill_tokens: int = 2048  # of prompts in one step, so that decoding goes on
    num_draft_tokens: int = 0  # prompt-lookup drafts in a step, verified exactly; 0 = off
    cuda_graphs: bool = True  # on a GPU: a decode step is one launch; false starts each kernel
    # insist on the same bits whatever is in the batch, and take the loss at them; or refuse
    batch_invariant: bool = False
    # with several ranks: one that has free slots takes groups that another has not begun; which rank
    # samples what is then chance, and gradients are added up in another order from run to run
    work_stealing: bool = False
    vllm: VllmConfig = field(default_factory=VllmConfig)


RolloutCorrection = Literal[
    "auto", "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask",
    "geometric_truncate", "geometric_mask",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class GRPOConfig:
    num_steps: int = 200  # rollouts
    prompts_per_step: int = 16  # problems in a rollout, over all ranks
    num_mini_batches: int = 1  # optimizer steps a rollout is split into, at random
    num_iterations: int = 1  # passes over one rollout, mu in the paper
    whole_groups: bool = False  # mini-batches of whole groups; R1 splits single completions
    # what the means of a mini-batch count: all groups, or (verl) those with signal alone
    denominator: Literal["full", "live"] = "full"
    # DAPO: sample until prompts_per_step groups have signal: rewards that differ, or (as the paper has
    # it) answers of which some and not all are correct
    dynamic_sampling: Literal["off", "signal", "accuracy"] = "off"
    max_rollout_factor: int = 4  # it samples at most so many times prompts_per_step groups
    # samples may be of weights that are this many steps old: with rollout.engine = vllm the next steps'
    # are sampled while this one is trained on. 0 = off, 1 = one step off
    max_staleness: int = 0
    mask_truncated: bool = False  # DAPO: no loss for completions cut at max_completion_tokens
    # kernels/policy_loss.py has the formulas
    loss_type: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo", "luspo"] = "grpo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    delta: float = 0.0  # upper clamp of the ratio whatever the advantage's sign; 0 = none
    dual_clip: float = 0.0  # bounds the loss of a negative advantage; 0 = none
    cispo_clip: Literal["relative", "absolute"] = "relative"  # to 1 + clip_eps_high, or to it
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    off_policy_mask_threshold: float = (
        0.0  # mean KL in nats that drops a negative sequence; 0 = off
    )
    # weighs a token by old / sampler's probability, where the old one is then the trainer's own; auto:
    # token_truncate (TIS) with rollout.engine = vllm, else none
    rollout_correction: RolloutCorrection = "auto"
    rollout_clip_min: float = 0.0  # bounds of that weight
    rollout_clip_max: float = 2.0
    entropy_coef: float = 0.0  # of the mean entropy, in nats, added to the objective
    kl_coef: float = 0.001  # beta in the paper; 0 skips the reference model
    kl_estimator: Literal["k1", "k2", "k3", "k3_unbiased"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    ref_refresh_steps: int = 400  # reference := policy every n optimizer steps; 0 = never
    ref_device: Literal["same", "cpu"] = "same"  # where its weights wait between forwards
    ref_dtype: Literal["same", "bfloat16"] = "same"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    std: Literal["population", "sample"] = "population"  # divide by G (numpy) or G - 1 (TRL)
    std_eps: float = 1e-4
    # tokens forwarded in one micro-batch; "auto" is what memory allows and the device likes. Another number
    # is another rounding of the same gradient
    token_budget: int | Literal["auto"] = "auto"
    shared_prompt: bool = True  # a group's prompt is forwarded once a micro-batch; exact
    balance_ranks: bool = True  # completions move to where there is less to compute; exact
    # without KL and entropy_coef a completion of advantage 0 is not forwarded; exact
    drop_without_signal: bool = True
    # mean |sampler - trainer| in nats above which the trainer computes the old log-probabilities of a
    # step again; 0 = by dtype: 0.001 in float32, 0.03 in bfloat16
    max_logprob_mismatch: float = 0.0


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """Weights; 0 switches a reward off. Accuracy applies where there is something to verify, helpfulness,
    safety and judge to `kind = general` prompts, unless by_kind says otherwise."""

    accuracy: float = 1.0
    format: float = 1.0
    language: float = 0.0
    overlong: float = 0.0
    repetition: float = 0.0
    helpfulness: float = 0.0  # reward model on the summary only
    safety: float = 0.0  # reward model on the whole response
    judge: float = 0.0  # [judge] prefers the summary to the problem's reference answer
    # kind -> weights that hold for its problems instead: [rewards.by_kind.code] format = 0
    by_kind: dict = field(default_factory=dict)
    helpfulness_model: str = ""  # HF folder of a sequence-classification checkpoint
    safety_model: str = ""
    helpfulness_label: str = ""  # which label's log-odds is the score, where there are several
    safety_label: str = ""
    # how a prompt and a response are put to it: through [template], the model's own chat template,
    # or as a pair of texts; auto: what r1fast trained by [template], another as it is made for
    helpfulness_input: Literal["auto", "template", "chat", "pair"] = "auto"
    safety_input: Literal["auto", "template", "chat", "pair"] = "auto"
    # general prompts and preference rewards join in the last n steps; 0 = from the first step
    preference_last_steps: int = 0
    general_share: float = 0.25  # of the prompts of those steps
    math_timeout: float = 5.0  # seconds a verdict may take
    math_batch_timeout: float = 120.0  # seconds the verdicts of a call may take, together
    math_workers: int = 2  # processes that compare symbolic answers, started when needed
    # seconds of a core for one test of a program, where the problem names none; of the clock 1.5 times
    # that and 1 s more. Time in which the program is kept from running by others does not count, up to
    # 4 times the limit (more where there are more than 2 slots a core); then the verdict is error
    code_timeout: float = 4.0
    # seconds of the clock for all tests of one program, from when it has a box, counted likewise
    code_total_timeout: float = 30.0
    code_memory_mib: int = 512  # of a program with all it starts
    code_partial: bool = False  # the share of tests that pass; false: all of them or nothing
    sandbox: Literal["auto", "bwrap", "namespaces", "rlimits"] = "auto"  # auto: the best there is
    sandbox_slots: int = (
        0  # programs that run at once, a process; 0 = two for each core, at least 4
    )
    # run generated programs as this user where no sandbox is possible; they can do what you can
    allow_unsafe_sandbox: bool = False
    overlong_cache: int = 0  # L_c of DAPO's soft penalty; 0 = a fifth of max_completion_tokens
    lexicon: dict = field(default_factory=dict)  # language -> its words, for artificial languages

    def weights(self, kind: str) -> dict[str, float]:
        """The weight of each reward for problems of this kind."""
        own = {name: getattr(self, name) for name in REWARDS}
        if kind != "general":
            own |= dict.fromkeys(PREFERENCE_REWARDS, 0.0)
        return own | self.by_kind.get(kind, {})


@dataclass(frozen=True, slots=True)
class OptimConfig:
    lr: float = 1e-6
    min_lr_ratio: float = 1.0  # the cosine's floor as a share of lr; 1 = constant
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0  # 0 = no clipping


@dataclass(frozen=True, slots=True)
class SFTConfig:
    epochs: float = 2.0
    max_steps: int = 0  # 0 = by epochs
    batch_size: int = 32  # sequences a step, over all ranks
    max_seq_tokens: int = 32768  # longer examples are dropped, counted and reported
    token_budget: int | Literal["auto"] = "auto"  # tokens in one micro-batch, as in [grpo]
    loss: Literal["token", "sequence"] = "token"  # what the mean is over


@dataclass(frozen=True, slots=True)
class SampleConfig:
    """Rejection sampling."""

    num_problems: int = 0  # 0 = all of data.train
    num_samples: int = 4  # a prompt
    max_kept: int = 1  # a prompt; 0 = all that pass
    temperature: float = 1.0
    top_p: float = 1.0
    min_language_share: float = 0.95  # of the target language in the CoT; 0 = off
    max_paragraph_words: int = 400  # 0 = off
    drop_code_blocks: bool = True
    drop_duplicates: bool = True
    require_format: bool = True
    # for answers that rules cannot read; empty = what [judge] names, if anything
    judge_url: str = ""
    judge_model: str = ""
    judge_timeout: float = 30.0
    general_cot: bool = False  # ask the model for a CoT before the answers of data.general
    simple_query_words: int = 3  # general prompts this short get an empty CoT


@dataclass(frozen=True, slots=True)
class JudgeConfig:
    """A chat model that judges: behind an OpenAI-compatible endpoint (url, model), or in process (path)."""

    url: str = ""
    model: str = ""  # its name behind url
    path: str = ""  # HF folder or model id, sampled by the embedded engine
    api_key_env: str = "R1FAST_JUDGE_API_KEY"  # the environment variable that holds the key
    timeout: float = 30.0  # seconds of one try
    num_retries: int = 3
    num_threads: int = 8  # requests at a time
    max_reply_tokens: int = 512
    # `r1fast preferences`: judgements of a pair, in random order; the mean gap that is kept (above it)
    num_judgements: int = 4
    min_gap: float = 1.0  # grades go from 2 (much better) to -2
    max_length_ratio: float = 2.0  # of the longer response to the shorter; 0 = any
    num_samples: int = 2  # responses sampled for each prompt; each two of them are a pair


@dataclass(frozen=True, slots=True)
class MonitorConfig:
    """Reward hacking: the training reward rises while held-out pass@1 falls. Needs eval.every_steps."""

    action: Literal["off", "warn", "stop"] = "warn"
    window: int = 4  # evaluations looked back on
    num_errors: float = (
        1.0  # standard errors that pass@1 must have fallen, and the reward risen, by
    )


@dataclass(frozen=True, slots=True)
class ColdStartConfig:
    """How long CoT examples are collected."""

    methods: list = field(default_factory=lambda: ["r1_zero"])  # few_shot | reflection | r1_zero
    num_problems: int = 300
    num_samples: int = 4
    max_kept: int = 300  # examples in the collected file; 0 = all that pass
    min_language_share: float = 0.0  # of the target language; 0 = off
    summary: str = "The answer is \\boxed{{answer}}."  # {answer} is what was extracted
    few_shot_file: str = ""  # JSONL of prompt + completion shown as examples
    num_few_shot: int = 4
    reflection_prompt: str = (
        "{prompt}\n\nReason in detail: reflect on every step and verify the result before you "
        "answer. Put the reasoning in <think> </think>, then the final answer in <answer> </answer>."
    )
    collector: str = ""  # model that few_shot and reflection ask; the base model when empty
    edited_file: str = ""  # a person's edit of the collected JSONL; the collected one when empty


@dataclass(frozen=True, slots=True)
class EvalConfig:
    num_problems: int = 0  # 0 = all of data.eval
    num_samples: int = 16  # k
    temperature: float = 0.6
    top_p: float = 0.95
    every_steps: int = 0  # during GRPO: a short evaluation every n steps; 0 = off
    every_num_problems: int = 64
    every_num_samples: int = 2


@dataclass(frozen=True, slots=True)
class LogConfig:
    tensorboard: bool = False
    wandb: bool = False  # offline unless WANDB_MODE says otherwise
    wandb_project: str = "r1fast"
    num_samples: int = 4  # completions stored in full, a step
    record: str = ""  # RL steps kept for `r1fast replay`: "all" or "12,20-30"; empty = none
    profile_steps: int = 0  # steps traced after one that warms up (profile/); 0 = none
    # without anything that moves, before stacks are written (hang-*.txt); the first step has three
    # times as long; 0 = off
    watchdog_seconds: float = 600.0
    watchdog_abort: bool = (
        False  # then end with exit code 75, for a supervisor that starts it again
    )


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    every_steps: int = 50  # weights and optimizer state; 0 = only after the last step
    keep_last: int = 2  # the newest, and one to go back to where it is damaged
    # from a signal to the saved checkpoint: torchrun, SLURM and Kubernetes kill after 30
    deadline_seconds: float = 25.0
    # the checkpoint whose mean of this metric since the one before is the best stays too: the largest,
    # of -name the smallest; auto: eval/pass@1, without evaluation reward; of SFT -loss; "" is off
    keep_best: str = "auto"
    # a copy in memory is written and read back beside the next steps; false: the step waits for the disk
    asynchronous: bool = True


@dataclass(frozen=True, slots=True)
class PipelineConfig:
    stages: list = field(default_factory=lambda: list(STAGES))
    base: str = ""  # HF folder or id; the task trains its own when empty
    small_base: str = ""  # the model that is distilled into; no distillation when empty and no task


@dataclass(frozen=True, slots=True)
class Config:
    seed: int = 0
    output_dir: str = "runs/r1fast"
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    stages: dict = field(default_factory=dict)  # [stages.r1_zero.optim] lr = ... for one stage only

    def __post_init__(self):
        check(self)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, then apply overrides such as `--grpo.kl_coef=0`.

    Raises ValueError for a missing file, bad TOML, an unknown key (with the known ones), a wrong
    type or a value out of range.
    """
    values: dict = {}
    if path is not None:
        path = Path(path)
        if not os.path.isfile(path):
            shipped = ", ".join(sorted(str(p) for p in Path("configs").glob("*.toml")))
            raise ValueError(
                f"config file {str(path)!r} does not exist"
                + (f"; here are {shipped}" * bool(shipped))
            )
        try:
            if (size := path.stat().st_size) > MAX_BYTES:
                raise ValueError(f"{path} has {size} bytes; a config has at most {MAX_BYTES}")
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from None
        except OSError as error:
            raise ValueError(f"config file {str(path)!r} cannot be read: {error}") from None
    return config_of(values, overrides)


def config_of(values: dict, overrides: Sequence[str] = ()) -> Config:
    """A Config of nested values, as TOML and `to_dict` give them, and overrides over it."""
    try:
        values = deepcopy(values)
    except RecursionError:
        raise ValueError("a config's tables and lists must not be nested so deeply") from None
    for override in overrides:
        key, sep, text = override.removeprefix("--").partition("=")
        if not sep or not override.startswith("--"):
            raise ValueError(f"expected --section.key=value, got {override!r}")
        *sections, name = key.split(".")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise ValueError(f"{key!r}: {section!r} is a value, not a section")
        table[name] = _parse(text)
    config = _build(Config(), values)
    config = replace(config, output_dir=os.path.expanduser(config.output_dir))
    for name in config.stages:
        stage_config(config, name)  # a wrong key in a stage is an error now, not in an hour
    return config


def stage_config(config: Config, stage: str) -> Config:
    """`config` with the `[stages.<stage>]` tables laid over it."""
    return _build(config, config.stages.get(stage, {}), f"stages.{stage}.")


def to_dict(config: Config) -> dict:
    return asdict(config)


def _parse(text: str) -> Any:
    """A TOML value, or a bare string: 3, 1e-6, true, [1, 2], adamw."""
    try:
        values = tomllib.loads(f"x = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return values["x"] if values.keys() == {"x"} else text  # text of several lines may define more


def _build(default: Any, values: dict, prefix: str = "") -> Any:
    """`default` with `values` put in; unknown keys and wrong types are errors."""
    hints = get_type_hints(type(default))
    names = [f.name for f in fields(default)]
    changes = {}
    for name, value in values.items():
        key = prefix + name
        if name not in names:
            close = get_close_matches(name, names, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"unknown config key {key!r}{hint}; known here: {', '.join(names)}")
        old = getattr(default, name)
        if is_dataclass(old):
            if not isinstance(value, dict):
                raise ValueError(f"{key} is a section, got the value {value!r}")
            changes[name] = _build(old, value, key + ".")
            continue
        types, choices = _allowed(hints[name])
        if type(value) is int and abs(value) >= 2**63:
            raise ValueError(f"{key} must fit in 64 bits, got a number of {value.bit_length()}")
        value = float(value) if types == (float,) and type(value) is int else value
        is_other_word = type(value) is str and choices and value not in choices
        if type(value) not in types or is_other_word:
            raise ValueError(f"{key} must be {_kind(types, choices)}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} must be a number, got {value}")
        changes[name] = value
    return replace(default, **changes)


def choices_of(hint: Any) -> tuple[str, ...]:
    """The words that a value of this annotation may be; none where it is free."""
    return _allowed(hint)[1]


def _allowed(hint: Any) -> tuple[tuple[type, ...], tuple[str, ...]]:
    """Types that a value of this annotation may have, and the words where it is one of some."""
    if get_origin(hint) in (Union, UnionType):  # `int | Literal[...]` is the former
        parts = [_allowed(part) for part in get_args(hint)]
        return tuple(t for types, _ in parts for t in types), sum((c for _, c in parts), ())
    if get_origin(hint) is Literal:
        return (str,), get_args(hint)
    return (get_origin(hint) or hint,), ()


def _kind(types: tuple[type, ...], choices: tuple[str, ...]) -> str:
    words = ", ".join(repr(c) for c in choices)
    kinds = {int: "a whole number", float: "a number", bool: "true or false", list: "a list",
             dict: "a table", str: "one of " * (len(choices) > 1) + words or "a string"}  # fmt: skip
    return " or ".join(kinds.get(t, "a value") for t in types)
