#!/usr/bin/env bash
# The tests of the native forms with csrc/*.cpp under the Address and UndefinedBehavior sanitizers: fails at the first
# report. The extension is built into build/sanitized; the installed one stays as it is. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${VENV:-.venv}/bin/python
cxx=${CXX:-g++}
folder=build/sanitized
tests=(tests/test_select_hotspots.py tests/test_glu_score.py tests/test_sparse_columns.py tests/test_column_grad_norm.py)

existing=()
for file in "${tests[@]}"; do
    if [[ -e $file ]]; then existing+=("$file"); fi
done

flags="-fsanitize=address,undefined -fno-sanitize-recover=all"
PKE_FAST_CUDA=0 CXX=$cxx CXXFLAGS="$flags -O1 -g -fno-omit-frame-pointer" LDFLAGS=$flags "$python" setup.py --quiet \
    build_ext --build-temp "$folder/objects" --build-lib "$folder"

# Python itself is not built with the sanitizers, so their libraries come before everything else; with libstdc++, since
# exceptions are watched too. Leaks are not looked for: Python keeps much until the end. -s: a report must be seen.
preload="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libubsan.so)"
preload+=" $("$cxx" -print-file-name=libstdc++.so)"
LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
    "$python" -m pytest -q -s -m "not slow and not gpu" --extension "$folder" "${existing[@]}" "$@"
