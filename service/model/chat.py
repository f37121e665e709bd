"""A checkpoint's chat template: messages to token ids, as transformers' `apply_chat_template` renders them.

One difference: control tokens come from the template alone. Before the template is compiled, each control token that stands in
its literals is replaced by a mark, a random word that the tokenizer takes for that token; the texts of callers pass through the
template as they are, and what looks like a control token in what comes out is plain text. A caller's words next to the
template's cannot make one either.

The template is the checkpoint's, so it is foreign code: it runs in Jinja's sandbox, and where time and memory matter in a
process of its own (`service/http/worker.py`).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from service.model.encoding import encoded

Message = Mapping[str, str]
"""`role`, `content`, and where the caller sent them `name` and `tool_call_id`."""

DEFAULT = "default"
"""Of a checkpoint's several templates the one for chat without tools."""

PROBE = "Xq7probe"  # one word, which no template cuts


class NoTemplate(ValueError):
    """The checkpoint has no chat template, or none that can be used. The message says why."""


class MessagesRefused(ValueError):
    """The template does not take these messages. The message says why, at times in the template's own words."""


class ChatTemplate:
    """One template over one tokenizer, whose `core` learns the marks. Not to be used by several threads at once."""

    def __init__(self, source: str, names: Mapping[str, Any], core: tokenizers.Tokenizer) -> None:
        """Compile the template. `names`: what it may ask for beside messages, such as `bos_token`. Raises NoTemplate."""
        self._core = core
        self._controls = {each.content: each for each in core.get_added_tokens_decoder().values() if each.special}
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._controls, key=len, reverse=True))) or r"(?!)")
        self._secret = secrets.token_hex(16)
        self._marks: dict[str, str] = {}
        self._ids: dict[int, int] = {}
        try:
            plain = _environment().from_string(source)
            self._names = {name: self._marked(value) for name, value in names.items()}
            self._template = self._compile(source)
        except (jinja2.TemplateSyntaxError, RecursionError, ValueError) as error:  # constants are computed here
            raise NoTemplate(f"its chat template cannot be read: {error}") from error
        core.add_tokens([self._added(content) for content in self._marks])
        self._ids = {self._id(mark): self._id(content) for content, mark in self._marks.items()}
        self._check(plain, names)
        self._passed_over = frozenset(role for role in PROBES if self._passes_over(role))

    @classmethod
    def load(cls, directory: Path, core: tokenizers.Tokenizer) -> ChatTemplate:
        """From `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`. Raises NoTemplate."""
        config, own = directory / "tokenizer_config.json", directory / "chat_template.jinja"
        settings = dict(json.loads(config.read_text())) if config.is_file() else {}
        source = own.read_text() if own.is_file() else settings.get("chat_template")
        if isinstance(source, list):
            source = {each["name"]: each["template"] for each in source}.get(DEFAULT)
        if not isinstance(source, str):
            raise NoTemplate("its files hold no chat template")
        return cls(source, {name: _content(value) for name, value in settings.items() if name.endswith("_token")}, core)

    def render(self, messages: Sequence[Message], options: Mapping[str, Any], most_characters: int) -> str:
        """The text of a conversation, control tokens as marks, up to where the assistant speaks.

        Raises:
            MessagesRefused: the template raises, or writes more than `most_characters`.
        """
        told = [self._as_taken(each) for each in messages]
        return _rendered(self._template, {**options, **self._names, "messages": told}, most_characters)

    def encode(self, text: str) -> list[int]:
        """Token ids of what `render` gave. Raises TextRefused."""
        ids = encoded(self._core.encode_batch_fast, text, add_special_tokens=False).ids
        return [self._ids.get(each, each) for each in ids]

    def _as_taken(self, message: Message) -> Message:
        """The message under a role that the template shows. Raises MessagesRefused."""
        role = message["role"]
        if role not in self._passed_over:
            return message
        if role == "developer" and "system" not in self._passed_over:
            return {**message, "role": "system"}  # OpenAI's newer word for the same
        raise MessagesRefused(f"this model's chat template knows no role {role}")

    def _compile(self, source: str) -> jinja2.Template:
        """The template with its control tokens marked."""
        environment = _environment()
        tree = environment.parse(source)
        for data in tree.find_all(nodes.TemplateData):
            data.data = self._marked(data.data)
        for const in tree.find_all(nodes.Const):
            const.value = self._marked(const.value)
        return environment.from_string(tree)

    def _marked(self, value: Any) -> Any:
        return self._pattern.sub(self._mark, value) if isinstance(value, str) else value

    def _mark(self, found: re.Match[str]) -> str:
        content = found[0]
        return self._marks.setdefault(content, f"\U000f0001{self._secret}.{len(self._marks)}\U000f0002")

    def _id(self, content: str) -> int:
        found = self._core.token_to_id(content)
        assert found is not None, "an added token has an id"
        return found

    def _added(self, content: str) -> tokenizers.AddedToken:
        """The mark as the tokenizer is to take it: wherever it would take the control token."""
        like = self._controls[content]
        return tokenizers.AddedToken(
            self._marks[content],
            single_word=like.single_word,
            lstrip=like.lstrip,
            rstrip=like.rstrip,
            normalized=like.normalized,
            special=False,
        )

    def _check(self, plain: jinja2.Template, names: Mapping[str, Any]) -> None:
        """Raise NoTemplate where the marks are not all the control tokens that the template writes."""
        for roles in (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("user",)):
            messages = [{"role": role, "content": PROBE} for role in roles]
            try:
                wanted = _rendered(plain, {**names, "messages": messages})
                marked = _rendered(self._template, {**self._names, "messages": messages})
            except MessagesRefused:
                continue
            if self.encode(marked) != self._encoded_with_controls(wanted):
                raise NoTemplate(
                    "its chat template puts control tokens together from parts, which a caller's words could do too"
                )
            return

    def _encoded_with_controls(self, text: str) -> list[int]:
        was = self._core.encode_special_tokens
        self._core.encode_special_tokens = False
        try:
            return list(self._core.encode(text, add_special_tokens=False).ids)
        finally:
            self._core.encode_special_tokens = was

    def _passes_over(self, role: str) -> bool:
        """Whether the template leaves out in silence what this role says, or refuses the role `developer`."""
        try:
            messages = [{"role": each, "content": PROBE if each == role else "a"} for each in PROBES[role]]
            return PROBE not in _rendered(self._template, {**self._names, "messages": messages})
        except MessagesRefused:
            return role == "developer"  # of others the template itself says why


