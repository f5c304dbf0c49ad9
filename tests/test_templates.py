"""Chat templates: those that models have pass, and are still templates; what reaches out, or costs more than
the chat, does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from adapterpack.chat_templates import template
from adapterpack.pack.validate.checks.context import Budget, Spent
from adapterpack.pack.validate.checks.template import MAX_TEMPLATE, template_findings
from adapterpack.sandbox.sandbox import Sandbox

pytestmark = pytest.mark.fast

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a town",
        "parameters": {
            "type": "object",
            "required": ["town"],
            "properties": {
                "town": {"type": "string", "description": "its name"},
                "days": {"type": "array", "items": {"type": "integer"}},
                "where": {
                    "type": "object",
                    "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}},
                },
            },
        },
    },
}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"town": "Bern", "days": [1, 2]}},
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is the weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "dry", "tool_call_id": "c1", "name": "weather"},
    {"role": "assistant", "content": "<think>easy</think>It is dry."},
    {"role": "user", "content": "Thanks"},
]


SHAPES: dict[str, tuple[str, str]] = {
    "ChatML": (
        """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
        "<|im_start|>assistant\n",
    ),
    "Llama 3": (
        """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}
        {%- if loop.index0 == 0 %}{%- set content = bos_token + content %}{%- endif %}
        {{- content }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("One call at a time!") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- elif message.role in ["tool", "ipython"] %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or (message.content is iterable and message.content is not string) %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}""",
        "<|end_header_id|>\n\n",
    ),
    "Gemma": (
        """{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) and strict -%}{{ raise_exception("Roles must alternate") }}{%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}
        {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
    {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}{{ '<end_of_turn>\\n' }}
{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}""",
        "<start_of_turn>model\n",
    ),
    "Mistral": (
        """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if strict and (message["role"] == "user") != (ns.index % 2 == 0) %}{{- raise_exception("Roles must alternate") }}{%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}{%- else %}{{- '"' + key + '": ' + val | tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}{{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}{{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}{{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}{{- out[:-1] }}
            {%- if tool_call.id is not defined or tool_call.id | length < 2 %}{{- raise_exception("An id is needed") }}{%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] in ["tool_results", "tool"] %}
        {%- if message.content is defined and message.content.content is defined %}{%- set content = message.content.content %}
        {%- else %}{%- set content = message.content %}{%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content | string + ", " }}{{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}""",
        "[INST] Be brief.\n\nThanks[/INST]",
    ),
    "Qwen with tools": (
        """{%- if tools %}
    {{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}{{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}""",
        "<|im_start|>assistant\n",
    ),
    "DeepSeek": (
        """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='', is_first_sp=true) -%}
{%- for message in messages %}{%- if message['role'] == 'system' %}
    {%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}
    {%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor -%}
{%- if tools %}{% set tool_ns = namespace(text='## Tools\\n') -%}
    {%- for tool in tools %}{% set tool_ns.text = tool_ns.text + '### ' + tool.function.name + '\\n' + (tool.function.parameters | tojson) %}
    {%- endfor %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + tool_ns.text %}{% endif -%}
{{- bos_token }}{{ ns.system_prompt -}}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{- '<|User|>' + message['content'] -}}{%- endif %}
    {%- if message['role'] == 'assistant' and 'tool_calls' in message %}{%- set ns.is_tool = false -%}
        {%- for tool in message['tool_calls'] %}
            {%- if not ns.is_first %}{{- '<|Assistant|><|tool_calls_begin|>' + tool['function']['name'] + '\\n' + tool['function']['arguments']
                | tojson + '<|tool_call_end|>' -}}{%- set ns.is_first = true -%}
            {%- else %}{{- '\\n' + tool['function']['name'] -}}{%- endif %}
        {%- endfor %}{{- '<|tool_calls_end|>' -}}
    {%- elif message['role'] == 'assistant' %}
        {%- set content = message['content'] -%}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] -%}{%- endif %}{{- '<|Assistant|>' + content -}}
    {%- endif %}
    {%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}
        {%- if ns.is_output_first %}{{- '<|outputs|>' + message['content'] -}}{%- set ns.is_output_first = false %}
        {%- else %}{{- '\\n' + message['content'] -}}{%- endif %}{%- endif %}
{%- endfor -%}
{%- if add_generation_prompt and not ns.is_tool %}{{- '<|Assistant|>' -}}{% endif %}""",
        "<|User|>Thanks<|Assistant|>",
    ),
    "macros that call themselves": (
        """{%- macro typed(spec, required, nullable=false) -%}
    {%- if spec.type == "array" -%}
        {%- if spec['items'] -%}{%- set inner = typed(spec['items'], required) -%}
            {%- if inner == "object" or inner | length > 50 -%}{{- "any[]" }}{%- else -%}{{- inner + "[]" }}{%- endif -%}
        {%- else -%}{{- "any[]" }}{%- endif -%}
    {%- elif spec.oneOf -%}
        {%- for variant in spec.oneOf -%}{{- typed(variant, required) }}{%- if not loop.last %}{{- " | " }}{% endif -%}{%- endfor -%}
    {%- elif spec.type == "object" -%}
        {{- "{" }}{%- for name, part in spec.properties | dictsort -%}
            {{- name }}{%- if name not in (spec.required or []) -%}{{- "?" }}{%- endif -%}{{- ": " }}{{- typed(part, spec.required or []) }}
            {%- if not loop.last -%}{{- ", " }}{%- endif -%}
        {%- endfor -%}{{- "}" }}
    {%- else -%}{{- spec.type | default('any') }}{%- endif -%}
{%- endmacro -%}
{%- macro told(value, quotes=true) -%}
    {%- if value is string -%}{{- '"' + value + '"' if quotes else value -}}
    {%- elif value is mapping -%}{{- '{' -}}{%- set ns = namespace(first=true) -%}
        {%- for key, item in value.items() -%}{%- if not ns.first %},{% endif -%}{%- set ns.first = false -%}
            {{- key -}}:{{- told(item, quotes=quotes) -}}{%- endfor -%}{{- '}' -}}
    {%- elif value is sequence -%}{{- '[' -}}
        {%- for item in value -%}{{- told(item, quotes) -}}{{- ',' if not loop.last -}}{%- endfor -%}{{- ']' -}}
    {%- else -%}{{- value -}}{%- endif -%}
{%- endmacro -%}
{%- macro plain(text) -%}
    {%- set ns = namespace(result='') -%}
    {%- for part in text.split('</think>') -%}{%- set ns.result = ns.result + part.split('<think>')[0] -%}{%- endfor -%}
    {{- ns.result | trim -}}
{%- endmacro -%}
{%- for tool in tools %}{{ 'type ' + tool.function.name + ' = (_: ' }}{{ typed(tool.function.parameters, []) }}{{ ') => any;\\n' }}{% endfor -%}
{%- for message in messages -%}
    {%- set seen = namespace(role=none, found=false) -%}
    {%- if loop.index0 > 0 -%}{%- for j in range(loop.index0 - 1, -1, -1) -%}
        {%- if not seen.found and messages[j]['role'] != 'tool' -%}
            {%- set seen.role = messages[j]['role'] -%}{%- set seen.found = true -%}{%- endif -%}
    {%- endfor -%}{%- endif -%}
    {%- set text -%}{%- if message.content is string -%}{{- plain(message.content) -}}{%- endif -%}{%- endset -%}
    {{- '<|' + message.role + '|>' + text -}}
    {%- for call in message.get('tool_calls') or [] -%}{{- told(call.function.arguments, false) -}}{%- endfor -%}
{%- endfor -%}""",
        "(_: {days?: integer[], town: string, where?: {lat?: number, lon?: number}}) => any;",
    ),
}


