#!/usr/bin/env bash
# Start the ranks of one node on a run that is guarded by deploy/secrets.sh, under torchrun:
#   deploy/examples/launch.sh CONTROLLER SECRETS SCRIPT [ARGUMENTS...]
# CONTROLLER is HOST:PORT, SECRETS the folder of join and headrace.pem. NNODES, NPROC_PER_NODE
# and RDZV (HOST:PORT of the first node) say how many ranks there are; one node needs no RDZV.
set -euo pipefail

controller=${1:?usage: launch.sh CONTROLLER SECRETS SCRIPT [ARGUMENTS...]}
secrets=${2:?the folder of join and headrace.pem is missing}
shift 2
: "${1:?the script is missing}"

export HEADRACE_JOIN_TOKEN_FILE=$secrets/join HEADRACE_CA=$secrets/headrace.pem
export HEADRACE_SERVER_NAME=headrace

if [ "${NNODES:-1}" = 1 ]; then
  rendezvous=(--standalone)
else
  rendezvous=(--rdzv-backend c10d --rdzv-endpoint "${RDZV:?HOST:PORT of the first node}")
  rendezvous+=(--rdzv-id "${RUN_ID:-headrace}")
fi
# A rank that dies has all of them start again from the newest checkpoint, as a new generation.
exec torchrun --nnodes "${NNODES:-1}" --nproc-per-node "${NPROC_PER_NODE:-1}" \
  --max-restarts "${MAX_RESTARTS:-3}" "${rendezvous[@]}" "$1" --controller "$controller" "${@:2}"
