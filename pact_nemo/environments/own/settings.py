"""Settings of ``environment=own``: the section ``agent``."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from pact_nemo.config.ranges import Ranges
from pact_nemo.environments.spec import EnvironmentConfig
from pact_nemo.errors import ConfigError

ISOLATION = ("process", "thread", "sandbox")
ANSWERS = ("contains", "exact", "f1", "number", "json")
#: the keys of a task's row that have a meaning here; all others go to the user's class only
FIELDS = (
    *("id", "group", "category", "messages", "prompt", "question", "tools", "answer", "expected_calls"),
    *("user_turns", "user_instructions", "info"),
)
ONE_OF_THEM = (
    "give one of them, e.g. agent.tools=shop.py:Shop, or agent.mcp.command=[mcp-server-time,--local-timezone,UTC]"
)
USER_TURNS = ("recorded", "first", "endpoint")


@dataclass
class MCPConfig:
    """An MCP server over stdio.

    In its texts ``{workdir}`` is a new folder of the rollout, ``{rollout}`` its number, and ``{task[KEY]}`` a value of
    the task's row, e.g. ``{task[info][repository]}``.
    """

    command: list[str] = field(default_factory=list)  #: program and arguments; empty: no MCP server
    env: dict[str, str] = field(default_factory=dict)  #: further environment variables
    cwd: str | None = None  #: the server's working folder; None = ``{workdir}``
    timeout: float = 30.0  #: seconds for the start, and for each call
    include: list[str] = field(default_factory=list)  #: only these tools; empty: all
    rename: dict[str, str] = field(default_factory=dict)  #: the server's name of a tool -> the name that the model sees
    #: arguments that the model never sees -> their value; of every tool that has one of that name
    hidden: dict[str, str] = field(default_factory=dict)
    #: one server for all rollouts, for tools without state; False: one a rollout, from a warm pool
    shared: bool = False


@dataclass
class JudgeConfig:
    """A model behind an OpenAI-compatible endpoint that scores episodes which nothing else judges."""

    url: str | None = None  #: base URL of the endpoint, e.g. ``http://127.0.0.1:8000/v1``; None: no such judge
    model: str | None = None  #: the model's name there
    rubric: str | None = None  #: a text file: what a good episode is
    votes: int = 1  #: answers for each episode; their median counts
    key_env: str = "PACT_JUDGE_API_KEY"  #: environment variable that holds the endpoint's key
    timeout: float = 120.0  #: seconds for an answer
    #: a JSONL file of scores, so that no episode is asked about twice; None: this process only
    cache: str | None = None

    def validate(self) -> None:
        """Raises ConfigError for a value out of range, or a part that is missing."""
        if self.url is None:
            _refuse_without_url(self, "judge", ("model", "rubric", "cache"), "agent.judge.url is not")
            return
        _check_endpoint(self, "judge", ("model", "rubric"))


@dataclass
class UserConfig:
    """A model behind an OpenAI-compatible endpoint that plays the user, with ``agent.user_turns=endpoint``.

    It is told its instructions and what both have said, never calls or observations.
    """

    url: str | None = None  #: base URL of the endpoint, e.g. ``http://127.0.0.1:8000/v1``
    model: str | None = None  #: the model's name there
    instructions: str | None = None  #: a text file: what every user is told, before the row's ``user_instructions``
    stop: list[str] = field(
        default_factory=lambda: ["###STOP###"]
    )  #: words of a user by which a conversation is over; the policy doesn't see that message
    #: what the assistant says before the request, for this model alone: chat templates want its words second
    greeting: str = "Hi! How can I help you today?"
    max_turns: int = 10  #: user turns of an episode at most, the request among them; it is judged as it stands then
    temperature: float = 0.0  #: above 0, each rollout's user has a seed of its own
    key_env: str = "PACT_USER_API_KEY"  #: environment variable that holds the endpoint's key
    timeout: float = 120.0  #: seconds for an answer
    #: a JSONL file of replies, so that nothing is asked twice; None: this process only. Temperature 0 only
    cache: str | None = None

    def validate(self, used: bool) -> None:
        """Raises ConfigError for a value out of range, or a part that is missing; ``used``: by ``agent.user_turns``."""
        if not used:
            if self.url is not None:
                raise ConfigError("agent.user.url: is set, and is asked with agent.user_turns=endpoint only; set that")
            _refuse_without_url(self, "user", ("model", "instructions", "cache"), "agent.user_turns is not endpoint")
            return
        if self.url is None:
            raise ConfigError("agent.user_turns=endpoint: agent.user.url is not set; give the endpoint's base URL")
        _check_endpoint(self, "user", ("model",))
        if not self.stop or not all(word.strip() for word in self.stop):
            raise ConfigError(f"agent.user.stop={self.stop}: give a word that ends a conversation, e.g. ['###STOP###']")
        if not self.greeting.strip():
            raise ConfigError("agent.user.greeting: is empty; say how the assistant greets")
        if self.cache is not None and self.temperature > 0:
            raise ConfigError(
                f"agent.user.cache={self.cache}: a user of temperature {self.temperature:g} answers anew each time;"
                " leave the cache out, or set agent.user.temperature=0"
            )


def _refuse_without_url(section: JudgeConfig | UserConfig, name: str, keys: tuple[str, ...], why: str) -> None:
    """Raises ConfigError for a part of an endpoint's settings where nothing is asked."""
    given = next((key for key in keys if getattr(section, key) is not None), None)
    if given is not None:
        raise ConfigError(f"agent.{name}.{given}: is set, and {why}; set that too, or leave this out")


