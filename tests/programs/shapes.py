"""Six shapes that public programs of Lightning have, small: modules, data modules, callbacks.

Each function gives what a program hands to its Trainer: the module, its data, and its callbacks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

Program = tuple[pl.LightningModule, Any, list[pl.Callback]]


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# A graph network: graphs of any size, put together by a collate_fn, and metrics of torchmetrics.


class Graph:
    """Nodes and edges of one graph, or of several side by side."""

    def __init__(self, x: Tensor, edge_index: Tensor, y: Tensor, batch: Tensor) -> None:
        self.x, self.edge_index, self.y, self.batch = x, edge_index, y, batch

    @property
    def num_graphs(self) -> int:
        return len(self.y)

    def to(self, device: Any, non_blocking: bool = False) -> Graph:
        move = [each.to(device) for each in (self.x, self.edge_index, self.y, self.batch)]
        return Graph(*move)


class Rings(Dataset[Graph]):
    """Rings and stars, which only their edges tell apart."""

    def __init__(self, count: int) -> None:
        generator = drawn(1)
        self.graphs = [self.make(index, generator) for index in range(count)]

    @staticmethod
    def make(index: int, generator: torch.Generator) -> Graph:
        nodes = int(torch.randint(4, 9, (1,), generator=generator))
        to = torch.arange(nodes)
        source = to.roll(1) if index % 2 else torch.zeros_like(to)
        x = torch.randn(nodes, 5, generator=generator)
        return Graph(x, torch.stack([source, to]), torch.tensor([index % 2]), torch.zeros_like(to))

    def __len__(self) -> int:
        return len(self.graphs)

    def __getitem__(self, index: int) -> Graph:
        return self.graphs[index]


def side_by_side(graphs: list[Graph]) -> Graph:
    firsts = torch.tensor([0] + [len(each.x) for each in graphs]).cumsum(0)
    return Graph(
        torch.cat([each.x for each in graphs]),
        torch.cat([g.edge_index + first for g, first in zip(graphs, firsts, strict=False)], 1),
        torch.cat([each.y for each in graphs]),
        torch.cat([each.batch + number for number, each in enumerate(graphs)]),
    )


class GraphConvolution(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.own, self.others = nn.Linear(inner, outer), nn.Linear(inner, outer, bias=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, to = edge_index
        total = torch.zeros_like(x).index_add(0, to, x[source])
        return self.own(x) + self.others(total)


class GraphClassifier(pl.LightningModule):
    def __init__(self, width: int = 16, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.convolutions = nn.ModuleList(
            [GraphConvolution(5, width), GraphConvolution(width, width)]
        )
        self.head = nn.Linear(width, 2)
        metrics = torchmetrics.MetricCollection(
            {
                "acc": torchmetrics.Accuracy("multiclass", num_classes=2),
                "f1": torchmetrics.F1Score("multiclass", num_classes=2, average="macro"),
            }
        )
        self.train_metrics = metrics.clone(prefix="train_")
        self.val_metrics = metrics.clone(prefix="val_")
        self.auroc = torchmetrics.AUROC("binary")

    def forward(self, data: Graph) -> Tensor:
        x = data.x
        for convolution in self.convolutions:
            x = convolution(x, data.edge_index).relu()
        pooled = x.new_zeros(data.num_graphs, x.shape[1]).index_add(0, data.batch, x)
        return self.head(pooled)

    def training_step(self, data: Graph, batch_idx: int) -> Tensor:
        logits = self(data)
        loss = F.cross_entropy(logits, data.y)
        self.log("train_loss", loss, batch_size=data.num_graphs, prog_bar=True)
        self.log_dict(
            self.train_metrics(logits, data.y),
            on_step=False,
            on_epoch=True,
            batch_size=data.num_graphs,
        )
        return loss

    def on_train_epoch_end(self) -> None:
        self.train_metrics.reset()

    def validation_step(self, data: Graph, batch_idx: int) -> None:
        logits = self(data)
        self.val_metrics.update(logits, data.y)
        self.auroc.update(logits.softmax(1)[:, 1], data.y)
        self.log("val_auroc", self.auroc, on_epoch=True, batch_size=data.num_graphs)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_metrics.compute())
        self.val_metrics.reset()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)


def graphs() -> Program:
    loaders = [DataLoader(Rings(n), 8, collate_fn=side_by_side) for n in (28, 12)]
    return GraphClassifier(), loaders, []


# A variational autoencoder, which draws in every step, and turns its second loss up by the step.


class VAE(pl.LightningModule):
    def __init__(self, latent_dim: int = 3, kl_warmup: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.fc_mu, self.fc_var = nn.Linear(32, latent_dim), nn.Linear(32, latent_dim)
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 32), nn.ReLU(), nn.Linear(32, 64))
        self.samples: list[Tensor] = []

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(x)
        return self.fc_mu(hidden), self.fc_var(hidden)

    def reparameterize(self, mu: Tensor, log_var: Tensor) -> Tensor:
        return torch.distributions.Normal(mu, (0.5 * log_var).exp()).rsample()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, log_var = self.encode(x)
        return self.decoder(self.reparameterize(mu, log_var)), mu, log_var

    def shared_step(self, batch: Any) -> dict[str, Tensor]:
        x, _ = batch
        decoded, mu, log_var = self(x)
        reconstruction = F.mse_loss(decoded, x.flatten(1), reduction="none").sum(1).mean()
        kl = (-0.5 * (1 + log_var - mu.square() - log_var.exp()).sum(1)).mean()
        weight = min(1.0, self.global_step / self.hparams.kl_warmup)
        return {"loss": reconstruction + weight * kl, "reconstruction": reconstruction, "kl": kl}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = self.shared_step(batch)
        self.log_dict({f"train_{name}": each.detach() for name, each in losses.items()})
        return losses

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.shared_step(batch)
        self.log_dict({f"val_{name}": each for name, each in losses.items()}, sync_dist=True)
        return losses["loss"]

    @torch.no_grad()
    def on_validation_end(self) -> None:
        z = torch.zeros(2, self.hparams.latent_dim, device=self.device)
        self.samples.append(self.decoder(z))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def images(count: int) -> TensorDataset:
    generator = drawn(2)
    y = torch.randint(4, (count,), generator=generator)
    x = torch.randn(4, 1, 8, 8, generator=generator)[y]
    return TensorDataset(x + 0.3 * torch.randn(count, 1, 8, 8, generator=generator), y)


def autoencoder() -> Program:
    return VAE(), [DataLoader(images(28), 8), DataLoader(images(12), 8)], []


# Segmentation: a U-Net with batch norm and a data module, a plateau, early stopping, the best kept.


def twice(inner: int, outer: int) -> nn.Sequential:
    def once(channels: int) -> list[nn.Module]:
        layer = nn.Conv2d(channels, outer, 3, padding=1, bias=False)
        return [layer, nn.BatchNorm2d(outer), nn.ReLU(inplace=True)]

    return nn.Sequential(*once(inner), *once(outer))


class UNet(nn.Module):
    def __init__(self, channels: int = 1, classes: int = 2, width: int = 4) -> None:
        super().__init__()
        self.down1, self.down2 = twice(channels, width), twice(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.last = nn.Sequential(twice(2 * width, width), nn.Conv2d(width, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        return self.last(torch.cat([first, self.up(second)], 1))


class Segmentation(pl.LightningModule):
    def __init__(self, model: nn.Module, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"])
        self.model = model
        self.example_input_array = torch.zeros(1, 1, 8, 8)
        self.val_iou = torchmetrics.JaccardIndex("multiclass", num_classes=2)
        self.test_iou = self.val_iou.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def dice(self, logits: Tensor, y: Tensor) -> Tensor:
        probability = logits.softmax(1)[:, 1]
        both = (probability * y).sum((1, 2))
        return (1 - (2 * both + 1) / (probability.sum((1, 2)) + y.sum((1, 2)) + 1)).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y) + self.dice(logits, y)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.val_iou(logits.argmax(1), y)
        self.log("val/loss", F.cross_entropy(logits, y), prog_bar=True)
        self.log("val/iou", self.val_iou, on_step=False, on_epoch=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.test_iou(self(x).argmax(1), y)
        self.log("test/iou", self.test_iou)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.RMSprop(self.parameters(), lr=self.hparams.lr, momentum=0.5)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"},
        }


class Squares(pl.LightningDataModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str | None = None) -> None:
        generator = drawn(3)
        x = 0.5 * torch.randn(52, 1, 8, 8, generator=generator)
        y = torch.zeros(52, 8, 8, dtype=torch.long)
        for number, (row, column) in enumerate(torch.randint(5, (52, 2), generator=generator)):
            y[number, row : row + 4, column : column + 4] = 1
        everything = TensorDataset(x + y[:, None], y)
        self.train, self.val, self.test = random_split(everything, [28, 12, 12], drawn(42))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=self.hparams.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=self.hparams.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, batch_size=self.hparams.batch_size)

    predict_dataloader = test_dataloader


def segmentation() -> Program:
    callbacks: list[pl.Callback] = [
        EarlyStopping("val/loss", patience=5),
        ModelCheckpoint(monitor="val/iou", mode="max", save_weights_only=True),
    ]
    return Segmentation(UNet()), Squares(), callbacks


# A model of transformers that is fine-tuned: keyword arguments, groups without decay, a warmup.


class FineTuned(pl.LightningModule):
    def __init__(self, learning_rate: float = 5e-3, warmup_steps: int = 2) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        super().__init__()
        self.save_hyperparameters()
        config = BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=2,
        )
        self.model = BertForSequenceClassification(config)
        self.accuracy = torchmetrics.Accuracy("binary")

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self(**batch)[0]
        self.log("train_loss", loss)
        return loss

    def validation_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        val_loss, logits = self(**batch)[:2]
        preds = torch.argmax(logits, dim=1)
        self.accuracy(preds, batch["labels"])
        self.log("val_loss", val_loss, prog_bar=True)
        self.log("val_accuracy", self.accuracy)
        return {"loss": val_loss, "preds": preds}

    def configure_optimizers(self) -> Any:
        from transformers import get_linear_schedule_with_warmup

        no_decay = ["bias", "LayerNorm.weight"]

        def group(decays: bool, weight_decay: float) -> dict[str, Any]:
            named = self.model.named_parameters()
            params = [p for n, p in named if decays != any(each in n for each in no_decay)]
            return {"params": params, "weight_decay": weight_decay}

        groups = [group(True, 0.01), group(False, 0.0)]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.learning_rate, eps=1e-8)
        scheduler = get_linear_schedule_with_warmup(
            optimizer,
            num_warmup_steps=self.hparams.warmup_steps,
            num_training_steps=self.trainer.estimated_stepping_batches,
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]


class Sentences(Dataset[dict[str, Any]]):
    """Rows of tokens of any length, with a class."""

    def __init__(self, count: int) -> None:
        generator = drawn(4)
        lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
        self.rows = [torch.randint(2, 40, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"input_ids": row, "labels": int(row[0] % 2)}


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def fine_tuned() -> Program:
    loaders = [DataLoader(Sentences(n), 8, collate_fn=padded) for n in (28, 12)]
    return FineTuned(), loaders, []


# Diffusion: noise and times that are drawn, buffers, and the mean of weights kept by a callback.


class Denoiser(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.time = nn.Embedding(20, width)
        self.into, self.out = nn.Linear(64, width), nn.Linear(width, 64)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = F.silu(self.norm(self.into(x.flatten(1)) + self.time(t)))
        return self.out(hidden).view_as(x)


class Diffusion(pl.LightningModule):
    def __init__(self, timesteps: int = 20) -> None:
        super().__init__()
        self.model = Denoiser()
        self.timesteps = timesteps
        betas = torch.linspace(1e-4, 0.2, timesteps)
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, 0), persistent=False)

    def q_sample(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        kept = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return kept.sqrt() * x + (1 - kept).sqrt() * noise

    def p_losses(self, batch: Any) -> Tensor:
        x, _ = batch
        t = torch.randint(0, self.timesteps, (len(x),), device=self.device)
        noise = torch.randn_like(x)
        return F.smooth_l1_loss(self.model(self.q_sample(x, t, noise), t), noise)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.p_losses(batch)
        self.log("train/loss_simple", loss, prog_bar=True, logger=True, on_step=True, on_epoch=True)
        lr = self.optimizers().param_groups[0]["lr"]
        self.log("lr_abs", lr, prog_bar=True, logger=True, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.p_losses(batch), on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
        return [optimizer], [{"scheduler": warm, "interval": "step"}]


class EMA(pl.Callback):
    """Keeps a moving mean of the weights, and validates with it."""

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.model: Any = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.model = copy.deepcopy(pl_module.model).requires_grad_(False).eval()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pairs = zip(self.model.parameters(), pl_module.model.parameters(), strict=True)
        for mean, newest in pairs:
            mean.mul_(self.decay).add_(newest.detach(), alpha=1 - self.decay)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.model is not None and not trainer.sanity_checking:
            self.kept = copy.deepcopy(pl_module.model.state_dict())
            pl_module.model.load_state_dict(self.model.state_dict())

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.model is not None and not trainer.sanity_checking:
            pl_module.model.load_state_dict(self.kept)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        checkpoint["ema"] = self.model.state_dict()


def diffusion() -> Program:
    return Diffusion(), [DataLoader(images(28), 8), DataLoader(images(12), 8)], [EMA()]


# Contrastive: two views of every sample, a loss that couples those of a batch, a frozen copy.


class Views(Dataset[Any]):
    """Two views of an image, each with noise of its own."""

    def __init__(self, count: int) -> None:
        self.images = images(count)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image, label = self.images[index]
        generator = drawn(index)
        return [image + 0.1 * torch.randn(1, 8, 8, generator=generator) for _ in range(2)], label


class SimCLR(pl.LightningModule):
    def __init__(self, hidden_dim: int = 16, temperature: float = 0.2, max_epochs: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        assert self.hparams.temperature > 0.0, "The temperature must be a positive float!"
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32))
        self.projector = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(32, hidden_dim))
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def info_nce_loss(self, batch: Any, mode: str) -> Tensor:
        views, _ = batch
        features = self.projector(self.encoder(torch.cat(views, dim=0)))
        similarity = F.cosine_similarity(features[:, None, :], features[None, :, :], dim=-1)
        own = torch.eye(similarity.shape[0], dtype=torch.bool, device=similarity.device)
        similarity.masked_fill_(own, -9e15)
        positive = own.roll(shifts=similarity.shape[0] // 2, dims=0)
        similarity = similarity / self.hparams.temperature
        loss = (torch.logsumexp(similarity, dim=-1) - similarity[positive]).mean()
        self.log(mode + "_loss", loss)
        ordered = torch.cat(
            [similarity[positive][:, None], similarity.masked_fill(positive, -9e15)], 1
        )
        place = ordered.argsort(dim=-1, descending=True).argmin(dim=-1)
        self.log(mode + "_acc_top1", (place == 0).float().mean())
        self.log(mode + "_acc_mean_pos", 1 + place.float().mean())
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.info_nce_loss(batch, mode="train")

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        total = self.trainer.estimated_stepping_batches
        momentum = 1 - 0.5 * 0.1 * (math.cos(math.pi * self.global_step / total) + 1)
        pairs = zip(self.teacher.parameters(), self.encoder.parameters(), strict=True)
        for mean, newest in pairs:
            mean.lerp_(newest, 1 - momentum)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.info_nce_loss(batch, mode="val")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=self.hparams.max_epochs, eta_min=1e-3
        )
        return [optimizer], [scheduler]


def contrastive() -> Program:
    loaders = [DataLoader(Views(28), 8, drop_last=True), DataLoader(Views(16), 8)]
    return SimCLR(), loaders, []


PROGRAMS: dict[str, Callable[[], Program]] = {
    each.__name__: each
    for each in (graphs, autoencoder, segmentation, fine_tuned, diffusion, contrastive)
}


# Several domains to validate with, each by a loader of its own, as in work on generalisation.


class Domains(pl.LightningModule):
    """Classifies what has labels, and rebuilds what has none by a head that only that needs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
        self.head, self.decoder = nn.Linear(16, 2), nn.Linear(16, 4)
        self.accuracies = nn.ModuleList(torchmetrics.Accuracy("binary") for _ in range(2))
        self.auroc = torchmetrics.AUROC("binary")
        self.outputs: list[list[Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.trunk(batch[0])
        rebuilt = F.mse_loss(self.decoder(hidden), batch[0])
        return F.cross_entropy(self.head(hidden), batch[1]) + 0.1 * rebuilt

    def on_validation_epoch_start(self) -> None:
        self.outputs = [[], [], []]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        hidden = self.trunk(batch["x"] if dataloader_idx == 2 else batch[0])
        if dataloader_idx == 2:
            self.outputs[2].append(self.decoder(hidden))
            self.log("rebuilt", F.mse_loss(self.decoder(hidden), batch["x"]))
            return
        output, labels = self.head(hidden), batch[1]
        self.outputs[dataloader_idx].append(output)
        self.accuracies[dataloader_idx].update(output.argmax(1), labels)
        self.auroc.update(output.softmax(1)[:, 1], labels)
        self.log("loss", F.cross_entropy(output, labels), prog_bar=True)
        name = ("seen", "unseen")[dataloader_idx]
        self.log(f"{name}_acc", self.accuracies[dataloader_idx], add_dataloader_idx=False)
        self.log("auroc", self.auroc)

    def on_validation_epoch_end(self) -> None:
        accuracies = [each.compute() for each in self.accuracies]
        self.log("mean_acc", torch.stack(accuracies).mean())

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        x = batch["x"] if dataloader_idx == 2 else batch[0]
        return torch.cat([x[:, :1], torch.full_like(x[:, :1], 10 * dataloader_idx + batch_idx)], 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class Unlabelled(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int) -> None:
        self.x = torch.randn(count, 4, generator=drawn(5))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index]}


class DomainsDataModule(pl.LightningDataModule):
    @staticmethod
    def labelled(count: int, seed: int, shift: float = 0.0) -> TensorDataset:
        x = torch.randn(count, 4, generator=drawn(seed)) + shift
        return TensorDataset(x, (x.sum(1) > 0).long())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.labelled(48, 2), batch_size=12, shuffle=True)

    def val_dataloader(self) -> dict[str, DataLoader[Any]]:
        return {
            "seen": DataLoader(self.labelled(13, 3), batch_size=4),
            # Fewer samples than there are ranks.
            "unseen": DataLoader(self.labelled(2, 4, 0.5), batch_size=4),
            "unlabelled": DataLoader(Unlabelled(7), batch_size=2),
        }

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return list(self.val_dataloader().values())

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        return list(self.val_dataloader().values())
