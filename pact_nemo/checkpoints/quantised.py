"""A copy of a Hugging Face folder in another dtype: what a rollout server starts from, so that refits bring tensors of
the same names.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from blake3 import blake3

from pact_nemo.checkpoints.adapter_exports import BASE_KEY
from pact_nemo.checkpoints.manifest import verify_manifest, write_manifest
from pact_nemo.errors import CheckpointError
from pact_nemo.policy.export.hf_folder import write_folder_alone
from pact_nemo.policy.model_folder import ModelFolder, WeightReader, check_model_folder
from pact_nemo.runtime import machine
from pact_nemo.runtime.files import new_directory
from pact_nemo.runtime.tensor_files import quick_digest

log = logging.getLogger(__name__)


def materialise(source: str | Path, cache_dir: str | Path, dtype: str) -> Path:
    """The folder under ``cache_dir`` that holds ``source`` in ``dtype``; converted tensor by tensor on the first call,
    verified and reused afterwards. A torn one is replaced; a changed source gets a new one.

    Args:
        dtype: one of ``export_layout.EXPORT_DTYPES``.

    Raises:
        CheckpointError: ``source`` holds other tensors than those of its model.
        ConfigError: ``source`` is no model that is supported, or ``cache_dir`` can't be written.
    """
    base = Path(source).resolve()
    model = check_model_folder(base)
    files = sorted({entry.file for entry in (*model.entries.values(), *model.scales.values())})
    state = [(name, (base / name).stat().st_size, (base / name).stat().st_mtime_ns) for name in ("config.json", *files)]
    folder = Path(cache_dir) / f"{base.name}-{dtype}-{blake3(repr((str(base), state)).encode()).hexdigest()[:12]}"
    if folder.exists():
        try:
            if BASE_KEY in verify_manifest(folder).extra:
                return folder
            raise CheckpointError(f"{folder} does not say what it is a copy of; an older version made it")
        except CheckpointError as error:
            log.warning("the %s copy is made again: %s", dtype, error)
            shutil.rmtree(folder)
    machine.check_writable(cache_dir, "run.cache_dir")
    try:
        with new_directory(folder) as temporary:
            known = write_folder_alone(_read(model), base, temporary, dtype, model.shapes)
            facts = {"source": base.name, "dtype": dtype, BASE_KEY: quick_digest(base, model.entries)}
            write_manifest(temporary, 0, facts, known=known)
    except OSError:
        if not folder.exists():  # unless another process finished the same copy first
            raise
        verify_manifest(folder)
    return folder


def _read(model: ModelFolder) -> Iterator[tuple[str, torch.Tensor]]:
    with WeightReader(model) as reader:
        for name in model.entries:
            yield name, reader.read(name)
