#!/bin/bash
# {{config}} on {{nodes}} x {{gpus}} GPUs without a scheduler: run this file on every node, in any order.
#
# When a process dies, all start again from the newest state, three times at most. SIGTERM saves the state and ends the
# run; the same command goes on with it. The folder must be on storage that all nodes share.
set -eu

export OMP_NUM_THREADS={{cpus}} TORCH_ELASTIC_SHUTDOWN_TIMEOUT={{grace}}
exec torchrun --nnodes={{nodes}} --nproc-per-node={{gpus}} --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-id={{name}} --rdzv-endpoint={{master}}:29500 \
  {{program}}
