#!/usr/bin/env bash
# tensorboard 2.21.0 (with tensorboard-data-server 0.7.2): SummaryWriter(purge_step=N), PyTorch's way to continue
# a run that was killed, hides nothing in the two commonest cases.
#
# purge_step writes a session-start event with that step, "subsequent events at or after it are purged". But
#  - the Python loader (tensorboard --load_fast=false, EventAccumulator) takes the FIRST such event of a run for the
#    run's beginning and ignores it: after SummaryWriter(dir), then SummaryWriter(dir, purge_step=3), everything
#    that was written from step 3 on is still shown. It works only if the first writer, too, was given a purge_step.
#  - the default loader (--load_fast=auto, where the data server is installed) ignores session starts altogether. It
#    drops old points tag by tag, once that tag is written again at an earlier or equal step: a metric that the
#    continued run writes rarely keeps the killed run's points.
# So a curve after a resume can hold points of weights that were never saved. A cure for both loaders: write every
# tag again from the step of the checkpoint, and give each writer a purge_step, the first one too.
#
# The events are those that SummaryWriter writes, by tensorboard's own writer: no torch is needed here.
#
# Seen (losses at steps 1 2 3 4 and mAP at 2 4; killed; continued at step 3, where the loss is written once):
#   first writer without purge_step, --load_fast=false: loss at [1, 2, 3, 4, 3], mAP at [2, 4]
#   first writer without purge_step, --load_fast=true:  loss at [1, 2, 3], mAP at [2, 4]
#   first writer with purge_step,    --load_fast=false: loss at [1, 2, 3], mAP at [2]
#   first writer with purge_step,    --load_fast=true:  loss at [1, 2, 3], mAP at [2, 4]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check tensorboard==2.21.0 tensorboard-data-server==0.7.2 \
    setuptools==80.9.0
cd "$work"
cat >see.py <<'PY'
import json, re, subprocess, sys, time, urllib.request

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


def write(run, points, purge_step):
    """What SummaryWriter(run, purge_step=purge_step) and its add_scalar write."""
    writer = EventFileWriter(f"log/{run}")
    if purge_step is not None:
        writer.add_event(Event(step=purge_step, file_version="brain.Event:2"))
        writer.add_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
    for tag, step in points:
        value = Summary.Value(tag=tag, simple_value=1.0)
        writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))
    writer.close()


first = [("loss", 1), ("loss", 2), ("mAP", 2), ("loss", 3), ("loss", 4), ("mAP", 4)]
write("without", first, None)
write("with", first, 1)
time.sleep(1.5)  # the files are read in the order of their names, which hold the second
for run in ("without", "with"):
    write(run, [("loss", 3)], 3)

seen = {}
for fast in ("false", "true"):
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", "log", "--port", "0", "--load_fast", fast],
        stderr=subprocess.PIPE, text=True,
    )
    try:
        url = next(found[0] for line in server.stderr if (found := re.search(r"http://localhost:\d+", line)))
        for run in ("without", "with"):
            for tag in ("loss", "mAP"):
                for attempt in range(120):  # until the files are read
                    try:
                        with urllib.request.urlopen(f"{url}/data/plugin/scalars/scalars?run={run}&tag={tag}") as answer:
                            seen[fast, run, tag] = [step for _, step, _ in json.load(answer)]
                            break
                    except OSError:
                        time.sleep(0.5)
            print(f"first writer {run} purge_step, --load_fast={fast}: "
                  f"loss at {seen[fast, run, 'loss']}, mAP at {seen[fast, run, 'mAP']}")
    finally:
        server.terminate()
        server.wait()
assert seen == {
    ("false", "without", "loss"): [1, 2, 3, 4, 3], ("false", "without", "mAP"): [2, 4],
    ("true", "without", "loss"): [1, 2, 3], ("true", "without", "mAP"): [2, 4],
    ("false", "with", "loss"): [1, 2, 3], ("false", "with", "mAP"): [2],
    ("true", "with", "loss"): [1, 2, 3], ("true", "with", "mAP"): [2, 4],
}, seen
PY
"$work/venv/bin/python" see.py
echo "as described above"
