#!/usr/bin/env bash
# Train the autoencoder, the base and the judge anew on one GPU, in about half an hour.
# First, on a machine with a network: python data/build/drawings.py --pack build/pack
# Then here: data/build/on_gpu.sh build/pack FOLDER-FOR-THE-RESULTS
# The budgets are minutes of training; a run that is cut off goes on with the same command.
set -euo pipefail
cd "$(dirname "$0")/../.."
pack=$1 out=$2
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p build/drawings
cp "$pack"/* build/drawings/
python3 data/build/pretrain_vae.py --out build/vae-gpu --batch 256 --minutes "${VAE_MINUTES:-6}"
python3 data/build/pretrain.py train --vae build/vae-gpu/vae --out build/base-gpu --concepts good \
    --batch 512 --peak 1e-3 --warmup 500 --save-every 0.2 --minutes "${BASE_MINUTES:-14}"
python3 data/build/pretrain.py export --vae build/vae-gpu/vae --out build/base-gpu --to "$out/base"
python3 data/build/train_judge.py --vae build/vae-gpu/vae --out build/judge-gpu --to "$out/judge" \
    --epochs "${JUDGE_EPOCHS:-150}" --batch 64
cp build/vae-gpu/log.jsonl "$out/vae.jsonl"
cp build/base-gpu/log.jsonl "$out/base.jsonl"
