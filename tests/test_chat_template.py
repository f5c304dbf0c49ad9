"""Chat templates: what they render is what transformers renders; those of strangers end in time and space,
with an error by name.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from adapterpack.chat_templates import rendering, template
from adapterpack.chat_templates.template import ChatTemplate
from adapterpack.errors import ConfigError, FormatError
from adapterpack.runtime.text.tokenizer import Tokenizer
from adapterpack.sandbox.sandbox import Sandbox

TEMPLATES = {
    "plain": "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}",
    "special": "{{ bos_token }}{% for m in messages %}\n    {%- if m.role == "
    "'user' %}\n  w1 {{ m.content }}{{ "
    "eos_token }}\n"
    "    {% endif %}\n{% endfor %}",
    "tools": (
        "{% if tools is not none %}tools{% endif %}{% if not tools %}none{% endif %}{{ messages[0].content }}"
    ),
    "json": "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}",
    "loop": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n "
        "}}{{ unk_token }}"
    ),
    "macro": "{% macro say(m, more=true) -%}<{{ m.role }}>{{ m['content'] | trim "
    "}}{% if more %}|{% endif %}{%- "
    "endmacro %}"
    "{% for m in messages[1:] %}{{ say(m, not loop.last) }}{% endfor %}{{ messages[::-1][0].content }}",
    "texts": "{{ 'a' ~ 1 ~ messages[0].role }} {{ ['x', 'y'] | join('-') }} {{ 'x,y'.split(',') | join }} "
    "{{ '%s-%03d%%' % ('a', 5) }}{{ '{}:{:>4}'.format('a', 'b') }} {{ 'a%s' | format('b') }} {{ '=' * 20 }} "
    "{{ 'aXa'.replace('X', 'yy') }}{{ 'b' | center(5) }}{{ messages[0].content | indent(3, true) | upper | "
    "replace('W', 'v') }} "
    "{{ '-'.join(['p', 'q']) }}{{ 'ab'[::-1] }}",
    "lists": "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}{{ users | length }}"
    "{{ [1, 2] + [3] }}{{ (1, 2) }}{{ {'a': [1, none]} }}{{ {'a': 1} | items | list }}"
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}"
    "{{ messages | map(attribute='role') | unique | join(',') }}{{ range(2, 9, 3) | list }}{{ [3, 1] | sort "
    "| first }}"
    "{{ [1, 2, 3] | sum }}{{ 7.5 | round | int }}{{ 7 // 2 * 3 - 2 ** 3 }}{{ [1, 2, 3] | batch(2) | list "
    "}}{{ dict(a=1).a }}",
    "blocks": "{% set text %}{% for m in messages recursive %}{{ m.role }}"
    "{% if loop.first and not loop.depth0 %}{{ loop([{'role': 'q'}]) }}{% endif %}"
    "{% endfor %}{% endset %}{{ text }}{% filter upper %}{{ text }}{% endfilter %}{% for m in messages if "
    "m.role == 'x' %}"
    "{% else %}none{% endfor %}{% macro twice() %}{{ caller(1) }}{{ caller(2) }}{% endmacro %}"
    "{% call(x) twice() %}[{{ x }}]{% endcall %}",
    "generation": "{% for m in messages %}{% generation %}\n  {{ m.role }}\n{% endgeneration %}{% endfor %}"
    "{{ raise_exception is defined }}",
    "undefined": "{{ documents is none }}{{ custom is defined }}{{ cls_token is defined }}{{ pad_token }}",
}
MESSAGES = [
    {"role": "system", "content": "  w4 <b>&'\" ü"},
    {"role": "user", "content": "w5 w6\n"},
    {"role": "assistant", "content": "w7"},
    {"role": "user", "content": "w8"},
]


def with_template(source: Path, target: Path, template: str) -> Path:
    """A copy of a model folder with a chat template."""
    shutil.copytree(source, target)
    (target / "chat_template.jinja").write_text(template, "utf-8")
    return target


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_under_transformers(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Text and ids equal ``apply_chat_template(add_generation_prompt=True)``, from chat_template.jinja and
    from the tokenizer's config.
    """
    folder = with_template(tiny_llama, tmp_path / "model", TEMPLATES[name])
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ours = Tokenizer(folder)
    assert ours.render(MESSAGES) == expected
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert ours.prompt(MESSAGES) == list(ids["input_ids"] if hasattr(ids, "keys") else ids)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for inline in (
        TEMPLATES[name],
        [{"name": "rag", "template": "no"}, {"name": "default", "template": TEMPLATES[name]}],
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": inline}))
        assert Tokenizer(folder).render(MESSAGES) == expected


HOSTILE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['__builtins__'] }}",
    "attribute filter": "{{ (messages | attr('__class__')).mro() }}",
    "call": "{{ ''.__class__() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "changes its input": "{{ messages.append('x') }}",
    "changes a message": "{{ messages[0].update({'content': 'x'}) }}",
    "endless": "{% for i in range(10**9) %}x{% endfor %}",
    "syntax": "{% for %}",
    "raises": "{{ raise_exception('roles must alternate') }}",
    "divides by zero": "{{ 1 / 0 }}",
    "wrong type": "{{ messages[0].content + 1 }}",
    "reads a file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """The sandbox gives no way to Python's insides, to files, or to the caller's messages: an error that
    names the folder, no answer.
    """
    tokenizer = Tokenizer(with_template(tiny_llama, tmp_path / "model", HOSTILE[name]))
    messages = [{"role": "user", "content": "w1"}]
    with pytest.raises(FormatError, match="does not render"):
        tokenizer.render(messages)
    assert messages == [{"role": "user", "content": "w1"}]


@pytest.mark.parametrize(
    "hidden",
    ["{{ messages | attr('__class__') }}", "{{ ''.__class__ }}", "{{ '{0.__class__}'.format(messages) }}"],
)
def test_what_the_sandbox_hides_is_empty(hidden: str, tiny_llama: Path, tmp_path: Path) -> None:
    """An attribute of Python's insides that is merely printed is printed as nothing, as under
    transformers.
    """
    folder = with_template(tiny_llama, tmp_path / "model", f"[{hidden}]")
    assert Tokenizer(folder).render(MESSAGES) == "[]"


# Templates that would take a machine's time and memory.


X, MANY = "{% set x = ['xx'] %}", 3_000_000_000
KEPT = "{% set b = 'x' * 999999 %}{% set n = namespace(l=[]) %}"
BOMBS = {
    "loops": "".join(f"{{% for {name} in range(9999) %}}" for name in "abc") + "{% endfor %}" * 3,
    "long loop": "{% for i in range(99999) %}{% for c in 'x' * 99999 %}{% endfor %}{% endfor %}",
    "doubled by +": "{% set x = 'xx' %}" + "{% set x = x + x %}" * 40 + "{{ x | length }}",
    "doubled by ~": "{% set x = 'xx' %}" + "{% set x = x ~ x %}" * 40 + "{{ x | length }}",
    "multiplied list": X + "{% set x = x * 9999 %}" * 5 + "{{ x | length }}",
    "nested list": X + "{% set x = [x, x] %}" * 40 + "{{ x }}",
    "compared": X + "{% set y = ['xx'] %}" + "{% set x = [x, x] %}{% set y = [y, y] %}" * 40 + "{{ x == y }}",
    "nested mapping": X + "{% set x = {'a': x, 'b': x} %}" * 40 + "{{ x | tojson }}",
    "nested keys": "{% set x = (1, 2) %}" + "{% set x = (x, x) %}" * 40 + "{{ {x: 1} | length }}",
    "center": f"{{{{ 'x' | center({MANY}) }}}}",
    "center, a method": f"{{{{ 'x'.center({MANY}) }}}}",
    "center by name": f"{{{{ ['x'] | map('center', {MANY}) | list }}}}",
    "center around a block": f"{{% filter center({MANY}) %}}x{{% endfilter %}}",
    "ljust by keyword": f"{{{{ 'x' | attr('ljust')({MANY}) }}}}",
    "tabs": f"{{{{ '\t'.expandtabs({MANY}) }}}}",
    "percent": f"{{{{ '%{MANY}d' % 1 }}}}",
    "percent, computed": f"{{{{ '%*d' % ({MANY}, 1) }}}}",
    "percent, precision": f"{{{{ '%.{MANY}d' % 1 }}}}",
    "percent, a key in parentheses": f"{{{{ '%((a)){MANY}d' % {{'(a)': 1}} }}}}",
    "format": f"{{{{ '{{:{MANY}}}'.format(1) }}}}",
    "format, computed": f"{{{{ '{{:{{w}}}}'.format(1, w={MANY}) }}}}",
    "format_map": f"{{{{ '{{a:{MANY}}}'.format_map({{'a': 1}}) }}}}",
    "macro": "{% macro f(n) %}{% if n < 40 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}",
    "recursive loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "recursive block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "text": "{% for i in range(9999) %}" + "y" * 9999 + "{% endfor %}",
    "replace": "{{ ('a' * 999999) | replace('a', 'b' * 9999) | length }}",
    "replace, a method": "{{ ('a' * 999999).replace('a', 'b' * 9999) | length }}",
    "join": "{{ range(99999) | join('b' * 9999) | length }}",
    "join, a method": "{{ ('b' * 9999).join(range(99999) | map('string')) | length }}",
    "batch": f"{{{{ [1] | batch({MANY}, 'x') | list | length }}}}",
    "slice": f"{{{{ [1] | slice({MANY}, 'x') | list | length }}}}",
    "tojson": f"{{{{ [[1]] | tojson(indent={MANY}) | length }}}}",
    "sum": "{{ ([[1] * 9999] * 9999) | sum(start=[]) | length }}",
    "power": "{{ 2 ** 9999 ** 2 }}",
    "digits": "{% set x = 9 ** 999 %}" + "{% set x = x * x %}" * 40 + "{{ x > 1 }}",
    "round": "{{ 5 | round(-1000000000) }}",
    "round up": "{{ 5 | round(1000000000, 'ceil') }}",
    "bytes of a number": f"{{{{ (1).to_bytes({MANY}, 'big') | length }}}}",
    "translate": "{{ ('a' * 99999).translate({97: 'x' * 99999}) | length }}",
    "kept slices": KEPT + "{% for i in range(9999) %}{% set n.l = n.l + [b[i:]] %}{% endfor %}",
    "kept copies": KEPT + "{% for i in range(9999) %}{% set n.l = n.l + [b.upper()] %}{% endfor %}",
    "while it compiles": (
        f"{{% if false %}}{{{{ 'x' | center({MANY}) }}}}{{{{ 'x' * {MANY} }}}}{{% endif %}}{{{{ 'x' * "
        f"{MANY} }}}}"
    ),
    "dates": "{{ strftime_now('%Y' * 999999) }}",
    "words": "{{ lipsum(1000000) }}",
    "message": "{{ raise_exception('x' * 9999999) }}",
    "many parts": "{{ a }}" * 30_000,
    "long": "x" * 300_000,
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long sum": "{{ " + "1+" * 5000 + "1 }}",
    "digits in the source": "{{ " + "9" * 100_000 + " }}",
    "many ifs": "{% if a %}" * 200 + "{% endif %}" * 200,
    "many fors": "{% for i in range(2) %}" * 30 + "x" + "{% endfor %}" * 30,
}


@pytest.fixture(scope="module")
def impatient() -> Iterator[Sandbox]:
    """The sandbox of templates, with less time."""
    sandbox = Sandbox(template._SANDBOX.function, template._SANDBOX.limits._replace(seconds=0.5))
    yield sandbox
    sandbox.close()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_would_not_end_is_refused(
    name: str, impatient: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a short sentence, while this process does nothing but wait; and the next template renders."""
    monkeypatch.setattr(template, "_SANDBOX", impatient)
    started = time.process_time()
    with pytest.raises(FormatError, match=r"does not render.*somewhere.*To fix it") as caught:
        ChatTemplate(BOMBS[name], "somewhere").render(MESSAGES)
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 1500
    assert ChatTemplate(TEMPLATES["plain"]).render(MESSAGES[1:2]) == "<user> w5 w6\n<assistant> "


