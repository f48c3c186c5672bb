"""Feature spaces: what a protocol's images become before they are compared.

Every space is one call: bytes in, named features out. A new space is a row in `SPACES`.
Each device gets a fixed number of images at a time.
The features are then the same bits on one device and on many.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dmf import pretrained, sharding
from dmf.errors import DmfError
from dmf.evaluation.protocols import Protocol
from dmf.metrics import resize as resizing
from dmf.storage import records

# A file beside converted weights: the features of `known_batch`, found at the conversion.
KNOWN = "known_features.json"
# Relative L2 error that the self-check allows; accelerators have products in full float32.
CPU_BOUND, BOUND = 1e-5, 2e-3
ROWS_PER_DEVICE = {"cpu": 8}  # images at a time; so few stay in the caches of a CPU
ROWS_PER_ACCELERATOR = 64
OUTPUTS = {
    "fid": "pool",
    "kid": "pool",
    "precision_recall": "pool",
    "sfid": "spatial",
    "is": "logits",
}
# What the self-check compares -> its key in `Extractor.about`.
NAMES = {"resized images": "resize", "features": "network_file"}
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)

Images = np.ndarray
SCALINGS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "bytes": lambda b: (b - 128) / 128,
    "unit": lambda b: 2 * (b / 255) - 1,
    "imagenet": lambda b: (b / 255 - IMAGENET_MEAN) / IMAGENET_STD,
}


class Space(NamedTuple):
    """One feature space.

    kind: the kind of its converted network, "" for none.

    size: the side of the images it takes, 0 for any.

    outputs(network, params, x): named features (B, D) float32.
    Its x is (B, size, size, 3), resized and scaled.
    """

    kind: str
    size: int
    outputs: Callable[[Any, Any, jax.Array], dict[str, jax.Array]]


def _inception(network: Any, params: Any, x: jax.Array) -> dict[str, jax.Array]:
    found = network.apply(params, x)
    return {"pool": found.pool, "spatial": found.spatial, "logits": found.logits}


SPACES = {
    "inception": Space("inception", 299, _inception),
    "dinov2": Space("dinov2", 224, lambda network, params, x: {"pool": network.apply(params, x)}),
    "pixels": Space("", 0, lambda network, params, x: {"pool": x.reshape(len(x), -1)}),
}


class Extractor:
    """Computes the features of images that one protocol needs.

    about: what a result or a reference says of the features.
    Its keys are space, resize, scaling, network_file and network_sha256.
    """

    def __init__(self, protocol: Protocol, folder: str, mesh: Mesh):
        """folder: of the converted network. Raises DmfError for missing or other weights."""
        self._protocol, self._mesh, self.space = protocol, mesh, SPACES[protocol.space]
        self._network: Any = None
        self._params: Any = {}
        self._known: np.ndarray | None = None
        source: dict[str, Any] = {}
        if self.space.kind:
            self._network, self._params, self._known, source = _open(
                protocol, self.space.kind, folder
            )
        self.about = {
            "space": protocol.space,
            "resize": protocol.resize if self.space.size else "none",
            "scaling": protocol.scaling,
            "network_file": source.get("file", "none"),
            "network_sha256": source.get("sha256", "none"),
        }
        self.names = sorted({OUTPUTS[metric] for metric in protocol.metrics} | {"pool"})
        self._rows = ROWS_PER_DEVICE.get(mesh.devices.flat[0].platform, ROWS_PER_ACCELERATOR)
        self._params = jax.device_put(self._params, sharding.replicated(mesh))
        self._extract = sharding.per_device(mesh, self._features)
        outputs, network = self.space.outputs, self._network
        self._pool = jax.jit(lambda params, x: outputs(network, params, x)["pool"])

    def _features(self, params: Any, images: jax.Array) -> dict[str, jax.Array]:
        x = images.astype(jnp.float32)
        x = jnp.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x
        if self.space.size:
            x = resizing.resize(x, self.space.size, self._protocol.resize)
        found = self.space.outputs(self._network, params, SCALINGS[self._protocol.scaling](x))
        return {name: found[name] for name in self.names}

    def __call__(self, images: Images) -> dict[str, np.ndarray]:
        """Features (N, D) float32 of images (N, H, W, 1 or 3) uint8, by name.

        "pool" is always there; the others are those that the protocol's scores need.
        Raises DmfError for other images.
        """
        fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] in (1, 3)
        if not fits or not len(images):
            raise DmfError(
                f"images to score are {images.dtype} of shape {images.shape}: "
                "expected uint8 (N, H, W, 3), grey or colour; "
                "latents need an autoencoder"
            )
        parts = []
        for piece in sharding.in_pieces(self._mesh, len(images), self._rows):
            put = sharding.put_padded(self._mesh, self._rows, images[piece])
            rows = piece.stop - piece.start
            found = sharding.fetch(self._mesh, self._extract(self._params, put))
            parts.append({name: x[:rows] for name, x in found.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in self.names}

    def dims(self) -> dict[str, int]:
        """The width of each output. Empty for pixels, whose width is the image's."""
        if not self.space.size:
            return {}
        found = jax.eval_shape(
            self._features, self._params, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
        )
        return {name: x.shape[1] for name, x in found.items()}

    def self_check(self) -> str:
        """Compares this device with known answers, and returns one line about it.

        The protocol's resize of a fixed image is compared with float64 products on the host.
        The network's features of a fixed batch are compared with those stored at the conversion.
        Raises DmfError where a difference is too large to score anything.
        """
        if not self.space.size:
            return "self-check: the space of pixels has nothing to check"
        errors = {"resized images": _relative(*self._resized())}
        if self._known is not None:
            found = self._pool(self._params, known_batch(self.space.size))
            errors["features"] = _relative(np.asarray(found), self._known)
        bound = CPU_BOUND if self._mesh.devices.flat[0].platform == "cpu" else BOUND
        for what, error in errors.items():
            if not error <= bound:
                raise DmfError(
                    f"self-check: the {what} of a fixed batch ({self.about[NAMES[what]]}) are "
                    f"{error:.2e} (relative L2) from the known ones, expected at most {bound:.0e}: "
                    "this device, its settings or the program cannot be trusted"
                )
        text = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
        return f"self-check passed: relative L2 to known answers: {text} (bound {bound:.0e})"

    def _resized(self) -> tuple[np.ndarray, np.ndarray]:
        """The resized fixed image: by this device, and by float64 products."""
        image = _fixed_bytes(64)[:1]
        method, size = self._protocol.resize, self.space.size
        ours = jax.jit(lambda x: resizing.resize(x, size, method))(image.astype(np.float32))
        weights = resizing.RESIZES[method](64, size)
        theirs = np.einsum("ih,jw,bhwc->bijc", weights, weights, image.astype(np.float64))
        return np.asarray(ours), np.clip(theirs, 0, 255) if method == "bicubic_clean" else theirs


