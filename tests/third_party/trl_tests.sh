#!/bin/sh
# TRL's tests, which its sdist leaves out, into the folder $1: from the checkout $3, or else from GitHub at version $2.
set -e
rm -rf "$1"
mkdir -p "$1"
checkout=$3
if [ -z "$checkout" ]; then
    checkout=$1/checkout
    GIT_TERMINAL_PROMPT=0 git clone -q --depth 1 --branch "v$2" https://github.com/huggingface/trl "$checkout"
fi
# Not the package: what is installed is tested.
cp -r "$checkout/tests" "$checkout/scripts" "$checkout/pyproject.toml" "$checkout/VERSION" "$1"
