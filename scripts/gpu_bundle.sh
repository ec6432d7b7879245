#!/usr/bin/env bash
# A folder that runs benchmarks/gpu_acceptance.py on a machine with a GPU, nvcc, Python and torch, and without a network:
#   bash scripts/gpu_bundle.sh OUT [PYTHON_VERSION ...]    default: 3.12, and the version of this python
#   on the machine:  bash OUT/run.sh [ARGUMENTS OF gpu_acceptance.py]
# It holds the sources as they are committed, less the demo model, which the step `build` compiles for that GPU, and the
# wheels that a machine with torch alone lacks. OUT must not be there; it has to stay below 64 MiB (EMOE_BUNDLE_MIB).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-}
[[ -n $out ]] || { echo "usage: $0 OUT [PYTHON_VERSION ...]" >&2; exit 2; }
[[ ! -e $out ]] || { echo "gpu_bundle.sh: $out is there already" >&2; exit 2; }
shift
python=${PYTHON:-python3}
versions=("$@")
[[ ${#versions[@]} -gt 0 ]] || versions=(3.12 "$($python -c 'import sys; print("%d.%d" % sys.version_info[:2])')")
limit=${EMOE_BUNDLE_MIB:-64}
packages=(transformers tokenizers safetensors huggingface-hub regex pyyaml tqdm psutil gguf rich pytest hypothesis
  accelerate pybind11 ninja cmake setuptools wheel)

work=$(mktemp -d "$(dirname "$out")/.gpu-bundle-XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/emoe" "$work/wheels"
git archive HEAD -- . ':!emoe/demo/*.safetensors' | tar -x -C "$work/emoe"
for version in "${versions[@]}"; do
  # What these need and torch's own installation has (numpy, sympy, ...) stays out: the list is --no-deps.
  "$python" -m pip download --quiet --no-deps --dest "$work/wheels" --python-version "$version" --only-binary=:all: \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
    -c constraints.txt "${packages[@]}"
done
cat >"$work/run.sh" <<'RUN'
#!/usr/bin/env bash
# Makes an environment beside this script that sees the machine's torch, and runs the acceptance in it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"'
command -v nvcc >/dev/null || export PATH="${CUDA_HOME:-/usr/local/cuda}/bin:$PATH"
command -v nvcc >/dev/null || { echo "run.sh: no nvcc on PATH or in CUDA_HOME; the kernels are compiled here" >&2; exit 2; }
if [[ ! -x $here/env/bin/python ]]; then
  "$python" -m venv --system-site-packages "$here/env"
  "$here/env/bin/python" -m pip install --quiet --no-index --no-deps --find-links "$here/wheels" \
    $(sed 's/$/ /' "$here/packages.txt" | tr -d '\n')
fi
cd "$here/emoe"
exec env PATH="$here/env/bin:$PATH" "$here/env/bin/python" benchmarks/gpu_acceptance.py --json "$here/report.json" "$@"
RUN
printf '%s\n' "${packages[@]}" >"$work/packages.txt"
size=$(du -sm "$work" | cut -f1)
if ((size >= limit)); then
  du -m "$work"/wheels/* "$work/emoe" | sort -rn | sed -n 1,8p >&2
  echo "gpu_bundle.sh: the folder has $size MiB, and $limit are allowed" >&2
  exit 1
fi
chmod 755 "$work"
mv "$work" "$out"
trap - EXIT
echo "$out: $size MiB for Python ${versions[*]}; bash $out/run.sh"
