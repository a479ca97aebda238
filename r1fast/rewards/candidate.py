"""What runs inside a box, beside the candidate's code and at its mercy. Never imported; sent as code.

It knows no expected value: of a function problem it sees one call at a time, of a program problem
one input at a time. All that tampering with it could change is what the candidate answers. Lines go
both ways over descriptor 0: Python literals in, JSON out. The first message says "ready" before any
of the candidate's code is there; then comes the job:

    {mode: calls | programs, language: python | cpp, code, preamble, mains, standard, ..., limits}

calls: {id, name, args} -> {id, value} or {id, raised, text} or {id, refused}
programs: {id, stdin} -> {id, status, out}, each in a process of its own that is killed with all it left;
    {stop: id} ends one that runs. Whoever started the box has the clock.
"""

import builtins
import os
import sys

MAX_REPLY = 4 << 20  # characters of one value
MAX_DEPTH = 100
STANDARDS = ["c++23", "c++20", "c++2a", "c++17"]
USUAL = "typing collections math re itertools functools heapq bisect string copy random operator"


class Control:
    """Lines over the descriptor that the launcher holds the other end of."""

    def __init__(self):
        self.descriptor = os.dup(0)
        self.buffer = b""
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)

    def warm_up(self):
        """Import what most programs import, for as long as no job has come."""
        names = USUAL.split()
        os.set_blocking(self.descriptor, False)
        while names and not self.buffer:
            try:
                self.buffer = os.read(self.descriptor, 65536)
                break
            except BlockingIOError:
                __import__(names.pop(0))
        os.set_blocking(self.descriptor, True)

    def read(self):
        while b"\n" not in self.buffer:
            chunk = os.read(self.descriptor, 1 << 16)
            if not chunk:
                os._exit(0)
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        return eval(line.decode("utf-8", "surrogatepass"), {"__builtins__": {}}, Names())

    def write(self, text):
        data = text.encode("utf-8", "replace") + b"\n"
        while data:
            data = data[os.write(self.descriptor, data) :]


class Names:
    """What an argument's text may name, imported when it does."""

    def __getitem__(self, name):
        if name in NAMES:
            return NAMES[name]
        return getattr(__import__(HOMES[name]), name)


HOMES = {
    "deque": "collections", "Counter": "collections", "OrderedDict": "collections",
    "Decimal": "decimal", "Fraction": "fractions",
}  # fmt: skip
NAMES = {
    "set": set, "frozenset": frozenset, "range": range, "bytearray": bytearray, "complex": complex,
    "iter": iter, "inf": float("inf"), "nan": float("nan"),
}  # fmt: skip


class NotLiteral(Exception):
    pass


def escape(text):
    from _json import encode_basestring_ascii

    return encode_basestring_ascii(text)


def encode(value):
    """JSON of a value made of plain types; what JSON lacks is {"tag": ...}, see literals.py."""
    parts = []
    size = 0

    def put(text):
        nonlocal size
        size += len(text)
        if size > MAX_REPLY:
            raise NotLiteral(f"a value of over {MAX_REPLY} characters")
        parts.append(text)

    def put_all(values, depth):
        put("[")
        for i, item in enumerate(values):
            if i:
                put(",")
            walk(item, depth + 1)
        put("]")

    def put_tagged(tag, values, depth):
        put(f'{{"{tag}":')
        put_all(values, depth)
        put("}")

    def walk(v, depth):
        if depth > MAX_DEPTH:
            raise NotLiteral(f"a value nested over {MAX_DEPTH} deep")
        kind = type(v)
        if v is None:
            put("null")
        elif kind is bool:
            put("true" if v else "false")
        elif kind is int:
            put(repr(v) if -(2**63) < v < 2**63 else f'{{"i":"{v:x}"}}')
        elif kind is float:
            put(repr(v) if v - v == 0 else f'{{"f":"{v!r}"}}')
        elif kind is str:
            put(escape(v))
        elif kind is list:
            put_all(v, depth)
        elif kind is tuple:
            put_tagged("t", v, depth)
        elif kind is dict:
            put_tagged("d", v.items(), depth)
        elif kind in imported("collections", "Counter", "defaultdict", "OrderedDict"):
            put_tagged(kind.__name__, dict.items(v), depth)
        elif kind is set:
            put_tagged("s", v, depth)
        elif kind is frozenset:
            put_tagged("fs", v, depth)
        elif kind is complex:
            put_tagged("c", (v.real, v.imag), depth)
        elif kind is bytes or kind is bytearray:
            put(f'{{"{kind.__name__}":"{v.hex()}"}}')
        elif kind is range:
            put_tagged("r", (v.start, v.stop, v.step), depth)
        elif kind in imported("collections", "deque"):
            put_tagged("q", v, depth)
        elif kind in imported("decimal", "Decimal"):
            put(f'{{"D":{escape(str(v))}}}')
        elif kind in imported("fractions", "Fraction"):
            put_tagged("F", (v.numerator, v.denominator), depth)
        elif kind in ITERATORS or kind in imported("itertools", "chain", "islice"):
            put_tagged("it", v, depth)
        elif (base := next((b for b in BASES if isinstance(v, b)), None)) is not None:
            walk(BASES[base](v), depth)  # a named tuple, an IntEnum
        else:
            raise NotLiteral(f"a value of type {kind.__name__!s:.80}")

    walk(value, 0)
    return "".join(parts)


