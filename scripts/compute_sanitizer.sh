#!/usr/bin/env bash
# The GPU tests of select_hotspots under compute-sanitizer: memcheck finds addresses out of bounds, racecheck races in
# shared memory. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${VENV:-.venv}/bin/python
if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not on PATH (it comes with the CUDA toolkit): the kernels were NOT checked with it" >&2
    exit 0
fi
for check in memcheck racecheck; do
    echo "compute-sanitizer: $check"
    # Without PyTorch's cache every tensor is an allocation of its own, whose end the tool can see. PyTorch tries calls
    # that may fail and deals with their errors itself, so errors of calls are not reported.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$check" --report-api-errors no --error-exitcode 1 \
        "$python" -m pytest -q -m gpu tests/test_select_hotspots_cuda.py -k "strides or another_stream or 1000" "$@"
done
