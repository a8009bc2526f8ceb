# Sourced by the sbatch files, with the arguments of launch.py: runs it in all
# tasks, and puts the job back into the queue if it was stopped with its
# progress saved (exit code 75): by the time limit, by scancel --signal=TERM
# --batch, or by a preemption.

# bash runs a trap only between commands: srun goes to the background, and
# `wait` ends when the signal comes. srun passes SIGTERM on to all tasks.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
trap 'echo "passing SIGTERM on"; kill -TERM "$task"' TERM

# One failed task ends the others. Output comes line by line, with the number
# of the task before it.
srun --kill-on-bad-exit=1 --unbuffered --label \
  "${PYTHON:-python}" launch.py "$@" &
task=$!

# A trapped signal ends the first wait with a code above 128, srun still there.
wait "$task"
code=$?
while kill -0 "$task" 2>/dev/null; do
  wait "$task"
  code=$?
done

if [[ $code -eq 75 ]]; then
  echo "stopped with its progress saved (restart ${SLURM_RESTART_COUNT:-0})"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