# type -> the plain value of an object of a subclass
BASES = {
    int: lambda v: int.__add__(v, 0), float: lambda v: float.__add__(v, 0.0),
    str: lambda v: str.__getitem__(v, slice(None)), list: lambda v: list.__getitem__(v, slice(None)),
    tuple: lambda v: tuple.__getitem__(v, slice(None)), dict: lambda v: dict(dict.items(v)),
    set: lambda v: set(set.__iter__(v)), frozenset: lambda v: frozenset(frozenset.__iter__(v)),
}  # fmt: skip
ITERATORS = {
    map, filter, zip, enumerate, reversed, type(_ for _ in ()), type(iter([])), type(iter(())),
    type(iter({})), type({}.keys()), type({}.values()), type({}.items()), type(iter(set())),
    type(iter(range(0))), type(iter("")), type(reversed([])),
}  # fmt: skip


def imported(module, *names):
    """The types of these names where their module was imported, else nothing can be of them."""
    home = sys.modules.get(module)
    return [getattr(home, name, None) for name in names] if home else ()


def limit(memory, cpu, file_size, stack=0):
    import resource

    for name, value in (
        ("RLIMIT_AS", memory),
        ("RLIMIT_CPU", cpu),
        ("RLIMIT_FSIZE", file_size),
        ("RLIMIT_STACK", stack),
    ):
        if value:
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            top = value + (name == "RLIMIT_CPU")
            top = top if hard == resource.RLIM_INFINITY else min(top, hard)
            resource.setrlimit(kind, (min(value, top), top))


def main():
    control = Control()
    builtins.exit = builtins.quit = sys.exit  # as `site` has them, which is not loaded
    control.write('{"ready":true}')
    control.warm_up()
    job = control.read()
    if job["processes"]:
        import resource

        resource.setrlimit(resource.RLIMIT_NPROC, (job["processes"], job["processes"]))
    serve = serve_calls if job["mode"] == "calls" else serve_programs
    serve(control, job)


def report_load(control, verdict, why=""):
    control.write(f'{{"loaded":{escape(verdict)},"why":{escape(str(why)[:500])}}}')


def compiled(job, name):
    """(code of the preamble or None, code of the candidate); SyntaxError and its like pass."""
    if job["preamble"] and job["code"][:1] in (" ", "\t"):  # the body of a function that it begins
        return None, compile(job["preamble"] + job["code"], name, "exec", dont_inherit=True)
    preamble = compile(job["preamble"], "preamble", "exec") if job["preamble"] else None
    return preamble, compile(job["code"], name, "exec", dont_inherit=True)


