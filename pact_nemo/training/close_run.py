"""What a finished run leaves: the HF export, ``summary.json`` and the report."""

from __future__ import annotations

import logging
import resource
import shutil
import time
from collections import Counter
from typing import Any

from pact_nemo.checkpoints.hf import CHANGE_KEPT, export_adapter_to, export_to
from pact_nemo.checkpoints.manifest import is_current, read_manifest
from pact_nemo.checkpoints.megatron_bridge.writing import export_bridge_to
from pact_nemo.config.schema import BRIDGE
from pact_nemo.planning.from_config import compare_with
from pact_nemo.policy.model_folder import check_model_folder
from pact_nemo.report import write_report
from pact_nemo.runtime.collective import on_rank_zero, rank
from pact_nemo.runtime.files import write_json_atomic
from pact_nemo.runtime.plugins import short_name
from pact_nemo.runtime.versions import versions
from pact_nemo.tracking.jsonl import read_metrics
from pact_nemo.training.run import TrainingRun

log = logging.getLogger(__name__)

MOST_OF_THE_CHANGE = 0.9  #: share of the adapters' change below which their merged weights are warned of


def sum_counters(records: list[dict[str, Any]], prefix: str) -> dict[str, int]:
    """Sums over all steps of the counters whose names start so, by what follows the slash."""
    found: Counter[str] = Counter()
    for record in records:
        found.update(
            {key.partition("/")[2]: int(value) for key, value in record.items() if key.startswith(prefix) and value}
        )
    return dict(found)


def summarise(run: TrainingRun) -> dict[str, Any]:
    """The content of ``summary.json``; every count is over the whole run, resumed parts included."""
    config = run.config
    records = read_metrics(run.workspace.folder)
    tokens = {key: sum(int(r.get(f"tokens/{key}") or 0) for r in records) for key in ("policy", "trained")}
    return {
        "method": short_name(config.method),
        "label": config.run.label or short_name(config.method),
        "seed": config.run.seed,
        "steps": run.state.step,
        "warmup_steps": run.state.warmup_step,
        "eval": run.state.scores,
        "hf_export": str(run.workspace.hf),
        "adapter_export": str(run.workspace.adapter) if config.policy.lora.rank else None,
        "adapter_change_in_hf": read_manifest(run.workspace.hf).extra.get(CHANGE_KEPT),
        "bridge_export": str(run.workspace.bridge) if BRIDGE in config.export.formats else None,
        "seconds": {name: round(value, 3) for name, value in run.state.seconds.items()},
        "peak_memory_bytes": {
            "trainer": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "server": run.generator.peak_memory_bytes(),
        },
        "tokens": tokens,
        "tasks": {
            "train": len(run.dataset.train),
            "held_out": len(run.dataset.held_out),
            "traces": len(run.dataset.traces),
            "without_trace": run.dataset.without_trace,
            "without_reference_calls": run.dataset.without_reference_calls,
            "dropped": run.dataset.dropped,
        },
        "failed_rollouts": sum_counters(records, "failed/"),
        "server": sum_counters(records, "server/") | sum_counters(records, "rollout/reissued"),
        "tracking_failures": run.recorder.trackers.failures if run.recorder.trackers is not None else {},
        "plan": run.plan,
        "precision": {
            "trainer": "bf16" if run.policy.bf16 else "fp32",  # what auto came to
            "server": config.rollout.server.dtype,
            "export": config.rollout.export_dtype,
        },
        "versions": versions(),
    }


def close_run(run: TrainingRun) -> None:
    """Write the trained policy as an HF folder that transformers and vLLM load as it is, in the other formats that are
    asked for, and its adapters, if it has some, in PEFT format; then the summary and the report.
    """
    space = run.workspace
    with run.progress.phase("export"):
        start = time.perf_counter()
        version, formats = run.state.version, run.config.export.formats
        hf = not on_rank_zero(lambda: is_current(space.hf, version))
        bridge = BRIDGE in formats and not on_rank_zero(lambda: is_current(space.bridge, version))
        if hf or bridge:
            run.sharing.trainer(end=True)
        if hf:
            export_to(run.policy, space.hf, version=version, dtype=run.policy.weight_dtype)
        if bridge:
            export_bridge_to(run.policy, space.bridge, version=version)
        if run.config.policy.lora.rank and not on_rank_zero(lambda: is_current(space.adapter, version)):
            export_adapter_to(run.policy, space.adapter, version=version)
        run.state.seconds["export"] = time.perf_counter() - start
    if rank() != 0:
        return
    if run.config.rollout.exports_dir is not None:  # nobody looks for leftovers there; a resumed run exports anew
        shutil.rmtree(space.exports, ignore_errors=True)
    summary = summarise(run)
    write_json_atomic(space.summary, summary)
    if run.plan is not None:
        for line in compare_with(run.plan, run.state.seconds, run.state.step, summary["peak_memory_bytes"]):
            run.progress.message(line)
    with run.progress.phase("report"):
        page = write_report(space.folder)
    run.progress.message(f"trained checkpoint (HF format): {space.hf}")
    if run.policy.adapters is not None:
        kept = summary["adapter_change_in_hf"]
        share = f"; of their change, the HF weights have {kept:.1%}" if kept is not None else ""
        run.progress.message(f"its adapters alone (PEFT format): {space.adapter}{share}")
        if kept is not None and kept < MOST_OF_THE_CHANGE:
            log.warning("%s lost what bfloat16 can't show: take the base with %s instead", space.hf, space.adapter)
        if check_model_folder(run.source).quantised:
            log.warning("%s belongs to %s dequantised to the policy's precision, not in FP8", space.adapter, run.source)
    if BRIDGE in run.config.export.formats:
        run.progress.message(f"the same for Megatron-Bridge: {space.bridge}")
    run.progress.message(f"report: {page}")
