"""Small tools, calls of them, and those calls as each tool format writes them."""

from __future__ import annotations

from typing import Any

from pact_nemo.chat.tool_formats import TOOL_FORMATS
from pact_nemo.environments.base import ToolCall

NAMES = ("pythonic", "hermes", "llama3_json")


def tool(name: str, *arguments: str, required: tuple[str, ...] = ()) -> dict[str, Any]:
    properties = {key: {"type": "integer"} for key in arguments}
    return {
        "name": name,
        "description": "",
        "parameters": {"type": "object", "properties": properties, "required": list(required)},
    }


TOOLS = [tool("f", "a", required=("a",)), tool("g"), tool("write", "text")]
F, G = ToolCall("f", {"a": 1}), ToolCall("g", {})


def written(name: str, *calls: ToolCall) -> str:
    return TOOL_FORMATS[name].render_calls(calls)
