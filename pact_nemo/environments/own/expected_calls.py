"""The expected calls of a task's row: read, and checked against what the tools take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pact_nemo.chat.json_calls import call_from
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.own.names import Aliases
from pact_nemo.environments.own.schema_checks import ArgumentError, argument_error, validator_of
from pact_nemo.environments.rows import Row
from pact_nemo.errors import ToolCallError

_KEY = "expected_calls"
_EXPECTED = 'expected a call such as {"name": "lookup", "arguments": {"sku": "A1"}}'


@dataclass(frozen=True)
class ExpectedCalls:
    """Reads ``expected_calls``.

    Attributes:
        aliases: names of tools and arguments as the model sees them.
        closed: a tool takes no arguments but those that its schema names. False: the schema says so where it is so, as
            MCP servers have it.
        any_turn: there may be calls of more user turns than the row tells.
    """

    aliases: Aliases
    closed: bool
    any_turn: bool
    _validators: dict[str, Any] = field(default_factory=dict)

    def read(self, row: Row, turns: int) -> list[list[ToolCall]]:
        """Calls of each user turn by the tools' own names; empty where the row has none.

        Raises:
            DataError: one is no call, or its tool does not take it; names file, row, field and tool.
        """
        if row.values.get(_KEY) is None:
            return []
        given = row.json(_KEY, list)
        if not (given and all(isinstance(item, list) for item in given)):
            return [[self._call(row, item, f"{_KEY}[{index}]") for index, item in enumerate(given)]]
        if len(given) > turns and not self.any_turn:
            raise row.complain(f"calls of {len(given)} user turns, and there are {turns}", _KEY)
        return [
            [self._call(row, item, f"{_KEY}[{turn}][{index}]") for index, item in enumerate(part)]
            for turn, part in enumerate(given)
        ]

    def _call(self, row: Row, item: Any, where: str) -> ToolCall:
        inner = item.get("function", item) if isinstance(item, dict) else item
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise row.complain(_EXPECTED, where)
        try:
            call = call_from(item)
        except ToolCallError as error:
            raise row.complain(f"{error}; {_EXPECTED}", where) from error
        if not self.aliases.knows(call.name):
            known = ", ".join(sorted(self.aliases.own_names))
            raise row.complain(f"the tool {call.name!r} does not exist; there are: {known}", where)
        call = self.aliases.own(call)
        self.check(row, call, f"{where}.arguments")
        return call

    def check(self, row: Row, call: ToolCall, where: str) -> None:
        """Refuse a call, by the tool's own names, that its tool does not take.

        Args:
            where: the field of its arguments.

        Raises:
            DataError: names file, row, field and tool.
        """
        fault = self._fault(call)
        if fault is not None:
            text = f"the tool {call.name!r} does not take this call: {fault.text}"
            raise row.complain(text, f"{where}{fault.place}")

    def _fault(self, call: ToolCall) -> ArgumentError | None:
        """Why a tool does not take a call's arguments, as far as its schema tells."""
        parameters = self.aliases.own_parameters(call.name)
        known = parameters.get("properties") or {}
        if self.closed:
            unknown = next((name for name in call.arguments if name not in known), None)
            if unknown is not None:
                told = f"unknown argument {unknown[:60]!r}; arguments: {', '.join(known) or 'it takes none'}"
                return ArgumentError(f".{unknown[:60]}", told)
        if call.name not in self._validators:
            self._validators[call.name] = validator_of(parameters, f"the tool {call.name!r}")
        validator = self._validators[call.name]
        required = parameters.get("required") or ()
        given = {name: value for name, value in call.arguments.items() if value is not None or name in required}
        fault = argument_error(validator, given, call.name)
        # schemas don't tell where null stands for absence (``hints.inlined``), so a null alone is no fault
        if fault is None or argument_error(validator, _without_null(given), call.name) is None:
            return None
        return fault


def _without_null(value: Any) -> Any:
    """A JSON value without the keys that are null."""
    if isinstance(value, Mapping):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
