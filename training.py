"""What a run trains with, built from its settings: data, network, memory bank, optimiser, evaluation."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import data_manager
from data_loader import IdentityBatches, TrainLoader
from devices import Processes, autocast_dtype, seed_everything, select_device
from eval_metrics import Metrics, summarize
from evaluation import Evaluation, Protocol
from images import open_training_arrays, training_arrays
from memory import MemoryBank
from model import TwoStreamResNet, extract_features, load_strictly
from utils import MODALITIES, UserError, log

SELECTION = {
    "test": "the best epoch is chosen on the test split, as the literature does: its result is optimistic",
    "val": "the best epoch is chosen on the val ids, which are not trained on",
    "last": "no epoch is chosen: the last one is the result",
}


def load_training_data(
    args: argparse.Namespace, root: Path, trial: int, check_stop: Callable[..., None]
) -> tuple[dict, dict, str]:
    """Training images {modality: (N, H, W, 3) uint8}, labels {modality: (N,) int64} and a fingerprint.

    Label -1: an image of a val id, which --select val does not train on.
    """
    samples = data_manager.train_samples(args.dataset, root, trial)
    paths = {modality: those.paths for modality, those in samples.items()}
    folder = args.array_path or root
    if args.dataset == "sysu":
        arrays = open_training_arrays(folder, args.img_h, args.img_w, paths, data_path=root)
    else:  # decoded on the first run, opened on the next
        prefix = f"train_{trial}" if args.dataset == "regdb" else "train"
        pids = sorted({int(pid) for pid in samples["visible"].pids})
        labels = data_manager.class_labels(samples)
        arrays = training_arrays(
            folder, paths, labels, pids, args.img_h, args.img_w, args.workers, prefix, lambda _: check_stop()
        )
    if args.select != "val":
        return arrays.images, arrays.labels, arrays.fingerprint or "of unknown origin"
    if arrays.pids is None:
        raise UserError(
            f"--select val needs to know the ids behind the arrays in {folder}: run pre_process_sysu.py"
        )
    train = data_manager.train_samples(args.dataset, root, trial, split="train")
    kept = np.flatnonzero(np.isin(arrays.pids, train["visible"].pids))  # labels
    labels = {
        modality: np.where(np.isin(own, kept), np.searchsorted(kept, own), -1)
        for modality, own in arrays.labels.items()
    }
    return arrays.images, labels, arrays.fingerprint


def describe_data(images: dict[str, np.ndarray], labels: dict[str, np.ndarray], fingerprint: str) -> str:
    """The training data in one line."""
    counts = ", ".join(f"{(own >= 0).sum()} {modality}" for modality, own in labels.items())
    height, width = images["visible"].shape[1:3]
    identities = labels["visible"].max() + 1
    return f"training data: {identities} identities, {counts} images of {height}x{width}, {fingerprint[:16]}"


class Training:
    """Everything that a run trains with, built from its settings; `start`: the number of finished epochs."""

    def __init__(
        self,
        args: argparse.Namespace,
        trial: int,
        checkpoint: dict | None,
        processes: Processes,
        check_stop: Callable[..., None],
    ):
        self.args, self.processes, self.check_stop = args, processes, check_stop
        local = processes.local_rank if processes.world_size > 1 and args.gpu >= 0 else args.gpu
        self.device = select_device(local)
        self.dtype = autocast_dtype(args.amp, self.device)
        processes.start(self.device)
        seed_everything(args.seed, args.deterministic)
        root = data_manager.dataset_root(args.dataset, args.data_path)
        if args.select == "val" and args.dataset != "sysu":
            raise UserError("--select val: only SYSU-MM01 has val ids")
        split = "val" if args.select == "val" else "test"
        self.protocol = Protocol(args.dataset, args.mode, split=split)
        trials = (trial,) if args.dataset == "regdb" else data_manager.DATASETS[args.dataset].trials
        self.evaluation = Evaluation(
            root, [self.protocol], trials, args.img_h, args.img_w, check_stop=check_stop
        )
        if processes.rank > 0:
            processes.wait()  # until the first process has made the arrays, where they have to be made
        images, labels, fingerprint = load_training_data(args, root, trial, check_stop)
        if processes.rank == 0:
            processes.wait()
        self.data = describe_data(images, labels, fingerprint)

        weights = None if args.weights == "none" or checkpoint else args.weights
        self.model = TwoStreamResNet(args.arch, args.stem, weights)
        if checkpoint:
            load_strictly(self.model, checkpoint["net"], f"--resume {args.resume}")
        self.model.to(self.device, memory_format=torch.channels_last)
        self.network = self.model
        if processes.world_size > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.model, device_ids=devices)
            self.network.broadcast_buffers = False  # training reads none; train.py shares them each epoch
        if args.compile:
            self.network = torch.compile(self.network)
        self.bank = MemoryBank(int(labels["visible"].max()) + 1, self.model.dim, device=self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), args.lr, weight_decay=5e-4, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        batches = IdentityBatches(
            labels, args.batch_size, args.num_pos, args.seed, processes.rank, processes.world_size
        )
        recipe = data_manager.DATASETS[args.dataset].recipe
        self.loader = TrainLoader(
            images, labels, batches, recipe, self.device, args.seed, args.cache, args.pad
        )

        self.start, self.best, self.latest = 0, None, None
        if checkpoint:
            if (count := checkpoint.get("world_size", 1)) != processes.world_size:
                raise UserError(
                    f"--resume {args.resume}: its run has {count} process(es), this has "
                    f"{processes.world_size}: start it with torchrun --nproc_per_node {count}"
                )
            try:
                self.optimizer.load_state_dict(checkpoint["optimizer"])
                if checkpoint["scaler"]:  # empty but of a run in fp16: --amp auto differs between GPUs
                    self.scaler.load_state_dict(checkpoint["scaler"])
            except torch.OutOfMemoryError:
                raise
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise UserError(f"--resume {args.resume}: broken state of the optimizer: {error}") from error
            if checkpoint.get("data") != self.data:
                log.warning("the data has changed: the run began with %s", checkpoint.get("data"))
            self.start, self.best = checkpoint["epoch"], checkpoint["best"]
            if checkpoint["cmc"]:
                self.latest = Metrics(np.array(checkpoint["cmc"]), checkpoint["mAP"], checkpoint["mINP"])

    def describe(self) -> list[str]:
        """The run in a few lines, for its log."""
        args, device = self.args, self.device
        name = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{torch.get_num_threads()} threads"
        )
        precision = str(self.dtype or torch.float32).removeprefix("torch.")
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        return [
            self.data,
            f"input: border {args.pad}; pixels on the {self.loader.cache}",
            f"network: {args.arch}, {args.stem} stem, {millions:.1f} million weights, {args.weights} first",
            f"device: {device.type} ({name}), {precision}, {self.processes.world_size} process(es)",
            f"a step: {args.batch_size} identities x {args.num_pos} images x 3 in each process; "
            f"an epoch: {len(self.loader.batches)} steps",
            f"evaluation: {self.protocol.title}; {SELECTION[args.select]}",
        ]

    @torch.no_grad()
    def rebuild_memory(self, epoch: int) -> None:
        """Reset the bank to the class means of the features of the whole training set, in each modality."""
        self.model.eval()
        means = {}
        for modality in MODALITIES:
            sums = torch.zeros_like(self.bank.shared.proxies)  # (C, D)
            counts = sums.new_zeros(len(sums), 1)
            batches = self.loader.memory_batches(
                modality, self.args.test_batch, epoch, self.processes.rank, self.processes.world_size
            )
            for images, labels in batches:
                self.check_stop()
                sums.index_add_(0, labels, extract_features(self.model, [images], modality, self.dtype))
                counts.index_add_(0, labels, counts.new_ones(len(labels), 1))
            means[modality] = self.processes.sum(sums) / self.processes.sum(counts)
        self.bank.reset(means)

    def of_all_processes(
        self, features: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Features and labels of the whole batch, of which each process has a part: so all banks agree."""
        gathered = {
            modality: self.processes.gather(f.detach()).flatten(0, 1) for modality, f in features.items()
        }
        return gathered, self.processes.gather(labels).flatten()

    def load_test_images(self) -> None:
        """Decode the images that are evaluated on, unless it was done; UserError naming every broken one."""
        if not self.evaluation.pixels:
            self.evaluation.load(self.args.workers, self.processes)

    def evaluate(self) -> Metrics:
        """The metrics of the network as it is now, mean over the trials."""
        self.load_test_images()
        self.model.eval()
        args = self.args
        features = self.evaluation.features(
            self.model, self.device, self.dtype, args.test_batch, args.workers, self.processes
        )
        mean, _ = summarize(self.evaluation.score(features)[self.protocol])
        return mean

    def state(self, epoch: int, log_size: int) -> dict:
        """The checkpoint after `epoch` epochs; cmc, mAP and mINP are those of the last evaluation."""
        latest = self.latest
        return {
            "net": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "args": {key: value for key, value in vars(self.args).items() if key in self.args.defaults},
            "cmc": latest and latest.cmc.tolist(),
            "mAP": latest and latest.mAP,
            "mINP": latest and latest.mINP,
            "best": self.best,
            "selection": "the run's last checkpoint",
            "protocol": self.protocol.title,
            "data": self.data,
            "world_size": self.processes.world_size,
            "log_size": log_size,
        }
