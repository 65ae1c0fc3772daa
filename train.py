"""Train on SYSU-MM01, RegDB or LLCM, on one GPU, the CPU, or many GPUs:

    python train.py --dataset sysu --lr 0.00035 --batch-size 8 --gpu 0
    python train.py --dataset regdb --trial 1 --gpu 0
    torchrun --nproc_per_node 4 train.py --dataset sysu

Writes <run>_best.t and <run>_last.t under save_model/, a log and its numbers, <run>.log and .jsonl, under
log/<dataset>_log/, and TensorBoard events under log/vis_log/. engine/launch.py makes a run of the command
line; below are its epochs, from top to bottom, and what an epoch does. docs/method.md defines the method.
"""

if __name__ == "__main__":  # before torch is imported, which takes long from a slow disk
    from utils import before_torch

    before_torch()

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from tqdm import tqdm

from augmentation import normalize
from devices import peak_memory
from engine.events import Board
from engine.files import Run
from engine.launch import launch
from engine.training import SELECTION, Progress, Training
from eval_metrics import Metrics, summarize
from evaluation.embedding import TestImages
from evaluation.scoring import Features, score
from model import extract_features
from utils import UserError, log, run_script

Batches = Iterable[tuple[dict[str, torch.Tensor], torch.Tensor]]

LOOK_EVERY = 20  # steps between two checks of the losses: a check waits for the device
SPEAK_EVERY = 60  # seconds between two lines about the steps of an epoch, where no terminal shows a bar


class NotFinite(UserError):
    """A loss or a weight is infinite or not a number."""


def main(command: list[str]) -> int | None:
    """Train the run or runs of a command line; return 143 after SIGTERM and 130 after Ctrl-C."""
    return launch(command, fit, check)


# --- a run: its epochs, evaluations and checkpoints


def fit(training: Training, test_images: TestImages, progress: Progress, run: Run) -> None:
    """Train the remaining epochs: set the rate, rebuild the memory, train, save, evaluate, keep the best."""
    args, processes, loader = training.args, training.processes, training.loader
    started, epochs_before = time.perf_counter(), progress.epoch
    board = Board(run.events if processes.rank == 0 else None, progress.epoch)
    if progress.epoch == 0:
        with contextlib.closing(loader.epoch(0)) as batches:  # for TensorBoard: augmented images
            board.add_batch(next(batches)[0])
    # With --epochs 0, or after a stop during an evaluation, one is due now.
    evaluate_if_due(training, test_images, progress, run, board)
    for epoch in range(progress.epoch, args.epochs):
        rate = learning_rate(epoch, args.lr, args.warmup_epochs, args.decay_epochs)
        for group in training.optimizer.param_groups:
            group["lr"] = rate

        began = time.perf_counter()
        rebuild_memory(training, epoch)
        rebuilt = time.perf_counter()
        try:
            losses = train_one_epoch(training, loader.epoch(epoch), epoch)
            refuse_non_finite_weights(training.model, epoch)
        except NotFinite as error:
            good = "no checkpoint was saved"
            if epoch:
                good = f"the last good checkpoint is {run.last}, after epoch {epoch}"
            raise NotFinite(f"{error}; {good}") from error
        ended = time.perf_counter()

        progress.epoch = epoch + 1
        progress.record().update(
            epochs=args.epochs,
            rate=rate,
            loss=dict(zip(("total", *training.loss.weights), losses.mean(0).tolist(), strict=True)),
            steps=len(losses),
            gigabytes=peak_memory(training.device),
            images_per_second=training.images_per_step * len(losses) / (ended - rebuilt),
            seconds={
                "memory": rebuilt - began,
                "steps": ended - rebuilt,
                "waiting": loader.wait_seconds,  # of the steps', for input
                "left": (args.epochs - epoch - 1) * (ended - started) / (epoch + 1 - epochs_before),
            },
        )
        # TensorBoard first: what a continued run repeats replaces what was there. Then the checkpoint, and
        # only then the log, which a continued run completes from the checkpoint.
        board.add_epoch(progress.record())
        if processes.rank == 0:
            run.save(training.state() | progress.state())
        evaluate_if_due(training, test_images, progress, run, board)
    board.close()
    if progress.best:
        log.info("best: %s, epoch %d, mAP %.2f", run.best, progress.best["epoch"], 100 * progress.best["mAP"])
    log.info("finished: %s", run.last)


