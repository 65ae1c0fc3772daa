"""What a run trains with and how far it is: data, network, memory bank, loss, optimiser; progress."""

import argparse
import contextlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data_manager
from data_loader import IdentitySampler, TrainLoader
from data_manager import DATASETS
from devices import Processes, seed_globally, select_device
from engine.distributed import distribute
from engine.settings import loss_weights
from eval_metrics import Metrics
from evaluation.embedding import TestImages
from evaluation.protocols import Evaluation, Protocol
from loss import MCE, Baseline
from memory import MemoryBank, NoMemory
from model import TwoStreamResNet, load_strictly
from precision import settle
from readers.arrays import ArrayFiles, TrainingArrays, TrainingImages
from readers.own import draw_split
from utils import MODALITIES, UserError, log

SELECTION = {
    "test": "the epoch with the highest mAP on the test split, as in the literature: optimistic",
    "val": "the epoch with the highest mAP on the val ids, which are not trained on",
    "last": "the last epoch, without selection",
}


@dataclass
class Progress:
    """How far a run is, and what it has found: what a checkpoint records besides the state of Training."""

    epoch: int = 0  # completed epochs
    evaluated: int = -1  # the value of epoch at the last evaluation; -1: none yet
    best: dict | None = None  # {"epoch", "rank1", "mAP", "mINP"} of the best evaluation
    latest: Metrics | None = None  # metrics of the last evaluation
    history: list[dict] = field(default_factory=list)  # a record of each epoch, see record
    made_with: dict[str, str] = field(default_factory=dict)  # command, versions, … of this process

    def record(self) -> dict:
        """The last epoch's record, begun if need be; what the log, its JSON lines and TensorBoard tell."""
        if not self.history or self.history[-1]["epoch"] != self.epoch:
            self.history.append({"epoch": self.epoch, "made_with": self.made_with})
        return self.history[-1]

    @property
    def result(self) -> dict[str, float]:
        """{"rank1", "mAP", "mINP"} of the best evaluation, or of the last where none is chosen."""
        if self.best:
            return {name: self.best[name] for name in ("rank1", "mAP", "mINP")}
        return {"rank1": float(self.latest.cmc[0]), "mAP": self.latest.mAP, "mINP": self.latest.mINP}

    def state(self) -> dict:
        """For the checkpoint. cmc, mAP and mINP are from the last evaluation."""
        latest = self.latest
        return {
            "epoch": self.epoch,
            "evaluated": self.evaluated,
            "best": self.best,
            "cmc": latest and latest.cmc.tolist(),
            "mAP": latest and latest.mAP,
            "mINP": latest and latest.mINP,
            "history": self.history,
        }

    @classmethod
    def of(cls, checkpoint: dict | None) -> "Progress":
        """Of a checkpoint, or None at the start. Checkpoints of earlier versions have no history."""
        if checkpoint is None:
            return cls()
        latest = None
        if checkpoint["cmc"]:
            latest = Metrics(np.array(checkpoint["cmc"]), checkpoint["mAP"], checkpoint["mINP"])
        known = (checkpoint[key] for key in ("epoch", "evaluated", "best"))
        return cls(*known, latest, list(checkpoint.get("history", ())))


@dataclass
class Training:
    """What the steps of a run train with."""

    args: argparse.Namespace  # the run's settings, as its checkpoint records them
    processes: Processes
    device: torch.device
    dtype: torch.dtype | None  # autocast's; None: float32
    loader: TrainLoader
    data: str  # a line that describes the training data
    model: TwoStreamResNet  # the network that is evaluated and saved
    network: nn.Module  # model as a step calls it: wrapped for several processes, compiled
    bank: MemoryBank | NoMemory
    loss: nn.Module  # MCE, or a baseline with its classifier
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @property
    def images_per_step(self) -> int:
        """Images that a step of all processes together passes through the network."""
        own = self.args.batch_size * self.args.num_pos * len(self.loader.modalities)
        return own * self.processes.world_size

    def state(self) -> dict:
        """For the checkpoint, with Progress.state."""
        return {
            "net": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "args": vars(self.args),
            "selection": "the run's last checkpoint",
            "protocol": protocol_of(self.args).title,
            "data": self.data,
            "world_size": self.processes.world_size,
        }

    def describe(self) -> dict[str, str]:
        """Describe the run in a few lines, for its log: {what: words}."""
        args, device = self.args, self.device
        name = f"{torch.get_num_threads()} threads"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        precision = str(self.dtype or torch.float32).removeprefix("torch.")
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        settings = (f"{key} {value}" for key, value in sorted(vars(args).items()) if key != "command")
        modalities = len(self.loader.modalities)
        return {
            "settings": ", ".join(settings),
            "training data": self.data.removeprefix("training data: "),
            "input": f"border {args.pad}; pixels on the {self.loader.cache}",
            "network": f"{args.arch}, {args.stem} stem, {millions:.1f} million weights, from {args.weights}",
            "device": f"{device.type} ({name}), {precision}, {self.processes.world_size} process(es)",
            "a step": f"{args.batch_size} identities x {args.num_pos} images x {modalities} in each process, "
            f"{self.images_per_step} images in all; an epoch: {len(self.loader.sampler)} steps",
            "evaluation": f"{protocol_of(args).title}; the result: {SELECTION[args.select]}",
        }


