#!/usr/bin/env bash
# What to run when a GPU is at hand for minutes: CIFAR-100 in ../data.
#
#   scripts/h200.sh                 all pieces in order, each for 4 minutes at most
#   scripts/h200.sh speed teacher   some of them
#
# The same command resumes: what is finished is skipped, a run that was stopped
# goes on from its checkpoint. OUT (runs/h200) holds everything; OUT/back is what
# to take home, at most 8 files of 15 MB: step times, the runs without their
# checkpoints, and the last checkpoint of a run that is not finished. To go on
# elsewhere, put these files into OUT/back first. SMALL=1 runs the same on a CPU in minutes.
# PYTHON chooses the interpreter.
#
# piece     minutes on an H200, estimated; not run there yet
# speed     4    step times: SimKD and KD, here and in compiled PyTorch
# teacher   8    resnet32x4, 240 epochs, bfloat16
# simkd     5    SimKD of factor 2, resnet8x4 (1.37 ms a step)
# alone     2    the student alone
# kd        3    KD; computes the cache of the teacher's logits
# dkd       2    DKD from the cache
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-runs/h200}
limit=${SECONDS_EACH:-240}
pieces=(speed teacher simkd alone kd dkd)
mkdir -p "$out/runs" "$out/back"

smoke="" main=resnet32x4:resnet8x4 batch=64
options=(--config.data.seed=0 --config.checkpoint.keep=1)
measure=()
if [[ -n ${SMALL:-} ]]; then
  smoke=:smoke main=_tiny_wide:_tiny batch=8
  measure=(--examples 32 --image_size 16 --workers 0 --steps 1 --turns 1)
fi

[[ -n $smoke ]] || options+=(--config.dtype=bfloat16)

# Where another machine stopped.
if [[ ! -e $out/.began ]] && compgen -G "$out/back/runs.tgz.*" >/dev/null; then
  cat "$out"/back/runs.tgz.* | tar -xz -C "$out/runs"
fi
touch "$out/.began"

speed() {
  timeout "$limit" "$python" -m benchmarks.step "${measure[@]}" \
    --pairs "$main" --batch "$batch" --methods simkd kd \
    --sides jax compiled --weights "$out/weights" --seconds $((limit - 20)) \
    --out "$out/back/speed.json"
}

# Trains $1 with a config and its options; the signal makes it save and stop.
train() {
  local name=$1 config=$2
  shift 2
  timeout --signal=TERM --kill-after=60 "$limit" "$python" launch.py \
    --config "configs/${config}_cifar.py$smoke" --workdir "$out/runs/$name" \
    --config.parallel.compilation_cache="$out/programs" "${options[@]}" "$@"
}

student() {
  local teacher=$out/runs/teacher
  if [[ ! -e $teacher/result.json ]]; then
    echo "$1: not run, the teacher is not finished" >&2
    return 75
  fi
  train "$@" --config.student.name="${main#*:}" \
    --config.teacher.name="${main%:*}" \
    --config.teacher.checkpoint="$teacher/export"
}

teacher() { train teacher teacher --config.student.name="${main%:*}"; }
simkd() { student simkd simkd; }
alone() { train alone teacher --config.student.name="${main#*:}"; }
kd() { student kd kd --config.teacher.cache="$out/cache"; }
dkd() { student dkd dkd --config.teacher.cache="$out/cache"; }

# Packs what to take home.
pack() {
  local run left_out=(--exclude=best --exclude=tensorboard --exclude=.lock)
  for run in "$out"/runs/*/; do
    if [[ -e $run/result.json ]]; then
      left_out+=(--exclude="./$(basename "$run")/checkpoints")
    fi
  done
  rm -f "$out"/back/runs.tgz.*
  tar -cz -C "$out/runs" "${left_out[@]}" . |
    split -b 15M - "$out/back/runs.tgz."
  ls -l "$out/back"
}

failed=0
for piece in "${@:-${pieces[*]}}"; do
  for name in $piece; do
    if [[ " ${pieces[*]} " != *" $name "* ]]; then
      echo "expected a piece (${pieces[*]}), got: $name" >&2
      exit 2
    fi
    began=$SECONDS
    "$name"
    code=$?
    echo "$name: exit code $code after $((SECONDS - began)) s"
    # 75: stopped with everything saved; 124: the time was over.
    ((code == 0 || code == 75 || code == 124)) || failed=1
  done
done
pack
exit "$failed"