def evaluate_if_due(
    training: Training, test_images: TestImages, progress: Progress, run: Run, board: Board
) -> None:
    """If an evaluation is due and not done yet: evaluate, keep the best, save and log.

    The epoch was saved before. So a failed evaluation loses no epoch, and a run that is stopped during an
    evaluation repeats it when it is resumed.
    """
    args, epoch = training.args, progress.epoch
    due = epoch == args.epochs or (epoch > args.eval_start and epoch % args.eval_every == 0)
    if not due or progress.evaluated == epoch:
        return
    began = time.perf_counter()
    metrics, features = evaluate(training, test_images)
    # The highest mAP is best, as in the released code; of equal ones, the earliest.
    is_best = (
        args.select != "last" and epoch > 0 and (progress.best is None or metrics.mAP > progress.best["mAP"])
    )
    rank1, rank10, mAP, mINP = float(metrics.cmc[0]), float(metrics.cmc[9]), metrics.mAP, metrics.mINP
    if is_best:
        progress.best = {"epoch": epoch, "rank1": rank1, "mAP": mAP, "mINP": mINP}
    progress.evaluated, progress.latest = epoch, metrics
    progress.record()["evaluation"] = {
        "protocol": test_images.evaluation.protocols[0].title,
        "metrics": {"rank-1": rank1, "rank-10": rank10, "mAP": mAP, "mINP": mINP},
        "best": is_best,
        "seconds": time.perf_counter() - began,
    }
    board.add_evaluation(progress.record(), features, test_images.evaluation)
    if training.processes.rank == 0:
        run.save(training.state() | progress.state(), is_best, SELECTION[args.select])


def evaluate(training: Training, test_images: TestImages) -> tuple[Metrics, Features]:
    """Evaluate the network: the metrics, averaged over the protocol's trials, and the features."""
    args = training.args
    training.model.eval()
    (features,) = test_images.embed(
        training.model, training.device, training.dtype, args.test_batch, args.workers, training.processes
    )
    (scores,) = score(test_images.evaluation, features, intervals=False).values()
    return summarize([each.metrics for each in scores])[0], features


# --- an epoch: learning rate, memory, steps


def learning_rate(epoch: int, base: float, warmup: int, decay: tuple[int, int]) -> float:
    """The learning rate of an epoch: linear warm-up, base, a tenth after decay[0], a hundredth from decay[1].

    The released code compares with `>` at the first and `>=` at the second, and the published results were
    made with it (docs/method.md, section 7).

    Args:
        epoch: counted from 0.
        base: the rate after the warm-up.
        warmup: length of the warm-up, in epochs.
        decay: the two epochs at which the rate falls, counted from 0.
    """
    if epoch < warmup:
        return base * (epoch + 1) / warmup
    if epoch >= decay[1]:
        return base * 0.01
    return base * 0.1 if epoch > decay[0] else base


@torch.no_grad()
def rebuild_memory(training: Training, epoch: int) -> None:
    """Reset the bank to the class means of the whole training set's features (docs/method.md, section 5)."""
    bank, processes, test_batch = training.bank, training.processes, training.args.test_batch
    training.model.eval()
    means = {}
    for modality in filter(bank.modalities.__contains__, training.loader.modalities):
        sums = torch.zeros_like(bank.shared.proxies)  # (C, D)
        counts = sums.new_zeros(len(sums), 1)
        # Each process embeds its share of the images; all_reduce adds the sums up.
        for images, labels in training.loader.memory_batches(modality, test_batch, epoch):
            features = extract_features(training.model, [images], modality, training.dtype)  # (n, D)
            sums.index_add_(0, labels, features)
            counts.index_add_(0, labels, counts.new_ones(len(labels), 1))
        means[modality] = processes.all_reduce(sums) / processes.all_reduce(counts)
    bank.reset(means)


def train_one_epoch(training: Training, batches: Batches, epoch: int) -> torch.Tensor:
    """Take one step per batch, starting from the bank that rebuild_memory made.

    Args:
        training: the run; its network, bank and optimiser are updated.
        batches: ({modality: (n, 3, H, W) float32}, labels (n,) int64) on the device; no aux with --no-aux.
        epoch: counted from 0, for messages.

    Returns:
        The losses (steps, 1 + terms) float32 on the CPU: in each row the total, then the unweighted terms.

    Raises:
        NotFinite: a loss is not finite.
    """
    network, bank, optimizer, scaler = training.network, training.bank, training.optimizer, training.scaler
    device, dtype, processes = training.device, training.dtype, training.processes
    network.train()
    watch = Watch(training, batches, epoch)
    for images, labels in watch:
        # One pass through the trunk, so that its batch norms see all 3n images. The aux images are made from
        # visible images, so they go through the visible stem.
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            visible = torch.cat([images[modality] for modality in ("visible", "aux") if modality in images])
            outputs, pooled = network(visible, images["infrared"], with_pooled=True)  # (3n, D) each
        # The features are the outputs of BNNeck, L2-normalised. Their rows come in the order of the images.
        order = [modality for modality in ("visible", "aux", "infrared") if modality in images]
        rows = F.normalize(outputs.float()).chunk(len(order))  # (n, D) each, unit norm
        features = dict(zip(order, rows, strict=True))
        total, terms = training.loss(features, labels, outputs, pooled)

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(total).backward()
        # The loss has used the tables from before this step; only now are they updated with its features: all
        # processes', so that each one's copy of the bank stays the same.
        features = {modality: processes.all_gather(f.detach()) for modality, f in features.items()}
        bank.update(features, processes.all_gather(labels))
        scaler.step(optimizer)
        scaler.update()

        watch.add(total, terms)
    return watch.losses()


