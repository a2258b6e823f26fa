"""What a rater sees next in `desra review`, and what follows from the answers: masks, and how far raters agree.

A region is decided when as many raters as `--passes` asks for have accepted or rejected it, and more of them did the
one than the other. An image whose regions are all decided gets a human mask: the detector's without the regions that
were rejected, changed by the strokes of brush and eraser. What follows is computed from the answers alone, so it does
not matter when a review was cut off.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.annotations.corrections import ReviewedMask, publish_corrections, reviewed_corrections
from desra_core.annotations.export import MaskedImage, decode_sized_mask, select_images
from desra_core.detection.mask import Components
from desra_core.errors import DesraError, ImageError, LockedError, UsageError
from desra_core.files import as_json, checksum, fingerprint, read_document
from desra_core.images.codec import Mask
from desra_core.images.parts import Rectangle
from desra_core.planning.plan import load_settings
from desra_core.workspace import Workspace
from desra_core.workspace.answers import ANSWERS, Answer, AnswerFile, Box, Kind, Stroke, raters, read_answers
from desra_core.workspace.human_masks import read_human_masks
from desra_core.workspace.manifest import picture_files

# One in so many regions that are shown is a known answer, where some are mixed in.
CHECK_EVERY = 10
# Masks that are imported at once: each takes a byte per pixel.
_AT_ONCE = 16

Key = tuple[str, Box | None]  # id of the image, and box of the region; None for the whole image
Votes = dict[Key, dict[str, str]]  # by region: the latest answer of each rater


class Place(NamedTuple):
    """What a rater is asked about: a region, or an image in which the detector found none."""

    image: MaskedImage
    region: dict[str, Any] | None  # the record of the region

    @property
    def key(self) -> Key:
        """The id of the image, and the box of the region."""
        return self.image.id, box_of(self.region) if self.region else None

    @property
    def severity(self) -> float:
        """The severity of the region; less than any for a whole image."""
        return float(self.region["severity"]) if self.region else -np.inf


class RaterAgreement(NamedTuple):
    """How far raters agree about the regions that at least two of them have answered."""

    regions: int
    raters: int
    share: float | None  # of all pairs of answers to one region: those that are equal; None without such regions
    # Cohen's kappa for two raters, else Fleiss'; None where all answers are equal, or no two raters have one region.
    kappa: float | None


class Imported(NamedTuple):
    """How far the masks of a review are imported."""

    images: int  # reviewed images that have their human mask
    waiting: int  # images whose mask is still to be brought or withdrawn
    why: str | None  # why it waits, in one line


class StaleError(UsageError):
    """The page shows another state than that of the rater's file: another tab has answered."""


