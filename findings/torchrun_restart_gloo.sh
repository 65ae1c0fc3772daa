#!/usr/bin/env bash
# torch 2.14.1: torchrun --max-restarts with gloo spends several restarts on the loss of one process, or all.
#
# The launcher keeps its store over the attempts, and init_process_group("gloo") publishes addresses in it under the
# same names in every attempt. The processes of the next attempt read the former one's addresses: they fail to
# connect, which uses up restarts, or wait for each other until a timeout. torch's own comment
# (distributed/rendezvous.py) says that every retry has a new store; torchrun --standalone does not make one.
# A cure: a PrefixStore with TORCHELASTIC_RESTART_COUNT, as below.
#
# Seen (two processes, of which one is killed once in attempt 0; --max-restarts 3), in three runs:
#   as documented: exit status 124, "Connection refused" True, finished in no attempt
#   as documented: exit status 0, "Connection refused" True, finished in attempt 2
#   as documented: exit status 1, "Connection refused" True, finished in no attempt
#   with a PrefixStore: exit status 0, "Connection refused" False, finished in attempt 1 (in all)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6
cd "$work"
cat >train.py <<'PY'
import os, signal, sys
import torch
import torch.distributed as dist

attempt, options = os.environ["TORCHELASTIC_RESTART_COUNT"], {}
if sys.argv[1] == "prefix":
    store, rank, size = next(dist.rendezvous("env://"))
    options = {"store": dist.PrefixStore(f"attempt {attempt}", store), "rank": rank, "world_size": size}
dist.init_process_group("gloo", **options)
dist.all_reduce(torch.ones(1))
if attempt == "0" and dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)  # as a machine does that runs out of memory
dist.barrier()
if dist.get_rank() == 0:
    print("finished in attempt", attempt)
dist.destroy_process_group()
PY
for mode in plain prefix; do
    status=0
    OMP_NUM_THREADS=1 timeout 60 venv/bin/torchrun --standalone --nproc_per_node 2 --max-restarts 3 train.py "$mode" \
        >"$mode.log" 2>&1 || status=$?
    echo "$status" >"$mode.status"
done
venv/bin/python - <<'PY'
import re
from pathlib import Path

seen = {}
for mode, words in (("plain", "as documented"), ("prefix", "with a PrefixStore")):
    log, status = Path(f"{mode}.log").read_text(), int(Path(f"{mode}.status").read_text())
    finished = re.findall(r"finished in attempt (\d)", log)
    seen[mode] = "Connection refused" in log, finished
    print(f'{words}: exit status {status}, "Connection refused" {seen[mode][0]}, finished in', end=" ")
    print(f"attempt {finished[0]}" if finished else "no attempt")
refused, finished = seen["plain"]
assert refused and finished != ["1"], "torchrun's restarts behave otherwise now"
assert seen["prefix"] == (False, ["1"])
PY
