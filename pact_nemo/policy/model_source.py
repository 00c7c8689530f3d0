"""Where a model's weights are and where its description is: one Hugging Face folder, or a Megatron-Bridge checkpoint
with a folder that describes it. Imports no megatron and reads no weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pact_nemo.errors import ConfigError

RUN_CONFIG = "run_config.yaml"  #: what tells a save of Megatron-Bridge from one of Megatron-LM
TRACKER = "latest_checkpointed_iteration.txt"  #: in the folder of saves: the newest one's number
TOKENIZER = "tokenizer"  #: folder of a save; in ours, it holds ``config.json`` as well
_SAVE = re.compile(r"iter_(\d+)")


@dataclass(frozen=True)
class ModelSource:
    """A model to start from.

    Attributes:
        described: Hugging Face folder with ``config.json``, tokenizer and chat template.
        checkpoint: one save of Megatron-Bridge, ``…/iter_0000000``, that has the weights; None: ``described`` has them.
    """

    described: Path
    checkpoint: Path | None = None


def model_source(path: str | Path, hf_config: str | Path | None = None) -> ModelSource:
    """What ``model.path`` and ``model.hf_config`` name.

    Args:
        path: a Hugging Face folder, a folder of Megatron-Bridge's saves, or one of them. Anything else passes as a
            Hugging Face folder, for its reader to refuse.
        hf_config: folder of the same model, whose weights are not read.

    Raises:
        ConfigError: a checkpoint that nothing describes, a folder that is of both kinds, a newest save that is absent,
            or an ``hf_config`` that nothing needs.
    """
    base = Path(path)
    save = newest_save(base)
    if save is None:
        if hf_config is not None:
            from pact_nemo.policy.other_formats import how_to_convert

            what = how_to_convert(base)
            raise ConfigError(
                f"model.hf_config={hf_config} describes a Megatron-Bridge checkpoint, and model.path={path} is none"
                f" (iter_*/{RUN_CONFIG}); leave it out{f': {what}' if what else ''}"
            )
        return ModelSource(base)
    strange = next((place / "config.json" for place in (base, save) if (place / "config.json").is_file()), None)
    if strange is not None:
        raise ConfigError(
            f"model.path={path} is a Megatron-Bridge checkpoint, and {strange} says that it is a Hugging Face folder;"
            " give the folder of one of them"
        )
    if hf_config is not None:
        return ModelSource(Path(hf_config), save)
    if (save / TOKENIZER / "config.json").is_file():
        return ModelSource(save / TOKENIZER, save)
    raise ConfigError(
        f"{save} is a Megatron-Bridge checkpoint, which holds no config.json and no chat template; set"
        " model.hf_config to a Hugging Face folder of the same model: its weights are not read"
    )


def newest_save(base: Path) -> Path | None:
    """The save that a path names: itself, or the newest one in it. None where it is no Megatron-Bridge checkpoint.

    Raises:
        ConfigError: the newest one, by the file that says so, is absent or is none of Megatron-Bridge's.
    """
    if (base / RUN_CONFIG).is_file() and (base / "metadata.json").is_file():
        return base
    found = {
        int(match.group(1)): place
        for place in (base.iterdir() if base.is_dir() else ())
        if (match := _SAVE.fullmatch(place.name)) and place.is_dir()
    }
    if not any((place / RUN_CONFIG).is_file() for place in found.values()):
        return None
    newest = max(found)
    if (base / TRACKER).is_file():
        said = (base / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
        if not said.isdecimal() or int(said) not in found:
            raise ConfigError(
                f"{base / TRACKER} says {said[:40]!r}, and there is no such iter_*; give model.path the save itself:"
                f" {found[newest]}"
            )
        newest = int(said)
    if not (found[newest] / RUN_CONFIG).is_file():
        raise ConfigError(f"{found[newest]} has no {RUN_CONFIG}: it is no whole save; give model.path another iter_*")
    return found[newest]
