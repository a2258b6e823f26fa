"""Judge in rounds: all candidates on a part of the held-out images, then only those that can still be the best.

The rule:

1. The control is judged on all images, every candidate on the first part: the first eighth of the images with
   artifacts and of the clean ones, but at least `LEAST_MARKED` and `LEAST_CLEAN` of them.
2. The rank that a candidate could reach at best is estimated from the images on which it was judged, by `rank_at_best`.
   On the other images, the share of the regions that are gone is the upper end of its interval of `DEVIATIONS` standard
   deviations; no further image gains a region; and all clean images keep as much sharpness as the one that kept most,
   each in proportion to what the best candidate yet keeps there, or the control as long as no candidate was judged on
   all images. (Some photos lose more sharpness than others, with all candidates.)
3. The candidate that could reach the greatest rank is judged on all images; later ones on as many as they were judged
   on before, after those on which another candidate gained a region. Then 2 and 3 are repeated, until a candidate that
   was judged on all images has a greater rank than all others could reach. These are dropped.

The verdict is the one without rounds, unless a dropped candidate would have reached more than the estimate.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from desra_core.evaluation.metrics import ratio, wilson_interval
from desra_core.evaluation.table import counted
from desra_core.gate.criteria import Judgement, Rank, Score, Verdict, decide, rank, score
from desra_core.gate.judge import CONTROL, Candidate
from desra_core.settings.models import Gate
from desra_core.workspace.manifest import ImageRef

# The first part has at least so many images with artifacts, and so many clean ones.
LEAST_MARKED, LEAST_CLEAN = 5, 2
# More than the 1.96 of a 95 % interval, because regions of one image often have the same fate.
DEVIATIONS = 5.0

# Images with the names of the candidates to judge on them.
Work = list[tuple[ImageRef, tuple[str, ...]]]


class PendingRound(NamedTuple):
    """The judgements that are missing in a round, and what the round is for."""

    title: str
    missing: Work


class Rounds:
    """The rounds of a comparison: iterate over those in which judgements are missing.

    The judgements of a round must be made before the next round is asked for; an image that then still lacks one could
    not be judged, and counts for no candidate. Only judgements that the rounds asked for count, so that the verdict
    does not depend on where a run was killed, or on what earlier comparisons have judged.

    Args:
        read: Reads the judgement of a candidate on an image; returns None where it is missing.
        candidates: The candidates; the control is the last one.
        marked, clean: The held-out images with and without artifacts.
        gate: The limits of the gate, and whether to judge in rounds.
    """

    def __init__(
        self,
        read: Callable[[Candidate, ImageRef], Judgement | None],
        candidates: Sequence[Candidate],
        marked: Sequence[ImageRef],
        clean: Sequence[ImageRef],
        gate: Gate,
    ) -> None:
        self._read, self._gate = read, gate
        *self._candidates, self._control = candidates
        self._images = {image.id: image for image in (*marked, *clean)}
        # Any number of images from the beginning of this order has its share of both kinds.
        places = [((index + 1) / len(kind), image) for kind in (marked, clean) for index, image in enumerate(kind)]
        self._order = [image for _, image in sorted(places, key=lambda each: each[0])]
        parts = ((marked, LEAST_MARKED), (clean, LEAST_CLEAN))
        self._first = [image for kind, least in parts for image in kind[: max(least, -(-len(kind) // 8))]]
        self._asked: dict[str, dict[str, None]] = {candidate.key: {} for candidate in candidates}
        self._found: dict[tuple[str, str], Judgement] = {}

    def __iter__(self) -> Iterator[PendingRound]:
        everything = [*self._images.values()]
        first = self._first if self._gate.rounds else everything
        title = f"{counted(len(self._candidates), 'candidate')} on {len(first)} of {counted(len(everything), 'image')}"
        yield from self._round(title, [(self._control, everything), *((each, first) for each in self._candidates)])
        while (challenger := self._challenger()) is not None:
            asked = self._asked[challenger.key].keys()
            rest = [image for image in self._order if image.id in self._images and image.id not in asked]
            telling = [image for image in rest if any(self._gains(each, image) for each in self._candidates)]
            images = telling or (rest[: max(1, len(asked))] if self._complete() else rest)
            yield from self._round(f"{challenger.name} on {counted(len(images), 'more image')}", [(challenger, images)])

    @property
    def images(self) -> list[ImageRef]:
        """The images that could be judged."""
        return [*self._images.values()]

    def verdict(self) -> Verdict:
        """Decide by the judgements; all rounds must be over."""
        complete = self._complete()
        dropped = [each.name for each in self._candidates if each not in complete]
        scores = [self._score(each) for each in self._candidates]
        return decide(scores, self._score(self._control), self._gate, dropped=dropped)

    def _round(self, title: str, asked: list[tuple[Candidate, list[ImageRef]]]) -> Iterator[PendingRound]:
        for candidate, images in asked:
            self._asked[candidate.key] |= dict.fromkeys(image.id for image in images)
        if missing := self._missing():
            yield PendingRound(title, missing)
            for image, _ in self._missing():
                del self._images[image.id]

    def _missing(self) -> Work:
        """List the images that lack judgements which were asked for, with the candidates concerned."""
        work = []
        for image in self._images.values():
            lacking = []
            for candidate in (*self._candidates, self._control):
                place = candidate.key, image.id
                if image.id not in self._asked[candidate.key] or place in self._found:
                    continue
                if (judgement := self._read(candidate, image)) is None:
                    lacking.append(candidate.name)
                else:
                    self._found[place] = judgement
            if lacking:
                work.append((image, tuple(lacking)))
        return work

    def _judgements(self, candidate: Candidate) -> list[Judgement]:
        """List the judgements of a candidate that were asked for, in the order of the images."""
        asked = self._asked[candidate.key]
        return [self._found[candidate.key, key] for key in self._images if key in asked]

    def _score(self, candidate: Candidate) -> Score:
        return score(candidate.name, self._judgements(candidate))

    def _complete(self) -> list[Candidate]:
        """List the candidates that were judged on all images."""
        return [each for each in self._candidates if self._images.keys() <= self._asked[each.key].keys()]

    def _gains(self, candidate: Candidate, image: ImageRef) -> bool:
        """Check whether a candidate is known to add a region to an image."""
        found = image.id in self._asked[candidate.key] and self._found[candidate.key, image.id]
        return bool(found and found.added)

    def _challenger(self) -> Candidate | None:
        """Find the candidate to judge on more images: the one that could reach most; None if none can be the best."""
        control = self._judgements(self._control)
        controlled = score(CONTROL, control)
        complete = {each: rank(self._score(each), controlled, self._gate) for each in self._complete()}
        best = max(complete, key=complete.__getitem__, default=None)
        reference = self._judgements(best) if best else control
        hopes = {
            each: rank_at_best(self._judgements(each), reference, control, self._gate)
            for each in self._candidates
            if each not in complete
        }
        challenger = max(hopes, key=hopes.__getitem__, default=None)
        return None if challenger is None or (best and hopes[challenger] < complete[best]) else challenger


def rank_at_best(
    judgements: Sequence[Judgement], reference: Sequence[Judgement], control: Sequence[Judgement], gate: Gate
) -> Rank:
    """Estimate the greatest rank that a candidate could reach on all images.

    Args:
        judgements: Those of the candidate, on a part of the images.
        reference: Those of another candidate or of the control, on all images.
        control: Those of the control, on all images.
        gate: The limits.
    """
    part, controlled = score("", judgements), score(CONTROL, control)
    judged = {each.id: each for each in judgements}
    regions = controlled.regions - part.regions
    before = after = 0.0
    pairs = [(judged[other.id], other) for other in reference if other.clean and other.id in judged]
    most = max(
        (own.sharpness_after / other.sharpness_after for own, other in pairs if other.sharpness_after), default=None
    )
    for other in reference:
        if other.clean:
            before += other.sharpness_before
            if other.id in judged:
                after += judged[other.id].sharpness_after
            else:
                after += other.sharpness_before if most is None else most * other.sharpness_after
    at_best = replace(part, detail_loss=1 - after / before if before else None, psnr=None)
    # Where too much detail is lost, the merit is below 0, and the greater the less is removed.
    ranks = [
        rank(replace(at_best, removal=ratio(part.gone + share * regions, controlled.regions)), controlled, gate)
        for share in wilson_interval(part.gone, part.regions, deviations=DEVIATIONS)
    ]
    met, merit, psnr = (max(values) for values in zip(*ranks, strict=True))
    return int(met), merit, psnr
