#!/usr/bin/env bash
# Sends the code, the configuration and a dataset folder to a machine reached over SSH; run again it goes on where it was.
#
#   vast/sync_to_vast.sh [-F SSH_CONFIG] [-p PORT] [-d FOLDER] [--dataset ID] [--run MODEL_ID] [--code-only]
#                        [--config FILE]... [--from FOLDER] [HOST]
#
#   --dataset ID    this one of datasets/ (default: the newest)
#   --run MODEL_ID  also logs/training_MODEL_ID, so that the training goes on from its checkpoint
#   --code-only     no dataset
#   --config FILE   sent as config.yaml; the second one as config.1.yaml, the third as config.2.yaml (default: the
#                   config.yaml of this clone)
#   --from FOLDER   where datasets/ and logs/ lie here (default: this clone)
#
# Code is what git tracks. Nothing at all is sent where .env, .perpcast/, *.pem or a private SSH key is among it. A
# dataset, or a checkpoint folder, that is there already is left as it is. HOST is user@host or user@host:port; without
# it the rented machine, or `vast.host` of config.yaml. Exit code 4: the disk there is full.
#
# Examples:
#   vast/sync_to_vast.sh
#   vast/sync_to_vast.sh --code-only me@gpu.example.org
#   vast/sync_to_vast.sh -d '~/perpcast' --dataset 0f3a5c --run 8d21be gpu
set -euo pipefail
SUBJECT=sync
# shellcheck source=vast/target.sh
source "$(dirname "${BASH_SOURCE[0]}")/target.sh"

from=$ROOT dataset='' run='' code_only=no configs=()
while [ $# -gt 0 ]; do
  TOOK=2
  case $1 in
  --dataset) dataset=$(value "$@") ;;
  --run) run=$(value "$@") ;;
  --config) configs+=("$(value "$@")") ;;
  --from) from=$(value "$@") ;;
  --code-only) code_only=yes TOOK=1 ;;
  *) target_option "$@" ;;
  esac
  shift "$TOOK"
done
[ ${#WORDS[@]} -le 1 ] || wrong_use "one HOST at most"
[ ${#configs[@]} -gt 0 ] || configs=("$ROOT/config.yaml")
for config in "${configs[@]}"; do
  [ -f "$config" ] || fail 2 "no such configuration file: $config"
done
if [ "$code_only" = no ] && [ -z "$dataset" ]; then
  # shellcheck disable=SC2012 # names of datasets are hashes
  dataset=$(cd "$from/datasets" 2>/dev/null && ls -td -- */ 2>/dev/null | head -n 1 | tr -d /) || true
  [ -n "$dataset" ] || fail 2 "no dataset in $from/datasets: train_universal_transformer.py builds one, or say --code-only"
fi
folders=()
if [ "$code_only" = no ]; then
  check_name "--dataset" "$dataset"
  folders+=("datasets/$dataset")
fi
if [ -n "$run" ]; then
  check_name "--run" "$run"
  folders+=("logs/training_$run")
fi
for folder in ${folders[@]+"${folders[@]}"}; do
  [ -d "$from/$folder" ] || fail 2 "no such folder: $from/$folder"
done
find_target "${WORDS[0]-}"

open_work

# What git tracks and is there, without config.yaml, which is sent with the other configuration files.
list_code() {
  git -C "$ROOT" ls-files -z --cached >"$WORK/tracked" 2>"$WORK/error" ||
    fail 1 "what may be sent is what git tracks, and $ROOT is no git repository: $(last_word "$(cat "$WORK/error")")"
  [ -s "$WORK/tracked" ] || fail 1 "git tracks nothing in $ROOT: there is no code to send"
  local name
  while IFS= read -r -d '' name; do
    [ "$name" != config.yaml ] || continue
    [ -e "$ROOT/$name" ] || [ -L "$ROOT/$name" ] || continue
    printf '%s\0' "$name"
  done <"$WORK/tracked" >"$WORK/code"
}

# Keys stay at home, also those that somebody gave to git, or put into a dataset, by mistake.
refuse_secrets() {
  local name secrets=()
  while IFS= read -r -d '' name; do
    case /$name in
    */.env.example | */id_*.pub) ;;
    */.env | */.env.* | */.perpcast/* | *.pem | */id_rsa* | */id_dsa* | */id_ecdsa* | */id_ed25519*) secrets+=("$name") ;;
    esac
  done < <(
    cat "$WORK/code"
    printf '%s\0' "${configs[@]}"
    for folder in ${folders[@]+"${folders[@]}"}; do (cd "$from" && find "$folder" -print0); done
  )
  [ ${#secrets[@]} -eq 0 ] ||
    fail 1 "nothing was sent, for keys would have been: ${secrets[*]} (git rm --cached takes a file out of what git tracks)"
}

# Makes the folder there, and asks which of the others are there already, into WORK/there.
prepare_there() {
  local code=0 said
  there "mkdir -p $FOLDER && command -v rsync && cd $FOLDER &&
    for one in ${folders[*]-}; do if [ -d \$one ]; then echo perpcast-has \$one; fi; done" || code=$?
  mv "$WORK/answer" "$WORK/there"
  [ "$code" != 0 ] || return 0
  said=$(last_word "$(cat "$WORK/error")")
  [[ $said != *"No space left on device"* ]] || fail 4 "the disk of $HOST is full: $said"
  fail 1 "$HOST is not ready: ${said:-there is no rsync (apt-get install rsync)}"
}

send_code() {
  local number=0 config
  mkdir "$WORK/configs"
  for config in "${configs[@]}"; do
    if [ "$number" = 0 ]; then cp "$config" "$WORK/configs/config.yaml"; else cp "$config" "$WORK/configs/config.$number.yaml"; fi
    number=$((number + 1))
  done
  transfer "$HOST" -lptzc --from0 --files-from="$WORK/code" "$ROOT/" "$HOST:$FOLDER/"
  transfer "$HOST" -rzc --chmod=F644 "$WORK/configs/" "$HOST:$FOLDER/"
  say "the code is there: $(tr -cd '\0' <"$WORK/code" | wc -c | tr -d ' ') files, $number configuration(s)"
}

# A folder is written beside its place and moved there when it is whole: what has its name is whole.
send_folder() {
  local folder=$1 aside progress=()
  aside=${folder%/*}/.sync-${folder##*/}
  if grep -q "perpcast-has $folder\$" "$WORK/there"; then
    say "$folder was there already"
    return
  fi
  [ ! -t 1 ] || progress=(--progress)
  there "mkdir -p $FOLDER/$aside"
  transfer "$HOST" -rtz --partial-dir=.rsync-partial ${progress[@]+"${progress[@]}"} \
    "$from/$folder/" "$HOST:$FOLDER/$aside/"
  there "mv $FOLDER/$aside $FOLDER/$folder"
  say "$folder is there"
}

list_code
refuse_secrets
prepare_there
send_code
for folder in ${folders[@]+"${folders[@]}"}; do send_folder "$folder"; done
