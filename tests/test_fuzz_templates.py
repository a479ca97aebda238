"""Chat templates of a hostile model folder: they reach nothing, end in time, and make no gigabytes."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from r1fast import chat_template
from r1fast.chat_template import render_chat
from r1fast.config import TemplateConfig
from r1fast.serve.fields import RequestError
from r1fast.serve.requests import _render
from r1fast.templates import prompt_opens_think, render_prompt

HI = [
    {"role": "system", "content": "Be <kind>."},
    {"role": "user", "content": "héllo \ud83d\ude00"},
]


def tokenizer(template: str):
    """What render_chat needs of transformers' tokenizers, with this template."""
    return SimpleNamespace(
        chat_template=template, get_chat_template=lambda: template,
        special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"},
    )  # fmt: skip


def refused(template: str, messages=HI, **variables) -> str:
    with pytest.raises(ValueError, match="chat template") as caught:
        render_chat(tokenizer(template), messages, variables=variables)
    return str(caught.value)


REACHES = [
    "{{ ''.__class__ }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}",
    "{{ messages.__class__ }}", "{{ self.__init__.__globals__ }}", "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}", "{{ strftime_now.__globals__['sys'] }}", "{{ dict.__class__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "{{ lipsum.__globals__ }}",
    "{{ joiner.__init__.__globals__ }}", "{{ ''|attr('__class__') }}", "{{ ['__class__']|map('attr')|list }}",
    "{{ '{0.__class__}'.format('') }}", "{{ ('{0.__class__.__mro__}'|string).format(1) }}",
    "{% set x = ''.format %}{{ x.__self__ }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os }}",
    "{% extends '/etc/passwd' %}", "{{ namespace(__class__=1) }}", "{% set ns = namespace() %}{% set ns.__x__ = 1 %}",
    "{{ messages.pop() }}", "{{ messages[0].update({'a': 1}) }}", "{{ open('/etc/passwd') }}", "{{ os.getcwd() }}",
    "{{ [].__getattribute__('x') }}", "{{ (1).to_bytes.__self__.__class__ }}", "{{ range.__class__.mro() }}",
]  # fmt: skip


