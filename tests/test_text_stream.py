"""Text of a growing completion: whole characters, and stop strings wherever they are cut."""

import random

import pytest

from r1fast.rollout.text import Offsets, TextStream


def byte_decode(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def run(text, stop=(), cuts=None):
    """(shown text, what stopped it, the pieces) with one token a byte, or in pieces of `cuts` bytes."""
    stream, pieces = TextStream(byte_decode, stop), []
    for token in text.encode():
        pieces.append(stream.feed([token]))
        if stream.stopped_by is not None:
            break
    pieces.append(stream.finish())
    return "".join(pieces), stream.stopped_by, pieces


def test_characters_are_shown_whole():
    text = "a é 漢字 🙂 z"
    shown, stopped, pieces = run(text)
    assert (shown, stopped) == (text, None)
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[0] == "a"  # nothing is held that need not be


def test_half_a_character_comes_out_at_the_end():
    stream = TextStream(byte_decode)
    assert stream.feed([*b"ok", 0xE6, 0xBC]) == "ok"
    assert stream.finish() == "\ufffd"


def test_a_stream_adds_up_to_the_whole_whatever_the_bytes():
    """Halves of characters, bytes that begin none, and characters behind many of either."""
    tokens = [
        b"\xff",
        b"\xe6",
        b"\xbc",
        b"\xa2",
        b"\xf0\x9f\x98",
        b"\x80",
        b"x\xe6",
        b"\xbc\xa2\xe6",
        b"a",
        "漢".encode(),
    ]
    decode = lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace")  # noqa: E731
    rng = random.Random(0)
    for _ in range(1000):
        weights = [rng.random() ** 3 for _ in tokens]
        ids = rng.choices(range(len(tokens)), weights, k=rng.randrange(1, 50))
        stream = TextStream(decode)
        assert "".join([*(stream.feed([i]) for i in ids), stream.finish()]) == decode(ids), ids


def test_bytes_that_are_no_text_do_not_hold_the_rest():
    stream = TextStream(byte_decode)
    shown = stream.feed([0xFF] * 20) + stream.feed(b"later")
    assert shown.endswith("later")


def test_a_stop_string_before_half_a_character():
    """One token ends the stop string and begins a character: it ends the text there and then."""
    tokens = {1: b"one ", 2: b"stop\xe6", 3: b"\xbc\xa2", 4: b"sto", 5: b"p\xe6"}
    decode = lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace")  # noqa: E731
    for ids in ([1, 2], [1, 2, 3], [1, 4, 5], [1, 4, 5, 3]):
        stream = TextStream(decode, ("stop",))
        shown = [stream.feed([i]) for i in ids if stream.stopped_by is None]
        assert "".join([*shown, stream.finish()]) == "one "
        assert stream.stopped_by == "stop"
        assert len(shown) == len(ids) - (ids[-1] == 3)
    stream = TextStream(decode)
    assert [stream.feed([i]) for i in (1, 2, 3)] == ["one ", "stop", "漢"]


@pytest.mark.parametrize(
    ("text", "stop", "shown", "by"),
    [
        ("one two three", ("two",), "one ", "two"),
        ("one two", ("three",), "one two", None),
        ("aab", ("ab",), "a", "ab"),
        ("abababc", ("ababc",), "ab", "ababc"),
        ("x</answer>y", ("</answer>", "nswer"), "x</a", "nswer"),  # the one that ends first
        ("stop", ("stop",), "", "stop"),
        ("é漢", ("漢",), "é", "漢"),
        ("almost sto", ("stop",), "almost sto", None),  # held back, then shown
        ("User:", (":", "User:"), "User", ":"),
    ],
)
def test_stop_strings(text, stop, shown, by):
    if by == ":":  # both end at the same place: the one that begins first
        shown, by = "", "User:"
    assert run(text, stop)[:2] == (shown, by)


def test_what_may_become_a_stop_string_is_held_back():
    _, _, pieces = run("ab stx stop", ("stop",))
    assert pieces[:7] == ["a", "b", " ", "", "", "stx", " "]


def test_not_before_it_may():
    stream = TextStream(byte_decode, ("ab",))
    assert stream.feed(b"ab", may_stop=False) == "ab"
    assert stream.stopped_by is None
    assert stream.feed(b"b") == "b"  # its a was before
    assert stream.feed(b"ab") == ""
    assert stream.stopped_by == "ab"


def test_against_the_whole_text():
    """Random texts over few letters: the stream ends where a search after each byte would end it."""
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice("abé") for _ in range(rng.randrange(1, 14)))
        stops = tuple(
            {"".join(rng.choice("abé") for _ in range(rng.randrange(1, 4))) for _ in "xy"}
        )
        expected, by = text, None
        for end in range(1, len(text) + 1):
            starts = [(end - len(s), s) for s in stops if text[:end].endswith(s)]
            if starts:
                at, by = min(starts)
                expected = text[:at]
                break
        assert run(text, stops)[:2] == (expected, by), (text, stops)


@pytest.mark.parametrize("separator", [" ", ""])
def test_offsets_are_places_in_the_text(separator):
    """Where a token decoded alone lacks its space, and where it is a part of a character."""
    words = ["<think>", "1", "is", "é", "so"]
    offsets = Offsets(lambda ids: separator.join(words[i] for i in ids))
    assert [x for i in range(5) for x in offsets.feed([i])] == [
        len(separator.join(words[:i])) for i in range(5)
    ]
    parts = [b"a", b"\xf0\x9f", b"\x98", b"\x80", b"b", b"\xe6", b"c", b"d \xc3", b"\xa9", b""]
    decode = lambda ids: b"".join(parts[i] for i in ids).decode(errors="replace")  # noqa: E731
    assert decode(range(10)) == "a🙂b\ufffdcd é".replace("🙂", "\U0001f600")
    assert Offsets(decode).feed(range(10)) == [0, 1, 1, 1, 2, 3, 4, 5, 7, 8]
