#!/bin/sh
# Two ranks of this machine (RANKS=4 ./run_ds.sh ...: four). Arguments go to the script, after its own, so that
# they win: ./run_ds.sh --dtype bf16 --stage 2 -e 5
here=$(dirname "$0")
exec deepspeed --num_gpus "${RANKS:-2}" "$here/cifar10_deepspeed.py" \
    --deepspeed --deepspeed_config "$here/ds_config.json" "$@"