def build_training(args: argparse.Namespace, checkpoint: dict | None, processes: Processes) -> Training:
    """Build what the steps of a run train with, or restore it from a checkpoint; seeds this process.

    Args:
        args: the run's settings.
        checkpoint: where to continue; None: from the start.
        processes: the processes of the run, which join here.

    Raises:
        UserError: data, weights, a device or a checkpoint that cannot be used.
    """
    device = select_device(args.gpu)
    processes.start(device)
    seed_globally(args.seed, args.deterministic)

    args, loader, data = build_loader(args, device, processes)
    weights = None if args.weights == "none" or checkpoint else args.weights
    model = TwoStreamResNet(args.arch, args.stem, weights)
    if checkpoint:
        load_strictly(model, checkpoint["net"], f"--resume {args.resume}")
    model.to(device, memory_format=torch.channels_last)
    dtype = settle(args.amp, model, partial(first_batch, loader), processes, training=True)
    bank, loss = build_loss(args, loader, model.dim, device, processes)
    network = distribute(model, loss, device, dtype, processes)
    training = Training(
        args=args,
        processes=processes,
        device=device,
        dtype=dtype,
        loader=loader,
        data=data,
        model=model,
        network=torch.compile(network) if args.compile else network,
        bank=bank,
        loss=loss,
        optimizer=torch.optim.Adam(
            [*model.parameters(), *loss.parameters()], args.lr, weight_decay=5e-4, fused=True
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )
    if checkpoint:
        restore(training, checkpoint)
    return training


def first_batch(loader: TrainLoader) -> dict[str, torch.Tensor]:
    """The images of a run's first step as the network gets them, the aux ones beside the visible ones."""
    with contextlib.closing(loader.epoch(0)) as batches:
        images, _ = next(batches)
    visible = torch.cat([images[modality] for modality in ("visible", "aux") if modality in images])
    return {"visible": visible, "infrared": images["infrared"]}


def protocol_of(args: argparse.Namespace) -> Protocol:
    """The protocol that a run is evaluated with."""
    return Protocol(args.dataset, args.mode, split="val" if args.select == "val" else "test")


def draw_evaluation(args: argparse.Namespace) -> Evaluation:
    """Who is searched where in a run's evaluations; UserError where nothing can be evaluated."""
    root = data_manager.dataset_root(args.dataset, args.data_path)
    trials = [int(args.trial)] if args.trial else DATASETS[args.dataset].trials
    return Evaluation.draw(root, [protocol_of(args)], trials)


def build_test_images(training: Training) -> TestImages:
    """The images that a run is evaluated on, decoded: broken ones are found before the first step.

    Raises:
        UserError: see Evaluation; or an image that cannot be read.
    """
    args = training.args
    test_images = TestImages(draw_evaluation(args), args.img_h, args.img_w, args.pixel_range)
    test_images.load(args.workers, training.processes)
    return test_images


def build_loss(
    args: argparse.Namespace, loader: TrainLoader, dim: int, device: torch.device, processes: Processes
) -> tuple[MemoryBank | NoMemory, nn.Module]:
    """Build the memory bank and the loss. A baseline has a classifier of its own, and no memory.

    Args:
        args: the run's settings.
        loader: whose identities and modalities the bank and the classifier are for.
        dim: D, the dimension of a feature.
        device: where both live.
        processes: that share a batch.
    """
    num_classes, weights = loader.sampler.classes, loss_weights(args)
    if args.loss != "mce":
        baseline = Baseline(args.loss, num_classes, dim, weights, args.margin, processes)
        return NoMemory(), baseline.to(device)
    bank = MemoryBank(
        num_classes, dim, args.temperature, args.shared_momentum, args.momentum, args.update == "hard", device
    )
    return bank, MCE(bank, weights, args.proxies, args.margin, processes)


def build_loader(
    args: argparse.Namespace, device: torch.device, processes: Processes
) -> tuple[argparse.Namespace, TrainLoader, str]:
    """Build the training input.

    Args:
        args: the run's settings.
        device: where batches are made.
        processes: process 0 decodes the training images if needed; the others wait for it.

    Returns:
        The settings with the pixel range that was found, for the checkpoint and test.py; the input; and a
        line that describes the training data.

    Raises:
        UserError: training images or arrays that cannot be used.
    """
    root = data_manager.dataset_root(args.dataset, args.data_path)
    if processes.rank > 0:
        processes.barrier()  # until process 0 has made what is missing: a split, the training arrays
    elif args.test_identities is not None:
        draw_split(root, args.test_identities, args.seed)
    arrays, labels = load_training_data(args, root)
    if processes.rank == 0:
        processes.barrier()
    sampler = IdentitySampler(
        labels, args.batch_size, args.num_pos, args.seed, processes.rank, processes.world_size
    )
    recipe = DATASETS[args.dataset].recipe
    modalities = [modality for modality in MODALITIES if not (args.no_aux and modality == "aux")]
    loader = TrainLoader(arrays.images, sampler, recipe, device, args.cache, args.pad, modalities)
    counts = ", ".join(f"{(array >= 0).sum()} {modality}" for modality, array in labels.items())
    size, digits = f"{loader.height}x{loader.width}", (arrays.fingerprint or "of unknown origin")[:16]
    data = f"training data: {sampler.classes} identities, {counts} images of {size}, {digits}"
    pixel_range = arrays.pixel_range and list(arrays.pixel_range)
    return argparse.Namespace(**vars(args) | {"pixel_range": pixel_range}), loader, data


def load_training_data(args: argparse.Namespace, root: Path) -> tuple[TrainingArrays, dict[str, np.ndarray]]:
    """Load the training arrays, and the labels {modality: (N,) int64} that this run trains with.

    Label -1 marks an image of a val id, which --select val does not train on.
    """
    samples = data_manager.train_samples(args.dataset, root, args.trial and int(args.trial))
    paths = {modality: samples[modality].paths for modality in samples}
    prefix = f"train_{args.trial}" if args.dataset == "regdb" else "train"
    files = ArrayFiles(args.array_path or root, args.img_h, args.img_w, prefix)
    if args.dataset == "sysu":
        arrays = files.load(paths, args.pixel_range, root)
    else:  # decoded on the first run, opened on the next
        pids = np.unique(samples["visible"].pids)
        source = TrainingImages(paths, data_manager.class_labels(samples), pids)
        arrays = files.load_or_write(source, args.workers, args.pixel_range)
    if args.select != "val":
        return arrays, arrays.labels
    if arrays.pids is None:
        raise UserError(
            f"--select val: {files.folder} does not record the ids of its training arrays: "
            "run pre_process_sysu.py"
        )
    train = data_manager.train_samples(args.dataset, root, split="train")
    kept = np.flatnonzero(np.isin(arrays.pids, train["visible"].pids))  # labels
    labels = {
        modality: np.where(np.isin(array, kept), np.searchsorted(kept, array), -1)
        for modality, array in arrays.labels.items()
    }
    return arrays, labels


def restore(training: Training, checkpoint: dict) -> None:
    """Restore loss, optimiser and scaler from a checkpoint; build_training has loaded the network."""
    resume = f"--resume {training.args.resume}"
    try:
        training.loss.load_state_dict(checkpoint["loss"])
        training.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty unless the run used fp16; --amp auto depends on the GPU
            training.scaler.load_state_dict(checkpoint["scaler"])
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{resume}: cannot restore the state of training: {error}") from error
    if checkpoint["data"] != training.data:
        counts, saved_counts = (str(data).rpartition(", ")[0] for data in (training.data, checkpoint["data"]))
        if training.args.dataset == "folder" and counts != saved_counts:  # two folders, one run's name
            raise UserError(f"{resume}: its {saved_counts}; not {counts}: give the new run a --name")
        log.warning("the training data has changed; the run started with %s", checkpoint["data"])
