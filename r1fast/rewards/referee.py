"""Runs the tests of function problems, in a box of its own. Never imported by the package; sent as code.

Test code and expected values are here and nowhere else. The candidate is in another box; its functions
are proxies that pass a call's arguments out as literals and take a literal back, so that no object,
frame or descriptor of the candidate's ever meets a test. One process stays warm and forks for each
verdict: descriptor 0 is a socket over which it gets the socket of the next one.

    in:  {setup, tests, names, check, stop_early, cpu, think, memory, json_args}, then answers
    out: {call, name, args, result_from}; {test, outcome, share, why} for each test; {done, error}
    answers: {said: what the candidate wrote} | {gone: timeout | wrong, why}, the launcher's own
    said:    {id, value} | {id, raised, text} | {id, refused}; nothing else in it counts
"""

import ast
import builtins
import json
import math
import os
import random
import signal
import socket
import sys

WARM = (
    "bisect collections copy datetime decimal fractions functools heapq itertools re string typing"
)
MAX_GONE = 3  # a candidate that has died so often in one test has failed it


def main():
    for name in WARM.split():
        __import__(name)
    control = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    control.send(b"r")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            control.close()
            try:
                referee(descriptors[0])
            finally:
                os._exit(0)
        os.close(descriptors[0])


def referee(descriptor):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # json writes ASCII; what comes may be anything
    lines = os.fdopen(os.dup(descriptor), "r", encoding="utf-8", errors="replace", newline="\n")
    out = os.fdopen(descriptor, "w", encoding="ascii")

    def send(message):
        out.write(json.dumps(message) + "\n")
        out.flush()

    job = json.loads(lines.readline())
    limit(job)
    random.seed(0)  # some tests draw their cases
    match = Match(send, lines, job)
    try:
        match.set_up()
    except BaseException as error:
        why = f"the tests' own code failed: {described(error)}"
        if match.num_calls:  # it had met the candidate by then
            send({"test": 0, **result("wrong", why)})
        send({"done": True, "error": "" if match.num_calls else why})
        return
    for index, test in enumerate(job["tests"]):
        outcome = match.play(test)
        send({"test": index, **outcome})
        if outcome["outcome"] == "error" or (job["stop_early"] and outcome["outcome"] != "pass"):
            break
    send({"done": True, "error": ""})


def limit(job):
    import resource

    for kind, value in ((resource.RLIMIT_AS, job["memory"]), (resource.RLIMIT_CPU, job["cpu"])):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    signal.setitimer(signal.ITIMER_PROF, job["think"])  # unhandled: it ends the process


def described(error):
    return f"{type(error).__name__}: {error}"[:300]


class Unsendable(BaseException):
    """A test's argument that is no literal.

    The data's fault where no candidate can have returned such a thing (`foreign`).
    """

    def __init__(self, text, foreign=True):
        super().__init__(text)
        self.foreign = foreign


class Gone(BaseException):
    """The candidate did not answer: late, dead, or not a literal."""


