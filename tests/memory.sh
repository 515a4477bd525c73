#!/bin/sh
# The most memory that hostile rows take, each against an idle process: 300 MB more at most. Prints a
# line for each, exits 1 if one took more.
# Needs Linux. Usage: tests/memory.sh [PATH OF cpmx.dll]
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
dll=${1:-$root/tests/bin/Release/net10.0/cpmx.dll}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

# peak COMMAND ...: MB, of the process itself.
peak() {
  "$@" >"$work/log" 2>&1 &
  most=0
  while now=$(sed -n 's/^VmHWM:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$!/status" 2>/dev/null) && [ -n "$now" ]; do
    most=$now
    sleep 0.02
  done
  wait $!
  echo $((most / 1024))
}

check() { peak dotnet "$dll" data check --model_name_or_path "$root/examples/model" \
  --data_path "$work/$1.json"; }

case_of() { # NAME
  got=$(check "$1")
  if [ $((got - idle)) -le 300 ]; then result=ok; else result=FAILED; failed=1; fi
  echo "$result $1: $got MB, $((got - idle)) above idle; $(tail -n 1 "$work/log" | cut -c1-100)"
}

many() { # COUNT TEXT
  head -c "$1" /dev/zero | sed "s/\\x00/$2/g"
}

row() { # NAME, text from stdin
  { printf '[{"conversations":[{"role":"user","content":"'; cat
    printf '"},{"role":"assistant","content":"a"}]}]'; } >"$work/$1.json"
}

echo hi | tr -d '\n' | row plain
idle=$(check plain)
echo "an idle process: $idle MB"
many 1999000 ' ' | row spaces
many 1999000 a | row one-word
many 990000 '\\ud83d\\ude00' | row surrogates
many 10000000 ' ' | row too-long
many 1000000 '[' >"$work/nested.json"
awk 'BEGIN { printf "[{\"conversations\":["; for (i = 0; i < 100000; i++) printf "%s{\"role\":\"%s\",\
\"content\":\"x\"}", i ? "," : "", i % 2 ? "assistant" : "user"; print "]}]" }' >"$work/turns.json"
for name in spaces one-word surrogates too-long nested turns; do case_of $name; done
exit $failed