@pytest.mark.parametrize("value", [{1, 2}, float, b"bytes", 10**5000], ids=["set", "type", "bytes", "digits"])
def test_messages_are_what_json_has(value: object) -> None:
    with pytest.raises(ConfigError, match="cannot be given to a chat template"):
        ChatTemplate("{{ messages }}").render([{"role": "user", "content": value}])


def test_a_namespace_is_not_written_out() -> None:
    """It may hold another one many times, or itself."""
    doubled = (
        "{% set x = namespace() %}"
        + "{% set y = namespace(a=x, b=x) %}{% set x = namespace(a=y, b=y) %}" * 20
        + "{{ x }}"
    )
    assert ChatTemplate(doubled).render(MESSAGES) == "<Namespace>"
    assert (
        ChatTemplate("{% set x = namespace() %}{% set x.x = [x, x] %}{{ x.x }}").render(MESSAGES)
        == "[<Namespace>, <Namespace>]"
    )


def test_what_is_long_may_be_rendered() -> None:
    """Long conversations are no bombs: the more is given, the more may be done with it."""
    messages = [{"role": "user", "content": f"{number} " * 500} for number in range(2000)]
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' %}{{ '<' ~ m.role ~ '>' "
        "+ m.content | trim }}"
        "{% set ns.n = ns.n + 1 %}{% for word in m.content[:200].split() %}{% endfor %}{% endif %}{% endfor "
        "%}{{ ns.n }}"
    )
    text = ChatTemplate(source).render(messages)
    assert text == "".join(f"<user>{message['content'].strip()}" for message in messages) + "2000"


def test_a_template_is_compiled_once() -> None:
    """However many prompts there are."""
    rendering._compile.cache_clear()
    for text in ("w1", "w2", "w3"):
        request = json.dumps([TEMPLATES["plain"], {"messages": [{"role": "user", "content": text}]}])
        assert text in rendering.render(request.encode()).decode()
    assert rendering._compile.cache_info().misses == 1
