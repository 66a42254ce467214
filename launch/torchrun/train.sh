#!/usr/bin/env bash
# The same command on every node, with the number of the node:
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun/train.sh RECIPE run.dir=runs/NAME [KEY=VALUE ...]
# run.dir lies on a file system that all nodes share. A teacher server runs elsewhere: teacher.url=http://HOST:PORT,
# with OPD_TEACHER_TOKEN set here and there.
#
#   NODES        number of nodes (1)
#   NODE_RANK    number of this one, from 0
#   MASTER_ADDR  name or address of node 0
#   MASTER_PORT  a free port there (29400)
#   GPUS         GPUs to use on each node (those that torch can see)
set -euo pipefail

fail() { echo "opd: $1" >&2; exit 2; }

test $# -ge 1 || fail "give a recipe: launch/torchrun/train.sh RECIPE [KEY=VALUE ...]"
nodes=${NODES:-1}
gpus=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
test "$gpus" -ge 1 || fail "torch sees no GPU on this node: set GPUS to the number of ranks that it starts"
where=(--standalone)
if test "$nodes" -gt 1; then
    where=(--node-rank="${NODE_RANK:?the number of this node, from 0}"
        --master-addr="${MASTER_ADDR:?the address of node 0}" --master-port="${MASTER_PORT:-29400}")
fi
exec torchrun --nnodes="$nodes" --nproc-per-node="$gpus" "${where[@]}" \
    -m opd.cli.main train "$@" "launch.processes=$((nodes * gpus))"