def environment() -> ImmutableSandboxedEnvironment:
    """What renders chat templates: Jinja's sandbox with the two functions that transformers adds."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    found.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    return found


def errors(text: str, **options: Any) -> list[str]:
    """The rules that a template breaks."""
    return [
        finding.rule
        for finding in template_findings(text.encode(), "t", **options)
        if finding.severity == "error"
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shapes_of_templates_that_models_have_pass(shape: str) -> None:
    """No finding at all; and they are templates, which render a chat with tools."""
    text, part = SHAPES[shape]
    assert [*template_findings(text.encode(), "t")] == []
    plain = [message for message in CHAT if message["role"] in {"system", "user"}]
    chat = plain if shape in {"ChatML", "Gemma"} else CHAT
    written = (
        environment()
        .from_string(text)
        .render(messages=chat, tools=[TOOL], bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    )
    assert part in written


WORDS = {
    "an attribute of the interpreter": ("{{ ''.__class__ }}", "AP852"),
    "an item of that name": ("{{ messages['__class__'] }}", "AP852"),
    "a name put together": ("{{ messages['_' ~ '_class__'] }}", "AP852"),
    "a name added up": ("{{ messages['_' + x + '_class_' + y] }}", "AP852"),
    "attr": ("{{ messages | attr('x') }}", "AP852"),
    "map by attr": ("{{ messages | map('attr', '__class__') | list }}", "AP852"),
    "map by map": ("{{ messages | map('map', 'attr', 'x') | list }}", "AP852"),
    "map by a variable": ("{{ messages | map(name) | list }}", "AP852"),
    "map by an attribute": ("{{ messages | map(attribute='__class__') | list }}", "AP852"),
    "map by an attribute of one": ("{{ messages | map(attribute='a.__class__') | list }}", "AP852"),
    "sort by an attribute": ("{{ messages | sort(attribute='__class__') }}", "AP852"),
    "sort by one at a place": ("{{ messages | sort(false, false, '__class__') }}", "AP852"),
    "sum of an attribute": ("{{ messages | sum('__class__') }}", "AP852"),
    "selectattr": ("{{ messages | selectattr('__class__') | list }}", "AP852"),
    "selectattr by a test of somebody": ("{{ messages | selectattr('a', name) | list }}", "AP852"),
    "groupby": ("{{ messages | groupby('__class__') }}", "AP852"),
    "a frame": ("{{ messages.gi_frame }}", "AP852"),
    "another object of Jinja's": ("{{ lipsum(5) }}", "AP852"),
    "the template itself": ("{{ self }}", "AP852"),
    "a macro's caller": ("{% macro f() %}{{ caller() }}{% endmacro %}", "AP852"),
    "a function that chats do not have": ("{{ cycler('a') }}", "AP852"),
    "a function of the chat": ("{{ messages() }}", "AP852"),
    "a call of an item": ("{{ messages['x']() }}", "AP852"),
    "a call of a call": ("{{ messages.get('x')() }}", "AP852"),
    "spread arguments": ("{{ dict(**messages) }}", "AP852"),
    "center": ("{{ 'x' | center(3000000000) }}", "AP852"),
    "the method center": ("{{ 'x'.center(3000000000) }}", "AP852"),
    "ljust": ("{{ 'x'.ljust(3000000000) }}", "AP852"),
    "zfill": ("{{ '1'.zfill(3000000000) }}", "AP852"),
    "expandtabs": ("{{ '\t'.expandtabs(3000000000) }}", "AP852"),
    "a width in a format": ("{{ '{:999999999}'.format(1) }}", "AP852"),
    "a width in the filter": ("{{ '%999999999d' | format(1) }}", "AP852"),
    "a format from a variable": ("{{ x.format(1) }}", "AP852"),
    "a width in a date": ("{{ strftime_now('%999999999Y') }}", "AP852"),
    "format_map": ("{{ x.format_map(messages) }}", "AP852"),
    "a power": ("{{ 9 ** 9 ** 9 }}", "AP852"),
    "urlize": ("{{ x | urlize }}", "AP852"),
    "random": ("{{ messages | random }}", "AP852"),
    "a test that is none of Jinja's": ("{{ x is filter }}", "AP852"),
    "include": ("{% include 'x' %}", "AP853"),
    "import": ("{% from 'x' import y %}", "AP853"),
    "extends": ("{% extends 'x' %}", "AP853"),
    "a block": ("{% block x %}{% endblock %}", "AP853"),
    "a call block": ("{% macro f() %}{% endmacro %}{% call f() %}x{% endcall %}", "AP853"),
    "a filter block": ("{% filter upper %}x{% endfilter %}", "AP853"),
    "autoescape": ("{% autoescape true %}{% endautoescape %}", "AP853"),
    "a loop that calls itself": ("{% for m in messages recursive %}{{ loop(m) }}{% endfor %}", "AP852"),
    "too deep": ("{{ " + "+".join(["1"] * 500) + " }}", "AP851"),
    "deeper": ("{{ " + "*".join(["1"] * 20_000) + " }}", "AP851"),
    "brackets": ("{{ " + "(" * 5_000, "AP851"),
    "too long": ("x" * (MAX_TEMPLATE + 1), "AP851"),
}
NEST = "{% for a in range(9999) %}"
COSTS = {
    "a repetition": "{{ 'x' * 10001 }}", "a repetition of one": "{{ 'x' * 9999 * 9999 }}", "a repetition in steps": "{% set a = 'x' * 9999 %}{% set b = a * 9999 %}{{ b }}",
    "a repeated list": "{% set a = [1] * 9999 %}{% for x in a %}{% for y in a %}{% for z in a %}x{% endfor %}{% endfor %}{% endfor %}",
    "a range of two ends": "{% for i in range(-9999, 9999) %}{% endfor %}",
    "a range that is computed": "{% for i in range(9999 * 9999) %}{% endfor %}", "one from a variable": "{% set n = 5000 %}{% for i in range(n + n + n) %}{% endfor %}",
    "one that grows": "{% set ns = namespace(n=1) %}{% for m in messages %}{% set ns.n = ns.n + ns.n %}{% endfor %}{% for i in range(ns.n) %}{% endfor %}",
    "one of a text": "{% for i in range('99999999' | int) %}{% endfor %}",
    "ranges in each other": NEST * 3 + "x" + "{% endfor %}" * 3, "ranges one after the other": (NEST + "x{% endfor %}") * 200,
    "a range in a macro": "{% macro f() %}" + NEST + "x{% endfor %}{% endmacro %}" + NEST + "{{ f() }}{% endfor %}",
    "a long text gone through": "{% set t = '" + "a" * 5_000 + "' %}" + "{% for a in t.split('a') %}{% for b in t.split('a') %}x{% endfor %}{% endfor %}",
    "loops in loops": "{% for a in m %}" * 5 + "x" + "{% endfor %}" * 5,
    "a text that doubles": "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}",
    "one in a namespace": "{% set ns = namespace(x='ab') %}{% for m in messages %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "one that doubles forty times": "{% set x0 = messages[0].content %}" + "".join(f"{{% set x{i + 1} = x{i} ~ x{i} %}}" for i in range(40)) + "{{ x40 }}",
    "two that grow by each other": "{% set a = 'x' %}{% set b = 'y' %}" + "{% set a = a ~ b %}{% set b = a ~ b %}" * 40,
    "one that is joined by itself": "{% set n = namespace(x='ab') %}{% for m in messages %}{% set n.x = [n.x, n.x] | join(n.x) %}{% endfor %}",
    "one that is replaced": "{% set n = namespace(x='a') %}{% for m in messages %}{% set n.x = n.x | replace('a', 'aa') %}{% endfor %}",
    "one that is indented": "{{ messages | tojson(indent=100000) }}", "a block that doubles": "{% set n = namespace(x='a') %}{% for m in messages %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(64) }}",
    "one for slices": "{% macro f(n) %}{% if n %}{{ f(n[1:]) }}{{ f(n[1:]) }}{% endif %}{% endmacro %}{{ f(messages) }}",
    "macros that double": "{% macro f0() %}abc{% endmacro %}" + "".join(
        f"{{% macro f{i + 1}() %}}{{{{ f{i}() }}}}{{{{ f{i}() }}}}{{% endmacro %}}" for i in range(40)) + "{{ f40() }}",
    "a text that may be a format": "{% set f = '%' ~ '999999999d' %}{{ f % 1 }}", "one of the chat": "{{ messages[0].content % 1 }}",
    "many copies": "{{ messages }}" * 4_200,
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_what_chats_do_not_need_is_refused(name: str) -> None:
    """Every filter, test, function, method and statement that is not on the list, however it is reached."""
    text, rule = WORDS[name]
    assert errors(text)[:1] == [rule]


@pytest.fixture(scope="module")
def impatient() -> Iterator[Sandbox]:
    """The sandbox of templates, with less time."""
    sandbox = Sandbox(template._SANDBOX.function, template._SANDBOX.limits._replace(seconds=0.5))
    yield sandbox
    sandbox.close()


@pytest.mark.parametrize("name", COSTS)
def test_what_costs_more_than_the_chat_is_refused(
    name: str, impatient: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repetition, a range, a text or a call that grows without proportion: rendering a sample goes beyond a
    limit.
    """
    monkeypatch.setattr(template, "_SANDBOX", impatient)
    assert errors(COSTS[name]) == ["AP854"]


