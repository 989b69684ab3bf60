#!/usr/bin/env bash
# Several hosts on one machine: each is a network namespace with a link of its own, limited to a rate, into one
# switch. torchrun trains across them, as it would across machines. Linux, as root.
#
#   cluster/multihost_lab.sh                                    2 hosts, ddp and fsdp, several rates; about 3 minutes
#   cluster/multihost_lab.sh --hosts 4 --rates "100 500"        rates in Mb/s, each way; without a limit comes first
#   cluster/multihost_lab.sh --lose-host                        a host disappears in mid-training; then a new start
#
# Results: build/multihost/*.json, and from them a table and a plot by cluster/compare.py.
# Nothing is left behind, whatever happens: hosts, switch and links live in namespaces that are removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

hosts=2 rates="100 200 500 1000" strategies="ddp fsdp" steps=30 model=mlp out=build/multihost lose_host=
python=${PYTHON:-.venv/bin/python}
usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; }
die() { echo "multihost_lab: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --hosts) hosts=${2:?}; shift ;;
    --rates) rates=${2:?}; shift ;;
    --strategies) strategies=${2:?}; shift ;;
    --steps) steps=${2:?}; shift ;;
    --model) model=${2:?}; shift ;;
    --out) out=${2:?}; shift ;;
    --lose-host) lose_host=1 ;;
    --help) usage; exit 0 ;;
    *) usage >&2; die "unknown option $1" ;;
  esac
  shift
done
[ "$(uname)" = Linux ] || die "network namespaces exist on Linux only; on this system read the recorded table in notebook 04"
[ "$(id -u)" = 0 ] || die "needs root for network namespaces: sudo $0"
for tool in ip tc; do command -v "$tool" >/dev/null || die "needs $tool: install the package iproute2"; done
[ -x "$python" ] || die "no $python: run make setup first"
[[ $hosts =~ ^[2-9]$ ]] || die "--hosts is 2 to 9, got $hosts"

lab=lab$$
switch=$lab-switch
host() { echo "$lab-host$1"; }
address() { echo "10.77.0.$1"; }

clean_up() {
  trap - EXIT INT TERM
  local names name
  names=$(ip netns list | awk -v lab="$lab-" 'index($1, lab) == 1 { print $1 }')
  for name in $names; do ip netns pids "$name" | xargs -r kill -9 2>/dev/null || true; done
  for name in $names; do ip netns del "$name" || true; done
}
trap clean_up EXIT
trap 'clean_up; exit 130' INT TERM

build_network() {
  ip netns add "$switch" || die "this system does not allow network namespaces (in a container? it needs CAP_SYS_ADMIN and CAP_NET_ADMIN)"
  ip -n "$switch" link add br0 type bridge
  ip -n "$switch" link set br0 up
  for h in $(seq "$hosts"); do
    ip netns add "$(host "$h")"
    ip -n "$switch" link add "port$h" type veth peer name eth0 netns "$(host "$h")"
    ip -n "$switch" link set "port$h" master br0 up
    ip -n "$(host "$h")" addr add "$(address "$h")/24" dev eth0
    ip -n "$(host "$h")" link set eth0 up
    ip -n "$(host "$h")" link set lo up
  done
}

# tbf lets a burst pass at once and then holds the rate: a millisecond's worth, and no less than 20 packets.
# The queue is long, so that packets wait and none is lost.
limit_links() { # Mb/s, each way; 0: no limit
  local burst=$(($1 * 1000000 / 8 / 1000))
  [ "$burst" -ge 32000 ] || burst=32000
  for h in $(seq "$hosts"); do
    for at in "-n $(host "$h") qdisc replace dev eth0" "-n $switch qdisc replace dev port$h"; do
      # shellcheck disable=SC2086  # $at is several words
      if [ "$1" = 0 ]; then tc $at root pfifo; else tc $at root tbf rate "$1mbit" burst "$burst" limit 16000000; fi
    done
  done
}

start_host() { # in the background: number, then the arguments of workshop_utils.train
  local h=$1 is_host=false
  shift
  [ "$h" != 1 ] || is_host=true
  exec ip netns exec "$(host "$h")" env OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=eth0 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \
    "$python" -m torch.distributed.run --nnodes="$hosts" --nproc-per-node=1 --rdzv-backend=c10d \
    --rdzv-endpoint="$(address 1):29500" --rdzv-conf="is_host=$is_host,join_timeout=60" \
    --local-addr="$(address "$h")" --rdzv-id="$lab" \
    -m workshop_utils.train "$@" >"$out/host$h.log" 2>&1
}

train_on_all() { # the arguments of workshop_utils.train
  local pids=() status=0 pid
  for h in $(seq "$hosts"); do start_host "$h" "$@" & pids+=($!); done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  [ "$status" = 0 ] || { tail -n 15 "$out"/host*.log >&2; die "the training failed; the logs are in $out"; }
  grep -h ' a step' "$out"/host*.log
}

compare_rates() {
  rm -f "$out"/*-*.json
  for rate in 0 $rates; do
    limit_links "$rate"
    for strategy in $strategies; do
      echo "$strategy, $hosts hosts, $([ "$rate" = 0 ] && echo no limit || echo "$rate Mb/s")"
      train_on_all --strategy "$strategy" --model "$model" --steps "$steps" --report "$out/$strategy-$rate.json"
    done
  done
  "$python" cluster/compare.py "$out"
}

# The last host's link goes dead, then its processes: nobody gets a word from it any more, as after a power cut.
lose_a_host() {
  local folder=$out/checkpoints arguments pids=() h
  rm -rf "$folder"
  arguments=(--strategy ddp --model "$model" --steps 200 --checkpoint-dir "$folder" --checkpoint-every 20 --timeout-s 8)
  limit_links 200
  echo "an undisturbed run"
  train_on_all "${arguments[@]}" --report "$out/undisturbed.json"
  rm -rf "$folder"
  echo "host $hosts disappears after the first checkpoint"
  for h in $(seq "$hosts"); do start_host "$h" "${arguments[@]}" --report "$out/disturbed.json" & pids+=($!); done
  until compgen -G "$folder/step_*.pt" >/dev/null; do sleep 0.2; jobs -r | grep -q . || die "training ended before a checkpoint"; done
  ip -n "$switch" link set "port$hosts" down
  ip netns pids "$(host "$hosts")" | xargs -r kill -9
  for h in "${pids[@]}"; do wait "$h" 2>/dev/null && die "a host ended as if nothing had happened" || true; done
  grep -h '^train:\|^\[.*train:' "$out/host1.log" || { tail -n 30 "$out/host1.log"; die "host 1 said nothing about the lost host"; }
  echo "checkpoints: $(cd "$folder" && echo step_*.pt)"
  ip -n "$switch" link set "port$hosts" up
  echo "the host is back; the same command again"
  train_on_all "${arguments[@]}" --report "$out/disturbed.json"
  "$python" - "$out" <<'PYTHON'
import json, sys
from pathlib import Path
undisturbed, disturbed = (json.loads(Path(sys.argv[1], f"{n}.json").read_text()) for n in ("undisturbed", "disturbed"))
assert disturbed["resumed_at"] > 0, "the second start did not go on from a checkpoint"
assert disturbed["weights_sha256"] == undisturbed["weights_sha256"], "other weights than the undisturbed run's"
print(f"went on from step {disturbed['resumed_at']}, and ended with the weights of the undisturbed run, bit for bit")
PYTHON
}

mkdir -p "$out"
build_network
if [ "$lose_host" ]; then lose_a_host; else compare_rates; fi
