#!/bin/sh
# Unpacks what the CUDA tests use, as root on Debian, into /opt/cpmx-cuda (or $CPMX_CUDA_TOOLS):
#   lib/  NVRTC 11.8 with its built-ins, and libcuda (the driver's library; it needs no driver to load)
#   bin/  ptxas, cuobjdump and nvdisasm, taken from the toolkit package without its dependencies
# and installs clang, the second compiler, and clang 19 where it is to be had, which knows sm_90a. The packages come from Debian's non-free component through
# a package list of its own, so the system's sources stay as they are. Runs again quickly; what cannot
# be had is left out. The last line says what is there; the exit code is always 0.
set -u
tools=${CPMX_CUDA_TOOLS:-/opt/cpmx-cuda}

fetch() {
  work=$(mktemp -d) || return 1
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$work/lists/partial" "$tools/lib" "$tools/bin" || return 1
  chmod 755 "$work"
  . /etc/os-release
  mirror=$(sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*debian\/\{0,1\}\) .*/\2/p' \
    /etc/apt/sources.list /etc/apt/sources.list.d/*debian* 2>/dev/null | grep -v security | head -n 1)
  [ -n "$mirror" ] || return 1
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]" \
    "$mirror ${VERSION_CODENAME:-bookworm} contrib non-free" >"$work/nonfree.list"
  options="-oDir::Etc::sourcelist=$work/nonfree.list -oDir::Etc::sourceparts=- -oDir::State::Lists=$work/lists"
  options="$options -oAPT::Sandbox::User=root"
  (
    cd "$work" || exit 1
    apt-get $options update -qq
    for package in libnvrtc11.2 libnvrtc-builtins11.8 libcuda1 nvidia-cuda-toolkit; do
      apt-get $options download -qq "$package" && dpkg -x "$package"_*.deb unpacked
      rm -f "$package"_*.deb
    done
    cp -a unpacked/usr/lib/x86_64-linux-gnu/libnvrtc* "$tools/lib/"
    cp -a unpacked/usr/lib/x86_64-linux-gnu/nvidia/current/libcuda.so* "$tools/lib/"
    for program in ptxas cuobjdump nvdisasm; do cp -a "unpacked/usr/bin/$program" "$tools/bin/"; done
  ) </dev/null >/dev/null 2>&1
}

have() { [ -e "$tools/$1" ]; }
find_clang() {
  for name in clang-14 clang-15 clang-16 clang-17 clang-18 clang-19 clang; do
    command -v $name >/dev/null 2>&1 && echo $name && return
  done
}

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  have lib/libnvrtc.so.11.2 && have lib/libcuda.so.1 && have bin/ptxas && have bin/cuobjdump || fetch
  export DEBIAN_FRONTEND=noninteractive
  install="apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120"
  add() {
    $install "$1" </dev/null >/dev/null 2>&1 ||
      { apt-get update -qq </dev/null >/dev/null 2>&1 && $install "$1" </dev/null >/dev/null 2>&1; }
  }
  [ -n "$(find_clang)" ] || add clang-14
  command -v clang-19 >/dev/null 2>&1 || add clang-19
fi

say() { have "$2" && printf '%s, ' "$1" || printf 'no %s, ' "$1"; }
printf 'cuda tools in %s: ' "$tools"
say NVRTC lib/libnvrtc.so.11.2
say libcuda lib/libcuda.so.1
say ptxas bin/ptxas
say cuobjdump bin/cuobjdump
compiler=$(find_clang)
printf '%s, ' "${compiler:-no clang}"
command -v clang-19 >/dev/null 2>&1 && echo clang-19 || echo 'no clang-19'
exit 0
