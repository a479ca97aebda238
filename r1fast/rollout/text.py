"""Text of a completion while it grows: whole characters only, and nothing that may become a stop string.

Tokens are decoded in a window that begins a little before the new ones, because a token's text may depend
on what stands before it (a space, the first bytes of a character). Token ids are never made from text.
"""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what decoders make of half a character
MAX_PENDING = 8  # tokens; no character has more bytes, so they do not all begin one
MAX_PART = 3  # bytes of a character that is not whole, each perhaps a replacement of its own


class TextStream:
    """Feed it tokens, take text. `stop` strings end the text before themselves."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        self.decode, self.stop = decode, tuple(stop)
        self.stopped_by: str | None = None
        self._ids: list[int] = []
        self._start = self._read = 0  # the window is ids[start:], text is known up to ids[read]
        self._ahead = 0  # characters behind ids[read] that are known too; or minus those before it that are not
        self._held = ""  # text that might become a stop string
        self._seen = ""  # the end of the text, in which one may have begun
        self._longest = max(map(len, self.stop), default=0)

    def feed(self, token_ids: Sequence[int], *, may_stop: bool = True) -> str:
        """The text that these tokens make certain. Sets `stopped_by` if a stop string ends in it.

        Without `may_stop` no string that ends in these tokens counts.
        """
        shown = ""
        for token in token_ids:
            self._ids.append(token)
            shown += self._push(self._decode_new(), may_stop)
            if self.stopped_by is not None:
                break
        return shown

    def finish(self) -> str:
        """What was held back, when nothing more will come."""
        if self.stopped_by is not None:
            return ""
        rest = self._held + self._decode_new(final=True)
        self._held = ""
        return rest

    @property
    def holds_half(self) -> bool:
        """Whether the newest tokens end in what may become a character."""
        return self._read < len(self._ids)

    def _decode_new(self, final: bool = False) -> str:
        before = self.decode(self._ids[self._start : self._read])
        text = self.decode(self._ids[self._start :])
        known = len(before) + self._ahead
        sure = len(text)
        if text.endswith(REPLACEMENT) and not final:
            sure = len(text.rstrip(REPLACEMENT))
            if len(self._ids) - self._read <= MAX_PENDING:
                new = text[known:sure]
                self._ahead += len(new)
                return new
            # more bytes that are no text than a character has: only the last may yet become one
            sure = max(sure, len(text) - MAX_PART)
        if sure < known:
            return ""
        self._start, self._read, self._ahead = self._read, len(self._ids), sure - len(text)
        return text[known:sure]

    def _push(self, text: str, may_stop: bool) -> str:
        if not self.stop or not text:
            return text
        window = self._seen + text
        # a string that ended in older text did not count then, and does not now
        found = [
            (at, s)
            for s in self.stop
            if (at := window.find(s, max(len(self._seen) - len(s) + 1, 0))) >= 0
        ]
        known = self._held + text
        self._seen = window[-(self._longest - 1) :] if self._longest > 1 else ""
        if found and may_stop:
            at, self.stopped_by = min(found, key=lambda x: (x[0], -len(x[1])))
            cut = len(window) - at
            self._held = ""
            return known[: max(len(known) - cut, 0)]
        keep = max(
            (
                n
                for s in self.stop
                for n in range(1, min(len(s), len(known) + 1))
                if known.endswith(s[:n])
            ),
            default=0,
        )
        self._held = known[len(known) - keep :]
        return known[: len(known) - keep]


class Offsets:
    """Feed it a completion's tokens, take the character of its text at which each begins.

    A part of a character begins where the character does, a token without text where the next text does.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._text, self._known = TextStream(decode), 0

    def feed(self, token_ids: Sequence[int]) -> list[int]:
        offsets = []
        for token in token_ids:
            had_half = self._text.holds_half
            new = self._text.feed([token])
            # halves that this token has not made whole stand before it
            broken = len(new) - len(new.lstrip(REPLACEMENT)) if had_half else 0
            offsets.append(self._known + broken)
            self._known += len(new)
        return offsets
