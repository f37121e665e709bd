"""A conversation becomes the tokens that transformers would make of it, and no caller's word becomes a control token."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from service.model.chat import ChatTemplate, Message, MessagesRefused, NoTemplate
from service.model.checkpoint import EMBEDDED
from service.model.tokenizer import Tokenizer

CONTROLS = ("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]")
NAMES = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role not in ("user", "assistant") %}{% continue %}{% endif %}
    {%- set said = m['content'] %}
    {%- if m.role == "assistant" and '</think>' in said %}{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}
    {%- set ns.last = loop.index0 %}
    {{- '<|im_start|>' + m.role + '\\n' + said | trim }}{% generation %}{{- '<|im_end|>\\n' }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
INSTRUCT = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set rules, messages = messages[0].content, messages[1:] %}
{%- else %}{% set rules = '' %}{% endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns, user first') }}{% endif %}
    {%- if m.role == 'user' %}{{ '[INST] ' + (rules + '\\n\\n' if loop.last and rules else '') + m.content + '[/INST]' }}
    {%- else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}
{%- endfor %}"""
TEMPLATES = {"chatml": CHATML, "thinking": THINKING, "instruct": INSTRUCT}


def core(**flags: bool) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    made.add_special_tokens([tokenizers.AddedToken(each, **flags) for each in CONTROLS])
    return made


def template(source: str, **flags: bool) -> ChatTemplate:
    made = core(**flags)
    made.encode_special_tokens = True
    return ChatTemplate(source, NAMES, made)


def tokens(made: ChatTemplate, messages: Sequence[Message]) -> list[int]:
    return made.encode(made.render(messages, {}, 2**20))


OURS = {name: template(source) for name, source in TEMPLATES.items()}
THEIRS = {
    name: PreTrainedTokenizerFast(tokenizer_object=core(), chat_template=source, **NAMES) for name, source in TEMPLATES.items()
}
PLAIN = core()
PLAIN.encode_special_tokens = True
WORDS = st.text(max_size=20) | st.sampled_from(["</think>", "<think>", "\n", " ", "a", "def f():", "</think>\n\nb"])
PARTS = st.sampled_from(
    [*CONTROLS, "<|endoftext|>", "<|im_", "start|>", "|im_end|>", "<|", "<", "end|>", "[", "INST]", "/INST]"]
)


def conversations(words: st.SearchStrategy[str]) -> st.SearchStrategy[list[Message]]:
    def told(texts: list[str], system: str | None) -> list[Message]:
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        return ([] if system is None else [{"role": "system", "content": system}]) + turns

    return st.builds(told, st.lists(words, min_size=1, max_size=5), st.none() | words)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(conversations(st.lists(WORDS, max_size=4).map("".join)))
def test_a_conversation_becomes_the_tokens_that_transformers_makes_of_it(name: str, messages: list[Message]) -> None:
    if name == "thinking":  # it passes system over, which is refused here
        messages = [each for each in messages if each["role"] != "system"]
    theirs = THEIRS[name].apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert tokens(OURS[name], messages) == theirs


def by_parts(name: str, messages: list[Message]) -> list[int]:
    """The slow reading: contents are spelled by words that no text holds, and put back between the control tokens."""
    spelled = {f"\ue000{i}\ue001": each["content"] for i, each in enumerate(messages)}
    hidden = [{**each, "content": word} for each, word in zip(messages, spelled, strict=True)]
    text, found = str(THEIRS[name].apply_chat_template(hidden, add_generation_prompt=True, tokenize=False)), []
    for part in re.split(f"({'|'.join(map(re.escape, (*CONTROLS, '<|endoftext|>')))})", text):
        whole = part
        for word, content in spelled.items():
            whole = whole.replace(word, content)
        is_control = part in (*CONTROLS, "<|endoftext|>")
        found += [PLAIN.token_to_id(part)] if is_control else PLAIN.encode(whole, add_special_tokens=False).ids
    return found


@settings(max_examples=300, deadline=None)
@given(conversations(st.lists(PARTS | WORDS, max_size=5).map("".join)))
def test_no_word_of_a_caller_becomes_a_control_token(messages: list[Message]) -> None:
    assert tokens(OURS["chatml"], messages) == by_parts("chatml", messages)


