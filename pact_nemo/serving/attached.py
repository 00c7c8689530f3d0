"""A server that somebody else started: is it fit for this run, and is nothing of another run left in it?"""

from __future__ import annotations

from pathlib import Path

from pact_nemo.checkpoints.adapter_exports import base_digest
from pact_nemo.errors import ConfigError
from pact_nemo.serving.adapters import AdapterRoom
from pact_nemo.serving.admin import ServerAdmin


def take_over(admin: ServerAdmin, model: Path, adapters: AdapterRoom | None) -> None:
    """Have the server hold a model as it came, and no adapter.

    Args:
        admin: of a server that answers.
        model: its folder.
        adapters: that refits will bring; None: they bring whole models.

    Raises:
        ConfigError: the server takes no such adapters, or was started from another model than theirs.
        ServerError: it refused, is late or gone.
    """
    if adapters is not None:
        _refuse_without_room(admin, adapters)
    if admin.loaded_version() is not None:  # another run, or an earlier part of this one, was here
        admin.pause()
        admin.set_weight_version("loading")
        admin.load_weights(model.resolve(), None)
        for name in admin.adapters():
            admin.drop_adapter(name)
        admin.reset_prefix_cache()
        admin.resume()
    if adapters is not None and admin.adapter_facts().base != base_digest(model):
        raise ConfigError(
            f"{admin.endpoint.url} (rollout.server.url) was started from another model than {model}, which the adapters"
            " of this run belong to; start it from this run's model.path"
        )


def _refuse_without_room(admin: ServerAdmin, adapters: AdapterRoom) -> None:
    facts = admin.adapter_facts()
    lacks = adapters.lacks(facts.rank, facts.targets, facts.runtime)
    if lacks:
        raise ConfigError(
            f"{admin.endpoint.url} (rollout.server.url) takes no adapters of policy.lora.rank={adapters.rank}: it was"
            f" started without {', '.join(lacks)}; start it by tools/serve.py with this run's settings, or set"
            " rollout.lora_refit=merged"
        )
