# Sourced by the sbatch files, with the arguments of launch.py: runs it in all
# tasks, and puts the job back into the queue if it was stopped with nothing
# lost (exit code 75): by the time limit, a preemption or
# `scancel --signal=TERM --batch`. Not if it could not save: that is code 1.

cd "${SLURM_SUBMIT_DIR:-.}" || exit 1

# One task of an array has the id of the whole array as its own.
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi

# bash runs a trap only between commands: srun goes to the background, and
# `wait` ends when the signal comes. A SIGTERM to srun itself would have it kill
# the tasks; scancel sends it to them.
trap 'signalled=1
  echo "asking all tasks to save and stop"
  scancel --signal=TERM "$job"' TERM

# srun does not take this from sbatch since Slurm 22.05.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# When a task has failed, the others end by themselves, with a reason; 60 s
# after the first they are ended. Not at once: that would spoil the code 75.
srun --kill-on-bad-exit=0 --wait=60 --unbuffered --label \
  "${PYTHON:-python}" launch.py "$@" &
task=$!

# A trapped signal ends `wait` with a code above 128, even if srun has ended
# meanwhile: its own code comes of the next wait.
while true; do
  signalled=
  wait "$task"
  code=$?
  [[ -n $signalled ]] || break
done

if [[ $code -eq 75 ]]; then
  echo "stopped with nothing lost (restart ${SLURM_RESTART_COUNT:-0})"
  scontrol requeue "$job"
fi
exit "$code"
