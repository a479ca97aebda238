"""Renders chat templates for chat_template.py: JSON lines {"template", "values"} in, {"text"} or {"error"} out.

Each rendering has a second or two of processor time, after which the kernel ends this process, and the process little memory. A
"template" of null is the last one. Only jinja2 is imported: a start takes a tenth of a second.
"""

import contextlib
import json
import signal
import sys
from datetime import datetime

MEMORY = 1 << 30  # bytes of addresses: the interpreter takes a tenth
SECONDS = 2.0  # of processor time, for one rendering


def make_environment():
    """What transformers gives a chat template: its tags, filters and functions, in Jinja's sandbox."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """{% generation %} marks what an assistant says, for masks; the text is what stands inside."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_inside")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _inside(self, caller):
            return caller()

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args, **kwargs):
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                check_name(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name, value):
            check_name(name)
            super().__setitem__(name, value)

    def check_name(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no place for {name!r}")

    class Dict:
        """dict, without its attributes."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args):
            return dict.fromkeys(*args)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment


def render(template, values: dict, max_chars: int) -> str:
    """Raises ValueError for a text of more characters."""
    parts, num_chars = [], 0
    for part in template.generate(values):
        num_chars += len(part)
        if num_chars > max_chars:
            raise ValueError(f"it makes more than {max_chars} characters")
        parts.append(part)
    return "".join(parts)


def limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    max_chars = int(sys.argv[1])
    for number in (signal.SIGTERM, signal.SIGUSR1):  # of a whole job: for the caller, which ends us
        signal.signal(number, signal.SIG_IGN)
    environment, template = make_environment(), None
    limit_memory()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # no handler: the kernel ends this process
        try:
            if request["template"] is not None:
                template = environment.from_string(request["template"])
            text = render(template, request["values"], max_chars)
            reply = {"text": text}
        except MemoryError:
            template, reply = None, {"error": "MemoryError: it takes more than a gigabyte"}
        except Exception as error:  # a template raises whatever it likes
            reply = {"error": f"{type(error).__name__}: {error}"[:2000]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
