#!/bin/sh
# Builds everything and runs all tests; arguments go to `dotnet test`, for instance
#   ./test.sh --filter FullyQualifiedName~Schedule
# As root on Debian, first installs the picture libraries that the tests use. Ends with the line
# "N passed, N failed"; the exit code is 0 only when all passed.
set -u
cd "$(dirname "$0")" || exit 1
export DOTNET_NOLOGO=1 DOTNET_CLI_TELEMETRY_OPTOUT=1
# No build server stays behind.
export MSBUILDDISABLENODEREUSE=1 DOTNET_CLI_USE_MSBUILD_SERVER=0 UseSharedCompilation=false

if ! command -v dotnet >/dev/null 2>&1; then
  echo "test.sh: the .NET 10 SDK is missing: install dotnet-sdk-10.0 or see https://dot.net" >&2
  exit 1
fi

missing=
if [ "$(id -u)" = 0 ] && command -v dpkg-query >/dev/null 2>&1; then
  for package in libturbojpeg0 libwebp7 libdeflate0; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed$' ||
      missing="$missing $package"
  done
fi
if [ -n "$missing" ]; then
  echo "installing$missing"
  export DEBIAN_FRONTEND=noninteractive
  install="apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120$missing"
  $install </dev/null >/dev/null 2>&1 ||
    { apt-get update -qq </dev/null && $install </dev/null >/dev/null; } ||
    echo "test.sh: could not install$missing; tests that need them will say so" >&2
fi

# NVRTC, libcuda and clang for the tests of the CUDA device; says what is there.
tests/install-cuda-tools.sh

results=$(mktemp -d) || exit 1
trap 'rm -rf "$results"' EXIT
if ! dotnet build MiniCpmNative.sln -c Release -v quiet -nologo </dev/null; then
  echo "test.sh: the build failed" >&2
  exit 1
fi
# run NAME ARGUMENTS...: its results are NAME.trx.
run() {
  name=$1
  shift
  dotnet test tests -c Release --no-build -nologo --results-directory "$results/$name" \
    --logger "trx;LogFileName=tests.trx" --logger "console;verbosity=minimal" \
    --blame-hang-timeout 15m --blame-hang-dump-type none "$@" -- NUnit.AssemblySelectLimit=100000 \
    </dev/null
}
if [ $# -gt 0 ]; then
  run all "$@"
  status=$?
else
  # Beside each other: a kernel of one block keeps one core busy, and most of the rest does too.
  # The half in the background ignores Ctrl-C, as the shell has it: it has no tests of signals.
  trap 'trap - TERM; kill 0' INT TERM
  run cuda --filter 'FullyQualifiedName~Cuda' >"$results/cuda.log" 2>&1 &
  run others --filter 'FullyQualifiedName!~Cuda'
  status=$?
  wait $! || status=1
  cat "$results/cuda.log"
fi

# The sum over the halves; a half without results is a failure.
count() {
  cat "$results"/*/tests.trx 2>/dev/null |
    sed -n "s/.*<Counters.*[^a-zA-Z]$1=\"\([0-9]*\)\".*/\1/p" |
    awk '{ sum += $1 } END { print sum + 0 }'
}
total=$(count total)
passed=$(count passed)
failed=$(count failed)
executed=$(count executed)
# A test host that died counts as a failure even when no test of its own reported one.
if [ $status -ne 0 ] && [ "$failed" -eq 0 ]; then failed=1; fi
if [ "$total" -eq 0 ]; then failed=1; fi
skipped=$((total - executed))
if [ $skipped -gt 0 ]; then
  echo "$passed passed, $failed failed, $skipped skipped"
else
  echo "$passed passed, $failed failed"
fi
[ "$failed" -eq 0 ]
