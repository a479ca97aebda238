"""The judge that a config asks for: behind an endpoint, or a model sampled by the embedded engine."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from r1fast.chat_template import render_chat
from r1fast.config import Config, JudgeConfig, RolloutConfig
from r1fast.policy import Policy, load_policy
from r1fast.rewards.chat import RETRY_TEMPERATURE, ChatEndpoint, ChatModel, ChatRequest, Read
from r1fast.rollout.engine import Engine
from r1fast.rollout.sampler import SamplingParams, sample_seed
from r1fast.templates import encode_text


class EngineChat(ChatModel):
    """A chat model in this process; all requests of a call are one batch of the engine.

    It is loaded by the first call. Raises ValueError where its tokenizer has no chat template.
    """

    def __init__(
        self,
        load: Callable[[], Policy],
        rollout: RolloutConfig,
        *,
        num_retries: int = 3,
        max_reply_tokens: int = 512,
        name: str = "",
    ):
        super().__init__(name)
        self._load, self._rollout = load, rollout
        self.num_retries, self.max_reply_tokens = num_retries, max_reply_tokens
        self._policy: Policy | None = None
        self._engine: Engine | None = None
        self._turn = threading.Lock()  # an engine is not for several threads

    def _ask(self, requests: list[ChatRequest], read: Read) -> list[Any]:
        if not requests:
            return []
        with self._turn:
            policy, engine = self._start()
            found: list[Any] = [None] * len(requests)
            prompts = [_encode(request, policy) for request in requests]
            todo = [i for i, ids in enumerate(prompts) if self._fits(ids, engine)]
            for attempt in range(self.num_retries + 1):
                if not todo:
                    break
                self._count(requests=len(todo), **({"retries": len(todo)} if attempt else {}))
                texts = self._generate(engine, requests, prompts, todo, attempt)
                for i, text in zip(todo, texts, strict=True):
                    found[i] = read(text)
                    if found[i] is None:
                        self._failed(f"the judge's reply cannot be read: {text!r:.200}")
                todo = [i for i in todo if found[i] is None]
            return found

    def _start(self) -> tuple[Policy, Engine]:
        if self._policy is None or self._engine is None:
            policy = self._load()
            if not getattr(policy.tokenizer, "chat_template", None):
                raise ValueError(
                    f"the judge {policy.path!r} has no chat template in its tokenizer; judge.path "
                    "needs a chat model"
                )
            self._policy = policy
            self._engine = Engine.of(policy, self._rollout, fixed_weights=True)
        return self._policy, self._engine

    def _fits(self, ids: list[int], engine: Engine) -> bool:
        if len(ids) < engine.context:
            return True
        self._failed(f"a request of {len(ids)} tokens; the judge's context has {engine.context}")
        return False

    def _generate(
        self,
        engine: Engine,
        requests: list[ChatRequest],
        prompts: list[list[int]],
        todo: list[int],
        attempt: int,
    ) -> list[str]:
        """One reply to each of the requests in `todo`: one batch for each temperature."""
        texts: dict[int, str] = {}
        temperatures = {
            i: requests[i].temperature or (RETRY_TEMPERATURE if attempt else 0.0) for i in todo
        }
        for temperature in sorted(set(temperatures.values())):
            own = [i for i in todo if temperatures[i] == temperature]
            try:
                groups = engine.generate(
                    [prompts[i] for i in own],
                    1,
                    SamplingParams(temperature, max_tokens=self.max_reply_tokens),
                    seeds=[[sample_seed("judge", requests[i].seed + attempt)] for i in own],
                )
            except FloatingPointError as error:  # every reply: no logit was finite
                self._failed(error)
                texts |= dict.fromkeys(own, "")
                continue
            for i, group in zip(own, groups, strict=True):
                reply = group.completions[0]
                texts[i] = "" if reply.finish_reason == "error" else reply.text
                self._count(prompt_tokens=len(prompts[i]), completion_tokens=len(reply.token_ids))
        return [texts[i] for i in todo]


def _encode(request: ChatRequest, policy: Policy) -> list[int]:
    text = render_chat(policy.tokenizer, request.messages())
    return encode_text(text, policy.tokenizer, add_special_tokens=False)


def make_chat(config: Config) -> ChatModel | None:
    """What [judge] names; None where it names nothing."""
    j = config.judge
    if j.url:
        return _endpoint(j, j.url, j.model, j.timeout)
    if not j.path:
        return None
    m = config.model
    return EngineChat(
        lambda: load_policy(j.path, dtype=m.dtype, device=m.device),
        config.rollout,
        num_retries=j.num_retries,
        max_reply_tokens=j.max_reply_tokens,
        name=j.path,
    )


def rejection_chat(config: Config) -> ChatModel | None:
    """The endpoint of sample.judge_url where it is set, else what [judge] names."""
    s = config.sample
    if s.judge_url:
        return _endpoint(config.judge, s.judge_url, s.judge_model, s.judge_timeout)
    return make_chat(config)


def _endpoint(j: JudgeConfig, url: str, model: str, timeout: float) -> ChatEndpoint:
    return ChatEndpoint(
        url,
        model,
        timeout=timeout,
        num_retries=j.num_retries,
        api_key=os.environ.get(j.api_key_env, "") if j.api_key_env else "",
        api_key_env=j.api_key_env,
        max_reply_tokens=j.max_reply_tokens,
        num_threads=j.num_threads,
    )
