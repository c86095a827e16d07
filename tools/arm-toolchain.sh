#!/usr/bin/env bash
# Prints the folder that holds aarch64-linux-gnu-g++ and qemu-aarch64-static, for `make check-arm`.
#
# Where both are on PATH, theirs. Else Debian's packages are downloaded and unpacked under build/arm, without root and
# without installing anything: package lists of our own, because those of the machine may be empty or old. About 60 MB
# once; later calls find the stamp and take no time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PACKAGES=(g++-aarch64-linux-gnu qemu-user-static)
readonly PROGRAMS=(aarch64-linux-gnu-g++ aarch64-linux-gnu-ar aarch64-linux-gnu-ranlib qemu-aarch64-static)
readonly HERE=$PWD/build/arm/toolchain

on_path() {
  for program in "${PROGRAMS[@]}"; do command -v "$program" >/dev/null || return 1; done
}

apt() {
  apt-get -qq -o APT::Sandbox::User= -o Debug::NoLocking=1 -o Dir::State::Lists="$HERE/lists" -o Dir::Cache="$HERE/cache" "$@"
}

download() {
  mkdir -p "$HERE"/{lists/partial,cache/archives/partial,debs,root,bin}
  apt update
  # What is missing on this machine, dependencies included; a simulation needs no root.
  local plan
  plan=$(apt install --simulate --no-install-recommends "${PACKAGES[@]}")
  (cd "$HERE/debs" && apt download $(awk '$1 == "Inst" {print $2}' <<<"$plan"))
  for deb in "$HERE"/debs/*.deb; do dpkg -x "$deb" "$HERE/root"; done
}

# The cross binutils bring libraries of their own, which the loader does not look for in our folder. What was installed
# already was not fetched, and is found on PATH.
wrap() {
  local program=$1
  [[ -e $HERE/root/usr/bin/$program ]] || return 0
  printf '#!/bin/sh\nLD_LIBRARY_PATH=%q exec %q "$@"\n' "$HERE/root/usr/lib/$(uname -m)-linux-gnu" \
    "$HERE/root/usr/bin/$program" >"$HERE/bin/$program"
  chmod +x "$HERE/bin/$program"
}

if on_path; then
  dirname "$(command -v aarch64-linux-gnu-g++)"
  exit
fi
if [[ ! -e $HERE/complete ]]; then
  if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
    echo "needs ${PROGRAMS[*]} on PATH, or Debian's apt-get and dpkg to fetch them" >&2
    exit 1
  fi
  echo "fetching ${PACKAGES[*]} into build/arm (once)" >&2
  rm -rf "$HERE"
  download >&2
  for program in "${PROGRAMS[@]}"; do wrap "$program"; done
  find "$HERE/root/usr/bin" -name 'qemu-*' ! -name qemu-aarch64-static -delete  # 40 other processors, 250 MB
  rm -rf "$HERE"/{lists,cache,debs}
  touch "$HERE/complete"
fi
echo "$HERE/bin"
