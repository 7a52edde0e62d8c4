#!/bin/sh
# All that is measured on a GPU, in parts, each of its commands within a time of its own: what one comes to a card with.
#
#   scripts/gpu.sh                        the parts in the order below, as far as nine minutes go: about the first three
#   scripts/gpu.sh 7b loss profile        these, and then 1b, train and sweep
#   BUDGET_S=1800 scripts/gpu.sh          half an hour: all of them, and every command may take longer
#   scripts/gpu.sh --smoke [PART ...]     each part tiny, on a CPU, to see that it runs
#   scripts/gpu.sh --show [--smoke]       only show the commands
#
#   laws       the laws on the card, in float32, and its attention kernels
#   attention  attention with its gradients by length, each form that the device has
#   real       a step of Llama 3.1 8B, random weights in bfloat16 and NF4, 4,096 tokens; and PEFT with bitsandbytes
#   7b, 1b     a step of some layers beside the base alone, layers by hand, and PEFT on torch, also compiled
#   loss       cross-entropy with its gradients by length, in chunks and of all logits
#   profile    where a step's time goes, kernel by kernel
#   train      SmolLM2 by `rslora train`
#   sweep      eight trials together by scripts/rank_sweep.py
#
# It needs JAX with CUDA and what the extras `train`, `benchmark` and `test` have; torch, peft, transformers and
# bitsandbytes for the comparisons. What fails or runs out of time is said, and the rest goes on; the exit status is that
# of a failure. PYTHON names another Python. $OUT (runs/gpu) holds log.txt, with the card's name and all versions,
# and the CSV files and pictures.
cd "$(dirname "$0")/.." || exit 1
SMOKE='' SHOW='' PARTS=''
for word in "$@"; do
  case $word in
    --smoke) SMOKE=1 ;;
    --show) SHOW=1 ;;
    laws | attention | real | 7b | 1b | loss | profile | train | sweep) PARTS="$PARTS $word" ;;
    *) echo "$0: $word is no part: see the head of this file" >&2; exit 2 ;;
  esac
done
PARTS=${PARTS:-laws attention real 7b loss profile 1b train sweep}
OUT=${OUT:-runs/gpu} PYTHON=${PYTHON:-python3} BUDGET_S=${BUDGET_S:-540}
begun=$(date +%s) failed=''
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2
export XLA_PYTHON_CLIENT_PREALLOCATE=false

if [ "$SMOKE" ]; then
  export JAX_PLATFORMS=cpu
  BUDGET_S=36000
  LAWS='law_2 and mlp' REAL='--model tiny --length 48 --rank 3 --steps 1 --repeats 1 --matrix 64'
  HEADS='--heads 2 --kv-heads 1 --width 8 --repeats 1' LENGTHS=24 LONG=32
  STEP='--preset tiny --tokens 24 --length 12 --repeats 1' RANKS=3 RANKS1=3,9 LAYERS='--layers 1' LAYERS1='--layers 2'
  LOSS='--width 16 --vocabulary 64 --lengths 24,300 --repeats 1' PROFILE='--preset tiny --layers 1 --tokens 12 --ranks 3'
  TRAIN='--steps 2 --batch-size 1 --max-len 48 --rank 3'
  SWEEP='--model tiny --ranks 3 --optimizers adamw --seeds 1 --steps 2 --max-len 32 --heldout 4 --budget 0.5'
else
  LAWS=scanned REAL=''
  HEADS='--heads 32 --kv-heads 8 --width 128 --dtype bfloat16 --repeats 3' LENGTHS=4096,8192 LONG=16384
  STEP='--repeats 5' RANKS=64,2048 RANKS1=8,64,512,2048 LAYERS='--preset 7b --layers 2' LAYERS1='--preset 1b --layers 4'
  LOSS='' PROFILE='--preset 7b --layers 2 --ranks 64'
  TRAIN='--steps 200 --batch-size 16 --max-len 512 --dtype bfloat16 --rank 64'
  SWEEP='--ranks 4,32,256 --optimizers adamw --seeds 1 --batch-size 8 --budget 1'
fi

say() { echo "$*" | tee -a "$OUT/log.txt"; }

# run SECONDS COMMAND...: with that time out of 540, or what is left of the budget.
run() {
  seconds=$(($1 * BUDGET_S / 540)) left=$((BUDGET_S - $(date +%s) + begun))
  shift
  if [ "$SHOW" ]; then echo "$*"; return; fi
  if [ $left -lt 10 ]; then say "-- no time is left for: $*"; return; fi
  if [ $seconds -gt $left ]; then seconds=$left; fi
  say "-- $* (at most $seconds s)"
  started=$(date +%s)
  timeout -k 5 $seconds "$@" >"$OUT/.out" 2>&1
  status=$?
  tail -n 60 "$OUT/.out" | tee -a "$OUT/log.txt"
  say "-- exit status $status after $(($(date +%s) - started)) s"
  # Out of time is no failure on a card: what is written until then is kept.
  if [ $status -eq 0 ] || { [ -z "$SMOKE" ] && [ $status -eq 124 ]; }; then return; fi
  case " $failed " in *" $part "*) ;; *) failed="$failed $part" ;; esac
}

