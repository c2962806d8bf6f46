#!/bin/sh
# Measure an adapter or a model on long documents: perplexity by length, loss by position, passkeys and needles by
# length and depth, with plots and evaluation.json in a folder.
#
#   examples/evaluate.sh ADAPTER_OR_MODEL FOLDER DOCUMENTS...
#   LENGTHS="4096 32768" WINDOWS=20 TRIALS=10 examples/evaluate.sh llama-2-7b-32k evaluation pg19.jsonl
#
# Documents are texts, or .jsonl with a `text` on each line. PG19's test books:
#
#   python -c 'from datasets import load_dataset; load_dataset("emozilla/pg19", split="test").to_json("pg19.jsonl")'
set -eu
[ $# -ge 3 ] || { echo "usage: $0 ADAPTER_OR_MODEL FOLDER DOCUMENTS..." >&2; exit 2; }
model=$1 folder=$2
shift 2

# The lengths are words of their own.
# shellcheck disable=SC2086
hf-longlora evaluate "$model" --documents "$@" --lengths ${LENGTHS:-8192 32768 131072 262144} \
	--max-windows "${WINDOWS:-50}" --passkey "${TRIALS:-10}" --needles "${TRIALS:-10}" --output-dir "$folder"
