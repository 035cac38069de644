#!/usr/bin/env bash
# Brings a training's results from a machine reached over SSH; run again it goes on.
#
#   vast/fetch_from_vast.sh [-F SSH_CONFIG] [-p PORT] [-d FOLDER] [--logs-only] [--into FOLDER] MODEL_ID [HOST]
#
#   --logs-only    only logs/training_MODEL_ID: checkpoint, history, TensorBoard; also while it trains
#   --into FOLDER  where logs/, plots/ and trained_model/ lie here (default: this clone)
#
# Without --logs-only also plots/MODEL_ID and the bundle, trained_model/MODEL_ID. The machine is not trusted: only plain
# files and folders come, no links, with the permissions that new files have here. A file is whole or not there.
# HOST is user@host or user@host:port; without it the rented machine, or `vast.host` of config.yaml.
#
# Examples:
#   vast/fetch_from_vast.sh 8d21be
#   vast/fetch_from_vast.sh --logs-only 8d21be me@gpu.example.org
set -euo pipefail
SUBJECT=fetch
# shellcheck source=vast/target.sh
source "$(dirname "${BASH_SOURCE[0]}")/target.sh"

into=$ROOT logs_only=no
while [ $# -gt 0 ]; do
  TOOK=2
  case $1 in
  --into) into=$(value "$@") ;;
  --logs-only) logs_only=yes TOOK=1 ;;
  *) target_option "$@" ;;
  esac
  shift "$TOOK"
done
case ${#WORDS[@]} in
1 | 2) ;;
*) wrong_use "MODEL_ID and one HOST at most" ;;
esac
model=${WORDS[0]}
check_name MODEL_ID "$model"
[ -d "$into" ] || wrong_use "no such folder: $into"
into=$(cd "$into" && pwd)
find_target "${WORDS[1]-}"

open_work
wanted=("logs/training_$model")
[ "$logs_only" = yes ] || wanted+=("plots/$model" "trained_model/$model")

# Not every training draws, or has got as far as a bundle: the folders that are there, one a line behind a mark.
there "cd $FOLDER && for one in ${wanted[*]}; do if [ -d \$one ]; then echo perpcast-found \$one; fi; done" ||
  fail 1 "there is no $FOLDER on $HOST: $(last_word "$(cat "$WORK/error")")"
sources=()
for one in "${wanted[@]}"; do
  if grep -q "perpcast-found $one\$" "$WORK/answer"; then
    sources+=("$HOST:$FOLDER/./$one")
  elif [[ $one != plots/* ]]; then
    fail 1 "$HOST has no $FOLDER/$one: the training has not got so far, or its id is another one"
  fi
done

# Unfinished files lie in a folder of their own: one that a kill left behind is never taken for a part of a model.
unfinished="$into/.perpcast/fetch/$$"
mkdir -p "$unfinished"
for left in "$into/.perpcast/fetch"/*; do
  kill -0 "${left##*/}" 2>/dev/null || rm -rf "$left"
done
for one in "${sources[@]}"; do # compared by content: checkpoints are all of one size, and may follow within a second
  transfer "this computer" -rtzRc --no-implied-dirs --chmod=Dugo=rwx,Fugo=rw --temp-dir="$unfinished" \
    --exclude=.rsync-partial "$one" "$into/"
done
rm -rf "$unfinished"
say "here now: ${wanted[*]}"
