"""Pre-training on the concepts: scenes and captions made anew for every batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.embedded.benchmark import EmbeddedData
from lightning_vlmq.data.embedded.concepts import Drawings, group_of, read_drawings
from lightning_vlmq.data.embedded.scenes import (
    COLOURS,
    SIZE,
    backgrounds,
    compose,
    draw_colours,
    place_freely,
    print_on_paper,
    recolour,
    textures,
)
from lightning_vlmq.data.embedded.wording import Writer
from lightning_vlmq.data.sets import Batch, as_is

TEXTURE_BANK = 1024
VAGUE = -1


class EmbeddedPretraining(EmbeddedData):
    """The training drawings, on scenes that are made anew every time, with captions; validation runs on id, unseen and spurious sets.

    A batch never holds two drawings of one concept, so equal concepts are never each other's negatives. An epoch goes
    ``rounds`` times through all trained concepts, each time with one of its drawings at random. The random draws of an epoch
    follow from the seed and the epoch's number, so a run that resumes from a checkpoint after any epoch goes on as if it had
    never stopped (Lightning reloads the loader when ``trainer.reload_dataloaders_every_n_epochs`` is 1, which is required).

    Args:
        root: folder of ``train.parquet``, made by ``make data``.
        captions: ``"clean"``, or ``"noisy"``: a share of the drawings has a wrong or vague caption, as alt texts of the web are.
        noise_rate: that share; half of them tell another concept, the same one every time, half name nothing.
        share_common: share of images on the background colour of their group.
        plain_until: share of the epochs, from the first, whose scenes are easy (Bengio et al. 2009, curriculum learning): flat
            backgrounds of any colour, and no :func:`~lightning_vlmq.data.embedded.scenes.print_on_paper`. From scratch, a model
            that sees the group's colour from the start learns the colour and little else.
        rounds: times an epoch goes through the concepts.
        train_batch_size: image-caption pairs per batch.
        data_seed: seed of everything random.
    """

    def __init__(
        self,
        root: str = "data/concepts",
        captions: Literal["clean", "noisy"] = "clean",
        noise_rate: float = 0.35,
        share_common: float = 0.9,
        plain_until: float = 0.0,
        rounds: int = 6,
        train_batch_size: int = 241,
        data_seed: int = 0,
    ) -> None:
        super().__init__(
            datasets=("concepts", "unseen", "backgrounds"), data_seed=data_seed, train_batch_size=train_batch_size
        )
        self.save_hyperparameters()
        if not 0 <= noise_rate < 1 or not 0 <= share_common <= 1 or not 0 <= plain_until <= 1 or rounds < 1:
            raise VLMQError(
                "noise_rate must lie in [0, 1), share_common and plain_until in [0, 1], and rounds must be at least 1"
            )
        self.root = root
        self.noise_rate = noise_rate if captions == "noisy" else 0.0
        self.share_common = share_common
        self.plain_until = plain_until
        self.rounds = rounds

    def setup(self, stage: str | None = None) -> None:
        """Read the training drawings (about 100 MB in memory), and see that none of their cells is evaluated."""
        super().setup(stage)
        self.eval_sets = [
            s for s in self.eval_sets if s.role != "near_ood"
        ]  # their images are in the zero-shot test too
        self.drawings = read_drawings(str(Path(self.root) / "train.parquet"), "train")
        both = self.drawings.cells() & read_drawings(self.recipe.path, "id").cells()
        if both:
            raise VLMQError(f"'{self.root}' holds {len(both)} drawings that are evaluated; make it again: make data")
        generator = self.recipe.generator(100)
        self.told = told_concepts(self.drawings.concept, self.noise_rate, generator)
        self.bank = textures(TEXTURE_BANK, generator)

    def train_dataloader(self) -> DataLoader[Batch]:
        """This epoch's batches: ``image``, ``index`` and ``caption``."""
        trainer = self.trainer
        if trainer is not None and trainer.reload_dataloaders_every_n_epochs != 1:  # type: ignore[attr-defined]
            raise VLMQError("set trainer.reload_dataloaders_every_n_epochs to 1, each epoch draws its own images")
        epoch, rank = (trainer.current_epoch, trainer.global_rank) if trainer is not None else (0, 0)
        generator = self.recipe.generator(1_000_000 + 1000 * epoch + rank)
        plain = self.plain_until > 0 and (trainer is None or epoch < self.plain_until * (trainer.max_epochs or 0))
        share = 1 / len(COLOURS) if plain else self.share_common
        scenes = Scenes(self.drawings, self.told, self.bank, share, generator, plain)
        batches = ConceptBatches(self.drawings.concept, self.train_batch_size, self.rounds, generator)
        return DataLoader(scenes, batch_sampler=batches, collate_fn=as_is)


