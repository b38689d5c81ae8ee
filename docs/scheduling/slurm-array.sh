#!/usr/bin/env bash
# One conversion for each line of a file of job files: sbatch --array=0-$(($(wc -l < jobs.txt) - 1)) slurm-array.sh jobs.txt
#SBATCH --job-name=headrace
#SBATCH --cpus-per-task=8
#SBATCH --mem=4G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM to this script two minutes before the end of the time: what is done is kept.
#SBATCH --signal=B:TERM@120
set -euo pipefail

jobs=${1:?the file that names a job file a line}
job=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$jobs")
if [ -z "$job" ]; then
    echo "line $((SLURM_ARRAY_TASK_ID + 1)) of $jobs is empty" >&2
    exit 2
fi

# Of the memory that Slurm grants, in MiB, an eighth is left to the system's own.
memory=$((${SLURM_MEM_PER_NODE:-4096} * 7 / 8))
headrace convert "$job" --scheduler threads --workers "${SLURM_CPUS_PER_TASK:-1}" --memory_limit "${memory}MiB" &
child=$!
trap 'kill -TERM "$child"' TERM

code=0
wait "$child" || code=$?
while kill -0 "$child" 2> /dev/null; do # the signal ended `wait`, and not yet the conversion
    code=0
    wait "$child" || code=$?
done

# 3: interrupted or failed half-way. The next attempt goes on from there, with the same bytes in the end.
if [ "$code" -eq 3 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 5 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