GROWS = {
    # what looks costly, and is not with any sample of a chat; were it with another chat, rendering that ends
    # with an error
    "one in a test": "{% if ('x' * 9999 * 9999) | length %}{% endif %}",
    "as often as the chat says": "{{ 'x' * messages }}",
    "as often as a number of it": "{{ 'x' * (messages[0].n | int) }}",
    "a range": "{% for i in range(10001) %}{% endfor %}",
    "one that is replaced by itself": "{% set n = namespace(x='a') %}{% for m in messages %}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
    "one that is indented by the chat": "{{ messages | tojson(indent=messages | length) }}",
    "a list that is appended to itself": "{% set x = [1] %}{% for m in messages %}{% set _ = x.append(x ~ x) %}{% endfor %}",
    "a number that squares itself": "{% set x = 99 %}{% for m in messages %}{% set x = x * x %}{% endfor %}",
    "one for the same part": "{% macro f(n) %}{{ f(n.a) }}{{ f(n.a) }}{% endmacro %}{{ f(messages) }}",
    "one in a loop over something else": "{% macro f(n) %}{% for i in [1, 2] %}{{ f(n.a) }}{% endfor %}{% endmacro %}{{ f(messages) }}",
    "one for a part and the whole": "{% macro f(n, x) %}{% if n %}{{ f(n - 1, x) }}{{ f(n - 1, x.a) }}{% endif %}{% endmacro %}{{ f(64, x) }}",
    "one for what the template nests": "{% macro f(n) %}{{ f(n.a) }}{% for x in n.values() %}{{ f(x) }}{% endfor %}{% endmacro %}"
                                       "{% set x = {} %}" + "{% set x = {'a': x} %}" * 50 + "{{ f(x) }}",
    "macros in a circle": "{% macro f(n) %}{{ g(n.a) }}{% endmacro %}{% macro g(n) %}{{ f(n.a) }}{{ f(n.b) }}{% endmacro %}{{ f(x) }}",
    "many variables": "".join(f"{{% set a{i} = 1 %}}" for i in range(600)),

    "text that is added to": "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t ~ m.content ~ '\\n' %}{% endfor %}{{ ns.t }}",
    "a line": "{{ '=' * 80 }}", "steps": "{% for i in range(messages | length) %}{{ messages[i].role }}{% endfor %}",
    "places": "{% for m in messages[1:] %}{% set at = loop.index0 + 1 %}{% for i in range(at - 1, -1, -1) %}{{ i }}{% endfor %}{% endfor %}",
    "a list that is appended to": "{% set ns = namespace(v=[]) %}{% for m in messages %}{% set _ = ns.v.append(m) %}{% endfor %}{{ ns.v }}",
    "a list that grows": "{% set ns = namespace(v=[]) %}{% for m in messages %}{% set n = m.name %}{% set ns.v = ns.v + [n] %}{% endfor %}"
                         "{% for n in ns.v %}{{ n }}{% endfor %}",
    "a text replaced four times": "{% set t = messages[0].content | replace('Reasoning', 'Thinking it over') | replace('a', 'b') %}{{ t }}",
    "numbers": "{% set ns = namespace(i=0) %}{% for m in messages %}{% set ns.i = ns.i + 1 %}{{ ns.i % 2 }}{{ ns.i * 3 }}{% endfor %}",
    "one of two": "{% set c = messages[0].content %}{% set c = c if c is string else c | map(attribute='text') | join('\\n') %}{{ c }}",
    "a macro for the rest": "{% macro f(n, left) %}{{ n }}{% if left %}{{ f(n, left - 1) }}{% endif %}{% endmacro %}{{ f(messages, 3) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", GROWS)