def known_batch(size: int) -> np.ndarray:
    """A fixed batch (2, size, size, 3) float32 in [-1, 1]: the same bits on every machine."""
    return (_fixed_bytes(size).astype(np.float32) - 128) / 128


def known_features(network: Any, params: Any, kind: str) -> str | None:
    """JSON for the file `KNOWN` beside converted weights, computed on the host's CPU.

    None where no space has networks of this kind.
    """
    space = next((space for space in SPACES.values() if space.kind == kind), None)
    if space is None:
        return None
    apply = jax.jit(lambda p, x: space.outputs(network, p, x)["pool"])
    with jax.default_device(_host()):
        found = np.asarray(apply(params, known_batch(space.size)))
    rows = [[float(f"{value:.9g}") for value in row] for row in found]
    return json.dumps({"pool": rows}) + "\n"


def _host() -> jax.Device | None:
    """The host's CPU, or None (JAX's default device) where JAX may not use it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _fixed_bytes(size: int) -> np.ndarray:
    """(2, size, size, 3) uint8: noise of a multiplicative hash, and a ramp that wraps around.

    It takes integer arithmetic only.
    """
    i = np.arange(size * size * 3, dtype=np.uint64)
    noise = (i * np.uint64(2654435761) % np.uint64(2**32) >> np.uint64(24)).reshape(size, size, 3)
    y, x, c = np.indices((size, size, 3))
    ramp = (3 * y + 2 * x + 40 * c) * 256 // (5 * size) % 256
    return np.stack([noise.astype(np.uint8), ramp.astype(np.uint8)])


def _open(
    protocol: Protocol, kind: str, folder: str
) -> tuple[Any, Any, np.ndarray, dict[str, Any]]:
    """(network, params, known features, source) of the converted weights in a folder.

    Raises DmfError where they are missing, or not the protocol's.
    """
    if not folder:
        raise DmfError(
            "no feature network is given (--features, config.run.features): "
            f"expected the directory of {how_to_get(protocol)}"
        )
    try:
        found, stored = pretrained.open_folder(folder)
    except DmfError as error:
        raise DmfError(
            f"--features={folder}: {error}. Expected the directory of {how_to_get(protocol)}"
        ) from error
    config, _ = pretrained.described(stored)
    if config.kind != kind:
        raise DmfError(
            f"--features={folder}: holds a {config.kind}; "
            f"expected the directory of {how_to_get(protocol)}"
        )
    source = stored.get("source", {}).get("source", {})
    digest, wanted = source.get("sha256", ""), protocol.weights_sha256
    if not digest.startswith(wanted):
        raise DmfError(
            f"--features={folder}: made from {source.get('file')} with SHA-256 {digest[:8]}...; "
            f"protocol {protocol.name} expects {wanted}..., {how_to_get(protocol)}. "
            "For other weights write your own protocol, with an empty weights_sha256"
        )
    wanted = "features beside weights that this version has converted"
    known = records.read(found / KNOWN, {"pool": list}, wanted)["pool"]
    try:
        pool = np.asarray(known, np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise DmfError(f"{found / KNOWN}: pool holds no array; expected {wanted}") from error
    return *pretrained.load_folder(found, stored), pool, source


def how_to_get(protocol: Protocol) -> str:
    """What a user without the weights does to get them."""
    kind = "fid_inception" if protocol.space == "inception" else protocol.space
    command = f"python main.py --mode=convert --kind={kind} --source=FILE --out=DIR"
    return f"converted weights: get {protocol.weights}, then run {command}"


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs))
