"""Chat templates: conversations laid out as the model was trained to see them. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from outrider.errors import InvalidRequest


class ChatTemplate:
    """A model's Jinja template for conversations, run in the sandbox that transformers uses.

    It is a program that comes with the model, so whatever it raises is caught: a model with a
    broken template still serves prompts.
    """

    def __init__(
        self, source: str, names: Mapping[str, str], now: Callable[[], datetime] = datetime.now
    ) -> None:
        """`names` are variables such as `bos_token` that the template may use."""
        self._names = dict(names)
        self._template: jinja2.Template | None = None
        self._fault = ""
        try:
            self._template = _environment(now).from_string(source)
        except jinja2.TemplateError as error:
            self._fault = str(error)

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Lay out a conversation of (role, content). Raises `InvalidRequest`."""
        if self._template is None:
            raise InvalidRequest("chat", f"the model's chat template is broken: {self._fault}")
        chat = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._template.render(
                **self._names,
                messages=chat,
                tools=None,
                documents=None,
                add_generation_prompt=True,
            )
        except Exception as error:  # The template may raise anything that Python can.
            message = f"the model's chat template refuses the conversation: {error}"
            raise InvalidRequest("chat", message) from error


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    environment.globals["namespace"] = _TemplateNamespace
    # The class itself would hand out its attributes.
    environment.globals["dict"] = lambda *items, **more: dict(*items, **more)
    return environment


class _GenerationTag(Extension):
    """Ignores `{% generation %}`, which marks the assistant's tokens for training."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as a set of the instance.

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateNamespace(Namespace):
    """Refuses underscored names, as transformers does: they reach into the interpreter."""

    def __init__(self, /, *items: Any, **more: Any) -> None:
        super().__init__()
        for name, value in dict(*items, **more).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape characters that are special in HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
