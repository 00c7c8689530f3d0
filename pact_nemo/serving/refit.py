"""New policy weights into the running server.

The export is verified before the server hears of it. From the moment the weights may be half old, half new until all of
it has succeeded, the server's version label names no version, so nothing that is sampled in between, or after a
failure, can pass for a rollout of either policy.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pact_nemo.checkpoints.adapter_exports import LM_HEAD, check_fits, is_adapter, is_tied
from pact_nemo.checkpoints.manifest import read_manifest, verify_manifest
from pact_nemo.errors import CheckpointError, ServerError
from pact_nemo.runtime.tensor_files import is_derived, read_tensors
from pact_nemo.serving.adapters import adapter_name
from pact_nemo.serving.admin import ServerAdmin
from pact_nemo.serving.client import RolloutClient


@dataclass(frozen=True)
class RefitReport:
    """Seconds of each part of a refit: verification (hashing), draining running requests, loading, cache reset and
    version check.
    """

    version: int
    bytes: int
    verify_s: float
    pause_s: float
    reload_s: float
    finish_s: float


def refit(
    client: RolloutClient,
    export_dir: str | Path,
    version: int,
    *,
    like: str | Path | None = None,
    elsewhere: bool = False,
) -> RefitReport:
    """:func:`refit_all` for one server."""
    return refit_all([client], export_dir, version, like=like, elsewhere=elsewhere)[0]


def refit_all(
    clients: Sequence[RolloutClient],
    export_dir: str | Path,
    version: int,
    *,
    like: str | Path | None = None,
    elsewhere: bool = False,
) -> list[RefitReport]:
    """Make the clients' servers load ``export_dir``, all at the same time, and expect ``version`` from then on. The
    export is verified once.

    Args:
        clients: their servers are updated, and each one's ``weight_version`` when its own has succeeded.
        export_dir: a folder with a manifest (:mod:`pact_nemo.checkpoints.manifest`), readable by the servers: a whole
            model, or adapters alone (:mod:`pact_nemo.checkpoints.adapter_exports`).
        version: must be the manifest's.
        like: folder that the servers were started from; the export must hold the same tensors (vLLM keeps the old
            value of a tensor that is missing), or adapters of that very base.
        elsewhere: the servers may be on other machines: they check the digests of what they see themselves.

    Raises:
        CheckpointError: the export is torn, of another or an older version than served, or holds other tensors. No
            server was touched.
        ServerError: requests are in flight, or a server refused, is late or gone. What it serves then has no version.
    """
    start = time.perf_counter()
    check_export(clients, export_dir, version, like=like)
    verify_s = time.perf_counter() - start
    with ThreadPoolExecutor(len(clients)) as threads:
        return list(
            threads.map(
                lambda client: load(client, export_dir, version, elsewhere=elsewhere, verify_s=verify_s), clients
            )
        )


def check_export(
    clients: Sequence[RolloutClient], export_dir: str | Path, version: int, *, like: str | Path | None = None
) -> None:
    """Everything that can be known to be wrong before a server is touched; see :func:`refit_all`."""
    folder = Path(export_dir).resolve()
    manifest = verify_manifest(folder, expect_version=version)
    if like is not None:
        (check_fits if is_adapter(manifest) else check_same_tensors)(folder, Path(like))
    for client in clients:
        if version < client.weight_version:
            raise CheckpointError(
                f"{folder} is version {version}, {client.endpoint.url} is at {client.weight_version}: versions only"
                " grow"
            )
    in_flight = sum(client.in_flight for client in clients)
    if in_flight:
        raise ServerError(f"{in_flight} generation requests are in flight; refit between batches")


def load(
    client: RolloutClient, export_dir: str | Path, version: int, *, elsewhere: bool = False, verify_s: float = 0.0
) -> RefitReport:
    """Make one server load an export that :func:`check_export` let pass.

    Raises:
        ServerError: the server refused, is late or gone.
    """
    folder, admin = Path(export_dir).resolve(), client.admin
    marks = [time.perf_counter()]
    admin.pause()
    marks.append(time.perf_counter())
    admin.set_weight_version(f"loading-{version}")
    model = _put(admin, folder, version, verify=elsewhere)
    marks.append(time.perf_counter())
    admin.reset_prefix_cache()
    admin.set_weight_version(version)
    admin.resume()
    admin.check_weight_version(version)
    if admin.loaded_version() != version:
        raise ServerError(
            f"{client.endpoint.url}: its workers hold another weight version than {version}, which they were just given"
        )
    client.weight_version, client.model = version, model
    marks.append(time.perf_counter())
    parts = [after - before for before, after in zip(marks, marks[1:], strict=False)]
    return RefitReport(version, read_manifest(folder).total_bytes, verify_s, *parts)


def _put(admin: ServerAdmin, folder: Path, version: int, *, verify: bool) -> str:
    """Have the export where the server computes with it, and no earlier adapter.

    Returns:
        what requests have to ask for.
    """
    if not is_adapter(read_manifest(folder)):
        admin.load_weights(folder, version, verify=verify)
        return admin.endpoint.model
    name, there = adapter_name(folder, version), admin.adapters()
    if name in there:  # of a load that did not succeed: of its bytes nothing is known
        admin.drop_adapter(name)
    admin.load_adapter(name, folder, version, verify=verify)
    for old in there:
        if old != name:
            admin.drop_adapter(old)
    return name


def check_same_tensors(export: Path, like: Path) -> None:
    """Raises CheckpointError when two HF folders differ in tensor names or shapes (an output matrix tied to the
    embeddings, and buffers that are computed from the configuration, may be absent).
    """
    new, old = (
        {name: entry.shape for name, entry in read_tensors(folder).items() if not is_derived(name)}
        for folder in (export, like)
    )
    optional = {LM_HEAD} if is_tied(export) else set()
    missing = sorted(old.keys() - new.keys() - optional)
    extra = sorted(new.keys() - old.keys() - optional)
    if missing or extra:
        raise CheckpointError(
            f"{export} lacks {len(missing)} tensors of {like} {missing[:3]} and has {len(extra)} others {extra[:3]};"
            " export the same model"
        )
    for name in new.keys() & old.keys():
        if new[name] != old[name]:
            raise CheckpointError(
                f"{export}: {name} has shape {new[name]}, {like} has {old[name]}; export the same model"
            )
