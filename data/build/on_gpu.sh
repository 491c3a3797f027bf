#!/usr/bin/env bash
# Train the autoencoder, the base and the judge anew on one GPU: about ten minutes on an H200, which made what ships.
# First, on a machine with a network: python data/build/drawings.py --pack build/pack
# Then here: data/build/on_gpu.sh build/pack FOLDER-FOR-THE-RESULTS
# The budgets are minutes of training; a run that is cut off goes on with the same command. Base and judge share the GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
pack=$1 out=$2
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p build/drawings "$out"
cp "$pack"/* build/drawings/
python3 data/build/pretrain_vae.py --out build/vae-gpu --batch 256 --minutes "${VAE_MINUTES:-2.2}" > "$out/vae.log"
python3 data/build/train_judge.py --vae build/vae-gpu/vae --out build/judge-gpu --to "$out/judge" \
    --epochs "${JUDGE_EPOCHS:-200}" --batch 256 --peak 2e-3 --threads 6 > "$out/judge.log" &
judge=$!
python3 data/build/pretrain.py train --vae build/vae-gpu/vae --out build/base-gpu --batch 256 --peak 1e-3 \
    --warmup 300 --save-every 0.4 --minutes "${BASE_MINUTES:-5}" --threads 6 > "$out/base.log"
python3 data/build/pretrain.py export --vae build/vae-gpu/vae --out build/base-gpu --to "$out/base"
wait "$judge"