@pytest.mark.parametrize("template", REACHES)
def test_nothing_is_reached(template):
    """An error, or the empty text that stands for what is not there; no object's inside."""
    try:
        text = render_chat(tokenizer(template), HI)
    except ValueError as error:
        assert "the model's chat template refuses these messages" in str(error)
        return
    assert text.strip("[]' ") in ("", "__class__")


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** (9 ** 9) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
]  # fmt: skip
TOO_LARGE = [
    "{{ 'x' * 9999999999 }}", "{{ [0] * 9999999999 }}", "{{ '%99999999999d'|format(1) }}", "{{ 'x'.center(99999999999) }}",
    "{% for a in range(99999) %}{% for b in range(9999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "{% set ns = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{{ ('x' * 90000)|replace('x', 'y' * 90000) }}", "{{ 'x' * 20000000 }}", "{{ '{:9999999999}'.format(1) }}",
]  # fmt: skip


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_that_never_ends_is_ended(template):
    assert "two seconds of processor time" in refused(template)
    assert render_chat(tokenizer("ok"), HI) == "ok"  # the next one has another process


@pytest.mark.parametrize("template", TOO_LARGE)
def test_a_template_that_makes_gigabytes_is_refused(template):
    message = refused(template)
    assert (
        "Memory" in message
        or "characters" in message
        or "processor time" in message
        or "Overflow" in message
    )
    assert render_chat(tokenizer("ok"), HI) == "ok"


@pytest.mark.parametrize("template", [
    "{{", "{% for %}", "{% endif %}", "{{ 1 // 0 }}", "{{ messages | nosuch }}", "{{ raise_exception('no ' ~ 'system') }}",
    "(" * 100000, "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 3000, "{{ 'a' + 1 }}", "{{ undefined.x }}",
    "{{ " + "-" * 20000 + "1 }}", "{{ [" * 3000 + "]" * 3000 + "}}",
])  # fmt: skip
def test_a_broken_template_is_a_value_error(template):
    if template.startswith("("):  # text, after all
        assert render_chat(tokenizer(template), HI) == template
        return
    message = refused(template)
    assert len(message) < 2200


def test_errors_are_named_where_they_are_met():
    template = "{{ raise_exception('roles must alternate') }}"
    expected = "refuses these messages: TemplateError: roles must alternate"
    with pytest.raises(ValueError, match=expected):
        render_prompt("?", TemplateConfig(name="chat"), tokenizer(template))
    with pytest.raises(RequestError, match=expected):
        _render(HI, {}, tokenizer(template))
    deep: list = []
    for _ in range(100000):
        deep = [deep]
    for wrong in ({"x": deep}, {"x": object()}, {"x": {1j: 2}}):
        with pytest.raises(RequestError, match="JSON values"):
            _render(HI, wrong, tokenizer("ok"))
    assert _render(HI, {"context": 2}, tokenizer("{{ context }}")) == "2"
    assert not prompt_opens_think(TemplateConfig(name="chat"), tokenizer("ok"))
    with pytest.raises(ValueError, match="must be a text of at most"):
        render_chat(tokenizer("x" * (chat_template.MAX_CHARS + 1)), HI)


@pytest.mark.parametrize(
    "template", ["{{ '\ud800' }}", r"{{ '\ud83d' }}", "{{ messages[0].content[:1] }}"]
)
def test_what_no_tokenizer_reads_is_refused(template):
    with pytest.raises(ValueError, match="must make a text without half a surrogate pair, got"):
        render_chat(tokenizer(template), [{"role": "user", "content": "\ud800x"}])


@pytest.mark.parametrize("template", [7, None, ["a"], {"a": "b"}, b"x"])
def test_a_template_that_is_no_text(template):
    with pytest.raises(ValueError, match="a chat template must be a text of at most"):
        render_chat(tokenizer(template), HI)


@pytest.mark.parametrize("made", [None, [1], 7, "\ud800"])
def test_a_tokenizer_with_its_own_way_makes_a_text_too(made):
    own = SimpleNamespace(apply_chat_template=lambda messages, **options: made)
    with pytest.raises(ValueError, match="must make a text"):
        render_chat(own, HI)


FIELD = [
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}",
    "{{ bos_token }}{% set ns = namespace(found=false) %}{% for m in messages if m.role != 'system' %}{% set ns.found = true %}"
    "{{ loop.index0 }}{{ m.content.split('l')[-1] }}{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ ns.found }}",
    "{{ messages | tojson(indent=2) }}{{ dict(a=1, **{'b': none}) | tojson }}{{ tools is none }}{{ documents }}",
    "{% generation %}{{ messages[-1].content }}{% endgeneration %}{{ eos_token }}{{ messages | length }}",
    "{%- macro f(x) -%}[{{ x }}]{%- endmacro -%}{{ f(messages[0].content) }}\n  {%- if messages[0].reasoning_content is defined %}"
    "{{ messages[0].reasoning_content }}{% endif %}\n",
    "{{ messages[0].thinking }}{{ messages[0].tool_calls is defined }}{{ extra | default('none') }}",
]  # fmt: skip
real = tiny_tokenizer
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant"]), "content": st.text(max_size=8)},
        optional={"reasoning": st.text(max_size=3), "tool_calls": st.none(), "thinking": st.none()},
    ),
    min_size=1, max_size=3,
)  # fmt: skip


@settings(max_examples=40)
@given(st.sampled_from(FIELD), messages, st.booleans())
def test_what_is_rendered_is_what_transformers_renders(template, chat, add):
    t = real()
    before, t.chat_template = t.chat_template, template
    try:
        expected = t.apply_chat_template(chat, tokenize=False, add_generation_prompt=add, extra="é")
        assert render_chat(t, chat, add_generation_prompt=add, variables={"extra": "é"}) == expected
    finally:
        t.chat_template = before


@settings(max_examples=150)
@given(st.text(alphabet="{}%#-.|()[]'\"~*+ax1 _m\n", max_size=30), st.text(max_size=4))
def test_any_text_is_a_template_or_refused(template, content):
    try:
        assert isinstance(
            render_chat(tokenizer(template), [{"role": "user", "content": content}]), str
        )
    except ValueError as error:
        assert "chat template" in str(error)


def test_a_process_that_died_is_replaced_and_a_slow_one_waited_for(monkeypatch):
    assert render_chat(tokenizer("a"), HI) == "a"
    process = chat_template._renderer()._worker.process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert render_chat(tokenizer("a"), HI) == "a"
    process = chat_template._renderer()._worker.process
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(chat_template, "_TIMEOUT", 0.2)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"took over 0\.2 s"):
        render_chat(tokenizer("a"), HI)
    assert time.monotonic() - start < 30
    monkeypatch.undo()
    assert render_chat(tokenizer("a"), HI) == "a"


def test_a_signal_to_a_whole_job_leaves_it_alone():
    assert render_chat(tokenizer("a"), HI) == "a"
    process = chat_template._renderer()._worker.process
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(process.pid, number)
    assert render_chat(tokenizer("b"), HI) == "b"
    assert chat_template._renderer()._worker.process is process


def test_a_tokenizer_with_its_own_way_is_asked_itself():
    own = SimpleNamespace(apply_chat_template=lambda messages, **options: repr(options))
    assert render_chat(own, HI) == "{'tokenize': False, 'add_generation_prompt': True}"
