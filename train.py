"""Train on SYSU-MM01, RegDB or LLCM, on one GPU, the CPU, or many GPUs:

    python train.py --dataset sysu --lr 0.00035 --batch-size 8 --gpu 0
    python train.py --dataset regdb --trial 1 --gpu 0
    torchrun --nproc_per_node 4 train.py --dataset sysu

Writes <run>_best.t and <run>_last.t under save_model/, a log under log/<dataset>_log/ and TensorBoard events
under log/vis_log/. Read an epoch in this file from top to bottom; docs/method.md defines the method.
"""

import argparse
import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from augmentation import normalize
from data_manager import DATASETS
from devices import Processes, select_device
from engine.events import Board
from engine.files import Run, environment
from engine.settings import get_args_parser, open_run
from engine.training import SELECTION, Training, build_training
from eval_metrics import Metrics, summarize
from evaluation.protocols import Features
from model import extract_features
from utils import UserError, log, log_to_terminal, run_script

Batches = Iterable[tuple[dict[str, torch.Tensor], torch.Tensor]]

LOOK_EVERY = 20  # steps between two checks of the losses: a check waits for the device


class NotFinite(UserError):
    """A loss or a weight is infinite or not a number."""


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
    for modality in training.loader.modalities:
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
    names = tuple(training.loss.weights)
    network.train()
    history = []  # the losses of each step, on the device
    progress = tqdm(batches, f"epoch {epoch + 1}", len(training.loader.batches), leave=False, disable=None)
    for images, labels in progress:
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
        # The loss has used the tables from before this step; only now are they updated with its features.
        # Each process has a copy of the bank and updates it with the features of all processes, so that the
        # copies stay equal.
        if processes.world_size > 1:
            features = {modality: processes.all_gather(f.detach()) for modality, f in features.items()}
            labels = processes.all_gather(labels)
            for weight in training.loss.parameters():  # a baseline's classifier, outside the network
                weight.grad = processes.all_reduce(weight.grad) / processes.world_size
        if training.args.loss == "mce":  # the baselines have no memory
            bank.update(features, labels)
        scaler.step(optimizer)
        scaler.update()

        history.append(torch.stack([total, *(terms[name] for name in names)]).detach())
        if len(history) % LOOK_EVERY == 0:
            refuse_non_finite(history, names, epoch)
            show(progress, history[-1][0].item(), training, epoch)
    refuse_non_finite(history, names, epoch)
    return torch.stack(history).cpu()


def show(progress: tqdm, loss: float, training: Training, epoch: int) -> None:
    """Show the loss, the speed and the time left until the end of the run next to the progress bar."""
    if progress.disable:  # no terminal, so tqdm measures no time
        return
    seconds = progress.format_dict["elapsed"] / max(progress.n, 1)  # of a step
    images = training.images_per_step
    steps = (training.args.epochs - epoch) * len(training.loader.batches) - progress.n
    left = tqdm.format_interval(steps * seconds)
    progress.set_postfix_str(f"loss {loss:.3f}, {images / seconds:.0f} images/s, {left} left", refresh=False)


def refuse_non_finite(history: list[torch.Tensor], terms: Iterable[str], epoch: int) -> None:
    """Raise NotFinite with the first step and terms that are not finite. Waits for the device."""
    finite = torch.stack(history).isfinite().cpu()
    if not finite.all():
        step = int((~finite.all(1)).nonzero()[0])
        bad = [name for name, good in zip(("total", *terms), finite[step].tolist(), strict=True) if not good]
        raise NotFinite(f"the loss is not finite at epoch {epoch + 1}, step {step + 1}: {', '.join(bad)}")


def refuse_non_finite_weights(model: torch.nn.Module, epoch: int) -> None:
    """Raise NotFinite with the name of the first weight that is not finite."""
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise NotFinite(f"the weight {name} is not finite after epoch {epoch + 1}")


# --- a run: epochs, evaluation, checkpoints


def evaluate(training: Training) -> tuple[Metrics, Features]:
    """Evaluate the network: the metrics, averaged over the protocol's trials, and the features."""
    args = training.args
    training.model.eval()
    features = training.evaluation.features(
        training.model, training.device, training.dtype, args.test_batch, args.workers, training.processes
    )
    mean, _ = summarize(training.evaluation.score(features)[training.protocol])
    return mean, features


