#!/usr/bin/env bash
# All that needs a CUDA GPU, most valuable first, at most 25 minutes (LIMIT=seconds) a call:
#
#     bash benchmarks/gpu.sh                            # CIFAR-10 is downloaded
#     DATA=cifar10-jpeg bash benchmarks/gpu.sh          # or read from train/<class>/*, test/<class>/*
#     PARTS="tests|speed-.*" bash benchmarks/gpu.sh     # some of the parts
#     SSL_TEST_DEVICE=cpu DATA=cifar10-jpeg bash benchmarks/gpu.sh    # a small rehearsal on a CPU
#
# Each part is a process with a time limit, and its result is written as soon as it is there, to
# runs/gpu (RESULTS=folder: elsewhere). Call it again to go on: parts that succeeded are not
# repeated, and stopped runs are resumed. lightly is compared if it is installed.

cd "$(dirname "$0")/.." || exit
data=${DATA:-data} end=$((SECONDS + ${LIMIT:-1500}))
out=${RESULTS:-runs/gpu${SSL_TEST_DEVICE:+-rehearsal}}
# Not tried below a capability of 8.0.
compile=$(python -c "import torch
cuda = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
print('--compile' * cuda)") || exit
flags="--batch-size 512" speed=(--seconds 0.7) precisions="bf16 fp16"
extra="$compile --eval-every 50" more="$compile --eval-every 100"
mkdir -p "$out"

first() {
    # FOLDER TRAIN TEST: links to the first images of every class.
    [ -d "$1" ] && return
    rm -rf "$1.part"
    python -c "import sys; sys.path.insert(0, 'benchmarks'); import accuracy
accuracy.first_of_each_class('$data', '$1.part', $2, $3)" && mv "$1.part" "$1"
}

if [ "$SSL_TEST_DEVICE" = cpu ]; then
    small="--device cpu --encoder resnet10 --width 16 --batch-size 32"
    flags=$small speed=(--images 256 --warmup 1 --seconds 1 --blocks 1)
    compile=--compile extra="$small --epochs 1" more=$extra precisions=bf16
    first "$out/data" 20 5
    data=$out/data
fi

part() {
    # NAME SECONDS COMMAND...
    name=$1 limit=$(($2 < end - SECONDS ? $2 : end - SECONDS))
    shift 2
    [[ -e $out/$name.done || ! $name =~ ^(${PARTS:-.*})$ ]] && return
    if [ "$limit" -lt 30 ]; then
        echo "$name: no time left; call again"
        return
    fi
    start=$SECONDS
    timeout --kill-after=60 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    [ $status = 0 ] && touch "$out/$name.done"
    echo "$name: exit status $status after $((SECONDS - start)) s; $out/$name.log"
    # A stopped run writes a checkpoint.
    [ $status = 124 ] && sleep 10
}

methods="simclr byol barlow_twins" dataset=cifar10
[ -d "$data/train" ] && dataset=folder
cifar10=(python benchmarks/cifar10.py --data-dir "$data" --runs "$out/cifar10"
    --output "$out/cifar10.jsonl")
# After SIGINT pytest still prints what failed.
TORCHINDUCTOR_COMPILE_THREADS=4 part tests 300 \
    timeout --foreground --signal=INT 270 python -m pytest -q -n 4 --dist worksteal tests/test_gpu.py
for method in $methods; do
    part "speed-$method" 300 python benchmarks/throughput.py --methods "$method" --no-lightly \
        --flags="$flags $compile" ${compile:+--variant=--no-compile} --profile "${speed[@]}" \
        --output "$out/throughput-$method.json"
    part "cifar10-$method" 720 "${cifar10[@]}" --methods "$method" --extra="$extra" --no-baselines
done
for method in $methods; do
    python -c "import lightly" 2>"$out/lightly.log" || break
    part "lightly-$method" 240 python benchmarks/throughput.py --methods "$method" --blocks 3 \
        --flags="$flags" "${speed[@]}" --output "$out/lightly-$method.json"
done
train() {
    # NAME METHOD FLAGS...: a run that ends with its peak memory.
    name=$1 method=$2
    shift 2
    part "$name" 300 python -c "import torch, common, $method as m
common.cli(m.Args, m.main, m.RECIPES)
print(torch.cuda.is_available() and torch.cuda.max_memory_allocated() / 2**30, 'GiB at the peak')" \
        --dataset "$dataset" --data-dir "$data" --run-dir "$out/$name" --resume "$@" $more
}

for method in $methods; do
    train "memory-$method" "$method" --epochs 1
done
for seed in 1 2 3; do
    for precision in $precisions; do
        train "$precision-s$seed" simclr --epochs 20 --precision "$precision" --seed "$seed"
    done
done
# The untrained encoder and raw pixels.
part cifar10 720 "${cifar10[@]}" --extra="$extra"
# Few images.
for n in 100 500; do
    [ -d "$data/train" ] || break
    first "$out/first$n" $n 1000
    for method in $methods; do
        part "few$n-$method" 400 python benchmarks/accuracy.py --methods "$method" --seeds 1 \
            --extra="--dataset folder --data-dir $out/first$n $more" --output "$out/few$n.jsonl"
    done
done
