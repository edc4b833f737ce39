#!/usr/bin/env bash
# Inspect an update, merge it with three values of α, and check what was written.
#
#   examples/merge.sh ORIGINAL UNLEARNED OUT
#
# Without arguments it makes a tiny pair first (a few seconds, offline).
set -euo pipefail

if [ $# -eq 0 ]; then
  root=$(mktemp -d)
  uipe-merge demo "$root/demo"
  set -- "$root/demo/original" "$root/demo/unlearned" "$root/grid"
fi
original=$1 unlearned=$2 out=$3

uipe-merge inspect "$original" "$unlearned"
mkdir -p "$out"
for alpha in 0.5 1 2; do
  uipe-merge "$original" "$unlearned" --alpha "$alpha" -o "$out/alpha-$alpha"
  uipe-merge verify "$out/alpha-$alpha"
done