PROBES: Mapping[str, Sequence[str]] = {
    "system": ("system", "user"),
    "developer": ("developer", "user"),
    "tool": ("user", "assistant", "tool"),
}
"""For each role that a template may not know a conversation in which it speaks."""


class _Generation(Extension):
    """`{% generation %}`, by which templates tell trainers what the assistant says: its body as it is."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own way to name them

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Jinja's `namespace`, without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"a template may not set {name}")
        super().__setitem__(name, value)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": _Namespace,
    }
    return made


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **others: Any) -> str:
    """As JSON, without the escapes for HTML of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **others)


def _rendered(template: jinja2.Template, variables: Mapping[str, Any], most_characters: int = 2**20) -> str:
    parts, size = [], 0
    nothing = {"tools": None, "documents": None, "add_generation_prompt": True}
    try:
        for part in template.generate({**nothing, **variables}):
            parts.append(part)
            if (size := size + len(part)) > most_characters:
                raise MessagesRefused(f"the chat template writes more than {most_characters} characters for these messages")
    except TimeoutError:
        raise
    except MessagesRefused:
        raise
    except Exception as error:  # foreign code: whatever it raises, it does not take these messages
        raise MessagesRefused(
            f"the model's chat template does not take these messages: {str(error) or type(error).__name__}"
        ) from error
    return "".join(parts)


def _content(token: Any) -> Any:
    """A special token's text, which older files keep in an object."""
    return token["content"] if isinstance(token, dict) else token
