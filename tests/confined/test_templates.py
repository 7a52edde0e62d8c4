"""Chat templates of strangers: whatever one asks for, it gives a text or is refused in a sentence, and is over soon."""

import contextlib
import functools
import multiprocessing
import os
import resource
import signal
import threading
import time
from pathlib import Path

import hypothesis.strategies as st
import jinja2
import jinja2.sandbox
import pytest
from hypothesis import given, settings

from rslora_jax.confined import Confined, Exceeded, ask, process
from rslora_jax.interop import chat_template
from rslora_jax.interop.tokenizer import EXAMPLE, tokenizer_from_metadata
from rslora_jax.train import Example
from rslora_jax.train.encode import encode_example
from rslora_jax.train.workers import map_in_processes
from tests.train import chats

# Each does without end, or with all memory, what a template can do.
BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "many loops": "{% for a in range(999) %}" * 9 + "{{ a }}" + "{% endfor %}" * 9,
    "a wide indent": "{{ 'a\\nb' | indent(10 ** 10) }}",
    "a wide tojson": "{{ [[[1]]] | tojson(indent=10 ** 9) }}",
    "a wide center": "{{ 'a' | center(10 ** 11) }}",
    "a product": "{{ 'a' * 10 ** 12 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "doubling": "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a format": "{{ '%1000000000000d' % 3 }}",
    "batches": "{{ range(99999) | batch(10 ** 9, 'x') | list }}",
    "a macro in itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "two macros": "{% macro a(n) %}{{ b(n) }}{{ b(n) }}{% endmacro %}"
    "{% macro b(n) %}{{ a(n + 1) }}{% endmacro %}{{ a(0) }}",
    "nested brackets": "{{ " + "(" * 9000 + ")" * 9000 + " }}",
    "nested blocks": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "a long text": "{% for a in range(9999) %}{% for b in range(9999) %}{{ messages }}{% endfor %}{% endfor %}",
    "replacing": "{% set n = namespace(x='a' * 9999) %}{% for i in range(9) %}{% set n.x = n.x.replace('a', n.x) %}"
    "{% endfor %}",
    "no template": "{% for %}",
    "an error": "{{ 1 / 0 }}{{ messages[9].content.x() }}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_without_end_is_stopped_and_leaves_this_process_as_it_was(bomb):
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    confined = Confined("templates", seconds=0.4, memory=150_000_000)
    with contextlib.closing(confined), pytest.raises(ValueError) as refused:
        confined.ask((BOMBS[bomb], {"messages": [{"role": "user", "content": "hi"}]}))
    assert len(str(refused.value)) <= 300 and str(refused.value).isprintable()
    assert isinstance(refused.value, Exceeded) or bomb in (
        "no template",
        "an error",
        "nested brackets",
        "a wide tojson",
    )
    assert time.process_time() - begun < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_refusal_names_the_template_and_the_limit_and_the_next_chat_is_rendered(monkeypatch):
    process.close_all()
    monkeypatch.setattr(process, "SECONDS", 0.2)
    said = "the chat template takes more than 0.2 s of computing: use another template"
    with pytest.raises(Exceeded, match=said):
        chat_template.render(BOMBS["loops"], {})
    assert chat_template.render("{{ a }}", {"a": 1}) == "1"
    tokenizer = tokenizer_from_metadata(EXAMPLE | {"tokenizer.chat_template": BOMBS["loops"]})
    with pytest.raises(ValueError, match=r"mine.jsonl:7 cannot be encoded: the chat template takes more than"):
        encode_example(tokenizer, Example("a", "b", origin="mine.jsonl:7"))
    process.close_all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*chats.TEMPLATES]), chats.conversations(), st.booleans())
def test_what_is_rendered_is_what_jinja_renders(name, messages, ask_for_more):
    """By Jinja's own environment, with the settings that templates for Hugging Face are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    source = chats.source(name)
    given = {"messages": messages, "add_generation_prompt": ask_for_more, "bos_token": "<s>", "eos_token": "</s>"}
    try:
        template = environment.from_string(source)
    except jinja2.TemplateSyntaxError:
        return  # it has a block that only we and transformers know
    try:
        want = template.render(**given)
    except jinja2.TemplateError:
        with pytest.raises(ValueError):
            chat_template.render(source, given)
    else:
        assert chat_template.render(source, given) == want


def test_threads_share_the_process_and_each_gets_its_own_answers():
    found: dict[int, list[str]] = {}

    def work(number):
        found[number] = [chat_template.render("{{ a }}-{{ b }}", {"a": number, "b": n}) for n in range(50)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [f"{n}-{m}" for m in range(50)] for n in range(8)}


@pytest.mark.nightly
def test_workers_have_processes_of_their_own_and_none_is_left_of_them(monkeypatch):
    mark = f"mark-{os.getpid()}-{time.time_ns()}"
    monkeypatch.setenv("RSLORA_TEST", mark)  # the children of children have it too

    def left():
        return [path for path in Path("/proc").glob("[0-9]*/environ") if mark.encode() in _read(path)]

    render = functools.partial(chat_template.render, "{{ a }}!")
    assert list(map_in_processes(render, [{"a": n} for n in range(40)], workers=2)) == [f"{n}!" for n in range(40)]
    until = time.monotonic() + 10
    while left() and time.monotonic() < until:
        time.sleep(0.05)
    assert not left()


def _read(path):
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


@pytest.mark.filterwarnings("ignore:os.fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_has_a_process_of_its_own():
    assert chat_template.render("{{ a }}", {"a": "parent"}) == "parent"
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            os.write(theirs, chat_template.render("{{ a }}", {"a": "child"}).encode())
        os._exit(0)
    os.close(theirs)
    assert os.read(ours, 99) == b"child"
    os.waitpid(child, 0)
    os.close(ours)
    assert chat_template.render("{{ a }}", {"a": "again"}) == "again"


def test_an_interrupt_and_a_killed_process_leave_no_answer_for_the_next_question():
    assert ask("templates", ("{{ a }}", {"a": 1})) == "1"
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        ask("templates", (BOMBS["loops"], {}))
    assert ask("templates", ("{{ a }}", {"a": 2})) == "2"
    confined = Confined("templates")
    os.kill(confined.pid, signal.SIGKILL)
    with pytest.raises(Exceeded, match="ends the process"):
        confined.ask(("{{ a }}", {"a": 3}))


def test_what_cannot_be_sent_and_what_answers_with_more_than_plain_values_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be sent"):
        chat_template.render("{{ a }}", {"a": multiprocessing})
    assert chat_template.render("{{ a }}", {"a": 1}) == "1"
    for value in ("os.system", "ValueError('x')", "object()"):
        (tmp_path / "evil.py").write_text(f"import os\ndef answer(question):\n    return {value}\n")
        with contextlib.closing(Confined(str(tmp_path / "evil"))) as confined, pytest.raises(ValueError, match="plain"):
            confined.ask(1)