def test_what_grows_with_the_chat_passes(name: str) -> None:
    """Lines, lists and texts that are added to, once for each message; and it is known soon."""
    start = time.monotonic()
    assert [*template_findings(GROWS[name].encode(), "t")] == []
    assert time.monotonic() - start < 60


def test_a_template_of_another_library_warns() -> None:
    """Of a folder that PEFT wrote, whose template is not taken along, what is merely unusual is a warning;
    what reaches out is not.
    """
    for text in ("{{ x | center(9) }}", "{{ 'x' * 99999 }}", "{% filter upper %}x{% endfilter %}"):
        assert errors(text) and not errors(text, foreign=True)
        assert [finding.severity for finding in template_findings(text.encode(), "t", foreign=True)] == [
            "warning"
        ]
    for text in ("{{ x.__class__ }}", "{{ x | attr('y') }}", "{% include 'x' %}"):
        assert errors(text, foreign=True)


def test_a_template_is_looked_through_within_the_budget() -> None:
    """Its nodes are gone over as long as there is time."""
    with pytest.raises(Spent, match="the chat template: the time ran out"):
        errors("{{ a }}" * 1_000, budget=Budget(seconds=0))
    for long in (
        "{{ " + "+".join(["a.b"] * 120) + " }}",
        "{% set a = b ~ c %}",
        "{% elif a %}",
        "{% for i in a %}{{ i }}{% endfor %}",
    ):
        text = long * (MAX_TEMPLATE // len(long))
        start = time.process_time()
        errors(f"{{% if a %}}{text}{{% endif %}}" if long == "{% elif a %}" else text)
        assert time.process_time() - start < 30
