"""Chat templates of files: the text that transformers gives, and an end in bounded time and memory."""

import resource
import time

import pytest

from sgfast.huggingface.bounded_template import TemplateBudgetError, compiled_bounded, render_bounded
from tests.chat_templates import FAMILIES, smollm2_tokenizer

CHAT = [
    {"role": "system", "content": "be  kind "},
    {"role": "user", "content": "hi\tthere  "},
    {"role": "assistant", "content": "yes, é"},
    {"role": "user", "content": "again"},
]
DIVERSE = (
    "{% set ns = namespace(n=0, text='') %}{% macro quoted(x, times=2) %}{{ '\"' * times ~ x ~ '\"' }}{% endmacro %}"
    "{% for m in messages if m.role != 'system' %}{% set ns.n = ns.n + loop.index0 %}"
    "{% set ns.text = ns.text ~ m.content[:3] + '/' %}{{ loop.length }}{{ loop.revindex }}"
    "{{ quoted(m['content'] | trim) }}{% if loop.index0 % 2 == 0 %}{{ loop.cycle('x', 'y') }}{% endif %}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
    "{{ ns.n }}{{ ns.text }}{{ {'a': [1, 2.5, none]} | tojson(indent=2) }}{{ [1, 'b'] }}{{ ('c', 4) ~ 2 ** 5 }}"
    "{{ '%s-%03d' % ('a', 5) }}{{ 'x{:>4}y{}'.format(3, 'z') }}{{ 'a,b'.split(',') | join('+') }}"
    "{{ '-'.join(messages | map(attribute='role')) }}{{ 'a\\tb'.expandtabs(3).replace('a', 'cc') }}"
    "{{ messages | length }}{{ messages[::-1][0].role | upper }}{{ 'a' in 'abc' }}{{ range(3) | list }}"
    "{{ 'b'.center(5) | replace(' ', '_') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{% generation %}g{% endgeneration %}{% set block %}in{{ 1 }}{% endset %}{{ block }}"
    "{% for key, value in {'k': 'v'}.items() %}{{ key }}{{ value }}{% endfor %}"
    "{{ 'yes' if add_generation_prompt else 'no' }}{{ bos_token }}{{ missing is defined }}"
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = smollm2_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


@pytest.mark.parametrize("template", [*(family.template for family in FAMILIES.values()), DIVERSE, None])
def test_the_text_is_that_of_transformers(tokenizer, template):
    template = template or tokenizer.chat_template
    chat = CHAT[1:] if template == FAMILIES["gemma"].template else CHAT
    expected = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)
    given = render_bounded(template, chat, add_generation_prompt=True, **tokenizer.special_tokens_map)
    assert given == expected


def test_the_budget_grows_with_the_chat():
    chat = [{"role": "user" if turn % 2 == 0 else "assistant", "content": "word " * 20_000} for turn in range(100)]
    template = FAMILIES["mistral"].template
    assert len(render_bounded(template, chat, bos_token="", eos_token="")) > 10_000_000


NUMBERS = "{% set n = namespace(x=START) %}{% for i in range(100) %}{% set n.x = STEP %}{% endfor %}{{ n.x }}"


def grown(start, step):
    return NUMBERS.replace("START", start).replace("STEP", step)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
        "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'a' * 1000000000 }}",
        "{{ [0] * 1000000000 }}",
        "{{ 'a'.center(1000000000) }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ 'a' | indent(1000000000) }}",
        "{{ ('\n' * 100000) | indent(1000000) }}",
        "{{ ('\t' * 100000).expandtabs(1000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 999999999) }}",
        "{{ ('{:{}}' * 1000).format(*([1, 999999] * 1000)) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
        "{{ ('b' * 10000).join(range(100000) | map('string')) }}",
        "{{ range(100000) | map('string') | join('b' * 10000) }}",
        "{{ [[1]] | batch(1000000000, 'x') | list }}",
        "{{ {'a': [1] * 1000} | tojson(indent=1000000) }}",
        "{% set x %}{% for i in range(100000) %}{{ 'abc' * 10000 }}{% endfor %}{% endset %}{{ x }}",
        "{% for i in range(99999) %}{{ 'abc' * 10000 }}{% endfor %}",
        "{% for i in range(99999) %}{% set x = ('a' * 100000)[1:] %}{% endfor %}",
        grown("'a'", "n.x ~ n.x"),
        grown("'a'", "n.x + n.x"),
        grown("[1]", "n.x + n.x"),
        grown("[1]", "[n.x, n.x]"),
        grown("[1]", "(n.x, n.x)"),
        grown("[1]", "{'a': n.x, 'b': n.x}"),
        grown("[1]", "dict(a=n.x, b=n.x)"),
        grown("3", "n.x * n.x"),
        grown("'aa'", "n.x.replace('a', 'aa')"),
    ],
)
def test_no_template_runs_for_ever_or_takes_the_memory(template):
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises((TemplateBudgetError, RecursionError)):
        render_bounded(template, CHAT)
    assert time.process_time() - begun < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # kilobytes


def test_templates_that_do_not_compile_end_at_once():
    for template in ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 2000 + "{% endif %}" * 2000):
        begun = time.process_time()
        with pytest.raises(RecursionError):
            compiled_bounded(template)
        assert time.process_time() - begun < 1
