"""Chat templates: rendered as transformers renders them, within bounds, in a sandbox."""

import json
import resource
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from headway.models import chat_template
from headway.models.chat_template import ChatTemplate, ChatTemplateError
from headway.models.config import ModelError
from headway.models.locate import locate
from headway.models.patience import OutOfTime, at_most
from headway.models.tokenizer import open_model_text

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße & <b>\n"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Why?"},
]
CHATML = """{{ bos_token }}{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
TRIMMED = """{% for message in messages %}
  {% if message.role == "system" %}
    {% continue %}
  {% endif %}
[{{ loop.index }}] {{ message.content }}
{% endfor %}
{% generation %}marked{% endgeneration %}"""
JSON = "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ tools is none }}"
COUNTED = """{% set seen = namespace(count=0) %}{% for m in messages %}{% set seen.count = seen.count + 1 %}
{% endfor %}{{ seen.count * 3 }} {{ "-" * 4 }} {{ thinking }}"""


@pytest.mark.parametrize("template", [CHATML, TRIMMED, JSON, COUNTED])
def test_templates_render_as_in_transformers(template: str) -> None:
    """Whitespace control, loop controls, tojson without HTML escapes, namespaces, extra arguments."""
    rendered, _ = render_jinja_template(
        [TALK], chat_template=template, add_generation_prompt=True, bos_token="<s>", thinking=False
    )
    ours = ChatTemplate(template, {"bos_token": "<s>"}).render(TALK, {"thinking": False})
    assert ours == rendered[0]


def test_the_date_is_available() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') | length }}", {}).render(TALK) == "4"


def test_a_template_refuses_in_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('Roles must alternate.') }}", {})
    with pytest.raises(ChatTemplateError, match=r"Roles must alternate\."):
        template.render(TALK)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 'x' * 1000000000 }}",
        "{{ 1000000000 * [0] }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ messages[9].content.missing }}",
        "{{ messages + 1 }}",
    ],
)
def test_a_hostile_or_broken_template_is_an_error_and_nothing_more(template: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(template, {}).render(TALK)


MEGABYTE = "{% set x = 'x' * 1000000 %}"
FILLING = [
    "{{ 'x'.ljust(4 * 1000000000) }}",
    "{{ 'x'.rjust(width=4000000000) or 'x'.rjust(4000000000) }}",
    "{{ 'x'.center(4000000000) }}",
    "{{ 'x'['zfill'](4000000000) }}",
    "{{ ('x' | attr('ljust'))(4000000000) }}",
    "{{ 'x'.encode().ljust(4000000000) | length }}",
    "{{ ('x'.encode() * 4000000000) | length }}",
    "{{ (1).to_bytes(4000000000) | length }}",
    "{{ '\\t'.expandtabs(4000000000) }}",
    "{{ '%09999999999d' % 1 }}",
    "{{ '%.9999999999f' % 1 }}",
    "{{ '%*d' % (4000000000, 1) }}",
    "{{ '%(a)9999999999d' % {'a': 1} }}",
    "{{ '%((a))9999999999d' % {'(a)': 1} }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 4000000000) }}",
    "{{ '{a:>9999999999}'.format_map({'a': 1}) }}",
    "{{ ('{:15000000}' * 300).format(*range(300)) }}",
    "{{ 'x' | center(4000000000) }}",
    "{{ 'x\\ny' | indent(4000000000) }}",
    "{{ '%09999999999d' | format(1) }}",
    "{{ [1] | batch(4000000000, 0) | list | length }}",
    "{{ 1 | round(9999999999, 'ceil') }}",
    "{{ [1] | tojson(indent=4000000000) }}",
    MEGABYTE + "{{ x | replace('x', x) }}",
    MEGABYTE + "{{ x.replace('', x) }}",
    MEGABYTE + "{{ x.join('y' * 100000) }}",
    MEGABYTE + "{{ ([x] * 100000) | join }}",
    MEGABYTE + "{{ range(100000) | join(x) }}",
    MEGABYTE + "{{ x.translate({120: x}) }}",
    MEGABYTE + "{{ ('%(a)s' * 100000) % {'a': x} }}",
    MEGABYTE + "{{ ('{0}' * 100000).format(x) }}",
    MEGABYTE + "{% set s = namespace(x=x) %}{% for i in range(40) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
    MEGABYTE + "{% set s = namespace(x=x) %}{% for i in range(40) %}{% set s.x = s.x + s.x %}{% endfor %}",
    MEGABYTE + "{% set y %}{% for i in range(100000) %}{{ x }}{% endfor %}{% endset %}",
    "{{ strftime_now('%c' * 8000000) }}",
]


@pytest.mark.parametrize("template", FILLING)
def test_no_operation_fills_the_memory(template: str) -> None:
    """It is refused before it is done: within it, nothing could be interrupted."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.monotonic()
    with pytest.raises(ChatTemplateError):
        ChatTemplate(template, {}).render(TALK)
    assert time.monotonic() - begun < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 1_000_000  # KiB


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 'x'.ljust(3) }}|{{ 'x' | center(3) }}|{{ '7'.zfill(3) }}", "x  | x |007"),
        ("{{ '%03d %s' % (7, 'y') }}|{{ '%s%%' | format(5) }}|{{ '%(a)s' % {'a': 1} }}|{{ 7 % 4 }}", "007 y|5%|1|3"),
        ("{{ '{:>3}{a}'.format(1, a='b') }}|{{ '{{}}'.format() }}", "  1b|{}"),
        ("{{ ['a', 1] | join('-') }}|{{ '-'.join(['a', 'b']) }}|{{ [{'k': 1}] | join(attribute='k') }}", "a-1|a-b|1"),
        ("{{ 'aba' | replace('a', 'c') }}|{{ 'aba'.replace('a', 'c', 1) }}|{{ 1.25 | round(1) }}", "cbc|cba|1.2"),
        (r"{{ 'x\ny' | indent(2) }}|{{ 1 ~ missing ~ 'a' }}|{{ [1] + [2] }}|{{ 'a' + 'b' }}", "x\n  y|1a|[1, 2]|ab"),
        ("{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m(1) ~ m(2) }}{% set x %}y{% endset %}{{ x }}", "<1><2>y"),
    ],
)
def test_what_is_measured_works(template: str, text: str) -> None:
    assert ChatTemplate(template, {}).render(TALK) == text


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 100)
    with pytest.raises(ChatTemplateError, match="over 100 characters"):
        ChatTemplate("{% for i in range(1000) %}xy{% endfor %}", {}).render(TALK)


