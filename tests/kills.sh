#!/bin/sh
# What takes long: a run that is killed at every system call by which it makes, flushes, renames and
# removes files and folders, and goes on; kills at random moments; damaged inputs of every kind.
# Prints a line for each part, exits 1 if one failed. Needs Linux, strace and the built tests.
# Usage: tests/kills.sh [KILLS [MUTATIONS OF EACH KIND [EVERY NTH POINT]]]
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
dll=$root/tests/bin/Release/net10.0/cpmx.dll
kills=${1:-200}
mutations=${2:-1000}
stride=${3:-1}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

# train OUT [ARGUMENT ...]: three steps, a checkpoint after each, the newest two kept; under strace
# where $trace has its options.
trace=
train() {
  out=$1
  shift
  ${trace:+strace} $trace dotnet "$dll" train --model_name_or_path "$root/examples/model" \
    --data_path "$root/examples/train.json" --device cpu --use_lora --tune_llm false --lora_r 8 \
    --report_to none --per_device_train_batch_size 1 --save_steps 1 --save_total_limit 2 \
    --max_slice_nums 1 --logging_steps 1 --max_steps 3 --threads 1 --output_dir "$work/$out" "$@" \
    >"$work/log" 2>&1
}

# The results and checkpoints of the killed run are those of the other, and nothing else is left.
same() {
  for file in adapter_model.safetensors checkpoint-2/optimizer.safetensors \
    checkpoint-3/adapter_model.safetensors checkpoint-3/optimizer.safetensors \
    checkpoint-3/run_state.json checkpoint-3/trainer_state.json; do
    cmp "$work/whole/$file" "$work/killed/$file" || return 1
  done
  [ "$(cd "$work/killed" && ls)" = "$(cd "$work/whole" && ls)" ] || { ls "$work/killed"; return 1; }
}

# `wait` in a subshell keeps the shell from telling of each kill.
train whole || { cat "$work/log"; exit 1; }
points=0
bad=0
for call in rename fsync mkdir rmdir unlink; do
  n=1
  while :; do
    rm -rf "$work/killed"
    trace="-f -qq -o /dev/null -e trace=$call -e inject=$call:signal=SIGKILL:when=$n"
    (train killed) 2>/dev/null && break
    trace=
    points=$((points + 1))
    if ls -d "$work"/killed/checkpoint-? >/dev/null 2>&1; then
      again="--resume_from_checkpoint true"
    else
      again="--overwrite_output_dir"
    fi
    # shellcheck disable=SC2086
    train killed $again && same || { echo "  $call $n: $(tail -n 1 "$work/log")"; bad=$((bad + 1)); }
    n=$((n + stride))
  done
  trace=
done
[ "$bad" = 0 ] && [ "$points" -gt 0 ] || failed=1
echo "killed at $points system calls, $bad of them not as if nothing had been"

run() { # NAME FILTER
  if dotnet test --no-build -c Release "$root/tests" --filter "FullyQualifiedName~$2" \
    --logger 'console;verbosity=detailed' >"$work/log" 2>&1; then
    echo "ok      $1"
  else
    echo "FAILED  $1"
    failed=1
  fi
  grep -E "mutations, |kills, |Error Message|^ +[^ ].*mutation [0-9]+:" "$work/log"
}

CPMX_KILLS=$kills
CPMX_MUTATIONS=$mutations
export CPMX_KILLS CPMX_MUTATIONS
[ "$kills" = 0 ] || run "$kills kills at random moments" ARunThatIsKilledLeavesWholeCheckpoints
[ "$mutations" = 0 ] || run "$mutations damaged inputs of each kind" MutatedInputTests
exit $failed
