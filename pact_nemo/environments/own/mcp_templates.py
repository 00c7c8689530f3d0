"""``{workdir}``, ``{rollout}`` and ``{task[KEY]}`` in the texts of ``agent.mcp``."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_nemo.environments.own.settings import MCPConfig
from pact_nemo.errors import ConfigError, EnvironmentFailure

_NAME = r"[A-Za-z_]\w*(?:\[[^\[\]{}]*\])*"
_PLACEHOLDER = re.compile(r"\{\{(?P<literal>" + _NAME + r")\}\}|\{(?P<name>" + _NAME + r")\}")
_KEY = re.compile(r"\[([^\[\]{}]*)\]")
#: of the trainer's environment, what a server gets beyond PATH and HOME; no tokens
_INHERITED = ("TMPDIR", "TZ", "LANG", "LC_ALL")


@dataclass(frozen=True)
class Rollout:
    """What the placeholders of one rollout stand for."""

    number: int
    folder: str
    task: Mapping[str, Any] | None = None


class Template:
    """A text with placeholders. ``{{name}}`` is the text ``{name}``; braces around anything but a name stay.

    Args:
        text: as it stands in the configuration.
        where: its key, for messages, e.g. ``agent.mcp.env.ROOT``.

    Attributes:
        needs: of ``workdir``, ``rollout`` and ``task``, what it has.

    Raises:
        ConfigError: there is no such placeholder; names it.
    """

    def __init__(self, text: str, where: str):
        self._text, self._where = text, where
        names = [found["name"] for found in _PLACEHOLDER.finditer(text) if found["name"]]
        for name in names:
            keys = _KEY.findall(name)
            if name not in ("workdir", "rollout") and not (name.startswith("task[") and all(keys)):
                raise ConfigError(
                    f"{where}: {{{name}}} is no placeholder; there are {{workdir}}, {{rollout}} and {{task[KEY]}}, e.g."
                    f" {{task[info][repository]}}. Write {{{{{name}}}}} for the text {{{name}}}"
                )
        self.needs = frozenset(name.partition("[")[0] for name in names)

    def fill(self, rollout: Rollout) -> str:
        """The text of a rollout.

        Raises:
            EnvironmentFailure: its task has no such value; says what it has.
        """
        return _PLACEHOLDER.sub(
            lambda found: f"{{{found['literal']}}}" if found["literal"] else self._value(found["name"], rollout),
            self._text,
        )

    def _value(self, name: str, rollout: Rollout) -> str:
        if name == "workdir":
            return rollout.folder
        if name == "rollout":
            return str(rollout.number)
        value: Any = rollout.task
        for key in _KEY.findall(name):
            if isinstance(value, Mapping) and key in value:
                value = value[key]
            elif isinstance(value, list | tuple) and key.isdigit() and int(key) < len(value):
                value = value[int(key)]
            else:
                there = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
                raise EnvironmentFailure(f"{self._where}: the task has no {{{name}}}; at [{key}] there is: {there}")
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Launch:
    """How a server is started."""

    command: list[str]
    env: dict[str, str]
    cwd: str


class LaunchPlan:
    """``command``, ``env`` and ``cwd`` of an MCP server.

    Attributes:
        name: of the server, for messages.
        needs_task: a server can only be started for a task that is known.

    Raises:
        ConfigError: a placeholder is unknown or can't be there, or the program isn't found.
    """

    def __init__(self, config: MCPConfig):
        if not config.command:
            raise ConfigError("agent.mcp.command is empty; give the program and its arguments")
        self._path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        self._command = [Template(part, f"agent.mcp.command[{at}]") for at, part in enumerate(config.command)]
        self._env = {key: Template(value, f"agent.mcp.env.{key}") for key, value in config.env.items()}
        self._cwd = Template("{workdir}" if config.cwd is None else config.cwd, "agent.mcp.cwd")
        self.name = " ".join(config.command)[:80]
        needs = frozenset().union(*(part.needs for part in (*self._command, *self._env.values(), self._cwd)))
        self.needs_task = "task" in needs
        odd = sorted(needs - {"workdir"})
        if config.shared and odd:
            raise ConfigError(
                f"agent.mcp.shared=true: one server for all rollouts can't have {{{odd[0]}}} in its command, env or"
                " cwd; take it out, or set agent.mcp.shared=false"
            )
        self._check_places(config)

    def _check_places(self, config: MCPConfig) -> None:
        """What can be known to be missing before anything is started."""
        program, path = config.command[0], config.env.get("PATH", self._path)
        if os.sep not in program and not self._command[0].needs and shutil.which(program, path=path) is None:
            raise ConfigError(
                f"agent.mcp.command: the program {program!r} isn't found in {path}; install it there, give its path, or"
                " set agent.mcp.env.PATH"
            )
        if config.cwd is not None and not self._cwd.needs and not os.path.isdir(config.cwd):
            raise ConfigError(f"agent.mcp.cwd={config.cwd!r}: there is no such folder")
        if self._cwd.needs or not os.path.samefile(config.cwd or "", "."):
            for part in config.command:
                if os.sep not in part[:1] and os.path.isfile(part) and (os.sep in part or os.path.splitext(part)[1]):
                    raise ConfigError(
                        f"agent.mcp.command: {part!r} is a file of the trainer's folder, and the server runs in"
                        f" {config.cwd or '{workdir}'}; give its whole path, {os.path.abspath(part)}, or"
                        " agent.mcp.cwd"
                    )

    def launch(self, rollout: Rollout) -> Launch:
        """How the server of a rollout is started.

        Raises:
            EnvironmentFailure: the task lacks a value that is asked for.
        """
        inherited = {key: os.environ[key] for key in _INHERITED if key in os.environ}
        own = {key: value.fill(rollout) for key, value in self._env.items()}
        return Launch(
            command=[part.fill(rollout) for part in self._command],
            env={"LANG": "C.UTF-8", **inherited, "PATH": self._path, **own},
            cwd=self._cwd.fill(rollout),
        )
