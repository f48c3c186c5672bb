"""Feature spaces: what a protocol's images become before they are compared.

Every space sits behind one call, bytes in, named features out; adding one is a row in `SPACES`. Images are handed to the
devices in pieces of a fixed number of rows per device, so that the features are the same bits on one device and on many.
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

KNOWN = "known_features.json"  # beside converted weights: the features of `known_batch`, as found when they were converted
CPU_BOUND, BOUND = (
    1e-5,
    2e-3,
)  # relative L2 of the self-check: on CPU, and on accelerators with products in full float32
ROWS_PER_DEVICE = {"cpu": 8}  # of a piece; a small one stays in the caches of a CPU
ROWS_PER_ACCELERATOR = 64
OUTPUTS = {
    "fid": "pool",
    "kid": "pool",
    "precision_recall": "pool",
    "sfid": "spatial",
    "is": "logits",
}
NAMES = {
    "resized images": "resize",
    "features": "network_file",
}  # what a check is of -> what `about` calls it
IMAGENET_MEAN, IMAGENET_STD = (
    np.array([0.485, 0.456, 0.406], np.float32),
    np.array([0.229, 0.224, 0.225], np.float32),
)

Images = np.ndarray
SCALINGS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "bytes": lambda b: (b - 128) / 128,
    "unit": lambda b: 2 * (b / 255) - 1,
    "imagenet": lambda b: (b / 255 - IMAGENET_MEAN) / IMAGENET_STD,
}


class Space(NamedTuple):
    """One feature space. kind: of the converted network, "" for none. size: of the images it takes, 0 for any.

    outputs(network, params, x) -> named features (B, D) float32 of x (B, size, size, 3), resized and scaled.
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
    """Features of images as one protocol wants them. Raises DmfError where the weights are missing or not the protocol's.

    about: what a result or a reference says of it (space, resize, scaling, network_file, network_sha256).
    """

    def __init__(self, protocol: Protocol, folder: str, mesh: Mesh):
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

    def _features(self, params: Any, images: jax.Array) -> dict[str, jax.Array]:
        x = images.astype(jnp.float32)
        x = jnp.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x
        if self.space.size:
            x = resizing.resize(x, self.space.size, self._protocol.resize)
        found = self.space.outputs(self._network, params, SCALINGS[self._protocol.scaling](x))
        return {name: found[name] for name in self.names}

    def __call__(self, images: Images) -> dict[str, np.ndarray]:
        """Features of images (N, H, W, 1 or 3) uint8: "pool" (N, D) and what else the protocol's scores need, float32."""
        if (
            images.dtype != np.uint8
            or images.ndim != 4
            or images.shape[-1] not in (1, 3)
            or not len(images)
        ):
            raise DmfError(
                f"images to score are {images.dtype} of shape {images.shape}: expected uint8 (N, H, W, 3), grey or colour; "
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
        """Width of each output; none in a space whose width is that of the images."""
        if not self.space.size:
            return {}
        found = jax.eval_shape(
            self._features, self._params, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
        )
        return {name: x.shape[1] for name, x in found.items()}

    def self_check(self) -> str:
        """One line on how far this device is from known answers; raises DmfError where it is too far to score anything.

        The protocol's resize of a fixed image is held against float64 products on the host, and the network's features of a
        fixed batch against those written down when the weights were converted.
        """
        if not self.space.size:
            return "self-check: the space of pixels has nothing to check"
        errors = {"resized images": _relative(*self._resized())}
        if self._known is not None:
            size, network = self.space.size, self._network
            apply = jax.jit(lambda params, x: self.space.outputs(network, params, x)["pool"])
            errors["features"] = _relative(
                np.asarray(apply(self._params, known_batch(size))), self._known
            )
        bound = CPU_BOUND if self._mesh.devices.flat[0].platform == "cpu" else BOUND
        for what, error in errors.items():
            if not error <= bound:
                raise DmfError(
                    f"self-check: the {what} of a fixed batch ({self.about[NAMES[what]]}) are {error:.2e} (relative L2) from "
                    f"the known ones, expected at most {bound:.0e}: this device, its settings or the program cannot be trusted"
                )
        text = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
        return f"self-check passed: relative L2 to known answers: {text} (bound {bound:.0e})"

    def _resized(self) -> tuple[np.ndarray, np.ndarray]:
        image = _fixed_bytes(64)[:1]
        method, size = self._protocol.resize, self.space.size
        ours = jax.jit(lambda x: resizing.resize(x, size, method))(image.astype(np.float32))
        weights = resizing.RESIZES[method](64, size)
        theirs = np.einsum("ih,jw,bhwc->bijc", weights, weights, image.astype(np.float64))
        return np.asarray(ours), np.clip(theirs, 0, 255) if method == "bicubic_clean" else theirs


def known_batch(size: int) -> np.ndarray:
    """A fixed batch (2, size, size, 3) float32 in [-1, 1], of integer arithmetic alone: the same on every machine."""
    return (_fixed_bytes(size).astype(np.float32) - 128) / 128


def known_features(network: Any, params: Any, kind: str) -> str | None:
    """JSON for the file `KNOWN` beside converted weights, computed on the host's CPU; None where `kind` has no space."""
    spaces = [space for space in SPACES.values() if space.kind == kind]
    if not spaces:
        return None
    with jax.default_device(_host()):
        found = jax.jit(lambda p, x: spaces[0].outputs(network, p, x)["pool"])(
            params, known_batch(spaces[0].size)
        )
    return (
        json.dumps({"pool": [[float(f"{v:.9g}") for v in row] for row in np.asarray(found)]}) + "\n"
    )


def _host() -> jax.Device | None:
    """The host's CPU, or None, JAX's default, where JAX was told to leave it alone."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _fixed_bytes(size: int) -> np.ndarray:
    """(2, size, size, 3) uint8: noise from a multiplicative hash, and a smooth ramp that wraps around."""
    i = np.arange(size * size * 3, dtype=np.uint64)
    noise = (i * np.uint64(2654435761) % np.uint64(2**32) >> np.uint64(24)).reshape(size, size, 3)
    y, x, c = np.indices((size, size, 3))
    return np.stack(
        [
            noise.astype(np.uint8),
            ((3 * y + 2 * x + 40 * c) * 256 // (5 * size) % 256).astype(np.uint8),
        ]
    )


def _open(
    protocol: Protocol, kind: str, folder: str
) -> tuple[Any, Any, np.ndarray, dict[str, Any]]:
    """(network, params, known features, source) of the converted weights in `folder`, which must be the protocol's."""
    if not folder:
        raise DmfError(
            f"no feature network is given (--features, config.run.features): expected the directory of {how_to_get(protocol)}"
        )
    try:
        found, stored = pretrained.open_folder(folder)
    except DmfError as error:
        raise DmfError(
            f"--features={folder}: {error}. It is to be the directory of {how_to_get(protocol)}"
        ) from error
    config, _ = pretrained.described(stored)
    if config.kind != kind:
        raise DmfError(
            f"--features={folder}: holds a {config.kind}; expected the directory of {how_to_get(protocol)}"
        )
    source = stored.get("source", {}).get("source", {})
    digest, wanted = source.get("sha256", ""), protocol.weights_sha256
    if not digest.startswith(wanted):
        raise DmfError(
            f"--features={folder}: made from {source.get('file')} with SHA-256 {digest[:8]}...; protocol {protocol.name} "
            f"expects {wanted}..., {how_to_get(protocol)}. For other weights write a protocol of your own, with an empty "
            "weights_sha256"
        )
    try:
        known = np.asarray(json.loads((found / KNOWN).read_text())["pool"], np.float32)
    except (OSError, ValueError, KeyError) as error:
        raise DmfError(
            f"--features={folder}: no readable {KNOWN} beside the weights; expected them converted anew"
        ) from error
    return *pretrained.load_folder(found, stored), known, source


def how_to_get(protocol: Protocol) -> str:
    """What a user without the weights has to do."""
    kind = "fid_inception" if protocol.space == "inception" else protocol.space
    command = f"python main.py --mode=convert --kind={kind} --source=FILE --out=DIR"
    return f"converted weights: get {protocol.weights}, then run {command}"


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs))