@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"lstrip": True}, {"normalized": True}])
def test_a_mark_is_taken_wherever_its_token_would_be(flags: dict[str, bool]) -> None:
    messages = [{"role": "user", "content": "\n  a b \n"}, {"role": "assistant", "content": "c"}]
    theirs = PreTrainedTokenizerFast(tokenizer_object=core(**flags), chat_template=CHATML, **NAMES)
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert tokens(template(CHATML, **flags), messages) == wanted


def test_a_template_that_builds_control_tokens_out_of_parts_is_not_offered() -> None:
    with pytest.raises(NoTemplate, match="from parts"):
        template("{% for m in messages %}{{ '<|im_' + 'start|>' + m.content }}{% endfor %}")


@pytest.mark.parametrize("source", [f"{{{{ {'(' * 5000}1{')' * 5000} }}}}", "{{ 10 ** 5000 }}"])
def test_a_template_that_cannot_be_compiled_is_not_offered(source: str) -> None:
    with pytest.raises(NoTemplate, match="cannot be read"):
        template(source)


def test_a_template_that_is_none_is_not_offered() -> None:
    with pytest.raises(NoTemplate, match="cannot be read"):
        template("{% for m in messages %}")


def test_a_templates_own_words_tell_why_it_refuses() -> None:
    with pytest.raises(MessagesRefused, match="roles must take turns"):
        tokens(OURS["instruct"], [{"role": "assistant", "content": "a"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
    ],
)
def test_what_a_template_must_not_do_ends_as_a_refusal(source: str) -> None:
    with pytest.raises(MessagesRefused):
        tokens(template(source), [{"role": "user", "content": "a"}])


def test_a_template_writes_no_more_than_it_may() -> None:
    made = template("{% for i in range(10000) %}{{ 'a' * 100 }}{% endfor %}")
    with pytest.raises(MessagesRefused, match="more than 5000 characters"):
        made.render([{"role": "user", "content": "a"}], {}, 5000)


def test_a_role_that_a_template_passes_over_is_refused_by_name() -> None:
    with pytest.raises(MessagesRefused, match="no role tool"):
        tokens(OURS["thinking"], [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}])
    with pytest.raises(MessagesRefused, match="no role system"):
        tokens(OURS["thinking"], [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])


def test_a_developer_is_a_system_where_the_template_knows_no_developer() -> None:
    def spoken(role: str) -> list[int]:
        return tokens(OURS["instruct"], [{"role": role, "content": "be kind"}, {"role": "user", "content": "hello"}])

    assert spoken("developer") == spoken("system")
    assert "developer" in OURS["chatml"].render([{"role": "developer", "content": "a"}], {}, 1000)


def test_an_option_reaches_the_template_as_plain_text() -> None:
    messages = [{"role": "user", "content": "a"}]
    assert OURS["thinking"].render(messages, {"enable_thinking": False}, 1000).endswith("<think>\n\n</think>\n\n")
    made = template("{{ extra }}{{ bos_token }}{{ messages[0].content }}")
    ids = made.encode(made.render(messages, {"extra": "<|im_end|>", "bos_token": "x"}, 1000))
    end, begin = (PLAIN.token_to_id(each) for each in ("<|im_end|>", "<|endoftext|>"))
    assert end not in ids and ids.count(begin) == 1


def test_a_template_is_found_beside_the_tokenizer_or_in_its_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((EMBEDDED / "tokenizer.json").read_bytes())

    def said(config: dict[str, object]) -> str:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return Tokenizer.load(tmp_path).chat.render([{"role": "user", "content": "a"}], {}, 1000)

    with pytest.raises(NoTemplate, match="no chat template"):
        said({})
    assert said({"chat_template": "1{{ messages[0].content }}"}) == "1a"
    named = [{"name": name, "template": f"{name}{{{{ messages[0].content }}}}"} for name in ("tool_use", "default")]
    assert said({"chat_template": named}) == "defaulta"
    (tmp_path / "chat_template.jinja").write_text("2{{ messages[0].content }}")
    assert said({"chat_template": "1{{ messages[0].content }}"}) == "2a"


def test_the_embedded_models_template_is_its_texts_behind_the_begin_token() -> None:
    tokenizer = Tokenizer.load(EMBEDDED)
    messages = [{"role": "system", "content": "import os"}, {"role": "user", "content": "def f(<|endoftext|>"}]
    ids = tokens(tokenizer.chat, messages)
    assert ids == tokenizer.encode("import os\n\ndef f(<|endoftext|>", add_special_tokens=True)