def evaluate_if_due(training: Training, run: Run, board: Board) -> None:
    """If an evaluation is due and not done yet: evaluate, keep the best, save and log.

    The epoch was saved before. So a failed evaluation loses no epoch, and a run that is stopped during an
    evaluation repeats it when it is resumed.
    """
    args, epoch = training.args, training.epoch
    due = epoch == args.epochs or (epoch > args.eval_start and epoch % args.eval_every == 0)
    if not due or training.evaluated == epoch:
        return
    metrics, features = evaluate(training)
    result = {"epoch": epoch, "rank1": float(metrics.cmc[0]), "mAP": metrics.mAP, "mINP": metrics.mINP}
    # The highest mAP is best, as in the released code; of equal ones, the earliest.
    is_best = (
        args.select != "last" and epoch > 0 and (training.best is None or metrics.mAP > training.best["mAP"])
    )
    if is_best:
        training.best = result
    training.evaluated, training.latest = epoch, metrics
    values = {"rank-1": metrics.cmc[0], "rank-10": metrics.cmc[9], "mAP": metrics.mAP, "mINP": metrics.mINP}
    board.add_similarities(features, training.evaluation, epoch)
    board.add_scalars(values, epoch)
    if training.processes.rank == 0:
        run.save(training.state(), is_best, SELECTION[args.select])
    words = "  ".join(f"{name} {100 * value:.2f}" for name, value in values.items())
    log.info("  %s: %s%s", training.protocol.title, words, "  (best so far)" if is_best else "")


def fit(training: Training, run: Run) -> None:
    """Train the remaining epochs: set the rate, rebuild the memory, train, save, evaluate, keep the best."""
    args, processes, loader = training.args, training.processes, training.loader
    board = Board(run.events if processes.rank == 0 else None, training.epoch)
    if training.epoch == 0:
        with contextlib.closing(loader.epoch(0)) as batches:  # for TensorBoard: augmented images
            board.add_batch(next(batches)[0])
    evaluate_if_due(training, run, board)  # with --epochs 0, or after a stop during an evaluation
    for epoch in range(training.epoch, args.epochs):
        rate = learning_rate(epoch, args.lr, args.warmup_epochs, args.decay_epochs)
        for group in training.optimizer.param_groups:
            group["lr"] = rate

        began = time.perf_counter()
        if args.loss == "mce":  # the baselines have no memory
            rebuild_memory(training, epoch)
        rebuilt = time.perf_counter()
        try:
            losses = train_one_epoch(training, loader.epoch(epoch), epoch)
            # The running statistics differ between processes: evaluate and save those of process 0.
            processes.broadcast(training.model.buffers())
            refuse_non_finite_weights(training.model, epoch)
        except NotFinite as error:
            good = (
                f"the last good checkpoint is {run.last}, after epoch {epoch}"
                if epoch
                else "no checkpoint was saved"
            )
            raise NotFinite(f"{error}; {good}") from error
        seconds = time.perf_counter() - rebuilt

        terms = training.loss.weights
        means = dict(zip(("loss", *terms), losses.mean(0).tolist(), strict=True))
        speed = training.images_per_step * len(losses) / seconds
        waiting = loader.wait_seconds / seconds
        scalars = {f"loss/{name}": value for name, value in means.items()}
        scalars |= {"rate": rate, "images per second": speed, "share of waiting for input": waiting}

        # TensorBoard first: what a continued run repeats replaces what was there. Then the checkpoint, and
        # only then the log's line, so that a run that is killed and continued logs no epoch twice.
        training.epoch = epoch + 1
        board.add_scalars(scalars, training.epoch)
        if processes.rank == 0:
            run.save(training.state())
        log.info(
            "epoch %d/%d: loss %.3f (%s), rate %.2e; memory %.1f s, steps %.1f s, %.0f images/s, "
            "waiting for input %.1f %%",
            epoch + 1, args.epochs, means["loss"], ", ".join(f"{name} {means[name]:.3f}" for name in terms),
            rate, rebuilt - began, seconds, speed, 100 * waiting,
        )  # fmt: skip
        evaluate_if_due(training, run, board)
    board.close()
    if training.best:
        epoch, mAP = training.best["epoch"], 100 * training.best["mAP"]
        log.info("best: %s, epoch %d, mAP %.2f", run.best, epoch, mAP)
    log.info("finished: %s", run.last)


def train_run(args: argparse.Namespace, run: Run, checkpoint: dict | None, processes: Processes) -> None:
    """Train one run to its last epoch, or, with --check, only try whether that would work.

    Args:
        args: the run's settings.
        run: the run's files.
        checkpoint: where to continue; None: from the start.
        processes: the processes of the run; only process 0 writes files.

    Raises:
        UserError: the run exists already, another process trains it, a file cannot be written, or the GPU has
            too little memory.
    """
    first = processes.rank == 0
    if first:
        run.refuse_unwritable()
        if not args.check:
            run.acquire()
    try:
        if (
            checkpoint
            and checkpoint["epoch"] >= args.epochs
            and checkpoint["evaluated"] == checkpoint["epoch"]
        ):
            log.info("%s is finished: %d epochs", run.last, checkpoint["epoch"])
            if args.data_path != (began := checkpoint["args"].get("data_path")):  # moved, or another dataset
                log.warning("it was trained on what was in %s", began or Path("data", args.dataset))
            return
        if checkpoint is None and first and not args.overwrite:
            run.refuse_to_overwrite(args.epochs)
        training = build_training(args, checkpoint, processes)
        if first and not args.check:
            if checkpoint is None:
                run.remove()
            run.open_log()
            if training.best and not run.best.exists():  # renamed, or moved without it
                log.warning("%s is missing: epoch %d, the best so far", run.best, training.best["epoch"])
        for line in [*environment(), *training.describe(), f"run: {run.last}"]:
            log.info("%s", line)
        if args.check:
            check(training)
        else:
            fit(training, run)
    except torch.OutOfMemoryError as error:
        sizes = f"--batch-size {args.batch_size} --num-pos {args.num_pos} or --test-batch {args.test_batch}"
        raise UserError(f"the GPU's memory is too small for {sizes} at {args.img_h}x{args.img_w}") from error
    except OSError as error:
        raise UserError(f"{error.filename or run.events}: {error.strerror or error}") from error
    finally:
        if first:
            run.release()


