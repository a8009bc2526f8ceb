#!/usr/bin/env bash
# Measures the CPU cells of docs/speed.md's table, on a machine that does
# nothing else: on 2 cores batch 64 takes 34 to 48 minutes, batch 256 takes 68,
# large images 50. Needs this repository, PyTorch, JAX and Flax with Optax, and up
# to 9 GB of memory at batch 64, 14 for large images; SemCKD of those was killed
# on a machine of 23.
#
#   benchmarks/cpu.sh            all files, one after the other
#   benchmarks/cpu.sh students   one of them
#
# Each file is written after every work, to OUT (runs/benchmarks/cpu); started
# again, of the same commit and on the same hardware, it goes on with the cells
# that are missing. PYTHON chooses the interpreter. The document takes what is
# kept:
#
#   cp runs/benchmarks/cpu/*.json results/benchmarks/
#   python -m benchmarks.speed_table
set -euo pipefail

# A step takes and returns hundreds of megabytes: pages of 2 MiB instead of 4 KiB
# save tens of thousands of page faults. XLA's scheduler for many threads is of no
# use where each core is a device.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
export XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false

cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-runs/benchmarks/cpu}
main=resnet32x4:resnet8x4
others=(resnet32x4:vgg8 resnet32x4:ShuffleV2_1_5)
methods=(simkd none kd crd semckd)

# Starts benchmarks.step; $1 names the file, the rest are its arguments.
step() {
  local name=$1
  shift
  "$python" -m benchmarks.step --dtype float32 --by_turns \
    --out "$out/cpu_$name.json" "$@"
}

# Batch 64 by five turns of two steps, batch 256 by three turns of one step,
# large images by two, one process at a time: all at once would take the memory
# of all.
measure() {
  case $1 in
    main) step main --pairs "$main" --batch 64 --methods "${methods[@]}" \
      --steps 2 ;;
    methods) step methods --pairs "$main" --batch 64 --sides jax --steps 2 \
      --methods others ;;
    students) step students --pairs "${others[@]}" --batch 64 --steps 2 \
      --methods "${methods[@]}" ;;
    main_256) step main_256 --pairs "$main" --batch 256 --steps 1 --turns 3 \
      --methods "${methods[@]}" ;;
    students_256) step students_256 --pairs "${others[@]}" --batch 256 \
      --steps 1 --turns 3 --methods "${methods[@]}" ;;
    large) "$python" -m benchmarks.step --dtype float32 --steps 1 --turns 2 \
      --pairs ResNet50:ResNet18 --batch 256 --methods "${methods[@]}" \
      --examples 256 --out "$out/cpu_large.json" ;;
    *)
      echo "expected main, methods, students, main_256, students_256 or large," \
        "got: $1" >&2
      exit 2
      ;;
  esac
}

files=(main methods students main_256 students_256 large)
(($#)) && files=("$@")
for name in "${files[@]}"; do
  measure "$name"
done
