"""The part of `engine.Engine` that decodes: next tokens, and what they mean for the samples that get them."""

import numpy as np

from r1fast import _C
from r1fast.rollout.cuda_graphs import MAX_STEPS
from r1fast.rollout.draw import Draw, draw
from r1fast.rollout.request import Sample, why_banned
from r1fast.rollout.result import event_of, undecodable
from r1fast.types import TokenEvent

NOT_FINITE = "the model's logits are not finite: its weights have diverged"


class Decoding:
    def _decode(self, events: list[TokenEvent], num_tokens: int) -> None:
        """The next token of every running sample, or several."""
        if self.speculation is None and self.runner.can_decode_many(self.rows):
            nobody_waits = not (self.rows.num_watched or self.scheduler.could_start)
            self._decode_many(events, num_tokens if nobody_waits else 1)
            return
        ahead = self.speculation is None and self.runner.can_decode_ahead(self.rows)
        if ahead and self._decode_ahead(events, num_tokens):
            return
        slots = self.rows.batch().slots
        self._counts.decode_steps += 1
        if self.speculation is None:
            with self.part("decode"):
                logits = self.runner.decode(self.rows, self.scheduler.cache)
            with self.part("sampling"):
                drawn = draw(logits, self.rows, slots)
            self._append(slots, drawn, np.arange(len(slots)), events)
            return
        drafts = self.speculation.drafts(self.rows, slots)  # (B, num_draft), -1: none
        counts = 1 + (drafts >= 0).sum(1)
        first = np.cumsum(counts) - counts
        offsets = np.arange(counts.sum()) - np.repeat(first, counts)
        with self.part("decode"):
            logits = self.runner.decode(self.rows, self.scheduler.cache, drafts)
        with self.part("sampling"):
            drawn = draw(logits, self.rows, np.repeat(slots, counts), offsets)
        self._counts.drafted += int(counts.sum()) - len(slots)
        # a draft holds if it is what was drawn in its place; then what was drawn after it counts
        going = np.ones(len(slots), bool)
        for j in range(int(counts.max())):
            if j:
                going &= counts > j
                going[going] = drafts[going, j - 1] == drawn.tokens[first[going] + j - 1]
                going &= [self.rows.samples[slot] is not None for slot in slots]
                self._counts.accepted += int(going.sum())
            self._append(slots[going], drawn, first[going] + j, events)

    def _decode_many(self, events: list[TokenEvent], num_tokens: int) -> None:
        """The next tokens of every running sample, all of it in one call."""
        slots = self.rows.batch().slots
        with self.part("decode"):  # and the draws
            steps, outcomes = self.runner.decode_many(self.rows, self.scheduler.cache, num_tokens)
        self._counts.decode_steps += steps
        self._counts.decode_tokens += steps * len(slots)
        if outcomes.any():
            is_bad = outcomes == int(_C.Outcome.bad)
            self._counts.decode_tokens -= int(is_bad.sum())
            for slot in slots[is_bad]:
                self._end(self.rows.samples[slot], "error", events, error=NOT_FINITE)
            slots, outcomes = slots[~is_bad], outcomes[~is_bad]
        stopped, full = (outcomes == int(x) for x in (_C.Outcome.stopped, _C.Outcome.full))
        self._settle(slots, stopped, full, None, np.arange(len(slots)), events)

    def _decode_ahead(self, events: list[TokenEvent], num_tokens: int) -> bool:
        """The next tokens of every running sample by graphs that draw. False where none could be had.

        The host looks after several steps: what a sample has drawn after its end is dropped, and a free slot
        waits for the others. So there are more of them as completions grow longer: a sixteenth of their mean
        length, which is what may be lost.
        """
        rows, slots = self.rows, self.rows.batch().slots
        left = rows.limit[slots] - rows.length[slots]
        drawn = rows.length[slots] - rows.prompt_length[slots]
        most = min(num_tokens, MAX_STEPS, int(left.min()), 1 + int(drawn.mean()) // 16)
        if rows.num_watched or self.scheduler.could_start:
            most = 1
        if most > 1:
            most = self.scheduler.grow_ahead(most)
        with self.part("decode"):  # and the draws
            steps = self.runner.decode_ahead(rows, self.scheduler.cache, most)
        if steps is None:
            return False
        self._counts.decode_steps += len(steps)
        going = np.arange(len(slots))
        for step in steps:
            self._append(slots[going], step, going, events)
            going = going[[rows.samples[slot] is not None for slot in slots[going]]]
        return True

    def _append(
        self, slots: np.ndarray, drawn: Draw, at: np.ndarray, events: list[TokenEvent]
    ) -> None:
        """Give entries `at` of what was drawn to these slots, and end what has ended."""
        rows, sound = self.rows, ~drawn.is_bad[at]
        if not sound.all():
            for slot, is_banned in zip(slots[~sound], drawn.is_banned[at][~sound], strict=True):
                sample = rows.samples[slot]
                why = why_banned(sample.request.sampling) if is_banned else NOT_FINITE
                self._end(sample, "error", events, error=why)
            slots, at = slots[sound], at[sound]
        tokens = drawn.tokens[at]
        stopped, full = rows.append(slots, tokens, {k: x[at] for k, x in drawn.values.items()})
        self._counts.decode_tokens += len(slots)
        self._settle(slots, stopped, full, drawn, at, events)

    def _settle(
        self,
        slots: np.ndarray,
        stopped: np.ndarray,  # by a token
        full: np.ndarray,
        drawn: Draw | None,  # None: nobody reports other tokens than its own
        at: np.ndarray,  # entries of `drawn`
        events: list[TokenEvent],
    ) -> None:
        """What these slots' last tokens mean: events, and the end of what has ended."""
        rows, ended = self.rows, stopped | full
        if not ended.any() and not rows.num_watched:
            return
        tokens = rows.tokens[slots, rows.length[slots] - 1]
        if rows.num_watched:
            for i in np.flatnonzero(rows.is_watched[slots]):
                sample = rows.samples[slots[i]]
                if error := self._watch(sample, int(tokens[i]), drawn, int(at[i])):
                    ended[i] = False
                    self._end(sample, "error", events, error=error)
                elif sample.text is not None and sample.text.stopped_by is not None:
                    ended[i] = False
                    self._end(sample, "stop", events, stop_reason=sample.text.stopped_by)
                elif sample.request.stream and not ended[i]:
                    events.append(self._event(sample, None))
        for i in np.flatnonzero(ended):
            sample = rows.samples[slots[i]]
            if stopped[i]:
                self._end(sample, "stop", events, stop_reason=int(tokens[i]))
            else:
                self._end(sample, "length", events)

    def _watch(self, sample: Sample, token: int, drawn: Draw | None, at: int) -> str:
        """What a sample that is watched does with a token. Returns why it must end, if so."""
        if sample.seen is not None:
            sample.seen[token] = True
        if n := sample.request.sampling.top_logprobs:
            top = (x[at, :n].tolist() for x in (drawn.top_ids, drawn.top_logprobs))
            sample.top_logprobs.append(list(zip(*top, strict=True)))
        if sample.text is not None:
            may_stop = self.rows.length[sample.slot] > self.rows.min_length[sample.slot]
            try:
                sample.shown += sample.text.feed([token], may_stop=bool(may_stop))
            except Exception as failure:
                sample.text = None  # the tokenizer's fault ends this sample, not the others' step
                return undecodable(failure)
        return ""

    def _end(self, sample: Sample, reason: str, events: list[TokenEvent], **why) -> None:
        if why.get("error"):
            why["error"] = f"{sample.request.name}, sample {sample.index}: {why['error']}"
        events.append(self._event(sample, reason, **why))
        self.scheduler.finish(sample, is_sound=reason != "error")
        request = sample.request
        if all(s.is_done for s in request.samples):
            self._requests.pop(request.id, None)

    def _event(self, sample: Sample, reason: str | None, **why) -> TokenEvent:
        return event_of(sample, self.rows.results(sample), self.decode, reason, **why)