class Match:
    """The tests of one problem against one candidate."""

    def __init__(self, send, lines, job):
        self.send, self.lines, self.job = send, lines, job
        self.space = {"__name__": "tests", "__builtins__": builtins}
        self.num_calls = 0
        self.bound = set()  # names that the tests set somewhere
        self.begin()

    def begin(self):
        self.gone = []  # (outcome, why) for each call of this test without an answer
        self.notes = []  # of each assertion of this test: whether it held
        self.why = ""

    def set_up(self):
        space = self.space
        space["_r1fast_note"] = self.note
        if self.job["setup"]:
            exec(compile(self.job["setup"], "setup", "exec"), space)
        for name in self.job["names"]:
            owner, _, method = name.rpartition(".")
            proxy = self.proxy(name)
            if owner:  # Solution().method in test code
                proxy = type(owner, (), {method: staticmethod(proxy)})
            space[owner or name] = proxy
        if self.job["check"]:
            self.run(self.job["check"])
            for name in self.job["names"]:  # test code may define a stub of the same name
                if "." not in name:
                    space[name] = self.proxy(name)

    def run(self, code):
        tree = ast.parse(code)
        self.bound |= {
            x.id for x in ast.walk(tree) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)
        }
        tree = ast.fix_missing_locations(Watched().visit(tree))
        exec(compile(tree, "tests", "exec"), self.space)

    def note(self, error):
        """After each assertion: `error` is what it raised, or None. May end the test."""
        self.notes.append(error is None)
        if error is None:
            return
        self.why = self.why or described(error)
        if (
            of_the_data(error, self.bound)
            or isinstance(error, Unsendable)
            or self.job["stop_early"]
            or len(self.gone) >= MAX_GONE
        ):
            raise error

    def play(self, test):
        self.begin()
        try:
            if test["kind"] == "code":
                self.run(test["code"])
            else:
                self.compare(test)
            outcome = "pass" if all(self.notes) and not self.gone else "wrong"
            if outcome == "pass" and not self.num_calls:
                return result("error", "the test never calls the candidate")
        except BaseException as error:
            self.why = self.why or described(error)
            # a failure is the data's only where the candidate had no part in it: what earns the
            # mean of its group must not be something that an answer can bring about
            if not self.num_calls or of_the_data(error, self.bound):
                return result("error", f"the test failed by itself: {self.why}")
            outcome = "wrong"
            if not self.notes or self.notes[-1]:
                self.notes.append(False)  # what came between the assertions did not hold
        if self.gone:  # even where the test's code swallowed it
            outcome, self.why = self.gone[0]
        share = sum(self.notes) / len(self.notes) if self.notes else float(outcome == "pass")
        if outcome != "pass" and share == 1:
            share = 0.0
        return result(outcome, self.why, share)

    def compare(self, test):
        call = self.proxy(test["name"], test["result_from"])
        value = call(*test["args"], **test["kwargs"])
        if self.job["json_args"]:
            value = in_pairs(value, test["expected"])
        if not same(value, test["expected"], test["tolerance"]):
            raise AssertionError(f"got {shortened(value)}, not the expected value")

    def proxy(self, name, result_from=None):
        def candidate(*args, **kwargs):
            if len(self.gone) >= MAX_GONE:
                raise Gone("the candidate has gone")
            if self.job["json_args"]:
                if kwargs:
                    raise Unsendable("keyword arguments")
                text = json.dumps(plain(args))
            else:
                text = f"({text_of(args)},{text_of(kwargs)})"
            self.num_calls += 1
            self.send(
                {"call": self.num_calls, "name": name, "args": text, "result_from": result_from}
            )
            line = self.lines.readline()
            if not line:
                os._exit(1)
            # a value may make a test compute for ever
            signal.setitimer(signal.ITIMER_PROF, self.job["think"])
            return self.outcome(json.loads(line))

        candidate.__name__ = candidate.__qualname__ = name
        return candidate

    def outcome(self, answer):
        if "said" not in answer:
            return self.end(answer["gone"], answer["why"])
        try:
            reply = json.loads(answer["said"])
            if not isinstance(reply, dict) or reply.get("id", self.num_calls) != self.num_calls:
                raise ValueError("not a reply")
            if "value" in reply:
                return decode(reply["value"])
        except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
            return self.end("wrong", "a reply that cannot be read")
        if "raised" in reply:
            kind = getattr(builtins, str(reply["raised"]), None)
            known = isinstance(kind, type) and issubclass(kind, Exception)
            if not known or kind.__name__.startswith("Unicode"):  # these take five arguments
                kind = RuntimeError
            raise kind(str(reply.get("text", "")))
        if "refused" in reply:
            return self.end("wrong", f"the candidate returned {reply['refused']}")
        return self.end("wrong", "a reply that cannot be read")

    def end(self, outcome, why):
        self.gone.append((outcome, str(why)))
        raise Gone(why)


def of_the_data(error, bound):
    """Whether the tests are to blame: they pass what no literal is, or use a name that they lack.

    One that they set somewhere (`bound`) and not this time is the doing of what the candidate returned.
    """
    if isinstance(error, NameError):
        if isinstance(error, UnboundLocalError) or error.name in bound:
            return False
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        return trace is not None and trace.tb_frame.f_code.co_filename in ("tests", "setup")
    return getattr(error, "foreign", False)


def result(outcome, why="", share=0.0):
    return {"outcome": outcome, "why": str(why)[:300], "share": share}


class Watched(ast.NodeTransformer):
    """Every assertion reports whether it held."""

    def visit_Assert(self, node):
        def note(argument):
            name = ast.Name("_r1fast_note", ast.Load())
            return ast.Expr(ast.Call(name, [argument], []))

        handler = ast.ExceptHandler(
            ast.Name("BaseException", ast.Load()),
            "_r1fast_error",
            [note(ast.Name("_r1fast_error", ast.Load()))],
        )
        return ast.copy_location(ast.Try([node], [handler], [note(ast.Constant(None))], []), node)


