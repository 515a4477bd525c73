#!/bin/sh
# What happens around a run, from outside and at full length: terminals that close, signals at bad
# moments, streams that are full or closed. Prints a line for each case, exits 1 if one failed.
# Needs Linux and util-linux's script(1). Usage: tests/surroundings.sh [PATH OF cpmx.dll]
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
dll=${1:-$root/tests/bin/Release/net10.0/cpmx.dll}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

cpmx() { exec dotnet "$dll" "$@"; }

# train OUT [ARGUMENT ...]: a run of the example, a few steps a second.
train() {
  out=$1
  shift
  cpmx train --model_name_or_path "$root/examples/model" --data_path "$root/examples/train.json" \
    --device cpu --use_lora --tune_llm false --lora_r 8 --report_to none \
    --per_device_train_batch_size 2 --logging_steps 1 --save_steps 100000 --max_steps 100000 \
    --output_dir "$work/$out" "$@"
}

ok() { # NAME COMMAND ...: the case holds if the command does
  name=$1
  shift
  if "$@"; then echo "ok      $name"; else echo "FAILED  $name"; failed=1; fi
}

wait_for() { # TEXT FILE
  for _ in $(seq 600); do
    grep -q "$1" "$2" 2>/dev/null && return 0
    sleep 0.1
  done
  return 1
}

ends_within() { # SECONDS PID CODE
  (sleep "$1" && kill -9 "$2" 2>/dev/null) &
  timer=$!
  wait "$2"
  code=$?
  kill "$timer" 2>/dev/null
  [ "$code" = "$3" ]
}

saved() { [ -n "$(find "$work/$1" -maxdepth 1 -name 'checkpoint-*[0-9]' 2>/dev/null)" ]; }

# A terminal that closes: the run saves and ends; with SIGHUP ignored it goes on to its end.
for ignored in no yes; do
  out=terminal-$ignored
  steps=$([ $ignored = yes ] && echo 60 || echo 100000)
  cat >"$work/$out.sh" <<EOF
$([ $ignored = yes ] && echo "trap '' HUP")
exec dotnet "$dll" train --model_name_or_path "$root/examples/model" \
  --data_path "$root/examples/train.json" --device cpu --use_lora --tune_llm false --lora_r 8 \
  --report_to none --logging_steps 1 --save_steps 100000 --max_steps $steps --output_dir "$work/$out"
EOF
  script -qfc "sh $work/$out.sh" "$work/$out.seen" >/dev/null 2>&1 </dev/null &
  terminal=$!
  wait_for " 5/$steps" "$work/$out.seen"
  kill -9 "$terminal"
  wait "$terminal" 2>/dev/null
  for _ in $(seq 600); do saved "$out" && break; sleep 0.1; done
  ok "terminal closed, SIGHUP ignored: $ignored" saved "$out"
  [ $ignored = no ] || ok "  and the run went on to its end" [ -d "$work/$out/checkpoint-60" ]
done

# 3,600 rows to evaluate take more than a minute on one thread.
awk 'BEGIN { printf "["; for (i = 0; i < 3600; i++) printf "%s{\"conversations\":[{\"role\":\"user\",\
\"content\":\"hi %d\"},{\"role\":\"assistant\",\"content\":\"rano\"}]}", i ? "," : "", i; print "]" }' \
  >"$work/many.json"
train evaluation --eval_data_path "$work/many.json" --eval_strategy steps --eval_steps 5 \
  --per_device_eval_batch_size 1 --threads 1 >"$work/evaluation.log" 2>&1 &
run=$!
wait_for "step 5/" "$work/evaluation.log"
sleep 0.5
kill "$run"
ok "SIGTERM in an evaluation: answered within 5 s" ends_within 5 "$run" 143
ok "  and step 5 was saved" [ -d "$work/evaluation/checkpoint-5" ]

awk 'BEGIN { printf "["; for (i = 0; i < 60000; i++) printf "%s{\"conversations\":[{\"role\":\"user\",\
\"content\":\"hi %d\"},{\"role\":\"assistant\",\"content\":\"rano hello world and so on\"}]}", \
i ? "," : "", i; print "]" }' >"$work/more.json"
train rows --data_path "$work/more.json" >"$work/rows.log" 2>&1 &
run=$!
sleep 1
kill "$run"
ok "SIGTERM while rows are checked: answered within 2 s" ends_within 2 "$run" 143

# timeout(1) signals the process and its group.
(train twice >"$work/twice.log" 2>&1) &
wait_for "step 3/" "$work/twice.log"
run=$(pgrep -P $! || echo $!)
kill "$run"; kill "$run"
ok "SIGTERM twice at once: saved" sh -c "for i in \$(seq 100); do ls -d '$work'/twice/checkpoint-* \
  >/dev/null 2>&1 && exit 0; sleep 0.1; done; exit 1"

(train full --max_steps 3 --save_steps 3 >/dev/full 2>"$work/full.err")
ok "stdout on a full disk: done" [ $? = 0 ]
ok "  said once" [ "$(grep -c 'No space left' "$work/full.err")" = 1 ]
(train both --max_steps 3 >/dev/full 2>&1)
ok "stdout and stderr on a full disk: done" [ $? = 0 ]
(cpmx --version >/dev/full 2>&1)
ok "the version on a full disk: exit 1" [ $? = 1 ]
exit $failed
