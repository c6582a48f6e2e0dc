#!/bin/bash
# Puts the kernel sources of each commit of the branch, oldest first, beside this script: sources/0 .. (0: before it).
set -e
here=$(dirname "$(readlink -f "$0")")
rm -rf "$here/sources"
number=0
for commit in a407f42 $(git -C . rev-list --reverse a407f42..b808941 -- plugins/cuda); do
  mkdir -p "$here/sources/$number"
  git -C . archive "$commit" plugins/cuda | tar -x -C "$here/sources/$number" --strip-components=2
  git -C . log -1 --format=%h\ %s "$commit" >"$here/sources/$number/COMMIT"
  number=$((number + 1))
done
cat "$here"/sources/*/COMMIT
