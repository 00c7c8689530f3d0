"""Settings of the rollout server and of an episode."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from pact_nemo.config.ranges import check_ranges
from pact_nemo.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("bfloat16", "float16", "float32")
ALL_ENGINES = "all"  #: of ``rollout.server.engines``


#: Words of vLLM's command line that change what is sampled, or what its log-probs mean, behind the trainer's back.
_OWN_ARGUMENTS = frozenset(
    {
        "generation-config",
        "override-generation-config",
        "logprobs-mode",
        "hf-overrides",
        "load-format",
        "logits-processors",
        "enable-lora",
        "lora-modules",
        "lora-target-modules",
        "lora-dtype",
        "max-lora-rank",
        "max-loras",
    }
)


@dataclass(frozen=True)
class RolloutServerConfig:
    """How the vLLM server is started, or where one that runs already is found. OmegaConf reads this as a structured
    config.
    """

    #: attach to the server at this address (``http://host:port``; several: a,b,c) instead of starting one
    #: (tools/serve.py)
    url: str | None = None
    #: with ``url``: variable that holds the key; a started server gets a random one where it is unset
    api_key_env: str = "PACT_ROLLOUT_API_KEY"
    #: address that a started server listens on; anything else only within a cluster's own network
    host: str = "127.0.0.1"
    device: str = "auto"  #: "cpu", "cuda", or "auto" = cuda where torch sees a GPU
    dtype: str = "bfloat16"  #: weights and KV cache of the sampler: bfloat16 | float16 | float32
    max_model_len: int = 4096  #: prompt + response, tokens
    max_num_seqs: int = 32  #: sequences decoded together
    #: tokens of one engine step; None = vLLM's default (CPU: at least ``max_model_len``)
    max_num_batched_tokens: int | None = None
    #: share the KV cache of equal prefixes: the K rollouts of a prompt and the turns of an episode
    prefix_caching: bool = True
    enforce_eager: bool | None = None  #: no compiled graphs; None = true on the CPU (starts faster), false on a GPU
    seed: int = 0  #: engine seed; requests carry their own seeds
    cpu_threads: int | None = None  #: CPU only: OpenMP threads; None = every core that this process may use
    cpu_kv_cache_gib: int = 1  #: CPU only: memory of the KV cache, GiB
    cpu_block_size: int = 32  #: CPU only: tokens of a KV block, the grain of prefix sharing; a multiple of 32
    #: CPU only: worker inside the engine process, forked from the front end: half the start-up time
    cpu_single_process: bool = True
    tensor_parallel_size: int = 1  #: GPUs that the model is split over
    #: the server sleeps while the policy trains, and the trainer's memory is on the host while it generates; null =
    #: where a GPU run starts its own server, without ``trainer.overlap``
    time_sharing: bool | None = None
    #: GPU only: share of its memory that the server may take; null = with ``time_sharing`` what the trainer leaves in
    #: the server's turn, by the plan, otherwise 0.85
    gpu_memory_utilization: float | None = None
    #: engines that the job starts: 1 = on its first node; a multiple of its nodes = as many on each; "all" = on each
    #: node as many as its trainer's GPUs take (CPU: one a node). With ``url`` none are started
    engines: str = "1"
    start_timeout_s: float = 600.0  #: from process start to healthy
    stop_timeout_s: float = 10.0  #: from SIGTERM to SIGKILL
    request_timeout_s: float = 600.0  #: deadline of one generation request, queueing included
    refit_timeout_s: float = 600.0  #: deadline of each call of a weight update
    heartbeat_s: float = 5.0  #: while generating, the server's engine is asked for a sign of life this often
    #: without an answer for this long it counts as hung and is restarted; longer than its longest step
    heartbeat_timeout_s: float = 60.0
    max_restarts: int = 3  #: of a server that died or hung, in the whole run; then it is given up
    #: of all servers that has to be left when one is given up; with fewer the run stops
    min_engines_share: float = 0.5
    #: times that a request is sent again when a server that lives gave no usable answer, or none in time
    reissue_limit: int = 2
    #: vLLM's statistics: /metrics (sequences running and waiting, …) and a line in its log now and then
    log_stats: bool = False
    log_mb: int = 64  #: when server.log is larger, it becomes server.log.1 (the one before is deleted) and starts anew
    #: extra tries after a connection error, with growing pauses; a request that was answered is never repeated
    connect_retries: int = 3
    extra_args: list[str] = field(default_factory=list)  #: further words of vLLM's own command line

    def validate(self) -> None:
        """Raises ConfigError for a setting that can't be meant."""
        check_ranges(dataclasses.asdict(self), "rollout.server")
        if self.device not in DEVICES:
            raise ConfigError(f"rollout.server.device is {self.device!r}; one of {', '.join(DEVICES)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"rollout.server.dtype is {self.dtype!r}; one of {', '.join(DTYPES)}")
        if self.cpu_block_size % 32:
            raise ConfigError(f"rollout.server.cpu_block_size is {self.cpu_block_size}; a multiple of 32 is needed")
        if self.engines != ALL_ENGINES and not (self.engines.isdecimal() and int(self.engines) >= 1):
            raise ConfigError(f"rollout.server.engines is {self.engines!r}; a number of 1 or more, or {ALL_ENGINES}")
        self.refuse_secrets()
        self.refuse_other_sampling()
        if self.heartbeat_timeout_s < self.heartbeat_s:
            raise ConfigError("rollout.server.heartbeat_timeout_s is shorter than heartbeat_s")

    def refuse_other_sampling(self) -> None:
        """Raises ConfigError for words of ``extra_args`` that change what the server samples, or what its log-probs
        mean.
        """
        own = next(
            (
                word
                for word in self.extra_args
                if word.lstrip("-").replace("_", "-").partition("=")[0] in _OWN_ARGUMENTS
            ),
            None,
        )
        if own is not None:
            raise ConfigError(
                f"rollout.server.extra_args holds {own.partition('=')[0]}: the trainer sets it, so that the server"
                " samples from the policy that is trained and says its log-probs; take it out (rollout.sampling has"
                " what may be changed)"
            )

    def refuse_secrets(self) -> None:
        """Raises ConfigError for a key in a setting: settings are written into configuration, report and command line.
        It isn't repeated.
        """
        for address in (self.url or "").split(","):
            if "@" in address or "?" in address:
                raise ConfigError(
                    "rollout.server.url holds a name, password or query: it is written into configuration and report."
                    f" Give http://host:port, and the key in the variable {self.api_key_env}"
                )
        secret = next(
            (
                word
                for word in self.extra_args
                if word.lstrip("-").replace("_", "-").startswith(("api-key", "hf-token"))
            ),
            None,
        )
        if secret is not None:
            raise ConfigError(
                f"rollout.server.extra_args holds {secret.partition('=')[0]}: every process of the machine can read a"
                f" command line. Put the key into the variable {self.api_key_env}"
            )


def share_beside(config: RolloutServerConfig) -> float:
    """Share of a GPU's memory that a server is given beside whatever else is there."""
    return config.gpu_memory_utilization if config.gpu_memory_utilization is not None else 0.85


@dataclass(frozen=True)
class EpisodeLimits:
    """What ends an episode early; the rollout is then marked truncated. Token limits count what the server sees at one
    time: where the chat template drops earlier thoughts, those no longer count.

    Attributes:
        max_turns_per_user_turn: assistant turns that may follow one user turn.
        max_turns: assistant turns of the whole episode.
        max_turn_tokens: policy-written tokens of one assistant turn.
        max_response_tokens: tokens after x, observations included.
        max_model_len: tokens of x and what follows it together (the server's own limit).
    """

    max_turns_per_user_turn: int
    max_turns: int
    max_turn_tokens: int
    max_response_tokens: int
    max_model_len: int


@dataclass(frozen=True)
class Sampling:
    """Sampling distribution. ``temperature=0`` is greedy. Rollout log-probs are those of this distribution (see the
    client).
    """

    temperature: float = 1.0
    top_p: float = 1.0