def serve_calls(control, job):
    limits = job["limits"]
    if job["language"] == "cpp":
        if build(control, job):
            limit(limits["memory"], limits["total_cpu"], limits["file"], limits["stack"])
            os.dup2(control.descriptor, 0)
            os.execve("./main", ["main"], {})
        return
    limit(limits["memory"], limits["total_cpu"], limits["file"])
    module = sys.modules["solution"] = type(sys)("solution")
    try:
        preamble, code = compiled(job, "solution")
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        return report_load(control, "unparseable", f"{type(error).__name__}: {error}")
    try:
        if preamble:
            exec(preamble, module.__dict__)
        exec(code, module.__dict__)
    except BaseException as error:
        return report_load(control, "raised", described(error))
    report_load(control, "yes")
    while True:
        call = control.read()
        start = f'{{"id":{call["id"]},'
        try:
            args, kwargs = call["args"]
            value = find(module, call["name"])(*args, **kwargs)
            if call["result_from"] is not None:
                value = args[call["result_from"]]
            reply = start + '"value":' + encode(value) + "}"
        except NotLiteral as error:
            reply = start + '"refused":' + escape(str(error)) + "}"
        except BaseException as error:
            text = described(error)
            kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins")
            reply = start + f'"raised":{escape(kind[:80])},"text":{escape(text)}}}'
        control.write(reply)


def described(error):
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except BaseException:
        return type(error).__name__[:80]


def find(module, name):
    """`f`, `Class.method` (on a new object), or a method `f` of a class Solution."""
    owner, _, method = name.rpartition(".")
    if not owner and not hasattr(module, name) and hasattr(module, "Solution"):
        owner, method = "Solution", name
    return getattr(getattr(module, owner)(), method) if owner else getattr(module, name)


def build(control, job):
    """Compile main.cpp, under limits of its own; True where there is a program now.

    `mains` are ways to call the function, to be tried where the one before is all that is wrong.
    """
    limits, mains = job["limits"], job["mains"]
    standards = STANDARDS[STANDARDS.index(job["standard"]) :]
    command = [
        job["compiler"],
        "",
        "-O2",
        "-pipe",
        "-w",
        "-fmax-errors=3",
        "-o",
        "main",
        "main.cpp",
    ]
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": os.getcwd(), "LC_ALL": "C"}

    def start():
        os.dup2(1, 2)
        limit(limits["compile_memory"], limits["compile_cpu"], limits["file"])
        os.execve(command[0], command, environment)

    while True:
        command[1] = f"-std={standards[0]}"
        with open("main.cpp", "w", encoding="utf-8") as file:
            file.write(job["code"] + mains[0])
        status, out = supervise(start, b"", 4096, job, flood_ends=False)
        first = out.partition(b" error: ")[0].rpartition(b"\n")[2]
        if b"unrecognized command" in out and len(standards) > 1:  # an older compiler
            standards = standards[1:]
        elif status != "ok" and first.startswith(b"r1fast_main.cpp:") and len(mains) > 1:
            mains = mains[1:]
        else:
            break
    if status == "ok" and os.path.exists("main"):
        os.unlink("main.cpp")
        report_load(control, "yes")
        return True
    verdict = "timeout" if status == "timeout" else "unparseable"
    report_load(control, verdict, f"compiler: {status}: {out.decode('utf-8', 'replace')}")
    return False


def serve_programs(control, job):
    limits = job["limits"]
    if job["language"] == "cpp":
        if not build(control, job):
            return

        def start():
            limit(limits["memory"], limits["cpu"], limits["file"], limits["stack"])
            os.execve("./main", ["main"], {})

    else:
        # compiled in a child first: a text that takes the compiler down takes no more than it
        status, out = supervise(lambda: try_to_compile(job), b"", 4096, job)
        if status != "ok":
            verdict = "timeout" if status == "timeout" else "unparseable"
            return report_load(control, verdict, out.decode("utf-8", "replace") or status)
        preamble, code = compiled(job, "main.py")
        report_load(control, "yes")

        def start():
            limit(limits["memory"], limits["cpu"], limits["file"])
            os.close(control.descriptor)
            run_python(preamble, code)

    keep = {"main"}
    while True:
        test = control.read()
        if "stop" in test:  # it ended by itself in the meantime
            continue
        stdin = test["stdin"].encode("utf-8", "surrogatepass")
        try:
            status, out = supervise(start, stdin, limits["output"], job, control)
        except OSError:  # a full disk, most likely
            clear(keep)
            status, out = supervise(start, stdin, limits["output"], job, control)
        clear(keep)
        text = out.decode("utf-8", "backslashreplace")
        control.write(f'{{"id":{test["id"]},"status":{escape(status)},"out":{escape(text)}}}')


