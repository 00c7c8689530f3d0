"""One chat template of a model folder with the run's constants: the only place that renders a conversation."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import DebugUndefined, TemplateError, meta, nodes

from pact_nemo.errors import ConfigError, DataError

Message = Mapping[str, Any]

#: what a template may raise: it is a program of its own that sees whatever the conversation holds, and Python may
#: refuse what jinja makes of it
_TEMPLATE_FAILS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    SyntaxError,
    MemoryError,
)
#: what the project itself says to the template or to the tokenizer
_RESERVED = frozenset(
    "messages conversation tools documents add_generation_prompt continue_final_message chat_template tokenize padding"
    " truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs".split()
)
_NOT_GIVEN = re.compile(
    r"\{\{ no such element: dict object\['(\w+)'\] \}\}"
)  # how jinja shows a missing field when it is asked to
#: fields that others give a tool's result, and results here don't have
_OF_RESULTS = {"name": "look_up", "tool_call_id": "a1B2c3D4e"}
TODAY = "strftime_now"  #: the function by which templates write today's date


class ChatTemplate:
    """The template that every piece of a conversation is cut from.

    A folder may hold several named templates. transformers takes ``tool_use`` only where tools are passed, so that a
    prompt would come from one template and what follows it from another. Here one is chosen for good.

    Attributes:
        source: where the template stands, for messages.
        text: the template itself.

    Args:
        tokenizer: the Hugging Face tokenizer that has it.
        kwargs: ``model.template_kwargs``: constants that the template reads, e.g. ``{"enable_thinking": False}``.
            ``strftime_now`` takes the date, as ``YYYY-MM-DD``, that a template which writes today's date shall write.
        tool_use: prefer the template named ``tool_use``.

    Raises:
        ConfigError: no template, several without a usable name, one that can't be parsed, or a constant that it never
            reads.
    """

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any], tool_use: bool):
        self._tokenizer = tokenizer
        name, self.text = _chosen(tokenizer.chat_template, tool_use)
        self.source = _source(str(getattr(tokenizer, "name_or_path", "") or ""), name)
        read = self._variables()
        _check_kwargs(self.source, kwargs, read, tokenizer)
        self._kwargs = dict(kwargs)
        if TODAY in read:
            self._kwargs[TODAY] = _fixed_date(self.source, kwargs.get(TODAY), read)

    def _variables(self) -> set[str]:
        """Names that the template takes from outside."""
        from transformers.utils.chat_template_utils import _compile_jinja_template  # takes seconds

        try:
            environment = _compile_jinja_template(self.text).environment
            tree = environment.parse(self.text)
            read = set(meta.find_undeclared_variables(tree))
        except _TEMPLATE_FAILS as error:
            raise ConfigError(
                f"{self.source} can't be used: {error!r}; repair it or take the template of the published model"
            ) from error
        names = list(tree.find_all(nodes.Name))
        asked = {
            test.node.name
            for test in tree.find_all(nodes.Test)
            if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name)
        }
        internal = {
            name.name for name in names if name.ctx == "store"
        } - asked  # e.g. a variable that only some branches set
        return (read - internal) | ({TODAY} & {name.name for name in names})

    def not_given(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> str | None:
        """A field of a message that the template writes down though messages don't have it, e.g. the tool's name in a
        result: jinja writes nothing there, or ``None`` where the template asks by ``message.get('name')``. None where
        there is none.

        Raises:
            DataError: as :meth:`render`.
        """
        from transformers.utils.chat_template_utils import _compile_jinja_template  # takes seconds

        environment = _compile_jinja_template(self.text).environment.overlay(undefined=DebugUndefined)
        known = {**self._tokenizer.special_tokens_map, **self._kwargs}

        def text(**fields: str) -> str:
            return environment.from_string(self.text).render(
                messages=[{**message, **(fields if message["role"] == "tool" else {})} for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=True,
                **known,
            )

        try:
            plain = text()
        except _TEMPLATE_FAILS as error:
            raise DataError(
                f"{self.source} can't render this conversation: {error!r}; change the conversation or the template"
            ) from error
        if (found := _NOT_GIVEN.search(plain)) is not None:
            return found.group(1)
        for field, value in _OF_RESULTS.items():
            with contextlib.suppress(*_TEMPLATE_FAILS):  # a template may refuse the value; nothing is told by that
                if text(**{field: value}) != plain:
                    return field
        return None

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, generation: bool) -> str:
        """Text of a conversation as the template writes it. ``tools``: OpenAI-style, or None where they aren't passed
        to the template.

        Raises:
            DataError: the template refuses the conversation, or fails on it.
            ConfigError: the template asks for today's date.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=self.text,
                    tools=None if tools is None else list(tools),
                    tokenize=False,
                    add_generation_prompt=generation,
                    **self._kwargs,
                )
            )
        except _TEMPLATE_FAILS as error:
            raise DataError(
                f"{self.source} can't render this conversation: {error!r}; change the conversation or the template"
            ) from error


