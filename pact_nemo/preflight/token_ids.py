"""Token ids of a model folder's tokenizer and settings, against the rows of its embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pact_nemo.errors import ConfigError
from pact_nemo.runtime import strict_json
from pact_nemo.runtime.tensor_files import read_tensors


def check_served_folder(path: Path, tokenizer: Any) -> None:
    """Refuse a folder that a server would start from and answer wrongly: its files contradict each other, or its
    tokenizer is larger than the model. Any architecture will do, for it is served and not trained.

    Raises:
        ConfigError, CheckpointError: the message names the file, or the token.
    """
    read_tensors(path)
    try:
        config = strict_json.loads((path / "config.json").read_text(encoding="utf-8"))
        rows = config["vocab_size"] if "vocab_size" in config else config["text_config"]["vocab_size"]
        check_token_ids(path, tokenizer, int(rows))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path / 'config.json'} says no vocab_size that can be read ({error!r}); copy that folder again"
        ) from error


def check_token_ids(path: Path, tokenizer: Any, rows: int) -> None:
    """Refuse a folder whose tokenizer or settings have token ids that the embedding has no row for. Fewer ids than rows
    are fine (padding).

    Args:
        tokenizer: of that folder.
        rows: of the model's embedding.

    Raises:
        ConfigError: names a token, its id and the rows.
    """
    remedy = (
        "give the model rows for it (resize_token_embeddings, then train them) or take the token out of the tokenizer"
    )
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= rows)
    if beyond:
        index, token = beyond[0]
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise ConfigError(
            f"{path}: the tokenizer has {token!r} as id {index}{more}, the model has {rows} rows (ids 0 to {rows - 1});"
            f" {remedy}"
        )
    for name in ("config.json", "generation_config.json"):
        try:
            settings = strict_json.loads((path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path / name} can't be read ({error}); copy that folder again") from error
        for key, value in settings.items():
            if not key.endswith(("_token_id", "_token_ids")):
                continue
            ids = value if isinstance(value, list) else [value]
            strange = next((item for item in ids if isinstance(item, int) and item >= rows), None)
            if strange is not None:
                shown = f"{path / name}: {key}={json.dumps(value)}"
                raise ConfigError(
                    f"{shown}: the model has {rows} rows (ids 0 to {rows - 1}) and none for {strange}; change that key"
                )