def _check_endpoint(section: JudgeConfig | UserConfig, name: str, needed: tuple[str, ...]) -> None:
    assert section.url is not None  # both sections look at it first
    if not section.url.startswith(("http://", "https://")):
        raise ConfigError(f"agent.{name}.url={section.url!r}: has to begin with http:// or https://")
    for key in needed:
        if getattr(section, key) is None:
            raise ConfigError(f"agent.{name}.{key}: is not set, and agent.{name}.url is")


@dataclass
class OwnConfig(EnvironmentConfig):
    """The user's own agent."""

    ranges: ClassVar[Ranges] = {
        "timeout": "> 0",
        "workers": ">= 1",
        "memory_mb": ">= 1",
        "success_score": "in (0, 1]",
        "mcp.timeout": "> 0",
        "user.max_turns": ">= 1",
        "user.temperature": ">= 0",
        "user.timeout": "> 0",
        "judge.votes": ">= 1",
        "judge.timeout": "> 0",
    }

    #: ``path/to/file.py:Class``, ``module:Class``, or a module of functions (``path/to/file.py``, ``module``)
    tools: str | None = None
    mcp: MCPConfig = field(default_factory=MCPConfig)
    include: list[str] = field(
        default_factory=list
    )  #: only these methods or functions are tools; empty: all public ones
    #: "process": each rollout's object lives in a process of its own; "thread": in the trainer's process, for speed;
    #: "sandbox": in a confined process, for code that nobody vouches for
    isolation: str = "process"
    timeout: float = 30.0  #: seconds that a call, the constructor or ``score()`` may take
    workers: int = 64  #: rollouts that are open at once
    memory_mb: int | None = None  #: address space of a rollout's process beyond what it starts with; None: no limit
    fields: dict[str, str] = field(default_factory=dict)  #: our name of a field of tasks and conversations -> theirs
    system: str | None = None  #: a text file; its words are the system message of tasks that have none
    #: later user messages: "recorded" (the row's), "first" (the first turn only), "endpoint" (``agent.user``)
    user_turns: str = "recorded"
    user: UserConfig = field(default_factory=UserConfig)
    #: how ``answer`` is looked for in the closing message: "contains", "exact", "f1", "number", "json"
    answer: str = "contains"
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    success_score: float = 1.0  #: a score from here on counts as success
    read_only: list[str] = field(default_factory=list)  #: tools that only read: their calls are no reference calls

    @property
    def simulated(self) -> bool:
        """Whether a model plays the user."""
        return self.user_turns == "endpoint"

    def validate(self) -> None:
        """See :class:`~pact_nemo.environments.spec.EnvironmentConfig`."""
        for key, known in (("isolation", ISOLATION), ("answer", ANSWERS), ("user_turns", USER_TURNS)):
            value = getattr(self, key)
            if value not in known:
                raise ConfigError(f"agent.{key}={value!r}: must be one of {', '.join(known)}")
        if self.tools is not None and self.mcp.command:
            raise ConfigError(f"agent.tools and agent.mcp.command: {ONE_OF_THEM}")
        if self.mcp.command and self.isolation == "sandbox":
            raise ConfigError(
                "agent.isolation=sandbox: an MCP server is a program of its own and isn't confined; leave"
                " agent.isolation out, and confine agent.mcp.command yourself, e.g. with bwrap"
            )
        self._refuse_unused()
        odd = sorted(set(self.fields) - set(FIELDS))
        if odd:
            raise ConfigError(f"agent.fields: no field {odd[0]!r} of ours; ours are {', '.join(FIELDS)}")
        self.judge.validate()
        self.user.validate(self.simulated)

    def _refuse_unused(self) -> None:
        """Raises ConfigError for what only the other kind of tools would read."""
        if self.mcp.command:
            key = _changed(self, ("include", "isolation", "timeout", "memory_mb"))
            if key is not None:
                near = f"; a server has agent.mcp.{key}" if hasattr(self.mcp, key) else ""
                raise ConfigError(f"agent.{key}: is read with agent.tools only, and agent.mcp.command is set{near}")
        elif self.tools is not None:
            key = _changed(self.mcp, tuple(one.name for one in fields(MCPConfig)))
            if key is not None:
                raise ConfigError(f"agent.mcp.{key}: is read with agent.mcp.command only, and agent.tools is set")


def _changed(section: OwnConfig | MCPConfig, keys: tuple[str, ...]) -> str | None:
    """The first of some keys that has another value than its default; None where none has."""
    default = type(section)()
    return next((key for key in keys if getattr(section, key) != getattr(default, key)), None)
