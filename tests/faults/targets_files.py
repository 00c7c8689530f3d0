"""Files that are fuzzed: configuration, manifests, weights, metrics and run folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from pact_nemo.checkpoints import manifest, resume_folders, resume_manifest
from pact_nemo.config import load as config_module
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import to_yaml
from pact_nemo.errors import CheckpointError, ConfigError, DataError
from pact_nemo.report import data as report_data
from pact_nemo.report import page as report_page
from pact_nemo.runtime import tensor_files
from pact_nemo.tracking import jsonl as metrics_module
from tests.faults.target_kit import REMEDY, Target, Unnamed, json_lines, named
from tests.fixtures.run_folders import make_run

ROOT = Path(__file__).resolve().parents[2]


def _make_config(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    path = folder / "c.yaml"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        try:
            config = load_config(path)
        except ConfigError as error:
            if not re.search(r"c\.yaml|[a-z]+\.[a-z_]+", str(error)):
                raise Unnamed(str(error)) from error
            raise
        config.policy.resolved_precision(cuda=False)
        for part in (config.rollout.server, config.optimizer):
            try:
                part.validate()
            except ConfigError:
                pass
        (folder / "again.yaml").write_text(to_yaml(config))
        assert to_yaml(load_config(folder / "again.yaml")) == to_yaml(config)

    small = (ROOT / "conf/pact_bfcl-smollm2_135m-cpu.yaml").read_bytes()
    small = b"".join(
        line for line in small.splitlines(keepends=True) if not line.startswith((b"#", b"defaults", b"  - "))
    )
    plain = (
        b"run:\n  seed: 3\ntrainer:\n  steps: 4\n  batch_size: 8\n  mini_batch_size: 4\noptimizer:\n  betas: [0.9,"
        b" 0.95]\n  lr: 1.0e-6\n"
    )
    flow = (
        b"{rollout: {server: {device: cpu, extra_args: [a]}, importance: off}, policy: {fp8: null}, traces:"
        b" {components: [calls]}}\n"
    )
    return target, [small, plain, flow]


def _make_overrides(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    def target(data: bytes) -> None:
        words = [word for word in data.decode("utf-8", "replace").split("\n") if word]
        config = load_config(None, ["tasks.held_out=2", *words])
        to_yaml(config)

    return target, [
        b"trainer.steps=3\nrun.label=a b",
        b"optimizer.betas=[0.9,0.95]\npolicy.fp8=null",
        b'rollout.server.extra_args=[--x,"y"]\nrollout.server.url=http://127.0.0.1:8000',
        b"objective.schedule.kind=adaptive\nobjective.schedule.anchor_end=0.2",
    ]


def _make_export_manifest(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    base = folder / "v000000"
    base.mkdir()
    (base / "model.safetensors").write_bytes(tensor_files.make_header([("a", "F32", (2,), 8)]) + bytes(8))
    (base / "config.json").write_text("{}")
    manifest.write_manifest(base, 0, {"step": 1})
    path = base / manifest.MANIFEST_NAME

    def target(data: bytes) -> None:
        path.write_bytes(data)
        try:
            manifest.verify_manifest(base)
        except CheckpointError as error:
            if str(base) not in str(error) or not REMEDY.search(str(error)):
                raise Unnamed(str(error)) from error
            raise

    old = {"schema": 1, "version": 0, "extra": {}, "files": {}}
    from pact_nemo.runtime.files import sha256_file

    old["files"] = {
        name: {"size": (base / name).stat().st_size, "sha256": sha256_file(base / name)}
        for name in ("config.json", "model.safetensors")
    }
    return target, [path.read_bytes(), json.dumps(old).encode()]


def _make_checkpoint_manifest(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    base = folder / "step_000001"
    (base / "weights").mkdir(parents=True)
    (base / "state.json").write_text("{}")
    (base / "weights" / "x.distcp").write_bytes(bytes(100))
    resume_manifest.write_manifest(base)
    path = base / resume_manifest.MANIFEST_NAME

    def target(data: bytes) -> None:
        path.write_bytes(data)
        try:
            resume_manifest.verify(base)
        except CheckpointError as error:
            if str(base) not in str(error) or not REMEDY.search(str(error)):
                raise Unnamed(str(error)) from error
            raise
        assert resume_folders.latest_complete(folder) == base

    return target, [path.read_bytes()]


def _make_tensor_files(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    single, index = folder / "model.safetensors", folder / tensor_files.INDEX_NAME

    def target(data: bytes) -> None:
        """The first byte says whether the input is a weight file or an index over one."""
        index.unlink(missing_ok=True)
        (single if data[:1] == b"w" else index).write_bytes(data[1:])
        try:
            tensor_files.read_tensors(folder)
        except CheckpointError as error:
            if str(folder) not in str(error) or not REMEDY.search(str(error)):
                raise Unnamed(str(error)) from error
            raise

    header = tensor_files.make_header([("a.weight", "F32", (2, 3), 24), ("b", "BF16", (4,), 8)])
    return target, [
        b"w" + header + bytes(32),
        b"i" + json.dumps({"weight_map": dict.fromkeys(("a.weight", "b"), "model.safetensors")}).encode(),
    ]


def _make_metrics(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    path = folder / metrics_module.FILE

    def target(data: bytes) -> None:
        path.write_bytes(data)
        try:
            metrics_module.read_metrics(folder)
        except DataError as error:
            named(error, path, line=True)
            raise

    return target, [json_lines({"step": 1, "stage": "rl", "loss/total": 0.5, "x": None}, {"step": 2, "stage": "rl"})]


def _make_report(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    """The first byte chooses the file of a run folder that the input replaces; the page is made from what is left."""
    run = make_run(folder, steps=2, warmup=1, tasks=2, passed=(0, 1, 2))
    names = [path for path in sorted(run.rglob("*")) if path.suffix in (".json", ".jsonl", ".yaml")]
    whole = {path: path.read_bytes() for path in names}

    def target(data: bytes) -> None:
        path = names[data[0] % len(names)] if data else names[0]
        path.write_bytes(data[1:])
        try:
            report_page.render(report_data.load_run(run)).encode("utf-8")
        except DataError:
            raise
        finally:
            path.write_bytes(whole[path])

    return target, [bytes([index]) + data for index, data in enumerate(whole.values())]


def file_targets() -> dict[str, Target]:
    refused = (DataError,)
    return {
        "config": Target(_make_config, (config_module,), (ConfigError,)),
        "overrides": Target(_make_overrides, (config_module,), (ConfigError,)),
        "export-manifest": Target(_make_export_manifest, (manifest,), (CheckpointError,)),
        "checkpoint-manifest": Target(_make_checkpoint_manifest, (resume_manifest, resume_folders), (CheckpointError,)),
        "safetensors": Target(_make_tensor_files, (tensor_files,), (CheckpointError,)),
        "metrics": Target(_make_metrics, (metrics_module,), refused),
        "run-folder": Target(_make_report, (report_data, report_page), refused),
    }
