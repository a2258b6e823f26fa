"""Workspaces whose masks are whatever a test wants them to be, as if `desra detect` had found them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from desra_core import find_regions
from desra_core.images.codec import encode_mask, encode_png
from desra_core.planning.plan import prepare, publish_tables
from desra_core.settings import Detection
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import image_refs, read_manifest
from desra_core.workspace.products import Record, gather_shard

MakeWorkspace = Callable[..., Workspace]


@pytest.fixture
def make_workspace(tmp_path: Path) -> MakeWorkspace:
    """Write results for some masks by name, and a workspace in which these masks were found."""
    return maker_below(tmp_path)


@pytest.fixture(scope="session")
def make_workspace_once(tmp_path_factory: pytest.TempPathFactory) -> MakeWorkspace:
    """The same for property tests, each example under a name of its own."""
    return maker_below(tmp_path_factory.mktemp("workspaces"))


def maker_below(folder: Path) -> MakeWorkspace:
    def make(
        masks: Mapping[str, np.ndarray], name: str = "ws", *, labelled: bool = True, copies: Mapping[str, str] = {}
    ) -> Workspace:
        rng = np.random.default_rng(0)
        root = folder / name
        for role in ("mse_sr", "gan_sr"):
            for image, mask in masks.items():
                path = root / f"{role}/{image}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_png(rng.integers(0, 256, (*mask.shape, 3), dtype=np.uint8)))
            for copy, image in copies.items():
                shutil.copy(root / f"{role}/{image}.png", root / f"{role}/{copy}.png")
        workspace = Workspace(root / "ws")
        workspace.create()
        settings = Detection(mse_sr=root / "mse_sr", gan_sr=root / "gan_sr", workspace=workspace.root)
        target = prepare(settings).plan.target
        manifest = read_manifest(workspace)
        records = []
        for image in image_refs(manifest):
            mask = next(masks[name] for name in image.names if name in masks)
            similarity = rng.random(mask.shape, np.float32)
            labels = rng.integers(0, 150, mask.shape, dtype=np.uint8) if labelled else None
            weights = np.ones(150) if labelled else None
            regions = [region._asdict() for region in find_regions(mask, similarity, labels=labels, weights=weights)]
            for other in image.names:
                workspace.publish(workspace.mask(other), encode_mask(mask))
            records.append(
                Record(
                    image.id,
                    *mask.shape,
                    similarity_key=target.similarity_key,
                    mask_key=target.mask_key,
                    weighting_key=target.weighting_key,
                    threshold=0.7,
                    min_area=4000,
                    artifact_pixels=int(mask.sum()),
                    regions=regions,
                )
            )
        gather_shard(workspace, 0, records)
        publish_tables(workspace, target)
        return workspace

    return make
