"""The evaluator beside torch-fidelity: the same PNG files, the same weights; scores and throughput side by side.

    pip install -r requirements-parity.txt
    python launch/tables/against_torch_fidelity.py --count=5000 --work=runs/fidelity --out=docs/against_torch_fidelity.json

Images are 32 x 32 crops of scikit-learn's two photographs, weights are random (or --weights=FILE, the published ones): this
compares two programs, not images. torch-fidelity resizes as TensorFlow 1 does, so the protocol here is that of EDM with
weights of any kind. Throughput: blocks of images through both extractors in turns, batch 64, float32, medians.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from dmf import sharding
from dmf.convert import audit
from dmf.convert.command import convert
from dmf.convert.inception import FID_INCEPTION
from dmf.evaluation import protocols, scoring
from dmf.evaluation.features import Extractor
from dmf.evaluation.judge import Setting
from dmf.networks.frozen.inception import InceptionConfig, build_inception

BATCH, ROUNDS = 64, 7


def torchvision_operators():
    """A torchvision wheel beside another build of torch lacks two operators that only detection needs."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


def write_images(folder, photo, count, seed):
    """`count` random crops of a photograph as PNG files, shrunk by 1 to 4 and mirrored at random."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        side = int(rng.integers(32, 129))
        y, x = (int(rng.integers(0, n - side)) for n in photo.shape[:2])
        crop = Image.fromarray(photo[y : y + side, x : x + side]).resize((32, 32), Image.BICUBIC)
        (crop.transpose(Image.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop).save(
            folder / f"{i:06}.png"
        )


def write_weights(path):
    """A file in the published layout with random weights, no layer at its zero start."""
    network = build_inception(InceptionConfig())
    rng = np.random.default_rng(0)
    leaves = {}
    for name, x in audit.flat(network.init(jax.random.key(0))).items():
        noise = rng.standard_normal(x.shape).astype(np.float32)
        leaves[name] = (
            np.asarray(x) * (1 + 0.2 * np.tanh(noise))
            if name.endswith("var")
            else np.asarray(x) + 0.02 * noise
        )
    tensors = audit.write(FID_INCEPTION.rules(InceptionConfig(), (299, 299, 3), None), leaves)
    torch.save(
        {name: torch.from_numpy(x) for name, x in tensors.items() if "num_batches" not in name},
        path,
    )


def throughput(extract, theirs, images):
    """Images per second of both, a block in turns: (ours, theirs, median of the ratios of the rounds)."""
    ours_s, theirs_s = [], []
    as_torch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    for n in range(ROUNDS + 1):  # the first one compiles
        started = time.perf_counter()
        extract(images)
        between = time.perf_counter()
        with torch.no_grad():
            theirs(as_torch)
        if n:
            ours_s.append(between - started)
            theirs_s.append(time.perf_counter() - between)
    ratios = [b / a for a, b in zip(ours_s, theirs_s, strict=True)]
    return (
        len(images) / statistics.median(ours_s),
        len(images) / statistics.median(theirs_s),
        statistics.median(ratios),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--reference_count", type=int, default=1000)
    parser.add_argument("--work", type=Path, default=Path("runs/fidelity"))
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/against_torch_fidelity.json"))
    args = parser.parse_args()
    keep = torchvision_operators()
    from torch_fidelity import calculate_metrics
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    work = args.work
    counts = {"real": args.reference_count, "fake": args.count}
    for (name, count), photo, seed in zip(
        counts.items(), load_sample_images().images, (0, 1), strict=True
    ):
        if len(list((work / name).glob("*.png"))) != count:
            shutil.rmtree(work / name, ignore_errors=True)
            write_images(work / name, photo, count, seed)
    weights = args.weights or work / "random.pth"
    if not weights.exists():
        write_weights(weights)
    inception = work / f"inception_{weights.stem}"
    if not inception.is_dir():
        convert("fid_inception", weights, inception)
    own = work / "edm_any_weights.json"
    own.write_text(
        json.dumps(
            {"base": "edm", "weights_sha256": "", "metrics": ["fid", "is"], "is_shuffle_seed": -1}
        )
    )

    setting = Setting(str(own), str(inception))
    extract = Extractor(protocols.load(str(own)), str(inception), sharding.make_mesh())
    options = {"feature_extractor_weights_path": str(weights)}
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], **options
    ).eval()
    block = np.stack([np.asarray(Image.open(p)) for p in sorted((work / "fake").iterdir())[:BATCH]])
    ours_per_s, theirs_per_s, ratio = throughput(extract, theirs, block)
    print(
        f"throughput: ours {ours_per_s:.2f} images/s, torch-fidelity {theirs_per_s:.2f}; ratio {ratio:.3f}",
        flush=True,
    )

    scoring.make_reference(str(work / "real"), setting, str(work / "real.npz"))
    scored = Setting(setting.protocol, setting.features, str(work / "real.npz"))
    (work / "scores.json").unlink(missing_ok=True)
    ours = scoring.score_images(str(work / "fake"), scored, str(work / "scores.json"))[0]
    found = calculate_metrics(
        input1=str(work / "fake"),
        input2=str(work / "real"),
        fid=True,
        isc=True,
        samples_shuffle=False,
        cuda=False,
        batch_size=BATCH,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
        **options,
    )
    rows = {
        "count": args.count,
        "reference_count": args.reference_count,
        "weights": "random" if args.weights is None else args.weights.name,
        "fid": {"ours": ours["fid"], "torch_fidelity": found["frechet_inception_distance"]},
        "is": {"ours": ours["is"], "torch_fidelity": found["inception_score_mean"]},
        "images_per_second": {
            "ours": ours_per_s,
            "torch_fidelity": theirs_per_s,
            "median_ratio": ratio,
            "batch": BATCH,
        },
        "threads": torch.get_num_threads(),
    }
    for name in ("fid", "is"):
        rows[name]["relative_difference"] = abs(
            rows[name]["ours"] / rows[name]["torch_fidelity"] - 1
        )
        print(
            f"{name}: ours {rows[name]['ours']:.9g}, torch-fidelity {rows[name]['torch_fidelity']:.9g}, ",
            end="",
        )
        print(f"relative difference {rows[name]['relative_difference']:.2e}")
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    del keep


if __name__ == "__main__":
    main()