def try_to_compile(job):
    limit(job["limits"]["memory"], job["limits"]["cpu"], job["limits"]["file"])
    try:
        compiled(job, "main.py")
    except BaseException as error:
        os.write(1, described(error).encode("utf-8", "replace"))
        os._exit(1)
    os._exit(0)


def run_python(preamble, code):
    """The program as `python main.py` would run it, in this process, to the end."""
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)
    sys.argv = ["main.py"]
    module = sys.modules["__main__"] = type(sys)("__main__")
    status = 0
    try:
        if preamble:
            exec(preamble, module.__dict__)
        exec(code, module.__dict__)
    except SystemExit as end:
        status = end.code if type(end.code) is int else int(end.code is not None)
    except BaseException:
        status = 1
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        if "atexit" in sys.modules:
            sys.modules["atexit"]._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        status = status or 1
    os._exit(status & 255)


def supervise(start, stdin, cap, job, control=None, flood_ends=True):
    """Run `start` in a child: (ok | exit N | signal N | timeout | output, what it wrote).

    A message that comes over `control` in the meantime can only be the one to stop.

    Its standard input is a file, so nothing need be fed; its output is read up to `cap` bytes. When
    it ends, whatever it left behind is killed: nobody waits for the end of its output.
    """
    import select

    file = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600)
    reader = writer = exited = child = -1
    try:
        while stdin:
            stdin = stdin[os.write(file, stdin) :]
        os.lseek(file, 0, 0)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setpgid(0, 0)
                os.dup2(file, 0)
                os.dup2(writer, 1)
                for descriptor in (file, reader, writer):
                    os.close(descriptor)
                start()
            finally:
                os._exit(127)
        os.close(writer)
        writer = -1
        os.set_blocking(reader, False)
        exited = os.pidfd_open(child)
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        poll.register(exited, select.POLLIN)
        if control:
            poll.register(control.descriptor, select.POLLIN)
        out, status = bytearray(), ""
        while True:
            ready = dict(poll.poll())
            if control and control.descriptor in ready:
                control.read()
                status = "timeout"
                break
            ended = exited in ready
            more = drain(reader, out, cap + 1 if flood_ends else 1 << 30)
            if not flood_ends:
                del out[cap:]
            elif len(out) > cap:
                status = "output"
                del out[cap:]
                break
            if ended:
                break
            if not more and reader in ready:
                poll.unregister(reader)
        end_all(child, job)
        _, code, usage = os.wait4(child, 0)
        child = -1
        if not status:
            signal, spent = code & 127, usage.ru_utime + usage.ru_stime
            if signal == 24 or (signal == 9 and spent >= job["limits"]["cpu"]):
                status = "timeout"
            else:
                status = f"signal {signal}" if signal else f"exit {code >> 8}" if code else "ok"
        return status, bytes(out)
    finally:
        for descriptor in (file, reader, writer, exited):
            if descriptor >= 0:
                os.close(descriptor)


def drain(reader, out, cap):
    """Read what is there; False at the end of the stream."""
    while len(out) < cap:
        try:
            chunk = os.read(reader, 65536)
        except BlockingIOError:
            return True
        if not chunk:
            return False
        out += chunk
    return True


def end_all(child, job):
    """Everything but this process where all that can be reached is of this box, else the session."""
    try:
        if job["alone"]:
            os.kill(-1, 9)
        else:
            os.killpg(child, 9)
    except OSError:
        pass
    try:
        os.kill(child, 9)
    except OSError:
        pass


def clear(keep):
    """Remove what a test left in the working folder."""
    import stat

    def remove(path):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            os.chmod(path, 0o700)
            for name in os.listdir(path):
                remove(path + "/" + name)
            os.rmdir(path)
        else:
            os.unlink(path)

    for name in os.listdir("."):
        if name not in keep:
            try:
                remove(name)
            except (OSError, RecursionError):
                pass


if __name__ == "__main__":
    main()
