#!/usr/bin/env bash
# The Grok-1 40B recipe from its first command to its last with tiny widths, on CPU ranks: rehearse.sh [FOLDER]
# 16 ranks, TP 4 x PP 2 x EP 2, on two "hosts" (folders, which share nothing); killed by SIGKILL in mid-run; gone on with on 8 ranks of
# another layout; compared with one rank that never stopped; exported to Hugging Face's names; asked to write.
set -euo pipefail
recipes="$(cd "$(dirname "$0")/.." && pwd)"
folder="${1:-runs/grok1_40b_rehearsal}"
mkdir -p "$folder"
cd "$folder"
began=$SECONDS
say() { echo "--- $((SECONDS - began)) s: $*"; }

say "an Alpaca-shaped parquet, a tokenizer, files of tokens, on each host"
rm -rf host0 host1 one
for host in host0 host1; do
  mkdir -p "$host"
  python "$recipes/alpaca.py" "$host/alpaca.parquet" > "$host/rows"
  bmtrain-ms tokenizer --input "$host/alpaca.parquet" --json-keys text --vocab-size 512 --output "$host/tokenizer"
  bmtrain-ms prepare --input "$host/alpaca.parquet" --tokenizer-name-or-path "$host/tokenizer" --append-eod --workers 4 \
    --output-prefix "$host/data/alpaca" --log-interval 2000
done

say "16 ranks on two hosts, of which one is killed after step 12 was saved"
bmtrain-ms pretrain "$recipes/grok1_40b/small.toml" --folders host0,host1 > first.log 2>&1 &
job=$!
saved=host0/runs/grok1_40b_small/checkpoints
until [ -e "$saved/step-00000012" ]; do
  kill -0 "$job" 2> /dev/null || { cat first.log; echo "the job ended before it could be killed" >&2; exit 1; }
  sleep 0.2
done
rank="$(pgrep -f "bmtrain_ms_cli/rank.py.*pretrain" --parent "$(pgrep --parent "$job" | head -1)" | tail -1)"
kill -KILL "$rank"
wait "$job" && { echo "the job did not notice" >&2; exit 1; }
tail -1 first.log

say "what both hosts have saved comes together, and 8 ranks of another layout go on"
step="$(cat "$saved/latest")"
cp -n "host1/${saved#*/}/$step"/* "$saved/$step/"
(cd host0 && bmtrain-ms pretrain "$recipes/grok1_40b/small.toml" --ranks 8 --layout.tp=2 --layout.pp=2 --layout.ep=2 \
  --data.shared_storage=true) 2>&1 | tail -4

say "one rank that never stopped"
cp -r host0 one && rm -rf one/runs
(cd one && bmtrain-ms pretrain "$recipes/grok1_40b/small.toml" --ranks 1 --layout.tp=1 --layout.pp=1 --layout.ep=1) 2>&1 | tail -4
python - << 'END'
import json

logs = [
    [json.loads(line) for line in open(f"{where}/runs/grok1_40b_small/log.jsonl")] for where in ("host0", "one")
]
pairs = list(zip(*logs))
assert [a["step"] for a, _ in pairs] == [b["step"] for _, b in pairs] == list(range(1, 25)), "steps are missing in a log"
for name in ("loss", "grad_norm", "valid_loss"):
    worst = max(abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs if name in a)
    print(f"{name}: differs by {worst:.1e} of one rank's, at most")
    assert worst < 1e-4, "more than rounding"
print(f"loss {logs[0][0]['loss']:.4f} -> {logs[0][-1]['loss']:.4f}")
assert logs[0][-1]["loss"] < logs[0][0]["loss"] - 0.3, "nothing was learnt"
END

say "it writes, out of a folder of Hugging Face's"
bmtrain-ms generate --model host0/runs/grok1_40b_small/model --prompt "### Instruction:" --max-new-tokens 16
say "done"
