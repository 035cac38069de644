# shellcheck shell=bash
# What the scripts of this folder share: which machine is meant, how it is reached, and what is said when it is not.
# Sourced by them after SUBJECT, the word before each message, is set. Bash 3.2 (macOS) is enough.
#
# Exit codes of all scripts: 1 failed, 2 wrong use, 3 the host key is unknown or another one, 4 the disk is full,
# 75 no connection for too long, 255 no connection.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
HOST='' PORT='' SSH_CONFIG='' FOLDER=''
WORDS=() # what was given that is no option
SSH=()   # how HOST is asked to run a command; INTERACTIVE the same for a person at the keyboard
INTERACTIVE=()
CHILD='' # what runs beside this script and ends with it
WORK=''  # a folder for its notes, deleted with it
PAUSE=1

exec 3>&2 # where messages go, also those of a trap in the middle of a command whose own errors go elsewhere
say() { printf '%s: %s\n' "$SUBJECT" "$*" >&3; }

fail() { # EXIT_CODE MESSAGE
  local code=$1
  shift
  say "$@"
  exit "$code"
}

wrong_use() { fail 2 "$1 ($(basename "$0") -h explains)"; }

# The comment at the top of the script that was called.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# value OPTION VALUE...: the option's value.
value() {
  [ $# -ge 2 ] || wrong_use "$1 needs a value"
  printf '%s' "$2"
}

# port OPTION VALUE...: the option's value, a TCP port.
port() {
  if ! [[ ${2-} =~ ^[0-9]{1,5}$ ]] || [ "$2" -lt 1 ] || [ "$2" -gt 65535 ]; then
    wrong_use "$1 needs a port from 1 to 65535, not '${2-}'"
  fi
  printf '%s' "$2"
}

# check_name WHAT NAME: refuses what could be more than the name of a folder.
check_name() {
  [[ $2 =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*$ ]] || wrong_use "$1 is a name of letters, digits, _ . and -, not '$2'"
}

# target_option ARGUMENTS...: takes the option, or the word, that comes next; TOOK is how many arguments that were.
# shellcheck disable=SC2034 # whoever calls it shifts by TOOK
target_option() {
  TOOK=2
  case $1 in
  -F) SSH_CONFIG=$(value "$@") ;;
  -p) PORT=$(port "$@") ;;
  -d) FOLDER=$(value "$@") ;;
  -h | --help)
    usage
    exit 0
    ;;
  -*) wrong_use "no such option: $1" ;;
  *)
    WORDS+=("$1")
    TOOK=1
    ;;
  esac
}

# find_target [HOST]: sets HOST, FOLDER, SSH and INTERACTIVE; without HOST the rented machine, or that of config.yaml.
find_target() {
  HOST=${1-}
  [ -n "$HOST" ] || ask_for_target
  if [[ $HOST =~ ^([^:]+):([0-9]+)$ ]]; then
    PORT=${PORT:-${BASH_REMATCH[2]}}
    HOST=${BASH_REMATCH[1]}
  fi
  FOLDER=${FOLDER:-/workspace/perpcast}
  [[ $HOST =~ ^[A-Za-z0-9_][A-Za-z0-9_.@-]*$ ]] || wrong_use "HOST is user@host or user@host:port, not '$HOST'"
  [[ $FOLDER =~ ^[A-Za-z0-9_./~][A-Za-z0-9_./~-]*$ ]] ||
    wrong_use "the folder there is a path of letters, digits and _ . / ~ -, not '$FOLDER'"
  [ -z "$SSH_CONFIG" ] || [ -r "$SSH_CONFIG" ] || wrong_use "no such SSH configuration: $SSH_CONFIG"
  INTERACTIVE=(ssh -o StrictHostKeyChecking=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=3)
  INTERACTIVE+=(-o ConnectTimeout=20)
  [ -z "$SSH_CONFIG" ] || INTERACTIVE+=(-F "$SSH_CONFIG")
  [ -z "$PORT" ] || INTERACTIVE+=(-p "$PORT")
  SSH=("${INTERACTIVE[@]}" -o BatchMode=yes -T)
}

ask_for_target() {
  local answer key text
  [ -x "$ROOT/.venv/bin/python" ] || fail 2 "no HOST was named, and there is no .venv to look it up: name user@host"
  answer=$(cd "$ROOT" && .venv/bin/python -m vast.target) || exit $?
  while IFS='=' read -r key text; do
    case $key in
    config) SSH_CONFIG=${SSH_CONFIG:-$text} ;;
    host) HOST=$text ;;
    folder) FOLDER=${FOLDER:-$text} ;;
    esac
  done <<<"$answer"
}

