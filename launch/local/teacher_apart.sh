#!/usr/bin/env bash
# One machine whose last TEACHER_GPUS GPUs serve the teacher, while a rank trains on each of the others:
#   GPUS=8 TEACHER_GPUS=4 TEACHER_TP=4 launch/local/teacher_apart.sh RECIPE run.dir=runs/NAME [KEY=VALUE ...]
# `opd train` starts and ends the servers itself.
#
#   GPUS          GPUs of the machine (those that torch can see)
#   TEACHER_GPUS  of them for the teacher (1)
#   TEACHER_TP    GPUs of one server; a divisor of the teacher's attention heads (TEACHER_GPUS)
set -euo pipefail

fail() { echo "opd: $1" >&2; exit 2; }

test $# -ge 1 || fail "give a recipe: launch/local/teacher_apart.sh RECIPE [KEY=VALUE ...]"
gpus=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
teacher=${TEACHER_GPUS:-1}
tp=${TEACHER_TP:-$teacher}
ranks=$((gpus - teacher))
test "$ranks" -ge 1 || fail "$gpus GPUs, of which $teacher serve the teacher: none is left to train"
test $((teacher % tp)) -eq 0 || fail "TEACHER_TP=$tp does not divide TEACHER_GPUS=$teacher"

replicas=()
test "$teacher" -eq "$tp" || replicas=("teacher.replicas=$((teacher / tp))")
# every process sees all GPUs; a rank takes the one of its own number, a server those of teacher.devices
exec opd train "$@" "launch.processes=$ranks" "teacher.devices='$(seq -s, "$ranks" $((gpus - 1)))'" \
    "teacher.tensor_parallel_size=$tp" "${replicas[@]}" \
    teacher.gpu_memory_utilization=0.8
