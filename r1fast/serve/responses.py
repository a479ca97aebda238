"""Writes OpenAI responses: what the engine made becomes completions, chat completions and chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Sequence

from r1fast.rollout.result import best_completions
from r1fast.rollout.text import Offsets
from r1fast.serve.requests import Generation
from r1fast.types import Completion, TokenEvent

DONE = b"data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON has no word for, as in OpenAI's API


def sse(body: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


class Responder:
    """Builds everything that answers one request. `token_text` is the text of a single token id,
    `decode` that of a completion's.
    """

    def __init__(
        self,
        generation: Generation,
        model: str,
        token_text: Callable[[int], str],
        decode: Callable[[list[int]], str],
    ):
        self.generation, self.token_text, self.decode = generation, token_text, decode
        self.head = {
            "id": f"{'chatcmpl' if generation.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if generation.chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self.chunk_head = self.head | (
            {"object": "chat.completion.chunk"} if generation.chat else {}
        )
        self.offsets: dict[int, Offsets] = {}  # of each choice that streams

    def response(self, completions: Sequence[Sequence[Completion]]) -> dict:
        """The whole answer; `completions` are `best_of` of each prompt, of which the best n stay."""
        g, choices = self.generation, []
        for prompt, drawn in enumerate(completions):
            kept = best_completions(drawn, g.n, by="mean") if g.best_of > g.n else drawn
            choices += [self._choice(len(choices) + i, prompt, c) for i, c in enumerate(kept)]
        num_tokens = sum(len(c.token_ids) for drawn in completions for c in drawn)
        whole = self.head | {"choices": choices, "usage": self.usage(num_tokens)}
        if g.chat and g.return_token_ids:
            whole["prompt_token_ids"] = g.prompts[0]
        return whole

    def usage(self, num_completion_tokens: int) -> dict:
        """Token counts. What `best_of` drops counts too: it was made."""
        num_prompt_tokens = sum(len(p) for p in self.generation.prompts)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_completion_tokens,
            "total_tokens": num_prompt_tokens + num_completion_tokens,
        }

    def _choice(self, index: int, prompt: int, c: Completion) -> dict:
        g = self.generation
        choice = {"index": index, "finish_reason": c.finish_reason, "stop_reason": c.stop_reason}
        echoed = g.prompt_texts[prompt] * g.echo
        if g.chat:
            choice["message"] = {"role": "assistant", "content": c.text}
        else:
            choice["text"] = echoed + c.text
        choice["logprobs"] = self._logprobs(
            c.token_ids, c.logprobs, c.top_logprobs, Offsets(self.decode)
        )
        if g.return_token_ids:
            choice["token_ids"] = c.token_ids
            if not g.chat:
                choice["prompt_token_ids"] = g.prompts[prompt]
        return choice

    def first_chunks(self) -> Iterable[dict]:
        """What comes before any token: a chat's role, the echoed prompt, the prompts' ids."""
        g = self.generation
        if not (g.chat or g.echo or g.return_token_ids):
            return
        for index in range(g.num_samples):
            prompt = index // g.n
            choice = {"index": index, "finish_reason": None, "logprobs": None}
            if g.chat:
                choice["delta"] = {"role": "assistant", "content": ""}
            else:
                choice["text"] = g.prompt_texts[prompt] * g.echo
            chunk = self.chunk_head | {"choices": [choice]}
            if g.return_token_ids:
                choice["token_ids"] = []
                (chunk if g.chat else choice)["prompt_token_ids"] = g.prompts[prompt]
            yield chunk

    def chunk(self, prompt: int, event: TokenEvent) -> dict | None:
        """The chunk of one event; None where there is nothing to say yet, as half a character."""
        g = self.generation
        shows_tokens = event.token_ids and (g.top_logprobs is not None or g.return_token_ids)
        if not (event.text or event.finish_reason or shows_tokens):
            return None
        index = prompt * g.n + event.sample
        choice = {"index": index, "finish_reason": event.finish_reason}
        if index not in self.offsets:
            self.offsets[index] = Offsets(self.decode)
        choice["logprobs"] = self._logprobs(
            event.token_ids, event.logprobs, event.top_logprobs or [], self.offsets[index]
        )
        choice |= {"delta": {"content": event.text}} if g.chat else {"text": event.text}
        if event.finish_reason:
            choice["stop_reason"] = event.stop_reason
        if g.return_token_ids:
            choice["token_ids"] = event.token_ids
        return self.chunk_head | {"choices": [choice]}

    def usage_chunk(self, num_completion_tokens: int) -> dict:
        """The last chunk, where stream_options.include_usage asks for it."""
        return self.chunk_head | {"choices": [], "usage": self.usage(num_completion_tokens)}

    def _logprobs(
        self,
        ids: list[int],
        logprobs: list[float],
        top: list[list[tuple[int, float]]],
        offsets: Offsets,
    ) -> dict | None:
        """In OpenAI's two shapes; None where they were not asked for."""
        g = self.generation
        if g.top_logprobs is None:
            return None
        tops = top if g.top_logprobs else [[] for _ in ids]
        if g.chat:
            entries = [
                {**self._entry(t, lp), "top_logprobs": [self._entry(*pair) for pair in row]}
                for t, lp, row in zip(ids, logprobs, tops, strict=True)
            ]
            return {"content": entries}
        rows = []
        for t, lp, row in zip(ids, logprobs, tops, strict=True):
            # tokens of equal text, as halves of characters, share a key: the likeliest keeps it
            pairs = sorted([*row, (t, lp)], key=lambda pair: pair[1])
            rows.append({self._name(i): _number(x) for i, x in pairs})
        return {
            "tokens": [self._name(t) for t in ids],
            "token_logprobs": [_number(lp) for lp in logprobs],
            "top_logprobs": rows if g.top_logprobs else None,
            "text_offset": offsets.feed(ids),
        }

    def _entry(self, token_id: int, logprob: float) -> dict:
        """A token of a chat's log-probabilities. `bytes` is None for a part of a character."""
        text = self.token_text(token_id)
        known = None if "\ufffd" in text else list(text.encode())
        return {"token": self._name(token_id), "logprob": _number(logprob), "bytes": known}

    def _name(self, token_id: int) -> str:
        return (
            f"token_id:{token_id}" if self.generation.tokens_as_ids else self.token_text(token_id)
        )


def _number(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