class Watch:
    """Yields an epoch's batches, keeps its losses on the device, and looks at and tells of them now and then.

    Args:
        training: the run.
        batches: of the epoch; a terminal shows how many are done.
        epoch: counted from 0.
    """

    def __init__(self, training: Training, batches: Batches, epoch: int):
        self.training, self.epoch, self.names = training, epoch, tuple(training.loss.weights)
        self.history = []  # the losses of each step, on the device
        self.began = self.spoke = time.perf_counter()
        steps = len(training.loader.sampler)
        self.bar = tqdm(batches, f"epoch {epoch + 1}", steps, leave=False, disable=None)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        return iter(self.bar)

    def add(self, total: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        """Take the losses of a step, in the mean over processes; see losses for what it may raise."""
        losses = torch.stack([total, *(terms[name] for name in self.names)]).detach()
        self.history.append(self.training.processes.mean(losses))
        if len(self.history) % LOOK_EVERY == 0:
            self.refuse_non_finite()
            self.speak()

    def losses(self) -> torch.Tensor:
        """The losses (steps, 1 + terms) float32 on the CPU; NotFinite, with the first step and its terms."""
        self.refuse_non_finite()
        return torch.stack(self.history).cpu()

    def refuse_non_finite(self) -> None:
        """Raise NotFinite with the first step and terms that are not finite. Waits for the device."""
        finite = torch.stack(self.history).isfinite().cpu()
        if not finite.all():
            step = int((~finite.all(1)).nonzero()[0])
            values = zip(("total", *self.names), finite[step].tolist(), strict=True)
            bad = ", ".join(name for name, good in values if not good)
            raise NotFinite(f"the loss is not finite at epoch {self.epoch + 1}, step {step + 1}: {bad}")

    def speak(self) -> None:
        """Tell loss, speed and the time left of the run: beside the bar, or once a minute in the log."""
        now, done = time.perf_counter(), len(self.history)
        if self.bar.disable and now - self.spoke < SPEAK_EVERY:
            return
        self.spoke, seconds = now, (now - self.began) / done  # of a step
        steps = (self.training.args.epochs - self.epoch) * self.bar.total - done
        speed, left = self.training.images_per_step / seconds, tqdm.format_interval(steps * seconds)
        words = f"loss {self.history[-1][0].item():.3f}, {speed:.0f} images/s, {left} left"
        if self.bar.disable:
            log.info("  epoch %d, step %d of %d: %s", self.epoch + 1, done, self.bar.total, words)
        else:
            self.bar.set_postfix_str(words, refresh=False)


def refuse_non_finite_weights(model: torch.nn.Module, epoch: int) -> None:
    """Raise NotFinite with the name of the first weight that is not finite."""
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise NotFinite(f"the weight {name} is not finite after epoch {epoch + 1}")


# --- trying a run


def check(training: Training, test_images: TestImages) -> None:
    """Try a few steps and one evaluation batch and log their time and memory; writes no files."""
    bank, loader, device = training.bank, training.loader, training.device
    classes, dim = loader.sampler.classes, training.model.dim
    bank.reset({modality: torch.randn(classes, dim, device=device) for modality in loader.modalities})
    seconds = []
    for step in islice(loader.epoch(0), 3):
        began = time.perf_counter()
        losses = train_one_epoch(training, [step], 0)
        seconds.append(time.perf_counter() - began)
    log.info("one step: loss %.3f, %.3f s; the first %.1f s", losses[0, 0], min(seconds), seconds[0])
    images = torch.from_numpy(test_images.pixels["infrared"][: training.args.test_batch])
    normalized = normalize(images.to(device))
    features = extract_features(training.model.eval(), [normalized], "infrared", training.dtype)
    log.info("one evaluation batch: %d images, %d features each", *features.shape)
    for name, gigabytes in peak_memory(device).items():
        log.info("memory of the %s: at most %.1f GB", name, gigabytes)
    if bank.modalities:
        log.info("memory bank: %.0f MB", 8 * bank.shared.proxies.nbytes / 1e6)
    state = sum(value.nbytes for value in training.model.state_dict().values()) / 1e6
    log.info("checkpoints: about %.0f MB", 4 * state)  # _best.t, and _last.t with Adam's two moments
    log.info("check passed: no checkpoint and no log was written")


if __name__ == "__main__":
    run_script(main, lambda: sys.argv[1:])