@dataclass
class _Image:
    """What the answers say about one image."""

    drawn: list[tuple[str, Stroke]] = field(default_factory=list)  # rater and stroke
    clean: set[str] = field(default_factory=set)  # the raters who say that all of it is right
    votes: dict[Box | None, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def strokes(self) -> list[Stroke]:
        """The strokes that count, in their order."""
        return [stroke for _, stroke in self.drawn]

    def marked(self) -> set[str]:
        """Name the raters who have accepted a region, or have drawn."""
        accepted = (name for votes in self.votes.values() for name, answer in votes.items() if answer == "accept")
        return {*accepted, *(name for name, _ in self.drawn)}


def box_of(region: Mapping[str, Any]) -> Box:
    """Return x, y, width and height of the record of a region."""
    return region["x"], region["y"], region["width"], region["height"]


class Review:
    """The review of a workspace by one rater. Threads may share it.

    Args:
        workspace: The workspace; its latest run may go on.
        file: The file of the rater, which this review writes.
        rater: The name of the rater.
        rating: Ask whether something is noticed, instead of whether a region is an artifact.
        passes: How many raters are to decide or rate each region; None for all of them.
        everything: Ask about images in which the detector found nothing, too, after all regions.
        checks: A rater whose answers are mixed in, see `CHECK_EVERY`; None for no checks.

    Attributes:
        images: The images, sorted by name.
        left_out: The number of images that people have given a mask elsewhere.
        unpictured: The number of images whose pictures are not kept.
        failed: Why the masks of images cannot be imported, by id.

    Raises:
        UsageError: The workspace has no run in it, there is nothing to ask, or a file of answers is damaged.
    """

    def __init__(
        self,
        workspace: Workspace,
        file: AnswerFile,
        rater: str,
        *,
        rating: bool = False,
        passes: int | None = 1,
        everything: bool = False,
        checks: str | None = None,
    ) -> None:
        self.workspace, self.rater = workspace, rater
        self.settings, self.target = load_settings(workspace)
        self.kind: Kind = "rating" if rating else "decision"
        self.passes = passes
        self._file = file
        self._lock = threading.RLock()
        self._importing = threading.Lock()
        self._read: dict[str, tuple[tuple[int, int], list[Answer]]] = {}
        self._drawn: tuple[str, str, Mask] | None = None  # id, state and mask of the image that was asked for last
        self._found: dict[str, Components] = {}  # of the two images that were asked for last
        self._counted: tuple[Any, Votes] | None = None
        self._skipped: dict[Key, None] = {}
        self._front: Key | None = None
        self._why: str | None = None
        self._began = file.lines
        self.failed: dict[str, str] = {}
        everything = everything and not rating
        reviewed = self._reviewed()
        chosen = select_images(workspace, self.target, everything=everything, worst=None)
        files = picture_files(workspace, self.settings.verb, [image.name for image in chosen])
        pictured = [
            image._replace(files=files[image.name])
            for image in chosen
            if (image.regions or everything) and all(files[image.name][kind].exists() for kind in ("mse_sr", "gan_sr"))
        ]
        self.unpictured = sum(bool(image.regions) or everything for image in chosen) - len(pictured)
        self.images = [
            image._replace(human=None)
            for image in pictured
            if rating or image.human is None or image.human.checksum in reviewed.get(image.id, {}).get("checksums", ())
        ]
        self.left_out = len(pictured) - len(self.images)
        self._image = {image.id: image for image in self.images}
        self._places: dict[Key, Place] = {place.key: place for place in sorted(self._all_places(), key=self._order)}
        if not self._places:
            more = "" if everything or rating else "; --all asks about images without any, too"
            raise UsageError(workspace.root, "has no region to review", f"mine or detect first{more}")
        self._known = self._known_answers(checks) if checks else {}
        self._changed = set() if rating else {one.id for answers in self._answers().values() for one in answers}

    # What is shown

    def current(self) -> Place | None:
        """Return what the rater is asked next; None where nothing is left."""
        with self._lock:
            return next(self._open(), None)

    def following(self) -> Place | None:
        """Return what the rater is asked after that, as far as it can be known."""
        with self._lock:
            found = self._open()
            next(found, None)
            return next(found, None)

    def state(self) -> int:
        """Return the number of lines in the rater's file: it grows with each answer, and with each that is undone."""
        return self._file.lines

    def answers_key(self) -> str:
        """Return a key for the answers of all raters, which changes with each of them."""
        with self._lock:
            return fingerprint(self._file.lines, self._stamps())

    def counts(self) -> dict[str, int]:
        """Count the places: answered by this rater, left for this rater, and all of them."""
        with self._lock:
            votes = self._votes()
            mine = sum(self.rater in votes.get(key, {}) for key in self._places)
            left = sum(self._is_open(key, votes) for key in self._places)
            return {"answered": mine, "left": left, "all": len(self._places)}

    def agreement(self) -> RaterAgreement:
        """Compute how far the raters agree on the regions of this workspace."""
        with self._lock:
            votes = self._votes()
        wanted = ANSWERS[self.kind][:2]
        regions = [
            {rater: answer for rater, answer in votes[key].items() if answer in wanted}
            for key in votes.keys() & self._places.keys()
        ]
        return agreement(regions)

    def checked(self) -> tuple[int, int]:
        """Count the checks that the rater has answered, and how many of them as it was known."""
        with self._lock:
            mine = [one for one in self._file.answers if one.kind == self.kind and one.check is not None]
        # Of a clean image, the region is rejected.
        return len(mine), sum(("reject" if one.answer == "clean" else one.answer) == one.check for one in mine)

    # What the rater does

    def answer(self, key: Key, answer: str, state: int) -> Answer:
        """Write an answer about a place.

        Args:
            key: The place.
            answer: One of `ANSWERS` but for ``drawn``. ``clean`` says that all of the image is right.
            state: The `state` that the page has shown.

        Raises:
            StaleError: Another tab has answered since.
            UsageError: There is no such place or answer.
            TransientError: The answer cannot be written.
        """
        offered = [one for one in ANSWERS[self.kind] if one != "drawn"]
        if answer not in offered:
            raise UsageError("answer", f"{answer!r} is none", f"give one of {', '.join(offered)}")
        with self._lock:
            place = self._place(key, state)
            # What still needs this rater's answer is no check, though another answer is known.
            check = None if self._is_open(key, self._votes()) else self._known.get(key)
            return self._write(self._about(place, answer, whole=answer == "clean" and check is None, check=check))

    def draw(self, key: Key, stroke: Stroke, state: int) -> Answer:
        """Write a stroke on the image of a place (raises as `answer`)."""
        if not stroke.is_drawable():
            raise UsageError("stroke", "is too wide, too long, or empty", "draw a smaller one")
        with self._lock:
            place = self._place(key, state)
            if self.kind == "rating":
                raise UsageError("stroke", "is drawn while regions are rated", "start desra review without --rate")
            height, width = place.image.shape
            if not all(-width <= x <= 2 * width and -height <= y <= 2 * height for x, y in stroke.points):
                raise UsageError("stroke", "lies far outside the image", "draw it in the image")
            return self._write(self._about(place, "drawn", whole=True, stroke=stroke))

    def undo(self, state: int) -> Answer | None:
        """Take the latest answer of this rater back, and ask about its place again (raises as `answer`)."""
        with self._lock:
            self._check_state(state)
            undone = self._file.undo(self.kind)
            if undone is not None:
                self._changed.add(undone.id)
                of_image = [key for key in self._places if key[0] == undone.id]
                shown = self.current()
                if undone.key in self._places:
                    self._front = undone.key
                elif of_image and (shown is None or shown.image.id != undone.id):
                    self._front = of_image[0]
            return undone

    def skip(self, key: Key) -> None:
        """Ask about a place after all others."""
        with self._lock:
            self._skipped.pop(key, None)
            self._skipped[key] = None
            self._front = None

    # Masks

    def find_image(self, image_id: str) -> MaskedImage:
        """Return an image of the review (raises `UsageError`: there is none)."""
        if image_id not in self._image:
            raise UsageError(image_id, "is no image of this review", "load the page again")
        return self._image[image_id]

    def mask(self, image: MaskedImage) -> Mask:
        """Make the ``(H, W)`` bool mask of an image as the answers have it; regions that are undecided count.

        Raises:
            ImageError: The detector's mask cannot be read, or is not the one that was recorded.
        """
        with self._lock:
            about = self._about_images([image.id])[image.id]
            state = self._state_of(image, about)
            if self._drawn is None or self._drawn[:2] != (image.id, state):
                self._drawn = image.id, state, self._made(image, about)
            return self._drawn[2]

    def region_masks(self, place: Place, window: Rectangle) -> tuple[Mask, Mask]:
        """Mark what the detector has found in a window of an image: the region alone, and all (raises as `mask`)."""
        with self._lock:
            numbers = self._components(place.image).numbers[window.slices]
        index = place.image.regions.index(place.region) if place.region else -2
        return np.asarray(numbers == index + 1), np.asarray(numbers > 0)

    def place(self, key: Key) -> Place:
        """Find a place by its key (raises `UsageError`: there is none)."""
        if key not in self._places:
            raise UsageError("region", "is not in this review", "load the page again")
        return self._places[key]

    def bring(self) -> Imported:
        """Import the masks of the images that are decided, and withdraw those of images that are not any more.

        Without effect while a run holds the workspace: call it again later. Masks that people have given elsewhere
        stay.
        """
        with self._importing:
            self._why = None
            while self._why is None:
                with self._lock:
                    wanted = sorted(self._changed)[:_AT_ONCE]
                if not wanted:
                    break
                try:
                    self._bring(wanted)
                except LockedError as error:
                    self._why = f"{error.reason}: answers are kept, and their masks follow when it has ended"
                except DesraError as error:
                    self._why = str(error)
        return self.imported()

    def imported(self) -> Imported:
        """Say how far the masks are imported (raises `UsageError`: a list of masks is damaged)."""
        with self._lock:
            reviewed, human = self._reviewed(), read_human_masks(self.workspace, self.target.gan_sr_key)
            there = [key for key in reviewed.keys() & self._image.keys() & human.keys()
                     if human[key].checksum in reviewed[key]["checksums"]]  # fmt: skip
            return Imported(len(there), len(self._changed), self._why)

    def _bring(self, ids: Sequence[str]) -> None:
        with self._lock:
            about = self._about_images(ids)
            states = {key: self._state_of(self._image[key], about[key]) for key in ids if key in self._image}
        if any(self._work(states, about)):
            with self.workspace.locked() as held:
                self._publish(held, states, about)
        with self._lock:
            now = self._about_images(ids)
            for key in ids:
                if key not in states or self._state_of(self._image[key], now[key]) == states[key]:
                    self._changed.discard(key)

    def _work(self, states: Mapping[str, str], about: Mapping[str, _Image]) -> tuple[set[str], set[str]]:
        """Find the images that need a new human mask, and those whose human mask is to go."""
        reviewed, human = self._reviewed(), read_human_masks(self.workspace, self.target.gan_sr_key)
        ours = {
            key for key in states
            if key not in human or human[key].checksum in reviewed.get(key, {}).get("checksums", ())
        }  # fmt: skip
        done = {key for key in ours if self._is_decided(self._image[key], about[key], self.passes or 1)}
        # A mask goes only where answers were taken back, not where another run has found other regions.
        gone = {
            key for key in ours & reviewed.keys() - done
            if reviewed[key]["mask_key"] == self.target.mask_key
            and not self._is_decided(self._image[key], about[key], 1)
        }  # fmt: skip
        return {key for key in done if reviewed.get(key, {}).get("state") != states[key] or key not in human}, gone

    def _publish(self, held: Workspace, states: Mapping[str, str], about: Mapping[str, _Image]) -> None:
        """Import and withdraw masks. The workspace must be locked."""
        new, gone = self._work(states, about)  # another rater may have done it meanwhile
        reviewed, masks, failed = self._reviewed(), [], {}
        for key in sorted(new):
            try:
                masks.append(self._reviewed_mask(self._image[key], about[key]))
            except ImageError as error:
                failed[key] = str(error)
        corrections, errors = reviewed_corrections(held, masks)
        failed |= dict(
            zip(sorted(new - failed.keys() - {one.id for one in corrections}), map(str, errors), strict=True)
        )
        for one in corrections:
            # All count until the mask is in place: imports that were killed or have failed leave any of them.
            noted = {*reviewed.get(one.id, {}).get("checksums", ()), checksum(one.png)}
            reviewed[one.id] = {"checksums": sorted(noted), "state": "", "mask_key": self.target.mask_key}
        held.publish(held.reviewed, as_json(reviewed), durable=True)
        if corrections or gone:
            noted = {found for one in reviewed.values() for found in one["checksums"]}
            publish_corrections(held, corrections, withdrawn=gone, reviewed=noted)
        for one in corrections:
            reviewed[one.id] |= {"checksums": [checksum(one.png)], "state": states[one.id]}
        held.publish(
            held.reviewed, as_json({key: value for key, value in reviewed.items() if key not in gone}), durable=True
        )
        with self._lock:
            self.failed = {key: error for key, error in self.failed.items() if key not in states} | failed

    def _reviewed_mask(self, image: MaskedImage, about: _Image) -> ReviewedMask:
        kinds = [*(("accepted region",) * len(image.regions)), *(("stroke",) * len(about.strokes))]
        return ReviewedMask(image.name, image.id, self.target.gan_sr_key, self._made(image, about), tuple(kinds))

    def _reviewed(self) -> dict[str, dict[str, Any]]:
        """Read which masks reviews have made: checksums, state of the answers and settings, by image id."""
        path = self.workspace.reviewed
        found = read_document(path)
        if not found and path.exists() and path.stat().st_size > len("{}"):
            raise UsageError(
                path, "is damaged", "bring it back from a copy, or delete it: its images are left out then"
            )
        return found

    # The order of questions

    def _all_places(self) -> Iterator[Place]:
        for image in self.images:
            yield from (Place(image, region) for region in image.regions)
            if not image.regions:
                yield Place(image, None)

    def _order(self, place: Place) -> tuple[Any, ...]:
        if self.kind == "rating":  # in an order of the rater's own, from which nothing can be guessed
            return (fingerprint(self.rater, place.image.id, place.key[1]),)
        return -place.severity, place.image.name, place.key[1] or ()

    def _open(self) -> Iterator[Place]:
        """List what is to be asked, in order."""
        votes = self._votes()
        first = [self._places[self._front]] if self._front else []
        session = [one for one in self._file.answers if one.line > self._began and one.kind == self.kind]
        answered = [one for one in session if one.answer != "drawn"]
        asked = {one.key for one in self._file.answers if one.check is not None and one.kind == self.kind}
        if not first and self._known and len(answered) % CHECK_EVERY == CHECK_EVERY - 1:
            known = (key for key in self._known if key not in asked and key not in self._skipped)
            first = [self._places[key] for key in islice((key for key in known if not self._is_open(key, votes)), 1)]
        yield from first
        seen = {place.key for place in first}
        late = [key for key in self._skipped if key not in seen]
        for key, place in self._places.items():
            if key not in seen and key not in self._skipped and self._is_open(key, votes):
                yield place
        for key in late:
            if key in self._places and self._is_open(key, votes):
                yield self._places[key]

    def _is_open(self, key: Key, votes: Votes) -> bool:
        """Check whether the answer of this rater about a place is still needed."""
        given = votes.get(key, {})
        if self.rater in given:
            return False
        if self.kind == "rating":
            return self.passes is None or len(given) < self.passes
        return decided(given, self.passes or 1) is None

    def _known_answers(self, checks: str) -> dict[Key, str]:
        """Take the answers of a rater as known."""
        answered = [rater for rater in raters(self.workspace) if read_answers(self.workspace, rater)]
        if checks not in answered:
            names = ", ".join(answered) or "nobody yet"
            raise UsageError("--checks", f"{checks} has answered nothing here", f"name a rater who has: {names}")
        given = {key: votes.get(checks, "") for key, votes in self._votes().items() if key in self._places}
        found = {key: answer for key, answer in given.items() if answer in ANSWERS[self.kind][:2]}
        if not found:
            reason = f"{checks} has answered no region that is asked about"
            raise UsageError("--checks", reason, "name a rater who has")
        # In an order that does not show which are right.
        return dict(sorted(found.items(), key=lambda item: fingerprint(self.rater, *item[0])))

    # Answers

    def _place(self, key: Key, state: int) -> Place:
        self._check_state(state)
        return self.place(key)

    def _check_state(self, state: int) -> None:
        if state != self._file.lines:
            raise StaleError("this tab", "is behind: another tab of this rater has answered", "here is what comes next")

    def _about(
        self, place: Place, answer: str, *, whole: bool = False, check: str | None = None, stroke: Stroke | None = None
    ) -> Answer:
        region = None if whole else place.region
        return Answer(
            rater=self.rater,
            kind=self.kind,
            id=place.image.id,
            name=place.image.name,
            gan_sr_key=self.target.gan_sr_key,
            mask_key=self.target.mask_key,
            box=box_of(region) if region else None,
            area=region["area"] if region else None,
            answer=answer,
            check=check,
            stroke=stroke,
        )

    def _write(self, answer: Answer) -> Answer:
        counted, state = self._counted, (self._file.lines, self._stamps())
        written = self._file.append(answer)
        if counted is not None and counted[0] == state and written.box is not None and written.check is None:
            # All other answers are as they were, so they need not be collected again.
            counted[1].setdefault(written.key, {})[self.rater] = written.answer
            self._counted = (self._file.lines, state[1]), counted[1]
        if answer.answer != "drawn":
            self._front = None
        if self.kind == "decision" and answer.check is None:
            self._changed.add(answer.id)
        return written

    def _stamps(self) -> dict[str, tuple[int, int]]:
        """Read the files of other raters that have changed; returns time and size of each."""
        for rater in raters(self.workspace):
            if rater != self.rater:
                status = self.workspace.answers(rater).stat()
                stamp = status.st_mtime_ns, status.st_size
                if self._read.get(rater, (None,))[0] != stamp:
                    self._read[rater] = stamp, read_answers(self.workspace, rater)
        return {rater: stamp for rater, (stamp, _) in self._read.items()}

    def _answers(self) -> dict[str, list[Answer]]:
        """Read the standing answers of all raters about results of this model, by rater."""
        self._stamps()
        each = {rater: answers for rater, (_, answers) in self._read.items()} | {self.rater: self._file.answers}
        key = self.target.gan_sr_key
        return {
            rater: [one for one in answers if one.kind == self.kind and one.gan_sr_key == key and not one.check]
            for rater, answers in each.items()
        }

    def _votes(self) -> Votes:
        """Collect the latest answer of each rater by place."""
        state = self._file.lines, self._stamps()
        if self._counted is None or self._counted[0] != state:
            about = self._about_images(None).items()
            self._counted = state, {(key, box): votes for key, image in about for box, votes in image.votes.items()}
        return self._counted[1]

    def _about_images(self, ids: Iterable[str] | None) -> dict[str, _Image]:
        """Collect what all raters have answered, in the order of time, about some images; None for all of them."""
        wanted = None if ids is None else set(ids)
        found: dict[str, _Image] = {key: _Image() for key in wanted or ()}
        each = (one for answers in self._answers().values() for one in answers)
        chosen = [one for one in each if (wanted is None or one.id in wanted) and one.id in self._image]
        for one in sorted(chosen, key=lambda one: one.time):
            image, about = self._image[one.id], found.setdefault(one.id, _Image())
            if one.answer not in ("clean", "reject"):
                about.clean.discard(one.rater)
            if one.stroke is not None:
                about.drawn.append((one.rater, one.stroke))
            elif one.box is not None:
                place = self._places.get(one.key)
                if place and place.region and place.region["area"] == one.area:
                    # An answer "unsure" of an earlier session is asked again.
                    again = one.answer == "unsure" and one.rater == self.rater and one.line <= self._began
                    about.votes[one.box].pop(one.rater, None)
                    about.votes[one.box] |= {} if again else {one.rater: one.answer}
            else:
                about.votes[None][one.rater] = one.answer
                if one.answer == "clean":
                    about.clean.add(one.rater)
                    about.drawn = [drawn for drawn in about.drawn if drawn[0] != one.rater]
                    for region in image.regions:
                        about.votes[box_of(region)][one.rater] = "reject"
        for about in found.values():
            if len(about.clean) >= (self.passes or 1) and len(about.clean) > len(about.marked()):
                about.drawn = []
        return found

    def _is_decided(self, image: MaskedImage, about: _Image, passes: int) -> bool:
        boxes: list[Box | None] = [*map(box_of, image.regions)] or [None]
        return all(decided(about.votes.get(box, {}), passes) is not None for box in boxes)

    def _state_of(self, image: MaskedImage, about: _Image) -> str:
        """Return a key for all that the mask of an image depends on."""
        kept = [(box_of(region), self._counts(region, about)) for region in image.regions]
        return fingerprint(kept, about.strokes, self.target.mask_key)

    def _counts(self, region: Mapping[str, Any], about: _Image) -> bool:
        """Check whether a region counts: it is undecided, or accepted."""
        return decided(about.votes.get(box_of(region), {}), self.passes or 1) is not False

    def _made(self, image: MaskedImage, about: _Image) -> Mask:
        flags = np.array([self._counts(region, about) for region in image.regions], bool)
        mask = self._components(image).chosen(flags)
        for stroke in about.strokes:
            draw_stroke(mask, stroke)
        return mask

    def _components(self, image: MaskedImage) -> Components:
        found = self._found.pop(image.id, None)
        if found is None:
            path = image.files["mask"]
            found = Components(decode_sized_mask(image.content("mask"), path, image.shape))
            areas = [(*box_of(region), region["area"]) for region in image.regions]
            if [(*box, area) for box, area in zip(found.boxes.tolist(), found.areas.tolist(), strict=True)] != areas:
                raise ImageError(path, "is not the mask whose regions are reviewed", "start desra review again")
        self._found[image.id] = found
        for key in list(self._found)[:-2]:
            del self._found[key]
        return found


def decided(votes: Mapping[str, str], passes: int) -> bool | None:
    """Decide about a place by the answers of raters.

    Returns:
        True if it is accepted, and False if it is rejected, or if the image is clean. None where fewer than ``passes``
        raters have decided, or as many for as against.

        >>> decided({"ann": "accept", "bob": "unsure"}, 1), decided({"ann": "accept", "bob": "reject"}, 2)
        (True, None)
    """
    given = list(votes.values())
    accepted, rejected = given.count("accept"), given.count("reject") + given.count("clean")
    if accepted + rejected < passes or accepted == rejected:
        return None
    return accepted > rejected


def draw_stroke(mask: Mask, stroke: Stroke) -> None:
    """Mark or erase the pixels of an ``(H, W)`` bool mask whose distance to a line is at most its radius, in place."""
    points = stroke.points if len(stroke.points) > 1 else stroke.points * 2
    height, width = mask.shape
    radius = stroke.radius
    for (x0, y0), (x1, y1) in pairwise(points):
        left, right = max(min(x0, x1) - radius, 0), min(max(x0, x1) + radius + 1, width)
        top, bottom = max(min(y0, y1) - radius, 0), min(max(y0, y1) + radius + 1, height)
        if left >= right or top >= bottom:
            continue
        x, y = np.arange(left, right)[np.newaxis] - x0, np.arange(top, bottom)[:, np.newaxis] - y0
        along: npt.NDArray[np.float64] = np.zeros((bottom - top, right - left))
        if length := (x1 - x0) ** 2 + (y1 - y0) ** 2:
            along = np.clip((x * (x1 - x0) + y * (y1 - y0)) / length, 0, 1)
        near = (x - along * (x1 - x0)) ** 2 + (y - along * (y1 - y0)) ** 2 <= radius**2 + 1e-6
        mask[top:bottom, left:right][near] = not stroke.erase


def agreement(regions: Iterable[Mapping[str, str]]) -> RaterAgreement:
    """Compute how far raters agree: Cohen's kappa for two of them, else Fleiss', by regions with two answers or more.

    Where not every region has as many answers, Fleiss' kappa takes the shares of each region, as Fleiss' own formula
    does for equal numbers.

    Args:
        regions: For each region the answers by rater.
    """
    shared = [votes for votes in regions if len(votes) > 1]
    people = sorted({rater for votes in shared for rater in votes})
    if not shared:
        return RaterAgreement(0, 0, None, None)
    observed = 0.0
    # How often each answer is given, each region counting once: by all raters, and by each rater.
    shares: Counter[str] = Counter()
    by_rater: dict[str, Counter[str]] = {rater: Counter() for rater in people}
    for votes in shared:
        counts, size = Counter(votes.values()), len(votes)
        observed += sum(count * (count - 1) for count in counts.values()) / (size * (size - 1))
        for rater, answer in votes.items():
            by_rater[rater][answer] += 1
            shares[answer] += 1 / size  # type: ignore[assignment]
    one, other = by_rater.values() if len(people) == 2 else (shares, shares)
    observed /= len(shared)
    expected = sum(one[answer] * other[answer] for answer in shares) / len(shared) ** 2
    kappa = (observed - expected) / (1 - expected) if expected < 1 - 1e-9 else None
    return RaterAgreement(len(shared), len(people), observed, kappa)
