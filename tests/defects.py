"""Defects of training, put in one at a time: which test notices each?

    python -m tests.defects [--only WORD ...]

Each defect replaces lines of the source in a copy of the repository, whose tests then run until one fails.
Prints a table; exits with 1 if a defect was not noticed. For use by hand, before a release and whenever the
step changes: it takes some minutes. Lines that are no longer in the source are an error: write them anew.
"""

import argparse
import functools
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch  # noqa: F401  imported once, for all the children
import torchvision  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds that the tests of one defect may take; longer is not noticed

# A file, the tests to run, and defects: lines of the file (-) and what stands there instead (+).
DEFECTS = """
== train.py, test_train.py

the bank is never updated
- bank.update(features, processes.all_gather(labels))
+ pass

the bank is updated before the loss
- total, terms = training.loss(features, labels, outputs, pooled)
+ bank.update(features, labels)
+ total, terms = training.loss(features, labels, outputs, pooled)

the bank learns from the network after the step
- scaler.update()
+ scaler.update()
+ after = F.normalize(network(visible, images["infrared"])).chunk(3)
+ bank.update(dict(zip(order, after, strict=True)), labels)

the rate is logged but not applied
- group["lr"] = rate
+ pass

the rate is one epoch ahead
- rate = learning_rate(epoch, args.lr, args.warmup_epochs, args.decay_epochs)
+ rate = learning_rate(epoch + 1, args.lr, args.warmup_epochs, args.decay_epochs)

steps in evaluation mode
- network.train()
+ network.eval()

aux images take the infrared stem
- outputs, pooled = network(visible, images["infrared"], with_pooled=True)  # (3n, D) each
+ infrared = torch.cat([images["aux"], images["infrared"]])
+ outputs, pooled = network(images["visible"], infrared, with_pooled=True)

each modality passes through the network alone
- outputs, pooled = network(visible, images["infrared"], with_pooled=True)  # (3n, D) each
+ outputs = pooled = torch.cat([network(visible), network(infrared=images["infrared"])])

visible and infrared features change places
- features = dict(zip(order, rows, strict=True))
+ features = dict(zip(order[::-1], rows, strict=True))

features are not normalised
- rows = F.normalize(outputs.float()).chunk(len(order))  # (n, D) each, unit norm
+ rows = outputs.float().chunk(len(order))

--amp is ignored in steps
- with torch.autocast(device.type, dtype, enabled=dtype is not None):
+ with torch.autocast(device.type, dtype, enabled=False):

gradients add up over steps
- optimizer.zero_grad(set_to_none=True)

no weight changes
- scaler.step(optimizer)

the loss is not scaled
- scaler.scale(total).backward()
+ total.backward()

the scale is never updated
- scaler.update()

the memory is rebuilt in training mode
- training.model.eval()
- means = {}
+ means = {}

the memory is rebuilt in a process's first epoch only
- rebuild_memory(training, epoch)
+ if epoch == 0:
+     rebuild_memory(training, epoch)

the memory forgets the last batch of a modality
- counts.index_add_(0, labels, counts.new_ones(len(labels), 1))
+ if len(labels) == test_batch:
+     counts.index_add_(0, labels, counts.new_ones(len(labels), 1))

the later of equal epochs is the best
- args.select != "last" and epoch > 0 and (progress.best is None or metrics.mAP > progress.best["mAP"])
+ args.select != "last" and epoch > 0 and (progress.best is None or metrics.mAP >= progress.best["mAP"])

every epoch is the best
- args.select != "last" and epoch > 0 and (progress.best is None or metrics.mAP > progress.best["mAP"])
+ args.select != "last" and epoch > 0

== engine/training.py, test_train.py

no weight decay
- [*model.parameters(), *loss.parameters()], args.lr, weight_decay=5e-4, fused=True
+ [*model.parameters(), *loss.parameters()], args.lr, fused=True

weight decay that bypasses Adam's moments
- optimizer=torch.optim.Adam(
+ optimizer=torch.optim.AdamW(

== engine/settings.py, test_train.py

a table learns too slowly
- add("--momentum", type=fraction, default=0.25, help="weight of a modality's old proxy")
+ add("--momentum", type=fraction, default=0.75, help="weight of a modality's old proxy")

== engine/training.py, test_train.py

--proxies is ignored
- return bank, MCE(bank, weights, args.proxies, args.margin, processes)
+ return bank, MCE(bank, weights, "historical", args.margin, processes)

RegDB is augmented with SYSU-MM01's recipe
- recipe = DATASETS[args.dataset].recipe
+ recipe = "sysu"

== data_loader.py, test_train.py

the aux table is of visible images
- channels = generator(self.seed, epoch, "memory").integers(3, size=len(labels))
+ channels = None

aux images are augmented as visible ones
- modality: draw_augmentation(rng, whole, *size, modality, self.recipe, self.pad).rows(mine)
+ modality: draw_augmentation(rng, whole, *size, "visible", self.recipe, self.pad).rows(mine)

== loss.py, test_train.py

a term has another weight
- WEIGHTS = {"shared": 1.0, "visible": 1.0, "infrared": 1.0, "aux": 0.4, "align": 1.2, "center": 1.0}
+ WEIGHTS = {"shared": 1.0, "visible": 1.0, "infrared": 1.0, "aux": 0.4, "align": 1.0, "center": 1.0}

== memory.py, test_train.py

the shared table learns from visible features only
- self.shared.update(all_features, labels.repeat(len(modalities)))
+ self.shared.update(features["visible"], labels)

== train.py, test_processes.py

a process's bank learns from its own features
- features = {modality: processes.all_gather(f.detach()) for modality, f in features.items()}
- bank.update(features, processes.all_gather(labels))
+ bank.update(features, labels)

the bank takes one process's labels for all
- bank.update(features, processes.all_gather(labels))
+ bank.update(features, labels.repeat(processes.world_size))

a process logs its own losses
- self.history.append(self.training.processes.mean(losses))
+ self.history.append(losses)

a process's memory is of its own images
- means[modality] = processes.all_reduce(sums) / processes.all_reduce(counts)
+ means[modality] = sums / counts.clamp(min=1)

== engine/distributed.py, test_processes.py

gradients and statistics are each process's own
- if processes.world_size == 1:
+ if True:

non-local blocks have their own statistics
- module.moments = moments_of_all
+ pass

batch norms have their own statistics
- module.__class__ = HostBatchNorm  # the same weights and names in a checkpoint
+ pass

statistics are the mean of the processes' variances
- return (variances + (means - mean).square()).mean(0), mean, count * len(means)
+ return variances.mean(0), mean, count * len(means)

running variances are of one process's count
- return (variances + (means - mean).square()).mean(0), mean, count * len(means)
+ return (variances + (means - mean).square()).mean(0), mean, count

the classifier's gradient is each process's own
- processes.mean(weight.grad)
+ pass

the first step sums gradients in another order
- sort_gradients(network, device, dtype)

the pass that is discarded moves the statistics
- buffer.copy_(value)
+ pass

== devices.py, test_processes.py

gradients of gathered rows are one process's
- torch.distributed.all_reduce(gradient)

== loss.py, test_processes.py

center knows a process's own identities
- others = self.processes.of_others(labels)
+ others = None

a triplet is of one process's images
- everything, everyone = (self.processes.all_gather(rows) for rows in (pooled.float(), all_labels))
+ everything, everyone = pooled.float(), all_labels

== data_loader.py, test_processes.py

a process draws its augmentation for its own images
- modality: draw_augmentation(rng, whole, *size, modality, self.recipe, self.pad).rows(mine)
+ modality: draw_augmentation(rng, len(labels), *size, modality, self.recipe, self.pad)

== devices.py, test_devices.py

processes that start anew read the former ones' addresses
- store = torch.distributed.PrefixStore(f"attempt {attempt}", store)

== devices.py, test_torchrun.py

who waits for a process that was killed hears of no signal
- previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
+ previous = signal.getsignal(signal.SIGTERM)

== engine/launch.py, test_torchrun.py

a signal ends the processes without a word
- except (KeyboardInterrupt, SystemExit) as stop:
+ except GeneratorExit as stop:

== train.py, test_fake_cuda.py

a step looks at its loss
- losses = torch.stack([total, *(terms[name] for name in self.names)]).detach()
+ losses = torch.stack([total, *(terms[name] for name in self.names)]).detach()
+ if total.item() > 1e6:
+     return

a step copies its losses to the host
- losses = torch.stack([total, *(terms[name] for name in self.names)]).detach()
+ losses = torch.stack([total, *(terms[name] for name in self.names)]).detach().cpu()

the memory's sums are on the host
- counts = sums.new_zeros(len(sums), 1)
+ counts = torch.zeros(len(sums), 1)

== engine/training.py, test_fake_cuda.py

the bank is on the host
- num_classes, dim, args.temperature, args.shared_momentum, args.momentum, args.update == "hard", device
+ num_classes, dim, args.temperature, args.shared_momentum, args.momentum, args.update == "hard"

== data_loader.py, test_fake_cuda.py

a step waits for its labels' way to the GPU
- yield images, labels.to(self.device, non_blocking=True)
+ yield images, labels.to(self.device)

== loss.py, test_fake_cuda.py

the loss leaves out rows by a mask
- positive = distances.diagonal()
+ positive = distances[same]

== memory.py, test_fake_cuda.py

the update counts on the host
- first = same.int().argmax(1)
+ first = torch.arange(len(labels))

== augmentation.py, test_fake_cuda.py

augmentation makes its rows on the host
- y = torch.arange(height, device=device)
+ y = torch.arange(height)

== train.py, test_variants.py

a baseline's two inputs change places
- total, terms = training.loss(features, labels, outputs, pooled)
+ total, terms = training.loss(features, labels, pooled, outputs)

== engine/training.py, test_variants.py

the classifier is not trained
- [*model.parameters(), *loss.parameters()], args.lr, weight_decay=5e-4, fused=True
+ model.parameters(), args.lr, weight_decay=5e-4, fused=True

a resume forgets the classifier
- training.loss.load_state_dict(checkpoint["loss"])
+ pass

== data_loader.py, test_variants.py

without aux images the others' draws differ
- for modality in MODALITIES
+ for modality in self.modalities

== memory.py, test_trajectory.py

m weights the new value
- moved = F.normalize(towards.lerp_(proxies, self.momentum))
+ moved = F.normalize(towards.lerp_(proxies, 1 - self.momentum))

== engine/training.py, test_trajectory.py

a weaker weight decay
- [*model.parameters(), *loss.parameters()], args.lr, weight_decay=5e-4, fused=True
+ [*model.parameters(), *loss.parameters()], args.lr, weight_decay=4e-4, fused=True
"""


