"""A small picture classifier, in whose features `training.evaluation` measures the Fréchet distance.

    L = CE(group) + CE(style) + CE(concept) / 2 + CE(subgroup) / 2

on randomly shifted pictures. The heads of concepts and subgroups make the features finer and are not part of the model:
distances compare in the same features only, so the classifier is shipped, and has to be small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from tqdm.auto import tqdm

from .data import PictureDataset
from .loop import Schedule
from .pictures import to_tensor

LOSS_WEIGHTS = {"group": 1.0, "style": 1.0, "concept": 0.5, "subgroup": 0.5}
KEPT_HEADS = ("group", "style")


class PictureClassifier(ModelMixin, ConfigMixin):
    """A convolutional network with a linear head for each labelling, all on the same features.

        features = ReLU(linear(convolutions(mean_2x2(x))))

    The convolutions, with BatchNorm, reduce the side by 8 in three strides. Pictures of another size are resized first.

    Args:
        size: side S of the pictures in pixels, a multiple of 16.
        width: channels of the first convolutions; the last has four times as many.
        num_features: length of the features.
        dropout: probability, before the features.
        labels: by labelling, {"style": ("3d", "flat")}, in the order of the logits of its head.
    """

    @register_to_config
    def __init__(
        self,
        size: int = 64,
        width: int = 32,
        num_features: int = 64,
        dropout: float = 0.3,
        labels: Mapping[str, Sequence[str]] | None = None,
    ):
        super().__init__()
        if size < 16 or size % 16:
            raise ValueError(f"size is {size}; expected a multiple of 16")

        def convolution(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
            return [
                nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
                nn.BatchNorm2d(channels_out),
                nn.ReLU(),
            ]

        self.layers = nn.Sequential(
            nn.AvgPool2d(2),
            *convolution(3, width, 2),
            *convolution(width, width, 1),
            *convolution(width, 2 * width, 2),
            *convolution(2 * width, 4 * width, 2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(4 * width * (size // 16) ** 2, num_features),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(num_features, len(classes)) for name, classes in (labels or {}).items()}
        )

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, num_features), non-negative."""
        size = self.config.size
        if tuple(pictures.shape[2:]) != (size, size):
            pictures = F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)
        return self.layers(pictures.to(self.dtype))

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits (N, labels) by labelling."""
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}


def labels_of(data: PictureDataset) -> dict[str, list[str]]:
    """The label of each picture by labelling, "" where it has none."""
    concepts = [data.concepts[c] for c in data.concept.tolist()]
    return {
        "group": [c.group for c in concepts],
        "style": [data.styles[s] if s >= 0 else "" for s in data.style.tolist()],
        "concept": [c.name for c in concepts],
        "subgroup": [c.subgroup for c in concepts],
    }


def classes_of(labels: Sequence[str], classes: Sequence[str]) -> torch.Tensor:
    """Rows (N,) of ``classes``, -1 for a label that is not among them."""
    row = {label: i for i, label in enumerate(classes)}
    return torch.tensor([row.get(label, -1) for label in labels], dtype=torch.int64)


def train_classifier(
    data: PictureDataset,
    steps: int = 3000,
    seed: int = 0,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    largest_shift: int = 3,
    kept_heads: Sequence[str] = KEPT_HEADS,
    progress: bool = True,
) -> PictureClassifier:
    """Train a classifier on the training split; the same arguments give the same weights.

    Args:
        data: pictures; labellings with fewer than two labels are left out.
        steps: of the training.
        seed: of the weights and of all random draws.
        batch_size: pictures in a step.
        learning_rate: the largest.
        largest_shift: pixels by which pictures are shifted at most.
        kept_heads: labellings whose heads are part of the model.
        progress: show a bar.
    """
    data = data.train()
    labels = labels_of(data)
    heads = {name: sorted({*labels[name]} - {""}) for name in LOSS_WEIGHTS}
    heads = {name: classes for name, classes in heads.items() if len(classes) > 1}
    if not heads:
        raise ValueError("the pictures have fewer than two labels of any kind: there is nothing to classify")
    target = {name: classes_of(labels[name], classes) for name, classes in heads.items()}
    pictures = to_tensor(data.images)
    schedule = Schedule(steps, batch_size, learning_rate, warmup_steps=50, decay_from=0.0, weight_decay=0.02)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kept = {name: classes for name, classes in heads.items() if name in kept_heads}
        model = PictureClassifier(size=pictures.shape[2], labels=kept).train()
        dropped = nn.ModuleDict(
            {
                name: nn.Linear(model.config.num_features, len(classes))
                for name, classes in heads.items()
                if name not in kept
            }
        )
        parameters = [*model.parameters(), *dropped.parameters()]
        optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=schedule.weight_decay)
        bar = tqdm(range(steps), desc="classifier", disable=not progress, mininterval=1.0, delay=1.0)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            index = torch.randint(len(pictures), (batch_size,))
            features = model.features(shifted(pictures[index], largest_shift))
            loss = torch.zeros((), dtype=torch.float32)
            for name in heads:
                head = model.heads[name] if name in kept else dropped[name]
                # the sum, divided here: a batch may have no picture with this label
                error = F.cross_entropy(head(features), target[name][index], ignore_index=-1, reduction="sum")
                loss = loss + LOSS_WEIGHTS[name] * error / batch_size
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def shifted(pictures: torch.Tensor, largest: int) -> torch.Tensor:
    """The pictures (N, 3, H, W), all shifted by one random offset of up to ``largest`` pixels, the border continued."""
    height, width = pictures.shape[2:]
    y, x = torch.randint(2 * largest + 1, (2,)).tolist()
    return F.pad(pictures, (largest,) * 4, mode="replicate")[:, :, y : y + height, x : x + width]


@torch.no_grad()
def accuracies(model: PictureClassifier, data: PictureDataset, batch_size: int = 256) -> dict[str, float]:
    """By labelling, the share of pictures whose label is the most likely one, among those whose label is known."""
    labels = labels_of(data)
    model.eval()
    logits = [model(to_tensor(data.images[i : i + batch_size])) for i in range(0, len(data), batch_size)]
    out = {}
    for name, classes in model.config.labels.items():
        target = classes_of(labels[name], classes)
        right = torch.cat([part[name] for part in logits]).argmax(1) == target
        out[name] = float(right[target >= 0].double().mean())
    return out