# keep FILE NAME: of a part's folder what is to be looked at later.
keep() { if [ -z "$SHOW" ] && [ -e "$1" ]; then cp "$1" "$OUT/$2"; fi; }

# The names of attention's forms that the device has, but for torch, which is on the CPU there, and those that are named.
# On a GPU "pallas" is tokamax's.
forms() {
  if [ "$SHOW" ]; then echo chunked; return; fi
  "$PYTHON" -c "
import importlib.util, sys
sys.path.insert(0, 'scripts')
from attention_cost import here
without = {'torch', *sys.argv[1:], *([] if importlib.util.find_spec('tokamax') else ['pallas'])}
print(','.join(n for n in here() if n not in without))" "$@" 2>/dev/null
}

# compared SECONDS RANKS LAYERS METHODS [SUFFIX]: scripts/benchmark.py.
compared() {
  run "$1" "$PYTHON" scripts/benchmark.py $3 $STEP --ranks "$2" --methods "$4" --out "$WORK/$part$5"
  keep "$WORK/$part$5/benchmark.csv" "$part$5.csv"
  if [ -z "$5" ]; then keep "$WORK/$part/benchmark.png" "$part.png"; fi
}

one() {
  case $part in
    laws)
      JAX_DEFAULT_MATMUL_PRECISION=highest run 90 "$PYTHON" -m pytest -q -x -p no:cacheprovider -n 0 tests/test_laws.py -k "$LAWS"
      if [ -e tests/models/test_kernels.py ] && [ -z "$SMOKE" ]; then
        run 40 "$PYTHON" -m pytest -q -x -p no:cacheprovider -n 0 tests/models/test_kernels.py
      fi ;;
    attention)
      run 40 "$PYTHON" scripts/attention_cost.py $HEADS --lengths $LENGTHS --forms "$(forms)"
      run 30 "$PYTHON" scripts/attention_cost.py $HEADS --lengths $LONG --forms "$(forms xla)" ;;
    real)
      for base in nf4 bfloat16; do run 100 "$PYTHON" scripts/real_run.py $REAL --base $base --out "$WORK"; done
      for base in nf4 bfloat16; do run 60 "$PYTHON" scripts/real_run.py $REAL --base $base --by peft --out "$WORK"; done
      keep "$WORK/real.csv" real.csv ;;
    7b)
      compared 90 "$RANKS" "$LAYERS" floor,rslora,factored,merged,peft
      compared 60 "${RANKS%%,*}" "$LAYERS" floor,rslora,peft-compiled -compiled ;;
    1b)
      compared 120 "$RANKS1" "$LAYERS1" floor,full,rslora,factored,merged,peft,torch ;;
    loss) run 40 "$PYTHON" scripts/loss_cost.py $LOSS ;;
    profile) run 50 "$PYTHON" scripts/step_profile.py $PROFILE --top 5 ;;
    train)
      run 90 "$PYTHON" -m rslora_jax train $TRAIN --out "$WORK/train"
      if [ -e "$WORK/train/metrics.jsonl" ]; then say "$(tail -n 2 "$WORK/train/metrics.jsonl")"; fi ;;
    sweep)
      run 90 "$PYTHON" scripts/rank_sweep.py $SWEEP --together 8 --out "$WORK/sweep"
      keep "$WORK/sweep/trials.jsonl" sweep.jsonl ;;
  esac
}

if [ "$SHOW" ]; then
  WORK=$OUT
else
  mkdir -p "$OUT" && WORK=$(mktemp -d) || exit 1
  trap 'rm -rf "$WORK" "$OUT/.out"' EXIT
  : >"$OUT/log.txt"
  say "$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || echo 'no GPU')"
  say "$("$PYTHON" -c '
import importlib.metadata as m
names = "jax jaxlib flax optax torch transformers peft bitsandbytes tokamax".split()
found = {d.metadata["Name"].lower(): d.version for d in m.distributions() if d.metadata["Name"]}
print(*(f"{n} {found[n]}," for n in names if n in found))')"
fi
for part in $PARTS; do
  [ "$SHOW" ] || say "== $part"
  one
done
if [ -z "$SHOW" ]; then say "== done after $(($(date +%s) - begun)) s${failed:+, with failures in$failed}"; fi
[ -z "$failed" ]