def told_concepts(concept: Tensor, noise_rate: float, generator: torch.Generator) -> Tensor:
    """The concept that each drawing's captions tell, int64 ``[n]``: its own, or for a share another drawing's or none (-1)."""
    noisy = torch.rand(len(concept), generator=generator) < noise_rate
    vague = torch.rand(len(concept), generator=generator) < 0.5
    told = torch.where(noisy & vague, VAGUE, concept)
    wrong = (noisy & ~vague).nonzero().flatten()
    told[wrong] = concept[wrong.roll(1 + len(wrong) // 2)]
    return told


class Scenes(Dataset[Batch]):
    """Training scenes by the batch, with captions; reading the same rows again gives others.

    Args:
        drawings: what is shown.
        told: from :func:`told_concepts`.
        bank: textures to choose from, ``[m, 3, 64, 64]``.
        share_common: share of images on their group's colour.
        generator: source of all random draws.
        plain: flat backgrounds, and nothing printed over the scene.
    """

    def __init__(
        self,
        drawings: Drawings,
        told: Tensor,
        bank: Tensor,
        share_common: float,
        generator: torch.Generator,
        plain: bool = False,
    ) -> None:
        self.drawings, self.told, self.bank, self.share_common = drawings, told, bank, share_common
        self.generator, self.plain = generator, plain
        self.writer = Writer(int(torch.randint(2**62, (), generator=generator)))

    def __len__(self) -> int:
        return len(self.drawings)

    def __getitems__(self, rows: list[int]) -> Batch:
        """A batch: ``image`` uint8 ``[b, 3, 64, 64]``, ``caption``, ``index`` and ``concept`` (as told), int64 ``[b]``."""
        index = torch.tensor(rows)
        colours = draw_colours(group_of(self.drawings.concept[index]), self.share_common, self.generator)
        placed = recolour(place_freely(self.drawings.images[index], self.generator), self.generator)
        if self.plain:
            flat = torch.zeros(len(rows), 3, SIZE, SIZE)
            scenes = compose(placed, backgrounds(colours, flat, self.generator))
        else:
            scenes = compose(placed, backgrounds(colours, self._textures(len(rows)), self.generator))
            scenes = print_on_paper(scenes, self._textures(len(rows)), self.generator)
        names = list(COLOURS)
        captions = [
            self.writer.vague(names[colour]) if told == VAGUE else self.writer.caption(told, names[colour])
            for told, colour in zip(self.told[index].tolist(), colours.tolist())
        ]
        return {"image": scenes, "index": index, "caption": captions, "concept": self.told[index]}

    def _textures(self, n: int) -> Tensor:
        chosen = self.bank[torch.randint(len(self.bank), (n,), generator=self.generator)]
        flips = torch.randint(2, (2,), generator=self.generator).tolist()
        return chosen.flip([axis for axis, flip in zip((2, 3), flips) if flip])


class ConceptBatches(Sampler[list[int]]):
    """Batches of rows without two of one concept: each round shuffles the concepts and takes a random row of each.

    In every second round concepts of one group stay together, so that a batch's negatives are hard: the background tells little
    about a concept then, and the drawing has to be looked at.

    Args:
        concept: of each row, int64 ``[n]``.
        batch_size: rows per batch; the remainder of a round is dropped.
        rounds: how many.
        generator: source of the draws.
    """

    def __init__(self, concept: Tensor, batch_size: int, rounds: int, generator: torch.Generator) -> None:
        self.order = concept.argsort(stable=True)
        self.count = torch.unique(concept, return_counts=True)[1]
        if batch_size > len(self.count):
            raise VLMQError(f"train_batch_size must be at most the number of trained concepts, {len(self.count)}")
        self.group = group_of(torch.unique(concept))
        self.first = self.count.cumsum(0) - self.count
        self.batch_size, self.rounds, self.generator = batch_size, rounds, generator

    def __len__(self) -> int:
        return self.rounds * (len(self.count) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        n = len(self.count)
        for number in range(self.rounds):
            which = (torch.rand(n, generator=self.generator) * self.count).long()
            shuffled = torch.randperm(n, generator=self.generator)
            if number % 2:
                place = torch.randperm(int(self.group.max()) + 1, generator=self.generator)[self.group]
                shuffled = shuffled[place[shuffled].argsort(stable=True)].roll(int(shuffled[0]))
            rows = self.order[self.first + which][shuffled]
            for batch in rows[: n // self.batch_size * self.batch_size].split(self.batch_size):
                yield batch.tolist()