def check(training: Training) -> None:
    """Try a few steps and one evaluation batch and log their time and memory; writes no files."""
    bank, loader, device = training.bank, training.loader, training.device
    bank.reset({modality: torch.randn_like(bank.shared.proxies) for modality in loader.modalities})
    seconds = []
    for step in islice(loader.epoch(0), 3):
        began = time.perf_counter()
        losses = train_one_epoch(training, [step], 0)
        seconds.append(time.perf_counter() - began)
    log.info("one step: loss %.3f, %.3f s; the first %.1f s", losses[0, 0], min(seconds), seconds[0])
    images = torch.from_numpy(training.evaluation.pixels["infrared"][: training.args.test_batch])
    normalized = normalize(images.to(device))
    features = extract_features(training.model.eval(), [normalized], "infrared", training.dtype)
    log.info("one evaluation batch: %d images, %d features each", *features.shape)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        log.info("GPU memory: at most %.1f of %.1f GB", torch.cuda.max_memory_reserved() / 1e9, total / 1e9)
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        log.info("memory of this process: at most %.1f GB", peak / 1e9)
    log.info("memory bank: %.0f MB", 8 * bank.shared.proxies.nbytes / 1e6)
    state = sum(value.nbytes for value in training.model.state_dict().values()) / 1e6
    log.info("checkpoints: about %.0f MB", 4 * state)  # _best.t, and _last.t with Adam's two moments
    log.info("check passed: no checkpoint and no log was written")


def main(command: list[str]) -> int | None:
    """Train the run or runs of a command line; return 143 after SIGTERM and 130 after Ctrl-C."""
    args = get_args_parser().parse_args(command)
    processes = Processes()
    log_to_terminal(quiet=processes.rank > 0)
    if processes.world_size > 1 and args.gpu is not None and args.gpu >= 0:
        raise UserError(
            f"--gpu {args.gpu}: leave it out with torchrun: each process takes the GPU of its local rank"
        )
    if args.trial == "all" and args.resume not in (None, "auto"):
        raise UserError(
            f"--resume {args.resume}: a file is one trial's run; --resume auto goes with --trial all"
        )
    commands, run = [command], None
    if args.trial == "all":
        commands = [[*command, "--trial", str(trial)] for trial in DATASETS[args.dataset].trials]
    try:
        if args.trial == "all" and not args.resume and not args.check:
            if args.overwrite:
                if processes.rank == 0:
                    for words in commands:  # all now: a trial that an earlier run left would count as done
                        _, run, _ = open_run(words)
                        run.acquire()
                        run.remove()
                        run.release()
                if processes.world_size > 1:  # until then the others would find runs to continue
                    processes.start(select_device(args.gpu))
                    processes.barrier()
            commands = [[*(w for w in words if w != "--overwrite"), "--resume", "auto"] for words in commands]
        for words in commands:
            run_args, run, checkpoint = open_run(words)
            if args.trial == "all":
                log.info("RegDB, trial %s of 10", run_args.trial)
            train_run(run_args, run, checkpoint, processes)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Every finished epoch is saved already. The next Ctrl-C ends the process at once.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # An old run that is still there, because the new one has not begun, is still to be replaced.
        replaced = args.trial == "all" or (run is not None and run.begun)
        words = [word for word in sys.argv if word != "--overwrite" or not replaced]
        words += [] if args.resume or "--overwrite" in words else ["--resume", "auto"]
        launcher = ["torchrun", "--nproc_per_node", str(processes.world_size)]
        words = [*(launcher if processes.world_size > 1 else ["python"]), *words]
        log.info("stopped; to continue: %s", shlex.join(words))
        return 130 if isinstance(stop, KeyboardInterrupt) else stop.code
    except RuntimeError as error:
        if processes.world_size > 1 and "by peer" in str(error):  # connection closed or reset
            raise UserError("another process has failed: see its error message") from error
        raise
    processes.stop()
    return None


if __name__ == "__main__":
    run_script(main, lambda: sys.argv[1:])