# open_work: makes WORK. However the script ends, WORK and CHILD end with it.
open_work() {
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap close_work EXIT
  WORK=$(mktemp -d)
}

close_work() {
  [ -z "$CHILD" ] || kill "$CHILD" 2>/dev/null || true
  [ -z "$WORK" ] || rm -rf "$WORK"
}

# attend COMMAND...: runs it beside this script, so that a signal is obeyed at once and not after it; its exit code.
attend() {
  local code=0
  "$@" <&0 &
  CHILD=$!
  wait "$CHILD" || code=$?
  CHILD=
  return "$code"
}

# pause: waits 1, 2, 4 … 30 seconds; PAUSE is what it will wait.
pause() {
  attend sleep "$PAUSE"
  PAUSE=$((PAUSE * 2))
  [ "$PAUSE" -le 30 ] || PAUSE=30
}

# there COMMAND...: runs a command line on HOST, its output in WORK/answer; without a connection, says why and ends.
there() {
  local code=0
  attend "${SSH[@]}" "$HOST" "$*" >"$WORK/answer" 2>"$WORK/error" </dev/null || code=$?
  [ "$code" != 255 ] || refuse_connection "$(cat "$WORK/error")"
  return "$code"
}

# What was said last, as one line of printable characters: some of it was said by a machine that is not trusted.
last_word() { printf '%s\n' "$1" | LC_ALL=C tr -cd '[:print:]\n' | grep -v '^ *$' | tail -n 1 || true; }

has_wrong_host_key() { [[ $1 == *"Host key verification failed"* ]]; }

# refuse_connection WHAT_SSH_SAID: ends with 3 where the host key is not the one known, else with 255.
refuse_connection() {
  has_wrong_host_key "$1" || fail 255 "no connection to $HOST: $(last_word "$1")"
  local connect="ssh${SSH_CONFIG:+ -F $SSH_CONFIG}${PORT:+ -p $PORT} $HOST" shown
  shown=$(printf '%s\n' "$1" | sed -n 's/.*\(SHA256:[A-Za-z0-9+\/=]*\).*/\1/p' | head -n 1)
  say "the host key of $HOST is refused, nothing was sent to it"
  if [[ $1 == *"HAS CHANGED"* ]]; then
    cat >&3 <<END
  expected: the key that is in known_hosts for this machine
  received: another one${shown:+, $shown}: another machine answers, or somebody in between
  next:     a rented machine is given back: python -m vast --destroy
            one of your own that was set up anew: compare the key on its own console,
              ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub
            then forget the old one ($(printf '%s\n' "$1" | sed -n 's/^ *\(ssh-keygen .*-R .*\)/\1/p' | head -n 1))
            and accept the new one by hand: $connect
END
  else
    cat >&3 <<END
  expected: a key in known_hosts for this machine
  received: one that is not known here
  next:     look at the key on the machine's own console, ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub
            then connect once by hand and accept the same one: $connect
END
  fi
  exit 3
}

# transfer FULL_DISK_OF RSYNC_ARGUMENTS...: files from or to HOST; what goes wrong is said in our words.
transfer() {
  local disk=$1 code=0 said part shell=''
  shift
  for part in "${SSH[@]}"; do shell="$shell\"$part\" "; done
  attend rsync -e "$shell" "$@" 2>"$WORK/error" || code=$?
  case $code in
  0 | 24) return ;; # 24: a file was replaced while it was read, its next version comes with the next copy
  esac
  said=$(cat "$WORK/error")
  if has_wrong_host_key "$said"; then
    refuse_connection "$said"
  elif [[ $said == *"No space left on device"* || $said == *"quota exceeded"* ]]; then
    fail 4 "the disk of $disk is full: make room there and run the same command again, it goes on where it was"
  fi
  printf '%s\n' "$said" >&2
  case $code in
  10 | 12 | 30 | 35 | 255) fail 255 "the connection to $HOST was lost: run the same command again, it goes on" ;;
  20) fail 130 "interrupted: run the same command again, it goes on where it was" ;;
  *) fail 1 "rsync failed with exit code $code, see above" ;;
  esac
}