def _chosen(templates: Any, tool_use: bool) -> tuple[str | None, str]:
    """Name and text of the template to use."""
    if not isinstance(templates, Mapping):
        return None, str(templates)
    for name in ("tool_use", "default") if tool_use else ("default",):
        if name in templates:
            return name, str(templates[name])
    known = ", ".join(sorted(templates))
    raise ConfigError(
        f"the tokenizer has chat templates named {known}, none of them 'default'; name the one to use"
        " chat_template.jinja"
    )


def _source(folder: str, name: str | None) -> str:
    """Where a template stands, as far as the folder shows it."""
    if folder and Path(folder).is_dir():
        files = ["chat_template.jinja"] if name in (None, "default") else [f"additional_chat_templates/{name}.jinja"]
        file = next((file for file in files if (Path(folder) / file).is_file()), "tokenizer_config.json")
        return f"{Path(folder) / file}: the chat template" + (f" {name!r}" if name else "")
    return "the chat template" + (f" {name!r}" if name else "")


def _check_kwargs(source: str, kwargs: Mapping[str, Any], read: set[str], tokenizer: Any) -> None:
    for key in kwargs:
        if key in _RESERVED or key in tokenizer.special_tokens_map:
            raise ConfigError(f"model.template_kwargs.{key}: the project sets it itself; take it out")
        if key not in read:
            known = sorted(
                read - _RESERVED - set(tokenizer.special_tokens_map) - {"raise_exception", "namespace", "range"}
            )
            raise ConfigError(
                f"model.template_kwargs.{key}: {source} never reads it; it reads {', '.join(known) or 'none'}"
            )
        value = kwargs[key]
        if isinstance(value, str) and key != TODAY and _reads_as_other(value):
            raise ConfigError(
                f"model.template_kwargs.{key}={value!r} is a text, which templates take for true whatever it says;"
                " write it without quotes"
            )


def _reads_as_other(text: str) -> bool:
    """Whether a text is how a truth value, a number or nothing is written."""
    word = text.strip().lower()
    if word in ("true", "false", "yes", "no", "on", "off", "null", "none", "~", "nan"):
        return True
    try:
        return str(yaml.safe_load(word)) == word and isinstance(yaml.safe_load(word), int | float)
    except yaml.YAMLError:
        return False


def _fixed_date(source: str, given: Any, read: set[str]) -> Callable[[str], str]:
    """``strftime_now`` of the run: the date of the config, or a refusal. Today's date would make other prompts of a run
    that is resumed tomorrow.
    """
    if given is None:
        others = sorted(name for name in read if "date" in name.lower())

        def refuse(_: str) -> str:
            remedy = f"model.template_kwargs.{others[0]} to the text to write, or " if others else ""
            raise ConfigError(
                f"{source} writes today's date, so prompts would change from day to day; set"
                f" {remedy}model.template_kwargs.{TODAY}=YYYY-MM-DD"
            )

        return refuse
    try:
        date = datetime.date.fromisoformat(str(given))
    except ValueError as error:
        raise ConfigError(
            f"model.template_kwargs.{TODAY}={given}: expected the date to write, as YYYY-MM-DD"
        ) from error
    return lambda form: datetime.datetime(date.year, date.month, date.day).strftime(form)
