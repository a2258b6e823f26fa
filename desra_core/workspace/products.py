"""The products of an image, declared once: their stages, cache keys, columns and arrays all follow from `PRODUCTS`.

This module imports no stage: a run finds the stage of a product by its name when it begins.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from desra_core.detection.detectors import DEFAULT
from desra_core.files.content import fingerprint

# One value, or one for each of many images.
F = TypeVar("F", bool, npt.NDArray[np.bool_])


@dataclass(frozen=True)
class Target:
    """The settings of a run as keys: an image is done when its record and its files agree with these.

    ``threshold`` is minus the score above which a pixel is suspect, as in the records: with DeSRA the threshold of the
    adjusted similarity. ``method`` is the detector; ``labels_first`` where its scores depend on the labels.
    """

    similarity_key: str
    segmentation_key: str
    weighting_key: str
    min_weight: float
    threshold: float
    min_area: str
    keep: str
    mask_key: str
    mse_sr_key: str | None = None
    gan_sr_key: str | None = None
    keep_mse: bool = False
    method: str = DEFAULT
    labels_first: bool = False

    @property
    def super_resolves(self) -> bool:
        """Whether the results are computed, rather than read from files."""
        return self.gan_sr_key is not None

    @property
    def segments(self) -> bool:
        """Whether labels are computed, rather than read or absent."""
        return self.segmentation_key.startswith("mmseg:")

    @property
    def runs_networks(self) -> bool:
        """Whether anything is inferred."""
        return self.super_resolves or self.segments

    @property
    def reads_labels(self) -> bool:
        """Whether labels are read from files."""
        return self.segmentation_key == "labels"

    @property
    def run_key(self) -> str:
        """The key of all products of the run: an image that failed for good under this key is not tried again."""
        keys = [product.key(self) for product in FURTHER]
        return fingerprint(self.mask_key, *keys) if any(keys) else self.mask_key


@dataclass(frozen=True)
class Product:
    """Something that a run makes of every image that needs it.

    Attributes:
        name: The name of the stage, on disk and in Dask. The module ``desra_core.stages.NAME`` has the function
            ``NAME_stage`` and, where it runs networks, ``network``.
        title: The stage in words for people.
        key: Gives the cache key under a target, or None where the product is not wanted.
        arrays: The arrays that the stage stores in the zarr group of the image. The last of them is the product.
        needs: Gives the arrays that must exist before the stage runs, as far as the run makes them.
        gpu: Whether the stage runs networks, on a GPU where there is one.
        column: The column of the record with the key under which the product was made.
        kept: The column that says whether it was stored; None where the record need not say so.
    """

    name: str
    title: str
    key: Callable[[Target], str | None]
    arrays: tuple[str, ...] = ()
    needs: Callable[[Target], tuple[str, ...]] = lambda _: ()
    gpu: bool = False
    column: str = ""
    kept: str | None = None


# In an order for readers; `stages_for` puts the products of a run in the order of their needs. A further product is
# declared between segmentation and mask, with a ``column``: it is made of every image whose similarity map is stored,
# and is deleted with that map.
PRODUCTS = (
    Product(
        "super_resolution",
        "super-resolution",
        key=lambda target: target.similarity_key if target.super_resolves else None,
        arrays=("mse_sr", "gan_sr", "similarity"),
        gpu=True,
        column="similarity_key",
        kept="similarity_kept",
    ),
    Product(
        "similarity",
        "similarity",
        key=lambda target: None if target.super_resolves else target.similarity_key,
        arrays=("similarity",),
        needs=lambda target: ("labels",) if target.labels_first else (),
        column="similarity_key",
        kept="similarity_kept",
    ),
    Product(
        "segmentation",
        "segmentation",
        key=lambda target: target.segmentation_key if target.segments else None,
        arrays=("labels",),
        # Images that are proven clean by the similarity map need no labels.
        needs=lambda target: ("gan_sr",) if target.labels_first else ("gan_sr", "similarity"),
        gpu=True,
        column="segmentation_key",
        kept="labels_kept",
    ),
    Product("mask", "mask and regions", key=lambda target: target.mask_key, needs=lambda _: ARRAYS, column="mask_key"),
)
# The products beside the usual ones, whose columns are fields of `Record`.
FURTHER = tuple(each for each in PRODUCTS if each.column not in ("similarity_key", "segmentation_key", "mask_key"))
ARRAYS: tuple[str, ...] = tuple(dict.fromkeys(array for product in PRODUCTS for array in product.arrays))


def stages_for(target: Target) -> list[Product]:
    """List what a run makes, each product after those that it needs."""
    wanted = {product.name: product for product in PRODUCTS if product.key(target)}
    makers = {array: name for name, product in wanted.items() for array in product.arrays}
    graph = {name: [makers[array] for array in each.needs(target) if array in makers] for name, each in wanted.items()}
    return [wanted[name] for name in TopologicalSorter(graph).static_order()]


def kept_whole(keep: str, artifact: F, marked: F) -> F:
    """Decide whether everything of an image is kept, the pair of a mined photo and its pictures in the dataset too.

    Args:
        keep: The setting: ``artifacts``, ``maps`` or ``all``.
        artifact, marked: Whether the detector found an artifact, and whether a person marked one.
    """
    return artifact | marked | (keep == "all")


def kept_arrays(target: Target, whole: F) -> dict[str, F]:
    """Decide which arrays of done images are kept.

    Args:
        target: The settings of the run.
        whole: Whether everything of an image is kept, by `kept_whole`.

    Returns:
        By the name of the array: whether it is kept.
    """
    with_maps = whole | (target.keep != "artifacts")
    kept = {
        "similarity": with_maps,
        "labels": with_maps & target.segments,
        "mse_sr": whole & target.super_resolves | target.keep_mse,
        "gan_sr": whole & target.super_resolves,
    }
    return kept | {product.arrays[-1]: with_maps & (product.key(target) is not None) for product in FURTHER}


def spared_arrays(target: Target) -> tuple[str, ...]:
    """Name the arrays that stay of an image whose similarity map is not kept."""
    kept = kept_arrays(replace(target, keep="artifacts"), False)
    return tuple(array for array, is_kept in kept.items() if is_kept)