def parse(text: str) -> Iterator[tuple[str, str, str, list[str], list[str]]]:
    """Yield (name, file, tests, lines, lines instead) of every defect in a text like DEFECTS."""
    file = tests = ""
    for block in text.strip().split("\n\n"):
        name, *lines = block.splitlines()
        if name.startswith("== "):
            file, tests = name.removeprefix("== ").split(", ")
        else:
            old, new = ([line[2:] for line in lines if line[0] == sign] for sign in "-+")
            yield name, file, tests, old, new


def put_in(path: Path, old: list[str], new: list[str]) -> None:
    """Replace lines of a file, whatever their indentation; ValueError unless it has them exactly once."""
    lines = path.read_text(encoding="utf-8").splitlines()
    bare = [line.strip() for line in lines]
    places = [k for k in range(len(lines)) if bare[k : k + len(old)] == old]
    if len(places) != 1:
        raise ValueError(f"{path.name} has {len(places)} times the lines {old}")
    [k] = places
    indentation = lines[k][: len(lines[k]) - len(bare[k])]
    lines[k : k + len(old)] = [indentation + line for line in new]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def first_failure(folder: Path, tests: str) -> str | None:
    """Which of tests, a file or one of its tests, fails first in a copy of the repository, if one does."""
    failures = multiprocessing.SimpleQueue()

    class Reporter:
        def pytest_runtest_logreport(self, report):
            if report.failed:
                failures.put(report.nodeid.removeprefix("tests/"))

    def run():
        os.chdir(folder)
        sys.path = [str(folder), *(path for path in sys.path if Path(path) not in (Path(), ROOT))]
        sys.modules.pop("tests")  # the original's
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", f"tests/{tests}"], [Reporter()])

    child = multiprocessing.get_context("fork").Process(target=run)  # with torch and pytest imported
    child.start()
    child.join(LIMIT)
    if child.is_alive():
        child.terminate()
        print(f"stopped after {LIMIT} s:")
        return None
    return None if failures.empty() else failures.get()


def main() -> int:
    """Try the defects; the exit status."""
    parser = argparse.ArgumentParser(description="Which test notices which defect?")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="defects with one of these words")
    only = parser.parse_args().only
    chosen = [own for own in parse(DEFECTS) if only is None or any(word in own[0] for word in only)]
    fails_anyway = functools.cache(lambda test: first_failure(ROOT, test) is not None)
    noticed = 0
    for name, file, tests, old, new in chosen:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "repository")
            left_out = shutil.ignore_patterns(".git", "__pycache__", "data", "demo", "*.t")
            shutil.copytree(ROOT, folder, ignore=left_out)
            put_in(folder / file, old, new)
            test = first_failure(folder, tests)
        if test is not None and fails_anyway(test):
            raise SystemExit(f"{test} fails without a defect too")
        noticed += test is not None
        print(f"{name:56} {test or 'NOT NOTICED'}", flush=True)
    print(f"{noticed} of {len(chosen)} defects noticed")
    return 0 if noticed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
