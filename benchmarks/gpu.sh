#!/usr/bin/env bash
# Measures the GPU cells of docs/speed.md's table, in three pieces of at most 8
# minutes and 10 seconds: 24.5 minutes in all. Needs this repository, PyTorch,
# JAX and Flax with Optax; nothing else.
#
#   benchmarks/gpu.sh            all pieces, one after the other
#   benchmarks/gpu.sh 2          one piece
#
# Each piece asks for its cells in the order of what they say; those that its
# time does not reach are "not run". Each writes its JSON after every cell, to
# OUT (runs/benchmarks/gpu), and started again, of the same commit and on the
# same hardware, goes on with the cells that are missing. PYTHON chooses the
# interpreter. SMALL=1 runs the same pieces on tiny networks, in minutes of a
# CPU, to prove them; SECONDS_EACH changes a piece's limit.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-runs/benchmarks/gpu}
limit=${SECONDS_EACH:-490}
small=()
common=(--weights "$out/weights" --seconds)

if [[ -n ${SMALL:-} ]]; then
  main=_tiny_wide:_tiny
  others=(_tiny_wide:_tiny)
  large=_tiny_wide:_tiny
  batch=8 batches=(16) large_batch=8 counts=(1 2)
  small=(--examples 32 --image_size 16 --negatives 16)
  common=("${small[@]}" --workers 0 --steps 1 --turns 1 "${common[@]}")
else
  main=resnet32x4:resnet8x4
  others=(resnet32x4:vgg8 resnet32x4:ShuffleV2_1_5)
  large=ResNet50:ResNet18
  batch=64 batches=(256) large_batch=256 counts=(1 11 71)
fi

# Finds the seconds that are left of the piece's time; $1 is what asks.
find_left() {
  left=$((limit - (SECONDS - began)))
  if ((left <= 0)); then
    echo "$1: not run, the piece's $limit s are over" >&2
    return 1
  fi
}

# Starts benchmarks.step for what is left of the piece's time: $1 names the
# file, the rest are its arguments.
step() {
  local name=$1 left
  shift
  find_left "$name" || return 0
  "$python" -m benchmarks.step "${common[@]}" "$left" \
    --out "$out/$name.json" "$@" || failed=1
}

# Where the time of the main pair's step goes, and for how long no kernel runs.
profile() {
  local left
  find_left profile || return 0
  timeout "$left" "$python" -m benchmarks.profile_step "${small[@]}" \
    --pair "$main" --batch "$batch" --dtype bfloat16 \
    --weights "$out/weights" --out "$out/profile.json" || failed=1
}

# SimKD's step with other parts of it in CUDA graphs: none; cuDNN's convolutions
# as well, which XLA leaves out; and the loop over the epoch's steps too. $1 names
# the file, $2 is XLA's list of kinds, the rest are benchmarks.step's arguments.
graphs() {
  local name=$1 kinds=$2
  shift 2
  XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=$kinds" \
    step "graphs_$name" --pairs "$main" --batch "$batch" --methods simkd \
    --sides jax --dtype bfloat16 "$@"
}

# The main pair at the recipe's batch, all sides.
piece_1() {
  step main --pairs "$main" --batch "$batch" --methods simkd kd none crd semckd
}

# A profile; the step without augmentation; how it grows with the batch and with
# the steps of a dispatch; CUDA graphs; other students; then the other methods
# of all these.
piece_2() {
  profile
  step bare --pairs "$main" --batch "$batch" --methods simkd --sides jax \
    --dtype bfloat16 --no_augment
  step batch --pairs "$main" --batch "${batches[@]}" --methods simkd kd
  step dispatch --pairs "$main" --batch "$batch" --methods simkd --sides jax \
    --dtype bfloat16 --steps_per_dispatch "${counts[@]}"
  graphs none ""
  graphs convolutions +CONVOLUTION
  # The program that once failed (docs/speed.md); then with all of a library's
  # kernels loaded at the start, in case it is loading them that a graph forbids.
  graphs convolutions_bare +CONVOLUTION --no_augment
  CUDA_MODULE_LOADING=EAGER graphs convolutions_eager +CONVOLUTION --no_augment
  graphs loop +CONVOLUTION,+WHILE
  step students --pairs "${others[@]}" --batch "$batch" --methods simkd none
  step students_rest --pairs "${others[@]}" --batch "$batch" \
    --methods kd crd semckd
  step batch_rest --pairs "$main" --batch "${batches[@]}" \
    --methods none crd semckd
  step students_batch --pairs "${others[@]}" --batch "${batches[@]}" \
    --methods simkd none kd crd semckd
}

# Large images; every other method, kd_jax's step alone; then the other methods
# of large images.
piece_3() {
  step large --pairs "$large" --batch "$large_batch" --steps 20 --turns 3 \
    --methods simkd none kd --dtype bfloat16
  step methods --pairs "$main" --batch "$batch" --sides jax --dtype bfloat16 \
    --methods others
  step large_rest --pairs "$large" --batch "$large_batch" --steps 20 --turns 3 \
    --methods crd semckd --dtype bfloat16
}

failed=0
mkdir -p "$out"
for piece in "${@:-1 2 3}"; do
  for number in $piece; do
    if ! declare -F "piece_$number" >/dev/null; then
      echo "expected a piece, 1, 2 or 3, got: $number" >&2
      exit 2
    fi
    began=$SECONDS
    "piece_$number"
  done
done
exit "$failed"
