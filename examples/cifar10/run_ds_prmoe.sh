#!/bin/sh
# PR-MoE: residual layers of two and of four experts over two ranks. Arguments go to the script, after its own.
here=$(dirname "$0")
exec deepspeed --num_nodes=1 --num_gpus="${RANKS:-2}" "$here/cifar10_deepspeed.py" \
    --deepspeed --moe --ep-world-size 2 --num-experts 2 4 --mlp-type residual --top-k 1 \
    --noisy-gate-policy 'RSample' --moe-param-group "$@"
