#!/usr/bin/env bash
# Builds r1fast on a bare GPU machine, runs the GPU tests, measures the rollout engine, the training step and
# the loss against their peers.
#
#   benchmarks/gpu.sh             9 minutes at most; writes gpu.json, gpu_rollout.json, gpu_step.json and the logs to ${OUT:-.}
#   benchmarks/gpu.sh --dry-run   the same steps on the CPU at toy shapes, no build and no GPU tests
#   PARTS="step bench"            only some of: tests rollout step bench
#
# The machine has torch, triton, transformers, pybind11, cmake, ninja and pytest, and no network.
# Peers, and hypothesis for the tests, are installed from benchmarks/wheels/*.whl where present:
#   pip download --no-deps -d benchmarks/wheels hypothesis sortedcontainers liger-kernel trl cut-cross-entropy
# Where there is no git, COMMIT=abc1234 says which code it is. Afterwards, where the project lives:
#   python benchmarks/common.py gpu.json gpu_rollout.json gpu_step.json
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=$(realpath "${OUT:-.}")
BUDGET=${BUDGET:-540}
PARTS=" ${PARTS:-tests rollout step bench} "
DRY_RUN=
if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1; fi
mkdir -p "$OUT"

if [[ -z $DRY_RUN ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device that torch can use: nothing was measured; --dry-run tries the steps on the CPU" >&2
    exit 1
fi

notes=()
# part SECONDS LOG COMMAND...: run it within its seconds and what is left of the budget
part() {
    local seconds=$1 log=$2 left=$((BUDGET - SECONDS)) status
    shift 2
    if ((left < 5)); then
        notes+=("$log: no time left, skipped")
        return 1
    fi
    if ((seconds > left)); then seconds=$left; fi
    echo "== $log (at most $seconds s, $SECONDS s so far)"
    timeout -k 5 "$seconds" "$@" >"$OUT/$log.log" 2>&1
    status=$?
    case $status in
        0) ;;
        124 | 137) notes+=("$log: stopped after $seconds s") ;;
        *) notes+=("$log: exit status $status, $(tail -n 1 "$OUT/$log.log")") ;;
    esac
    return $status
}

shopt -s nullglob
wheels=(benchmarks/wheels/*.whl)
bench=("$PYTHON" benchmarks/bench_loss.py --no-append --json "$OUT/gpu.json")
rollout=("$PYTHON" benchmarks/rollout_gpu.py --no-append --json "$OUT/gpu_rollout.json")
step=("$PYTHON" benchmarks/step_gpu.py --no-append --json "$OUT/gpu_step.json")
wants() { [[ $PARTS == *" $1 "* ]]; }
if [[ -n $DRY_RUN ]]; then
    bench+=(--device cpu --shapes "64,32,500" "48,16,300" --dtypes bf16 --rounds 2 --skip memory)
    rollout+=(--device cpu --shapes toy --prompts 2 --group 4 --prompt-tokens 48 --new-tokens 24)
    rollout+=(--short-tokens 12 --generate-tokens 12)
    step+=(--device cpu --shapes toy --prompts 2 --group 4 --prompt-tokens 24 --new-tokens 16)
    step+=(--mean 7 --step-tokens 8 --pack 256 --variants r1fast "plain PyTorch")
    wants bench && part "$BUDGET" bench "${bench[@]}"
    wants rollout && part "$BUDGET" rollout "${rollout[@]}"
    wants step && part "$BUDGET" step "${step[@]}"
else
    if ((${#wheels[@]})); then
        part 40 wheels "$PYTHON" -m pip install -q --no-deps --no-index "${wheels[@]}"
    else
        notes+=("no benchmarks/wheels: peers that are not installed already are skipped")
    fi
    if ! part 120 build "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e .; then
        part 120 build_in_place "$PYTHON" setup.py build_ext --inplace
        export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
    fi
    if ! wants tests; then
        :
    elif "$PYTHON" -c 'import hypothesis, pytest' 2>"$OUT/tests.log"; then
        part 150 tests "$PYTHON" -P -m pytest -q -m gpu --continue-on-collection-errors tests
        tail -n 3 "$OUT/tests.log"
    else
        notes+=("GPU tests: $(tail -n 1 "$OUT/tests.log"); add the wheel to benchmarks/wheels")
    fi
    # what is left is shared by the parts that are wanted
    waiting=$(grep -ow 'rollout\|step\|bench' <<<"$PARTS" | wc -l)
    for name in rollout step bench; do
        wants $name || continue
        left=$(((BUDGET - SECONDS - 15) / waiting))
        declare -n words=$name
        share=8
        if [[ $name == bench ]]; then share=6; fi
        part "$left" $name "${words[@]}" --budget $((left * share / 10))
        waiting=$((waiting - 1))
    done
fi

grep -hs '^skipped' "$OUT/bench.log" "$OUT/step.log"
if ((${#notes[@]})); then printf 'note: %s\n' "${notes[@]}"; fi
echo "took $SECONDS s"
for name in rollout step; do
    if wants $name; then sed -n '/^bars/,$p' "$OUT/$name.log"; fi
done
if wants bench && [[ ! -s $OUT/gpu.json ]]; then
    echo "no measurement was finished, see $OUT/bench.log" >&2
    exit 1
fi
if wants bench; then "$PYTHON" benchmarks/bench_loss.py --summary "$OUT/gpu.json"; fi
