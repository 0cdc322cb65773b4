#!/bin/sh
# Runs the side-by-side benchmarks that lie beside this tree (BENCH, default ../shared/bench): each workload with
# deepspeed_c, with plain torch or DDP, and with DeepSpeed where PEER names the python of an environment that has
# it; BENCH_ROUNDS rounds, the systems interleaved, so that a busy machine hits all alike. Lines go to
# build/bench.txt as well; figures count as ratios within one run.
set -u
here=$(dirname "$0")
bench=${BENCH:-$here/../../shared/bench}
rounds=${BENCH_ROUNDS:-3}
python=${PYTHON:-python3}
out=$(cd "$here/.." && pwd)/build/bench.txt
[ -d "$bench" ] || { echo "There is no $bench; BENCH names the folder of benchmarks" >&2; exit 1; }
mkdir -p "$(dirname "$out")"
: > "$out"
export DS_ACCELERATOR=cpu

# one PYTHON RANKS PROGRAM ARGS...: a line that says what ran, then what the program printed.
one() {
    interpreter=$1 ranks=$2
    shift 2
    echo "-- $ranks ranks: $*" | tee -a "$out"
    # run2 calls `python`, so the interpreter's folder goes first.
    (cd "$bench" && PATH="$(dirname "$interpreter"):$PATH" timeout 600 sh ./run2 "$ranks" "$@") \
        > "$out.said" 2> "$out.err" || {
        failed=1
        { echo "FAILED:" && tail -5 "$out.err"; } >> "$out.said"
    }
    tee -a "$out" < "$out.said"
}

ours() { one "$python" "$@"; }
peer() { [ -z "${PEER:-}" ] || one "$PEER" "$@"; }

failed=0
round=1
while [ "$round" -le "$rounds" ]; do
    echo "== round $round of $rounds" | tee -a "$out"
    ours 2 train_bench.py --system ddp
    for stage in 1 2; do
        ours 2 train_bench.py --system deepspeed_c --stage $stage
        peer 2 train_bench.py --system deepspeed --stage $stage
    done
    ours 1 train_bench.py --system torch --model tiny --steps 200
    ours 1 train_bench.py --system deepspeed_c --model tiny --steps 200
    peer 1 train_bench.py --system deepspeed --model tiny --steps 200
    ours 2 cifar_bench.py --system deepspeed_c
    peer 2 cifar_bench.py --system deepspeed
    ours 2 comm_bench.py --impl deepspeed_c
    ours 2 comm_bench.py --impl gloo
    round=$((round + 1))
done
echo "-- comm.py" | tee -a "$out"
"$python" -W ignore "$here/comm.py" --rounds "$rounds" | tee -a "$out"
echo "-- optim.py" | tee -a "$out"
"$python" "$here/optim.py" | tee -a "$out"
rm -f "$out.err" "$out.said"
exit $failed