def same(value, expected, tolerance):
    """Equal as JSON sees it: a tuple is a list; floats within `tolerance`, absolute or relative."""
    if isinstance(value, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(
            same(v, e, tolerance) for v, e in zip(value, expected, strict=True)
        )
    if isinstance(value, dict) and isinstance(expected, dict):
        keys = {str(k): v for k, v in value.items()}  # a key of a JSON object is a string
        wanted = {str(k): v for k, v in expected.items()}
        if len(value) != len(expected):  # 1 and "1" are one of the keys here
            return False
        return keys.keys() == wanted.keys() and all(
            same(keys[k], wanted[k], tolerance) for k in wanted
        )
    if isinstance(value, bool) is not isinstance(expected, bool):
        return False
    if tolerance and isinstance(expected, (int, float)) and isinstance(value, (int, float)):
        if isinstance(value, float) or isinstance(expected, float):
            return math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)
    return value == expected


def in_pairs(value, expected):
    """A map of C++ as a list of pairs where that is what is expected."""
    if isinstance(value, dict) and isinstance(expected, list):
        value = [[k, v] for k, v in value.items()]
    if isinstance(value, list) and isinstance(expected, list) and len(value) == len(expected):
        return [in_pairs(v, e) for v, e in zip(value, expected, strict=True)]
    return value


def shortened(value):
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def plain(value):
    """What JSON can hold, for candidates in C++."""
    if value is None or isinstance(value, (bool, int, float, str)):
        if isinstance(value, float) and not math.isfinite(value):
            raise Unsendable(f"the number {value}", foreign=False)
        return value
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(v) for v in value)
    if isinstance(value, dict):
        return [[plain(k), plain(v)] for k, v in value.items()]
    raise Unsendable(f"a {type(value).__name__}", foreign=not returnable(value))


def returnable(value):
    """Whether `decode` makes such objects."""
    return hasattr(value, "__next__") or type(value).__name__ in RETURNED


RETURNED = set(
    "NoneType bool int float str list tuple dict set frozenset bytes bytearray complex range deque "
    "Decimal Fraction Counter OrderedDict defaultdict".split()
)


def text_of(value):
    """An expression that the other box evaluates to an equal value; it knows the names in `Names`."""
    kind = type(value)
    name = kind.__name__
    if value is None or kind in (bool, bytes, bytearray, complex, range):
        return repr(value)
    if kind is int:
        return hex(value) if abs(value) >> 63 else repr(value)
    if kind in (float, str):
        return ascii(value)
    if kind is list:
        return "[" + "".join(text_of(v) + "," for v in value) + "]"
    if kind is tuple:
        return "(" + "".join(text_of(v) + "," for v in value) + ")"
    if kind in (set, frozenset):
        return f"{name}([" + "".join(text_of(v) + "," for v in value) + "])"
    if isinstance(value, dict) and (kind is dict or kind.__module__ == "collections"):
        inner = "{" + "".join(f"{text_of(k)}:{text_of(v)}," for k, v in value.items()) + "}"
        return f"{name}({inner})" if name in ("Counter", "OrderedDict") else inner
    if name == "deque":
        return f"deque([{''.join(text_of(v) + ',' for v in value)}])"
    if name == "Decimal":
        return f"Decimal({str(value)!r})"
    if name == "Fraction":
        return f"Fraction({value.numerator},{value.denominator})"
    if hasattr(value, "__next__"):
        return f"iter([{''.join(text_of(v) + ',' for v in value)}])"
    raise Unsendable(f"a {name}", foreign=not returnable(value))


def key(value):
    """A pair or a vector as the key of a C++ map comes as a list."""
    return tuple(map(key, value)) if isinstance(value, list) else value


def decode(value):
    """The inverse of candidate.encode; ValueError or TypeError for what that never writes."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    ((tag, inner),) = value.items()
    if tag == "t":
        return tuple(decode(v) for v in inner)
    if tag in ("d", "Counter", "OrderedDict", "defaultdict"):
        found = {key(decode(k)): decode(v) for k, v in (pair["t"] for pair in inner)}
        if tag == "d":
            return found
        home = sys.modules["collections"]
        return home.defaultdict(None, found) if tag == "defaultdict" else getattr(home, tag)(found)
    if tag == "s":
        return {decode(v) for v in inner}
    if tag == "fs":
        return frozenset(decode(v) for v in inner)
    if tag == "i":
        return int(inner, 16)
    if tag == "f":
        return float(inner)
    if tag == "c":
        return complex(*(decode(v) for v in inner))
    if tag == "bytes":
        return bytes.fromhex(inner)
    if tag == "bytearray":
        return bytearray.fromhex(inner)
    if tag == "r":
        return range(*(decode(v) for v in inner))
    if tag == "it":
        return iter([decode(v) for v in inner])
    if tag == "q":
        return sys.modules["collections"].deque(decode(v) for v in inner)
    if tag == "D":
        return sys.modules["decimal"].Decimal(inner)
    if tag == "F":
        return sys.modules["fractions"].Fraction(*(decode(v) for v in inner))
    raise ValueError(f"unknown tag {tag!r}")


if __name__ == "__main__":
    main()
