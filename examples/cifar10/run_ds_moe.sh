#!/bin/sh
# One layer of two experts, one on each of two ranks. Arguments go to the script, after its own, so that they win.
here=$(dirname "$0")
exec deepspeed --num_nodes=1 --num_gpus="${RANKS:-2}" "$here/cifar10_deepspeed.py" \
    --deepspeed --moe --ep-world-size 2 --num-experts 2 --top-k 1 \
    --noisy-gate-policy 'RSample' --moe-param-group "$@"
