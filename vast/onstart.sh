#!/bin/sh
# What a rented instance runs when it comes up, each time: `vastai create instance --onstart-cmd "$(cat vast/onstart.sh)"`
# with PERPCAST_DEADLINE (seconds since 1970) among its variables.
#
# First the dead man's switch: at the deadline the instance destroys itself, whatever became of the computer that rented
# it. The deadline of the first start counts, also after a restart. Then the host key into the log, which is read over
# HTTPS before the first connection, and the programs that the scripts need. Complete in itself: nothing else is there.

: "${HOME:=/root}"
umask 077
touch "$HOME/.no_auto_tmux" "$HOME/.hushlogin" # a script that logs in wants neither tmux nor a greeting

switch="$HOME/.perpcast_dead_man"
[ -s "$switch.deadline" ] || echo "${PERPCAST_DEADLINE:-}" >"$switch.deadline"
cat >"$switch.sh" <<'SWITCH'
#!/bin/sh
# Waits for the deadline, in steps, for the clock may be set meanwhile; then destroys this instance, until it is gone.
deadline=$1
url="${VAST_URL:-https://console.vast.ai}/api/v0/instances/$CONTAINER_ID/"
while left=$((deadline - $(date +%s))) && [ "$left" -gt 0 ]; do
  sleep $((left < 10 ? left : 10))
done
while :; do
  echo "perpcast-dead-man: the deadline is over, destroying instance $CONTAINER_ID"
  if command -v curl >/dev/null; then
    # The key comes as a file, for arguments are everybody's to read.
    printf 'header = "Authorization: Bearer %s"\n' "$CONTAINER_API_KEY" | curl -sS -m 30 -X DELETE -K - "$url"
  else
    python3 -c 'import os, sys, urllib.request as http
key = {"Authorization": "Bearer " + os.environ["CONTAINER_API_KEY"]}
print(http.urlopen(http.Request(sys.argv[1], method="DELETE", headers=key), timeout=30).read().decode())' "$url"
  fi
  echo
  sleep 30
done
SWITCH
case $(cat "$switch.deadline") in
'' | *[!0-9]*) echo "perpcast-dead-man: no deadline was given, there is none" ;;
*)
  nohup "$(command -v setsid || echo env)" sh "$switch.sh" "$(cat "$switch.deadline")" </dev/null 2>&1 &
  echo "perpcast-dead-man: set to $(cat "$switch.deadline")"
  [ -n "${CONTAINER_API_KEY:-}" ] || echo "perpcast-dead-man: without CONTAINER_API_KEY it cannot destroy anything"
  ;;
esac

install_programs() {
  missing=
  command -v rsync >/dev/null || missing="$missing rsync"
  command -v curl >/dev/null || missing="$missing curl"
  command -v ssh-keygen >/dev/null || missing="$missing openssh-server"
  python3 -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv"
  [ -d /etc/ssl/certs ] && [ -n "$(ls /etc/ssl/certs)" ] || missing="$missing ca-certificates"
  [ -n "$missing" ] || return 0
  export DEBIAN_FRONTEND=noninteractive
  # shellcheck disable=SC2086 # one word each
  { apt-get update && apt-get install -y --no-install-recommends $missing; } >/dev/null 2>&1 </dev/null ||
    echo "perpcast: could not install$missing"
}

# Again whenever it is another one, for a quarter of an hour: it may be made only after this has begun.
announce_host_key() {
  shown='' rounds=0
  while [ "$rounds" -lt 450 ]; do
    key=$(cut -d ' ' -f 1,2 /etc/ssh/ssh_host_ed25519_key.pub 2>/dev/null)
    if [ -n "$key" ] && [ "$key" != "$shown" ]; then
      echo "perpcast-host-key: $key"
      shown=$key
    fi
    rounds=$((rounds + 1))
    sleep 2
  done
}

[ -s /etc/ssh/ssh_host_ed25519_key.pub ] || ! command -v ssh-keygen >/dev/null || ssh-keygen -A >/dev/null
announce_host_key </dev/null &
install_programs
echo "perpcast: ready"
