#!/usr/bin/env bash
# From nothing to a table of what quantization costs in LIBERO-Object, on one machine with a GPU: docs/libero.md, "In one go".
#
#   everything.sh DIRECTORY [STAGE ...]      stages: collect render train arms evaluate report; by default all of them
#
# Everything lies in DIRECTORY; a stage that was stopped goes on. By environment variables: PER_TASK demonstrations (100), RENDER,
# TRAIN and EVALUATE minutes (2, 10, 6), EPISODES of a task and an arm (50), SM to compile for (90).
set -euo pipefail
directory=${1:?a directory to work in}
shift
here=$(dirname "$0")
jobs=$(nproc)
export MUJOCO_GL=egl OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
mkdir -p "$directory"

collect() { python3 "$here/collect.py" "$directory/demonstrations" --episodes "${PER_TASK:-100}" --jobs "$jobs"; }
render() { python3 "$here/render.py" "$directory/demonstrations" --minutes "${RENDER:-2}" --every 2 --jobs "$jobs"; }
train() {
  [ -e "$directory/policy" ] || OMP_NUM_THREADS=8 python3 "$here/train.py" "$directory/demonstrations" --out "$directory/policy" \
    --minutes "${TRAIN:-10}" --steps 1000000 --every 2 --render-minutes 0
}
arms() { python3 "$here/arms.py" "$directory/policy" --out "$directory/arms" --sm "${SM:-90}" --jobs "$((jobs > 3 ? jobs - 3 : 1))"; }

# Two processes with half of the arms each, the most important ones first in both: one alone would wait for its interpreter.
evaluate() {
  local common=(--episodes "${EPISODES:-50}" --minutes "${EVALUATE:-6}" --places permuted --jobs "$((jobs + 4))")
  half 1 --torch "fp32=$directory/policy" $(plans w4a8 w4a8-llm-expert w4a8-compensated w8a8 w4a16) $(packs bare) &
  half 2 $(plans none w4a8-llm w4a8-all w4a8-expert duquant w8a8-vision) $(packs reference) &
  wait -n && wait -n
}
half() { python3 "$here/evaluate.py" "${common[@]}" --out "$directory/episodes-$1.jsonl" "${@:2}"; }
plans() { for name in "$@"; do [ ! -e "$directory/arms/$name.plan" ] || echo "--plan $directory/arms/$name.plan"; done; }
packs() { for name in "$@"; do [ ! -e "$directory/arms/$name.packs" ] || echo "--torch $name=$directory/policy@$directory/arms/$name.packs"; done; }

report() { python3 "$here/report.py" "$directory"/episodes-*.jsonl --common --plot "$directory/success.svg" --table "$directory/success.md"; }

for stage in "${@:-collect render train arms evaluate report}"; do
  for each in $stage; do
    case $each in
      collect | render | train | arms | evaluate | report) echo "$(date +%T) $each" && "$each" ;;
      *) echo "everything.sh: no stage $each; there are collect, render, train, arms, evaluate and report" >&2 && exit 2 ;;
    esac
  done
done
