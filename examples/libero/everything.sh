#!/usr/bin/env bash
# From nothing to a table of what quantization costs in LIBERO-Object, on one machine with a GPU: docs/libero.md, "In one go".
#
#   everything.sh DIRECTORY [STAGE ...]      stages: collect render train arms evaluate report; by default all of them
#
# Everything lies in DIRECTORY; a stage that was stopped goes on. By environment variables: PER_TASK demonstrations (150), RENDER,
# TRAIN and EVALUATE minutes (2, 10, 8), EPISODES of a task and an arm (50), NOISE of pixels where they are disturbed (30), SM to compile
# for (90).
set -euo pipefail
directory=${1:?a directory to work in}
shift
here=$(dirname "$0")
jobs=$(nproc)
export MUJOCO_GL=egl OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
mkdir -p "$directory"

processes=()
beside() { # COMMAND ...: in the background, until all_ended
  "$@" &
  processes+=($!)
}
all_ended() { # of which none may have failed; the others run on if one does
  local failed=0
  for process in "${processes[@]}"; do wait "$process" || failed=1; done
  processes=()
  return $failed
}

# Beside the demonstrations to learn from, undisturbed ones to be replayed, one of each task.
collect() {
  beside to_replay permuted
  beside to_replay official
  beside python3 "$here/collect.py" "$directory/demonstrations" --episodes "${PER_TASK:-150}" --jobs "$jobs"
  all_ended
}
to_replay() { # PLACES
  quietly "$directory/replay-$1.txt" python3 "$here/collect.py" "$directory/replay-$1" --places "$1" --episodes 1 --strength 0
}
quietly() { "${@:2}" >"$1" 2>&1 || { tail "$1" && return 1; }; } # FILE COMMAND ...: what it says goes into FILE
render() { python3 "$here/render.py" "$directory/demonstrations" --minutes "${RENDER:-2}" --every 2 --jobs "$jobs"; }
train() {
  [ -e "$directory/policy" ] || OMP_NUM_THREADS=8 python3 "$here/train.py" "$directory/demonstrations" --out "$directory/policy" \
    --minutes "${TRAIN:-10}" --steps 1000000 --every 2 --render-minutes 0 --torch-compile
}
arms() { python3 "$here/arms.py" "$directory/policy" --out "$directory/arms" --sm "${SM:-90}" --jobs "$((jobs > 3 ? jobs - 3 : 1))"; }

# Processes at once, since one would wait for its interpreter: most simulators for the arms that matter most, and fewer for the others,
# for disturbed pictures and for the official places. Each stops in time, at equal numbers of episodes of its own arms.
evaluate() {
  beside some 1 6 permuted 0 fp32 w4a8-compensated w4a8-llm-expert
  beside some 2 5 permuted 0 none w4a8 w4a8-llm naive-W4A8
  beside some 3-others 5 permuted 0 w4a8-all w4a8-expert w8a8 w8a8-vision w4a16 duquant reference bare w4a8-euler-5 w4a8-ab2-5 naive-W4A4 replay
  beside some 4-noise 2 permuted "${NOISE:-30}" fp32 w4a8-compensated w4a8-llm-expert bare naive-W4A8
  beside some 5-official 2 official 0 fp32 w4a8-compensated replay
  all_ended
}
some() { # FILE SHARE PLACES NOISE ARM...
  quietly "$directory/evaluate-$1.txt" python3 "$here/evaluate.py" $(options "$3" "${@:5}") --places "$3" --noise "$4" \
    --episodes "${EPISODES:-50}" --minutes "${EVALUATE:-8}" --jobs "$(($2 * jobs / 8 + 1))" --out "$directory/episodes-$1.jsonl"
}
options() { # PLACES ARM...
  for name in "${@:2}"; do
    case $name in
      fp32) echo "--torch fp32=$directory/policy" ;;
      naive-*) echo "--torch $name=$directory/policy@${name#naive-}" ;;
      replay) echo "--replay $directory/replay-$1" ;;
      *) [ -e "$directory/arms/$name.packs" ] && echo "--torch $name=$directory/policy@$directory/arms/$name.packs" ||
        echo "--plan $directory/arms/$name.plan" ;;
    esac
  done
}

report() { python3 "$here/report.py" "$directory"/episodes-*.jsonl --plot "$directory/success.svg" --table "$directory/success.md"; }

for stage in "${@:-collect render train arms evaluate report}"; do
  for each in $stage; do
    case $each in
      collect | render | train | arms | evaluate | report) echo "$(date +%T) $each" && "$each" ;;
      *) echo "everything.sh: no stage $each; there are collect, render, train, arms, evaluate and report" >&2 && exit 2 ;;
    esac
  done
done
