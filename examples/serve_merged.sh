#!/bin/sh
# Merge an adapter into its base, and serve the model at its full length: by vLLM, or by transformers.
#
#   examples/serve_merged.sh ADAPTER FOLDER [vllm|transformers]
#   LENGTH=131072 examples/serve_merged.sh llama-3.1-8b-262k merged vllm   # a shorter context needs less memory
#
# The folder is merged into once, and served as it is from then on. It needs none of this package: RoPE is in its
# config.json. Both serve OpenAI's protocol at port 8000; for chat the tokenizer needs a template. To install:
# pip install vllm, or pip install 'transformers[serving]'.
set -eu
[ $# -ge 2 ] || { echo "usage: $0 ADAPTER FOLDER [vllm|transformers]" >&2; exit 2; }
adapter=$1 folder=$2 server=${3:-vllm}

case $server in
	vllm) set -- vllm serve "$folder" ${LENGTH:+--max-model-len "$LENGTH"} ;;
	transformers) set -- transformers serve "$folder" ;;
	*) echo "no such server: $server; there are vllm and transformers" >&2; exit 2 ;;
esac
command -v "$1" >/dev/null || { echo "$1 is not installed" >&2; exit 1; }

[ -f "$folder/config.json" ] || hf-longlora merge "$adapter" "$folder"
exec "$@"
