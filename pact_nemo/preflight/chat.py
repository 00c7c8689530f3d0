"""Template and tokenizer of the model that a config names."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checkpoints.embedded import FOLDER_NAME, convert_gguf, find_embedded_gguf
from pact_nemo.config.schema import Config
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.policy.model_source import model_source


def chat_format(config: Config, source: Path) -> ChatFormat:
    """Template and tokenizer of the model folder ``source``, with the settings of ``model``."""
    settings = config.model
    chat = ChatFormat.from_pretrained(source, settings.tool_format, settings.template_kwargs, settings.earlier_thoughts)
    if config.traces.control == "none":
        chat.boundary_after_nothing_ids()  # raises where the template can't have it
    if (closing := config.traces.closing) is not None:
        if chat.thought is not None:
            raise ConfigError(
                f"traces.closing={closing!r}: {source} thinks before each message, and no trace tells what it thinks"
                " before this one; leave traces.closing out"
            )
        try:
            chat.check_assistant(chat.encode_assistant(closing)[0])
        except DataError as error:
            raise ConfigError(f"traces.closing={closing!r}: {error}; give plain words") from error
    return chat


def chat_of(config: Config) -> ChatFormat | None:
    """Template and tokenizer of the model that a config names, the embedded one included; None for a recipe without
    ``model.path``.

    Raises:
        ConfigError: the folder has no usable template or tokenizer.
    """
    if config.model.path is not None:
        return chat_format(config, model_source(config.model.path, config.model.hf_config).described)
    return None if config.model.recipe is not None else _embedded_chat_format(config)


def _embedded_chat_format(config: Config) -> ChatFormat:
    cached = Path(config.run.cache_dir) / FOLDER_NAME
    if cached.exists():  # from a run before this one
        return chat_format(config, cached)
    with tempfile.TemporaryDirectory(prefix="pact-") as folder:
        convert_gguf(find_embedded_gguf(), Path(folder), weights=False)
        return chat_format(config, Path(folder))