@pytest.mark.parametrize("body", ["xy", "{% set a = i * j %}", ""], ids=["writing", "reckoning", "silent"])
def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Whether it writes something or not; and what is rendered next in this thread has its own time."""
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.2)
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 1 << 40)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}" + body + "{% endfor %}{% endfor %}"
    begun = time.monotonic()
    with pytest.raises(ChatTemplateError, match=r"took over 0\.2 s"):
        ChatTemplate(loop, {}).render(TALK)
    assert time.monotonic() - begun < 5
    assert ChatTemplate("{{ messages[0].role }}", {}).render(TALK) == "system"


def test_an_interruption_never_comes_late() -> None:
    """Blocks that end just when their time does: it comes inside or not at all, or this test would end with it."""
    for _ in range(300):
        with suppress(OutOfTime), at_most(0.001):
            end = time.monotonic() + 0.001
            while time.monotonic() < end:
                pass
        for _ in range(100):
            time.sleep(0)


def test_a_template_is_a_file_or_the_text_itself(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages[0].role }}")
    assert ChatTemplate.parse(str(path), {}).render(TALK) == "system"
    assert ChatTemplate.parse("{{ messages[1].role }}", {}).render(TALK) == "user"
    with pytest.raises(ModelError, match="There is no chat template"):
        ChatTemplate.parse(str(tmp_path / "none.jinja"), {})
    path.write_bytes(b"\xff")
    for unreadable in (str(path), str(tmp_path), "x" * 5000):
        with pytest.raises(ModelError, match="There is no chat template"):
            ChatTemplate.parse(unreadable, {})
    with pytest.raises(ModelError, match="broken in line 1"):
        ChatTemplate.parse("{% if %}", {})


def test_the_callers_template_goes_before_the_models_own() -> None:
    own, given = open_model_text(None), open_model_text(None, "{{ messages | length }}")
    assert own.chat_template is not None
    assert given.chat_template is not None
    assert own.chat_template.render(TALK[:1]) == "Be brief."
    assert given.chat_template.render(TALK) == "4"


def test_a_file_beside_the_model_goes_before_its_tokenizer_config(tmp_path: Path) -> None:
    """Published models have the template in either place, some under several names."""
    embedded = locate(None)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(embedded / name, tmp_path / name)
    several = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": "{{ 'default' }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    named = open_model_text(str(tmp_path)).chat_template
    assert named is not None
    assert named.render(TALK) == "default"
    (tmp_path / "chat_template.jinja").write_text("{{ 'beside' }}")
    beside = open_model_text(str(tmp_path)).chat_template
    assert beside is not None
    assert beside.render(TALK) == "beside"
