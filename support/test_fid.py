"""fid.py and the files behind it: closed forms, independent oracles, every input and error. Offline, on a CPU."""
import hashlib
import json
import os
import pickle
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fid
from support import checkpoint, cli, data, features, inception
from support.cli import UserError
from support.data import image_generators
from support.features import Moments, measure
from support.inception import Inception

HERE = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def named_fid(monkeypatch):
    """Errors and warnings begin with the script's name."""
    monkeypatch.setattr(sys, "argv", ["fid.py"])


def some_images(n, size=4, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, size, size, 3)).astype("uint8")


def write_folder(path, images):
    """PNGs in two folders, by turns."""
    for i, image in enumerate(images):
        folder = path / f"{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return str(path)


def write_npz(path, images, **arrays):
    np.savez(path, images=images, **arrays)
    return str(path)


class Pixels(torch.nn.Module):
    """The first 8 pixel values as features: exact, whatever the batch."""

    def forward(self, x: torch.Tensor):
        return x.view(x.size(0), 3 * x.size(2) * x.size(3))[:, :8]


class Broken(torch.nn.Module):
    """Not finite where the first pixel is white."""

    def forward(self, x: torch.Tensor):
        return 1 / (1 - x.flatten(1)[:, :8])


class Grey(torch.nn.Module):
    """Fails on 3 channels."""

    def forward(self, x: torch.Tensor):
        return x.view(x.size(0), x.size(2) * x.size(3))[:, :8]


class DeclaredGrey(torch.nn.Module):
    """Runs on any number of channels, and says that it takes 1."""

    def __init__(self):
        super().__init__()
        self.channels = 1

    def forward(self, x: torch.Tensor):
        return x.flatten(1)[:, :8]


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_features(tmp_path, module=None):
    """The flags for a module's features."""
    module = module or Pixels()
    example = torch.zeros(2, 1 if isinstance(module, Grey) else 3, 4, 4)
    if isinstance(module, DeclaredGrey):
        program = torch.jit.script(module)
    else:
        program = torch.jit.trace(module, example, check_trace=False)
    program.save(str(tmp_path / "f.pt"))
    return ["--features", str(tmp_path / "f.pt"), "--workers", "0"]


def run(capsys, *argv):
    fid.main([str(a) for a in argv])
    return capsys.readouterr()


def report_of(capsys, *argv):
    return json.loads(run(capsys, *argv, "--json").out)


def error_of(capsys, *argv):
    """The one line of an error that ends with exit code 2 and prints nothing else, but progress on a slow machine."""
    with pytest.raises(SystemExit) as leave:
        cli.run_script(fid.main, [str(a) for a in argv])
    out = capsys.readouterr()
    lines = [line for line in out.err.splitlines() if not line.endswith(" left")]
    assert leave.value.code == 2 and out.out == "", out
    assert len(lines) == 1 and lines[0].startswith("fid.py: error: "), out
    return lines[0]


# ------------------------------------------------------------------------------------------ the metrics in closed form
def test_frechet_distance_of_two_gaussians_in_closed_form():
    r = np.random.RandomState(0)
    Q, _ = np.linalg.qr(r.standard_normal((64, 64)))
    a, b = r.uniform(0.1, 9, 64), r.uniform(0.1, 9, 64)
    mu = r.standard_normal(64)
    got = fid.frechet_distance(mu, Q * a @ Q.T, 0 * mu, Q * b @ Q.T)  # commuting: sum (sqrt a - sqrt b)^2
    assert abs(got - (mu @ mu + ((a**0.5 - b**0.5) ** 2).sum())) < 1e-6
    S1 = np.array([[2.0, 0.6], [0.6, 1.0]])
    S2 = np.array([[0.5, -0.3], [-0.3, 3.0]])
    M = S1 @ S2  # 2x2: Tr sqrt(M) = sqrt(Tr M + 2 sqrt(det M))
    expected = 25 + np.trace(S1 + S2) - 2 * np.sqrt(np.trace(M) + 2 * np.sqrt(np.linalg.det(M)))
    assert abs(fid.frechet_distance(np.array([3.0, 0]), S1, np.array([0.0, 4]), S2) - expected) < 1e-6


def test_frechet_distance_of_identical_and_rank_deficient_sets():
    x = np.random.RandomState(0).standard_normal((20, 300)) * 10  # rank 19 of 300
    mu, sigma = x.mean(0), np.cov(x.T)
    assert abs(fid.frechet_distance(mu, sigma, mu, sigma)) < 1e-6
    zero, left, right = np.zeros(4), np.diag([4.0, 1, 0, 0]), np.diag([0.0, 0, 9, 1])
    assert abs(fid.frechet_distance(zero, left, np.ones(4), right) - (4 + 5 + 10)) < 1e-12  # no shared direction
    assert abs(fid.frechet_distance(zero, left, zero, np.diag([1.0, 0, 0, 0])) - (5 + 1 - 2 * 2)) < 1e-12
    assert abs(fid.frechet_distance(zero, left, zero, np.zeros((4, 4))) - 5) < 1e-12
    low = np.random.RandomState(1).standard_normal((300, 5))
    assert abs(fid.frechet_distance(mu, low @ low.T, mu, 4 * low @ low.T) - np.trace(low @ low.T)) < 1e-6
    with pytest.raises(UserError, match="eigenvalues from -1 to 2"):
        fid.frechet_distance(np.zeros(2), np.diag([2.0, -1]), np.zeros(2), np.eye(2))


def test_streaming_statistics_equal_numpy_in_any_pieces():
    x = np.random.RandomState(0).standard_normal((1500, 12)).astype("float32") + 1000  # sum(x^2) - n mean^2 would fail
    results = []
    for piece in (1, 7, 512, 1500):
        moments = Moments(12)
        for i in range(0, len(x), piece):
            moments.add(x[i:i + piece])
        assert moments.count() == 1500
        results.append(moments.result())
    for mu, sigma in results:
        assert np.abs(mu - x.astype(float).mean(0)).max() < 1e-10
        assert np.abs(sigma - np.cov(x.T.astype(float))).max() < 1e-10
        assert (mu == results[0][0]).all() and (sigma == results[0][1]).all()


def test_inception_score_of_known_predictions():
    one_hot = 1e4 * torch.eye(7).repeat(30, 1)  # every tenth of the 210 holds each class 3 times
    mean, std = fid.inception_score(one_hot)
    assert abs(mean - 7) < 1e-9 and std < 1e-9
    assert fid.inception_score(torch.zeros(50, 7)) == (1.0, 0.0)
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)  # by the definition
    kl = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert abs(fid.inception_score(p.log().repeat(10, 1))[0] - kl.exp()) < 1e-12
    halves = torch.cat([1e4 * torch.eye(2).repeat(5, 1), torch.zeros(10, 2)])
    assert np.allclose(fid.inception_score(halves, splits=2), (1.5, 0.5))


class OneHot:
    """A network whose logits say which of ten classes an image of one pixel is."""
    name, digest = Inception.name, Inception.digest

    def __call__(self, images):
        return 1e4 * torch.eye(10)[images[:, 0, 0, 0].long()]

    def logits(self, pool):
        return pool


def test_class_sorted_samples_are_shuffled_for_the_inception_score(monkeypatch):
    labels = np.arange(10).repeat(100).astype("uint8")  # sorted: any tenth of them is one class
    numbers = np.arange(1000)

    def batches(missing=()):
        for i in range(0, 1000, 33):
            part = np.setdiff1d(numbers[i:i + 33], missing)
            yield part, labels[part].reshape(-1, 1, 1, 1)

    side = measure(batches(), 1000, OneHot(), "sorted", CPU)
    order = np.random.RandomState(2020).permutation(1000)  # torch-fidelity's
    assert (side.pool.argmax(1).numpy() == labels[order]).all() and side.num == 1000
    assert 8.5 < fid.score(side, network=OneHot())["inception_score"] < 10
    missing = numbers[40:140]  # samples that were not finite: the others keep their order
    fewer = measure(batches(missing), 1000, OneHot(), "sorted", CPU)
    assert (fewer.pool.argmax(1).numpy() == labels[order[~np.isin(order, missing)]]).all() and fewer.num == 900
    monkeypatch.setattr(features, "KEPT", 300)  # of a larger set: all in the statistics, a random part in the rest
    part = measure(batches(), 1000, OneHot(), "sorted", CPU)
    assert (part.pool == side.pool[:300]).all() and (part.sigma == side.sigma).all() and part.num == 1000


def line(*x):
    return torch.tensor(x, dtype=torch.float32)[:, None]


def test_precision_and_recall_of_toy_sets():
    reference = line(0, 1, 2, 3)  # third neighbours at 3, 2, 2, 3: the manifold is [-3, 6], ends included
    assert fid.precision_recall(line(-3, 6, 6.5, 100), reference) == (0.5, 1.0)
    assert fid.precision_recall(line(-3.5, 6.5, 7, 8), reference) == (0.0, 1.0)  # 6.5 reaches 10 back
    assert fid.precision_recall(line(10, 11, 12, 13, 1), reference) == (0.2, 1.0)
    assert fid.precision_recall(reference, reference) == (1.0, 1.0)
    same, four_same = line(5, 5, 5, 5, 5), line(5, 5, 5, 5, 9)
    assert fid.precision_recall(same, four_same) == (1.0, 0.8)  # radius 0 holds its equals; a 9 is not one
    one = torch.rand(1, 2048) + 1  # radius 0 again: a feature's last bit, which a batch may change, must not tell
    assert fid.precision_recall(one.nextafter(torch.tensor(9.0)).repeat(6, 1), one.repeat(5, 1)) == (1.0, 1.0)
    assert fid.precision_recall(one.repeat(6, 1) * 1.0001, one.repeat(5, 1)) == (0.0, 0.0)


def test_precision_and_recall_equal_brute_force_in_any_blocks():
    r = np.random.RandomState(0)
    a, b = r.randint(0, 6, (41, 3)).astype("float32"), r.randint(3, 9, (29, 3)).astype("float32")  # many ties

    def manifold_share(x, centres):
        radii = []
        for i in range(len(centres)):
            radii.append(sorted(((centres[i] - np.delete(centres, i, 0)) ** 2).sum(1))[2])
        inside = [any(((p - c) ** 2).sum() <= r2 for c, r2 in zip(centres, radii, strict=True)) for p in x]
        return np.mean(inside)

    expected = manifold_share(a, b), manifold_share(b, a)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    for block in (1000, 29, 8, 2, 1):
        assert fid.precision_recall(torch.tensor(a), torch.tensor(b), block=block) == expected


# ------------------------------------------------------------------------------------------ the Inception
FID_LAYERS = """
- Conv2d_1a_3x3:32x3x3x3 Conv2d_2a_3x3:32x32x3x3 Conv2d_2b_3x3:64x32x3x3
- Conv2d_3b_1x1:80x64x1x1 Conv2d_4a_3x3:192x80x3x3
Mixed_5b branch1x1:64x192x1x1 branch5x5_1:48x192x1x1 branch5x5_2:64x48x5x5
Mixed_5b branch3x3dbl_1:64x192x1x1 branch3x3dbl_2:96x64x3x3
Mixed_5b branch3x3dbl_3:96x96x3x3 branch_pool:32x192x1x1
Mixed_5c branch1x1:64x256x1x1 branch5x5_1:48x256x1x1 branch5x5_2:64x48x5x5
Mixed_5c branch3x3dbl_1:64x256x1x1 branch3x3dbl_2:96x64x3x3
Mixed_5c branch3x3dbl_3:96x96x3x3 branch_pool:64x256x1x1
Mixed_5d branch1x1:64x288x1x1 branch5x5_1:48x288x1x1 branch5x5_2:64x48x5x5
Mixed_5d branch3x3dbl_1:64x288x1x1 branch3x3dbl_2:96x64x3x3
Mixed_5d branch3x3dbl_3:96x96x3x3 branch_pool:64x288x1x1
Mixed_6a branch3x3:384x288x3x3 branch3x3dbl_1:64x288x1x1 branch3x3dbl_2:96x64x3x3 branch3x3dbl_3:96x96x3x3
Mixed_6b branch1x1:192x768x1x1 branch7x7_1:128x768x1x1 branch7x7_2:128x128x1x7
Mixed_6b branch7x7_3:192x128x7x1 branch7x7dbl_1:128x768x1x1
Mixed_6b branch7x7dbl_2:128x128x7x1 branch7x7dbl_3:128x128x1x7 branch7x7dbl_4:128x128x7x1
Mixed_6b branch7x7dbl_5:192x128x1x7 branch_pool:192x768x1x1
Mixed_6c branch1x1:192x768x1x1 branch7x7_1:160x768x1x1 branch7x7_2:160x160x1x7
Mixed_6c branch7x7_3:192x160x7x1 branch7x7dbl_1:160x768x1x1
Mixed_6c branch7x7dbl_2:160x160x7x1 branch7x7dbl_3:160x160x1x7 branch7x7dbl_4:160x160x7x1
Mixed_6c branch7x7dbl_5:192x160x1x7 branch_pool:192x768x1x1
Mixed_6d branch1x1:192x768x1x1 branch7x7_1:160x768x1x1 branch7x7_2:160x160x1x7
Mixed_6d branch7x7_3:192x160x7x1 branch7x7dbl_1:160x768x1x1
Mixed_6d branch7x7dbl_2:160x160x7x1 branch7x7dbl_3:160x160x1x7 branch7x7dbl_4:160x160x7x1
Mixed_6d branch7x7dbl_5:192x160x1x7 branch_pool:192x768x1x1
Mixed_6e branch1x1:192x768x1x1 branch7x7_1:192x768x1x1 branch7x7_2:192x192x1x7
Mixed_6e branch7x7_3:192x192x7x1 branch7x7dbl_1:192x768x1x1
Mixed_6e branch7x7dbl_2:192x192x7x1 branch7x7dbl_3:192x192x1x7 branch7x7dbl_4:192x192x7x1
Mixed_6e branch7x7dbl_5:192x192x1x7 branch_pool:192x768x1x1
Mixed_7a branch3x3_1:192x768x1x1 branch3x3_2:320x192x3x3 branch7x7x3_1:192x768x1x1
Mixed_7a branch7x7x3_2:192x192x1x7 branch7x7x3_3:192x192x7x1
Mixed_7a branch7x7x3_4:192x192x3x3
Mixed_7b branch1x1:320x1280x1x1 branch3x3_1:384x1280x1x1 branch3x3_2a:384x384x1x3
Mixed_7b branch3x3_2b:384x384x3x1 branch3x3dbl_1:448x1280x1x1
Mixed_7b branch3x3dbl_2:384x448x3x3 branch3x3dbl_3a:384x384x1x3 branch3x3dbl_3b:384x384x3x1 branch_pool:192x1280x1x1
Mixed_7c branch1x1:320x2048x1x1 branch3x3_1:384x2048x1x1 branch3x3_2a:384x384x1x3
Mixed_7c branch3x3_2b:384x384x3x1 branch3x3dbl_1:448x2048x1x1
Mixed_7c branch3x3dbl_2:384x448x3x3 branch3x3dbl_3a:384x384x1x3 branch3x3dbl_3b:384x384x3x1 branch_pool:192x2048x1x1
"""

def reference_shapes():
    """Name -> shape of every entry of pt_inception-2015-12-05-6726825d.pth, in its order."""
    shapes = {}
    for text in FID_LAYERS.split("\n")[1:-1]:
        block, *convs = text.split()
        for conv in convs:
            name, shape = conv.split(":")
            name = name if block == "-" else f"{block}.{name}"
            shape = tuple(int(n) for n in shape.split("x"))
            shapes[f"{name}.conv.weight"] = shape
            for part in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{name}.bn.{part}"] = shape[:1]
            shapes[f"{name}.bn.num_batches_tracked"] = ()
    return shapes | {"fc.weight": (1008, 2048), "fc.bias": (1008,)}


def reference_weights():
    """The same weights anywhere: legacy numpy randomness, by sorted name."""
    r, weights = np.random.RandomState(0), {}
    for name, shape in sorted(reference_shapes().items()):
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
            continue
        a = r.standard_normal(shape)
        if name.endswith(("running_var", "bn.weight")):
            a = np.exp(0.2 * a)
        elif len(shape) > 1:
            a = a * (2 / np.prod(shape[1:])) ** 0.5
        else:
            a = 0.1 * a
        weights[name] = torch.from_numpy(a.astype("float32"))
    return weights


def test_inception_has_the_reference_files_names_and_shapes():
    with torch.device("meta"):
        ours = {name: tuple(tensor.shape) for name, tensor in Inception().state_dict().items()}
    assert len(ours) == 94 * 6 + 2 and list(ours.items()) == list(reference_shapes().items())


# Made once by pytorch-fid 0.3.0's InceptionV3 (torchvision 0.28) from these weights, of one random image of each size:
# seven of its features, their mean, and three logits.
PYTORCH_FID = {
    32: ([0.00387, 5.07427, 0.0, 0.01583, 4.06776, 0.0, 0.01729], 1.314622, [-0.33478, 0.90587, 1.09325]),
    320: ([0.00318, 6.06326, 0.0, 0.02668, 4.84089, 0.0, 0.00649], 1.55314, [-0.13469, 0.86871, 1.15209]),
}


def test_inception_equals_pytorch_fid_and_runs_from_the_command_line(tmp_path, capsys, monkeypatch):
    weights, path = reference_weights(), tmp_path / "weights.pth"
    torch.save(weights, path)
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    model = inception.load_inception(str(path))
    assert not model.training
    for size, (pool, mean, logits) in PYTORCH_FID.items():
        images = np.random.RandomState(size).randint(0, 256, (1, 3, size, size)).astype("uint8")
        with torch.inference_mode():
            h = model(torch.from_numpy(images))
            y = model.logits(h)
        assert h.shape == (1, 2048) and y.shape == (1, 1008) and h.dtype == torch.float32
        assert np.allclose(h[0, [0, 320, 704, 1088, 1472, 1856, 2047]], pool, atol=5e-5)
        assert abs(h.mean().item() - mean) < 5e-5 and np.allclose(y[0, [0, 500, 1007]], logits, atol=5e-5)
    images = some_images(10)
    a, x = write_npz(tmp_path / "a.npz", images), str(tmp_path / "x.npz")
    out = run(capsys, a, "--save-stats", x, "--weights", path, "--workers", 0)
    assert out.out.startswith("FID ") and "inception-2015-12-05 (2048), resize bilinear to 299x299" in out.out
    assert "10 images for 2048" in out.err
    with np.load(x) as file:
        mu, sigma, num, digest = file["mu"], file["sigma"], file["num"], file["features_sha256"]
    with torch.inference_mode():
        h = model(torch.from_numpy(images).permute(0, 3, 1, 2)).double().numpy()
    assert np.allclose(mu, h.mean(0), atol=1e-5) and np.allclose(sigma, np.cov(h.T), atol=1e-5)
    assert num == 10 and digest == Inception.digest
    del weights["fc.bias"]  # strict: a file whose hash passed, and yet an entry is missing
    monkeypatch.setattr(inception.torch, "load", lambda *args, **kwargs: weights)
    with pytest.raises(RuntimeError, match="fc.bias"):
        inception.load_inception(str(path))


def test_features_are_made_in_full_float32(monkeypatch):
    """TF32 on a GPU would change the third digit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends, "cudnn", types.SimpleNamespace(allow_tf32=True))
    monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace(allow_tf32=True))
    assert fid.pick_device("auto").type == "cuda"
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_weight_file_that_is_not_the_one(tmp_path, capsys):
    images = write_npz(tmp_path / "a.npz", some_images(4))
    (tmp_path / "w.pth").write_bytes(b"other weights")
    error = error_of(capsys, images, images, "--weights", tmp_path / "w.pth")
    assert hashlib.sha256(b"other weights").hexdigest() in error and "6726825d0af5" in error and "w.pth" in error
    assert "No such file" in error_of(capsys, images, images, "--weights", tmp_path / "none.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    assert "a pipe" in error_of(capsys, images, images, "--weights", tmp_path / "pipe.pth")
    assert "a pipe" in error_of(capsys, images, images, "--features", tmp_path / "pipe.pth")


def test_weights_are_downloaded_checked_and_cached(tmp_path, capsys, monkeypatch):
    images = write_npz(tmp_path / "a.npz", some_images(4))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(inception, "WEIGHTS_URL", (tmp_path / "nowhere" / "weights.pth").as_uri())  # "offline"
    error = error_of(capsys, images, images)
    assert inception.WEIGHTS_URL in error and "--weights PATH" in error
    source, cached = tmp_path / "weights.pth", tmp_path / "cache" / "farmer" / "weights.pth"
    source.write_bytes(b"wrong")
    monkeypatch.setattr(inception, "WEIGHTS_URL", source.as_uri())
    assert hashlib.sha256(b"wrong").hexdigest() in error_of(capsys, images, images)
    assert list(cached.parent.iterdir()) == []
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", hashlib.sha256(b"right").hexdigest())
    source.write_bytes(b"right")
    monkeypatch.setattr(inception.torch, "load", lambda file, **options: {"file": file, **options})
    monkeypatch.setattr(Inception, "__init__", lambda self: torch.nn.Module.__init__(self))
    loaded = []
    monkeypatch.setattr(Inception, "load_state_dict", lambda self, weights: loaded.append(weights))
    inception.load_inception()
    source.unlink()
    inception.load_inception()  # from the cache
    assert loaded == [{"file": cached, "map_location": "cpu", "weights_only": True}] * 2
    assert list(cached.parent.iterdir()) == [cached]


# ------------------------------------------------------------------------------------------ inputs
def test_folder_zip_and_npz_of_the_same_images_are_identical(tmp_path, capsys):
    images = some_images(11)
    folder = write_folder(tmp_path / "images", images)
    names = sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*.png"))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        for name in names:
            file.write(os.path.join(folder, name), name)
    in_order = images[[int(Path(name).stem) for name in names]]
    npz, adm = write_npz(tmp_path / "images.npz", in_order), tmp_path / "adm.npz"
    np.savez(adm, in_order)  # arr_0
    x = images.transpose(0, 3, 1, 2).reshape(11, -1)[:, :8].astype("float32") / np.float32(127.5) - 1
    first = None
    for source in (folder, tmp_path / "images.zip", npz, adm):
        run(capsys, source, "--save-stats", tmp_path / "x.npz", *write_features(tmp_path))
        with np.load(tmp_path / "x.npz") as file:
            mu, sigma = file["mu"], file["sigma"]
        first = first or (mu, sigma)
        assert (mu == first[0]).all() and (sigma == first[1]).all()
        assert np.abs(mu - x.astype(float).mean(0)).max() < 1e-7
        assert np.abs(sigma - np.cov(x.T.astype(float))).max() < 1e-7


def test_splits_are_named(tmp_path, capsys):
    """Of a folder with both, of a set by name."""
    train, test = some_images(12), some_images(10, seed=1)
    write_folder(tmp_path / "set" / "train", train)
    write_folder(tmp_path / "set" / "test", test)
    options = write_features(tmp_path)
    got = report_of(capsys, f"{tmp_path}/set:train", f"{tmp_path}/set:test", *options)
    a, b = write_folder(tmp_path / "a", train), write_folder(tmp_path / "b", test)
    assert got == report_of(capsys, a, b, *options) and (got["num_samples"], got["num_reference"]) == (12, 10)
    assert got["fd"] > 0.01


def test_a_set_is_compared_by_name(tmp_path, capsys, monkeypatch):
    """`python fid.py cifar10:train cifar10:test`, on a small archive of CIFAR-10's format in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "farmer" / "cifar10"
    folder.mkdir(parents=True)
    images = some_images(16, size=32)
    records = np.concatenate([np.zeros((16, 1), np.uint8), images.transpose(0, 3, 1, 2).reshape(16, -1)], 1)
    (folder / "data_batch_1.bin").write_bytes(records[:9].tobytes())
    (folder / "test_batch.bin").write_bytes(records[9:].tobytes())
    options = write_features(tmp_path)
    got = report_of(capsys, "cifar10:train", "cifar10:test", *options)
    a, b = write_npz(tmp_path / "a.npz", images[:9]), write_npz(tmp_path / "b.npz", images[9:])
    assert got == report_of(capsys, a, b, *options) and (got["num_samples"], got["num_reference"]) == (9, 7)


def test_same_numbers_for_any_batch_size_and_workers(tmp_path, capsys):
    a = write_folder(tmp_path / "a", some_images(31))
    b = write_npz(tmp_path / "b.npz", some_images(25, seed=1) // 2)
    runs, options = [], write_features(tmp_path)[:2]
    for size, workers in ((1, 0), (7, 2), (50, 0), (50, 1)):
        argv = [a, b, *options, "--batch-size", size, "--workers", workers]
        runs.append(run(capsys, *argv, "--json").out)
    report = json.loads(runs[0])
    assert runs == runs[:1] * 4 and report["fd"] > 0.1 and 0 <= report["precision"] <= 1
    assert (report["num_samples"], report["num_reference"], report["dim"]) == (31, 25, 8)
    assert report["inception_score"] is None


def test_other_features_give_an_fd(tmp_path, capsys):
    a, b = write_npz(tmp_path / "a.npz", some_images(11)), write_npz(tmp_path / "b.npz", some_images(11, seed=1))
    options = write_features(tmp_path)
    out = run(capsys, a, *options, b)  # REFERENCE may follow flags
    assert out.out.startswith("FD (f.pt)  ") and "FID" not in out.out + out.err
    assert "resize none" in out.out and "IS         n/a" in out.out and "11 samples, 11 reference" in out.out
    report = report_of(capsys, a, b, *options)
    assert "fid" not in report and report["features"] == "f.pt"
    assert report["features_sha256"] == hashlib.sha256((tmp_path / "f.pt").read_bytes()).hexdigest()
    assert f"{report['fd']:.4f}" in out.out and f"{report['precision']:.4f}" in out.out
    os.rename(tmp_path / "f.pt", tmp_path / "inception-2015-12-05")  # the name alone makes no FID
    assert "fid" not in report_of(capsys, a, b, "--features", tmp_path / "inception-2015-12-05")


def test_saved_statistics_stand_for_their_images(tmp_path, capsys):
    a, b = write_npz(tmp_path / "a.npz", some_images(9)), write_npz(tmp_path / "b.npz", some_images(12, seed=1))
    x, options = tmp_path / "x.npz", write_features(tmp_path)
    direct = report_of(capsys, a, b, *options)
    run(capsys, b, "--save-stats", x, *options)
    assert report_of(capsys, a, x, *options) == direct | {"precision": None, "recall": None}
    assert report_of(capsys, x, x)["fd"] == pytest.approx(0, abs=1e-6)  # needs no features at all
    with np.load(x) as file:
        known = {name: file[name] for name in file}
    known |= dict(mu=known["mu"] + 1, num=10_000)
    both = write_npz(tmp_path / "both.npz", some_images(12, seed=1), **known)
    mixed = report_of(capsys, a, both, *options)  # as ADM's: statistics for the FID, images for the rest
    assert mixed["fd"] != direct["fd"]
    assert (mixed["precision"], mixed["num_reference"]) == (direct["precision"], 10_000)
    foreign = write_npz(tmp_path / "foreign.npz", some_images(12, seed=1), mu=np.zeros(2048), sigma=np.eye(2048))
    assert report_of(capsys, a, foreign, *options) == direct  # its images count
    np.savez(tmp_path / "pytorch-fid.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    side, has_images = features.read_statistics(str(tmp_path / "pytorch-fid.npz"))
    assert (side.features, side.digest, side.num) == (Inception.name, Inception.digest, None) and not has_images


def test_statistics_of_another_file_of_the_same_name_are_refused(tmp_path, capsys):
    a, b, x = write_npz(tmp_path / "a.npz", some_images(9)), write_npz(tmp_path / "b.npz", some_images(9)), tmp_path
    options = write_features(tmp_path)
    run(capsys, b, "--save-stats", x / "x.npz", *options)
    os.rename(tmp_path / "f.pt", tmp_path / "renamed.pt")
    assert report_of(capsys, a, x / "x.npz", "--features", tmp_path / "renamed.pt")["fd"] < 1e-6  # the content counts
    write_features(tmp_path, torch.nn.Flatten())
    error = error_of(capsys, a, x / "x.npz", *options)
    assert "8 f.pt features (sha256 " in error and "expected those of f.pt (sha256 " in error
    run(capsys, b, "--save-stats", x / "y.npz", *options)
    error = error_of(capsys, x / "x.npz", x / "y.npz")
    assert "8 f.pt features" in error and "48 f.pt features" in error
    assert "x.npz" in error_of(capsys, x / "x.npz", x / "x.npz", *options)  # no images to read, yet other features
    np.savez(x / "old.npz", mu=np.zeros(48), sigma=np.eye(48), features="f.pt")  # written before hashes were kept
    assert "48 f.pt features (of an unknown file)" in error_of(capsys, a, x / "old.npz", *options)


# ------------------------------------------------------------------------------------------ networks of one channel
def test_a_network_of_one_channel_is_given_the_luminance(tmp_path, capsys):
    images = some_images(9)
    a = write_npz(tmp_path / "a.npz", images)
    luminance = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])
    grey = write_npz(tmp_path / "grey.npz", luminance)
    for module in (Grey(), DeclaredGrey()):
        options = write_features(tmp_path, module)
        out = run(capsys, a, grey, *options, "--batch-size", 2)
        assert out.err.count("reads 1 channel") == 1 and float(out.out.split("\n")[0].split()[-1]) < 1e-6
        run(capsys, a, "--save-stats", tmp_path / "x.npz", *options)
        with np.load(tmp_path / "x.npz") as file:
            mu = file["mu"]
        assert np.abs(mu - (luminance.reshape(9, -1)[:, :8] / 127.5 - 1).mean(0)).max() < 1e-6
        assert "reads 1 channel" not in run(capsys, grey, grey, *options).err  # nothing is lost of grey images


def test_luminance_is_pillows():
    colours = some_images(1, size=256)
    expected = np.asarray(Image.fromarray(colours[0]).convert("L"))
    got = features.luminance(torch.from_numpy(colours).permute(0, 3, 1, 2))
    assert (got[0, 0].numpy() == expected).all()


def test_a_network_that_takes_the_images_in_no_way_is_one_line(tmp_path, capsys):
    a = write_npz(tmp_path / "a.npz", some_images(9, size=5))
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
    error = error_of(capsys, a, a, *write_features(tmp_path, linear))
    assert "failed on images (9, 3, 5, 5)" in error and "cannot be multiplied" in error


# ------------------------------------------------------------------------------------------ samples of a model
OWN_MODEL = """
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Sampling:
    strength: float = field(default=0.5, metadata=dict(help="of the slope"))
    broken: str = field(default="", metadata=dict(help="seeds of generators whose images are not finite"))

    def __post_init__(self):
        if not self.strength >= 0:
            raise ValueError(f"strength: got {self.strength}, expected a number >= 0")


@dataclass(frozen=True)
class Config:
    image_size: int = 4
    channels: int = 3
    num_classes: int = 5
    sampling: Sampling = Sampling()


PRESETS, TRAINING = {"own": Config()}, {}


class Model(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.scale = config, torch.nn.Parameter(torch.ones(()))

    def sample(self, labels, options=None, generators=None):
        c, options = self.config, options or self.config.sampling
        y = torch.stack([torch.randn(c.channels, c.image_size, c.image_size, generator=g) for g in generators])
        with torch.enable_grad():  # a model may need a gradient to sample
            y.requires_grad_()
            (slope,) = torch.autograd.grad(0.2 * y.square().sum() * self.scale, y)
        x = options.strength * slope + labels.view(-1, 1, 1, 1) / 10
        broken = [str(g.initial_seed()) in options.broken.split(",") for g in generators]
        return x.masked_fill(torch.tensor(broken).view(-1, 1, 1, 1), torch.nan)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The module of a model of one's own, in the current folder; run/ and grey/ have checkpoints of it."""
    (tmp_path / "own_model.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    module = checkpoint.model_file("own_model")
    grey = module.Config(channels=1, num_classes=0, sampling=module.Sampling(strength=0.25))
    for name, config in (("run", module.Config()), ("grey", grey)):
        (tmp_path / name).mkdir()
        checkpoint.save(tmp_path / name / "ckpt.pt", checkpoint.build("own_model", config))
    yield module
    del sys.modules["own_model"]


def own_samples(module, num, seed=0, num_classes=5, **settings):
    """The images (num, 4, 4, C) uint8 of run/ or grey/, drawn in one batch."""
    config = module.Config(num_classes=num_classes, channels=3 if num_classes else 1)
    model, options = module.Model(config), module.Sampling(**settings)
    labels = torch.arange(num) % num_classes if num_classes else torch.zeros(num, dtype=torch.long)
    x = model.sample(labels, options, image_generators(seed, range(num), CPU)).detach()
    return (128 * x + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def seeds_text(seed, indices):
    return ",".join(str(g.initial_seed()) for g in image_generators(seed, indices, CPU))


def test_samples_straight_from_a_model_of_ones_own(tmp_path, capsys, own):
    options = write_features(tmp_path)
    b = write_npz(tmp_path / "b.npz", some_images(12))
    flags = ["--num", 24, "--strength", 0.75, "--seed", 7, "--batch-size", 10]
    got = report_of(capsys, "run", b, *flags, *options)
    a = write_npz(tmp_path / "a.npz", own_samples(own, 24, seed=7, strength=0.75))
    same = report_of(capsys, a, b, *options)
    assert got == same | dict(sampling=dict(strength=0.75, broken=""), seed=7, not_finite=0)
    assert report_of(capsys, *options, "run/ckpt.pt", *flags, b) == got  # in any order
    out = run(capsys, "grey", b, "-n", 24, *options).out  # unconditional, grey, the checkpoint's own settings
    assert "24 samples, 12 reference" in out and "with seed 0, strength 0.25; 0 not finite" in out
    a = write_npz(tmp_path / "a.npz", own_samples(own, 24, num_classes=0, strength=0.25))
    assert run(capsys, a, b, *options).out.split("\n")[0] == out.split("\n")[0]
    assert "strength: got -1.0" in error_of(capsys, "run", b, "-n", 4, "--strength", -1, *options)
    assert "not a readable checkpoint" in error_of(capsys, b, b, "-n", 4, *options)


def test_samples_that_are_not_finite_are_left_out_and_counted(tmp_path, capsys, own):
    options = write_features(tmp_path)
    b = write_npz(tmp_path / "b.npz", some_images(12))
    bad = [0, 1, 2, 9, 23]
    out = run(capsys, "run", b, "-n", 24, "--broken", seeds_text(0, bad), "--batch-size", 3, *options, "--json")
    good = write_npz(tmp_path / "a.npz", np.delete(own_samples(own, 24, strength=0.5), bad, 0))
    report, same = json.loads(out.out), report_of(capsys, good, b, *options)
    assert report["not_finite"] == 5 and report["num_samples"] == 19
    assert [report[name] for name in same] == [same[name] for name in same]
    assert "5 of 24 samples were not finite" in out.err
    all_bad = seeds_text(0, range(24))
    error = error_of_many(capsys, "run", b, "-n", 24, "--broken", all_bad, *options)
    assert "0 of 24" in error


def error_of_many(capsys, *argv):
    """The last line, where others come before the error."""
    with pytest.raises(SystemExit) as leave:
        cli.run_script(fid.main, [str(a) for a in argv])
    assert leave.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_digits_are_drawn_at_the_size_of_what_they_are_compared_with(tmp_path, capsys, own, monkeypatch):
    drawn = []

    def few_digits(n, size, channels, seed):
        drawn.append((size, channels, seed))
        return digits(20, size, channels, seed)

    digits = data.digits
    monkeypatch.setattr(data, "digits", few_digits)
    options = write_features(tmp_path)
    for name in ("run", "grey"):
        assert report_of(capsys, name, "digits:test", "-n", 8, *options)["num_reference"] == 20
    assert report_of(capsys, write_npz(tmp_path / "a.npz", some_images(9, 6)), "digits", *options)["fd"] > 0.01
    assert drawn == [(4, 3, 1), (4, 1, 1), (6, 3, 0)]


def test_work_is_shared_and_progress_counts_it(tmp_path, capsys, own, monkeypatch):
    """One process: all of it. The last call says that all is done, left-out samples too."""
    calls = {}

    class Progress:
        def __init__(self, what, total, quiet):
            self.calls = calls.setdefault((what, total, quiet), [])

        def __call__(self, done):
            self.calls.append(done)

    monkeypatch.setattr(features, "Progress", Progress)
    b = write_npz(tmp_path / "b.npz", some_images(12))
    broken = seeds_text(0, [0, 5])
    run(capsys, "run", b, "-n", 6, "--broken", broken, "--batch-size", 5, *write_features(tmp_path))
    assert calls == {("run: image", 6, False): [5, 6], (f"{b}: image", 12, False): [5, 10, 12]}


def test_two_processes_give_the_report_of_one(tmp_path, capsys, own):
    """torchrun shares the images, an odd number. Process 0 prints the report, though it has no finite sample itself."""
    b = write_npz(tmp_path / "b.npz", some_images(13, seed=1))
    argv = ["run", b, "-n", "13", "--broken", seeds_text(0, range(6)), *write_features(tmp_path), "--json"]
    argv += ["--device", "cpu", "--batch-size", "3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=localhost:0", str(HERE / "fid.py"), *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(torchrun, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    one = json.loads(run(capsys, *argv).out)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    printed = [line for line in output.splitlines() if line.startswith("{")]
    assert len(printed) == 1 and json.loads(printed[0]) == one and one["num_samples"] == 7


# ------------------------------------------------------------------------------------------ warnings and bad input
def test_warnings_of_few_images_and_of_two_sizes(tmp_path, capsys):
    a, b = write_npz(tmp_path / "a.npz", some_images(7)), write_npz(tmp_path / "b.npz", some_images(8, size=5))
    err = run(capsys, a, b, *write_features(tmp_path)).err
    lines = [line for line in err.splitlines() if "warning" in line]
    assert len(lines) == 2 and "a.npz: 7 images for 8 features" in lines[0] and "biased" in lines[0]
    assert "4x4" in lines[1] and "5x5" in lines[1]


def test_bad_sets_of_images(tmp_path, capsys):
    good, options = write_npz(tmp_path / "good.npz", some_images(9)), write_features(tmp_path)
    x = tmp_path / "x.npz"
    one = write_folder(tmp_path / "one", some_images(1))
    assert "1 image, expected at least 2" in error_of(capsys, one, good, *options)
    (tmp_path / "one" / "ckpt.pt").write_bytes(b"")
    assert "give --num" in error_of(capsys, one, good, *options)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt.pt").write_bytes(b"")
    assert "give --num" in error_of(capsys, tmp_path / "run", good, *options)
    mixed = write_folder(tmp_path / "mixed", some_images(6))
    Image.new("RGB", (6, 5)).save(tmp_path / "mixed" / "1" / "003.png")
    broken = write_folder(tmp_path / "broken", some_images(6))
    (tmp_path / "broken" / "1" / "003.png").write_bytes(b"not a picture")
    for workers in (0, 1):
        flags = [*options[:2], "--workers", workers, "--batch-size", 2, "--save-stats", x]
        error = error_of(capsys, good, mixed, *flags)
        assert "003.png is 6x5" in error and "000.png is 4x4" in error and "mixed sizes" in error
        error = error_of(capsys, broken, good, *flags)
        assert "003.png" in error and "Traceback" not in error and len(error) < 400
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 nothing else")
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 nothing else")
    nan = write_npz(tmp_path / "nan.npz", np.full((4, 4, 4, 3), np.nan, "float32"))
    os.mkfifo(tmp_path / "pipe.npz")
    bad_sets = [tmp_path / name for name in ("none", "bad.npz", "bad.zip", "nan.npz", "pipe.npz")]
    for bad in bad_sets:
        assert bad.name in error_of(capsys, bad, good, *options, "--save-stats", x)
        assert bad.name in error_of(capsys, good, bad, *options, "--save-stats", x)
    assert "uint8" in error_of(capsys, nan, good, *options)  # pixels that are NaN cannot get in: floats do not
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("x.npz")]  # nothing written, in whole or in part


def test_a_dying_worker_is_one_line(tmp_path, capsys, monkeypatch):
    class Deadly:
        names, path, array = ["a", "b"], "a", None

        def __init__(self):
            self.calls = 0

        def __len__(self):
            return 2

        def read(self, i):
            self.calls += 1
            if self.calls > 1:  # the first look is the main process's
                os._exit(1)
            return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(features, "open_images", lambda path, **options: Deadly())
    error = error_of(capsys, "a", "b", *write_features(tmp_path)[:2], "--workers", 1)
    assert "data worker" in error and "--workers" in error


def test_bad_statistics(tmp_path, capsys):
    good, options = write_npz(tmp_path / "good.npz", some_images(9)), write_features(tmp_path)
    zero, eye = np.zeros(64), np.eye(64)

    def stats(**arrays):
        np.savez(tmp_path / "s.npz", **arrays)
        return tmp_path / "s.npz"

    error = error_of(capsys, good, stats(mu=zero, sigma=eye), "--weights", tmp_path / "unread.pth")
    assert "64 unnamed features" in error and "expected those of inception" in error
    error = error_of(capsys, good, stats(mu=zero, sigma=eye), *options)
    assert "64 unnamed features" in error and "expected those of f.pt" in error
    run(capsys, good, "--save-stats", tmp_path / "x.npz", *options)
    error = error_of(capsys, tmp_path / "x.npz", stats(mu=zero, sigma=eye))
    assert "8 f.pt features" in error and "64 unnamed features" in error
    digest = hashlib.sha256((tmp_path / "f.pt").read_bytes()).hexdigest()
    error = error_of(capsys, tmp_path / "x.npz", stats(mu=zero, sigma=eye, features="f.pt", features_sha256=digest))
    assert "8 f.pt features" in error and "64 f.pt features" in error
    assert "(64,) and sigma (3, 3)" in error_of(capsys, good, stats(mu=zero, sigma=np.eye(3)), *options)
    assert "(0,)" in error_of(capsys, good, stats(mu=zero[:0], sigma=eye[:0, :0]), *options)
    assert "complex" in error_of(capsys, good, stats(mu=zero + 1j, sigma=eye), *options)
    assert "-5 images" in error_of(capsys, good, stats(mu=zero, sigma=eye, num=-5), *options)
    assert "sigma" in error_of(capsys, good, stats(mu=zero), *options)
    for value in (np.nan, np.inf, 1e200):
        assert "finite" in error_of(capsys, good, stats(mu=zero, sigma=np.diag(zero + value)), *options)
        assert "finite" in error_of(capsys, good, stats(mu=zero + value, sigma=eye), *options)
    assert "symmetric" in error_of(capsys, good, stats(mu=zero, sigma=np.triu(np.ones((64, 64)))), *options)
    assert "eigenvalues" in error_of(capsys, stats(mu=zero, sigma=-eye), tmp_path / "s.npz")
    pickled = np.array([Payload(str(tmp_path / "ran"))], dtype=object)
    assert "s.npz" in error_of(capsys, good, stats(mu=pickled, sigma=eye), *options)
    assert not (tmp_path / "ran").exists()


def test_bad_feature_modules(tmp_path, capsys):
    images = some_images(9)
    images[5] = 255
    a = write_npz(tmp_path / "a.npz", images)
    error = error_of(capsys, a, a, *write_features(tmp_path, Broken()), "--batch-size", 2)
    assert "not finite for image 5" in error
    assert "expected (9, D)" in error_of(capsys, a, a, *write_features(tmp_path, torch.nn.Identity()))
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.pt")
    (tmp_path / "w.pt2").write_bytes(b"x")
    for bad in ("w.pt", "w.pt2", "none.pt"):
        error = error_of(capsys, a, a, "--features", tmp_path / bad)
        assert bad in error and "torch.jit.script" in error


def test_pickled_code_in_a_features_file_is_not_run(tmp_path, capsys):
    """torch.export.load, which .pt2 files would need, falls back to unpickling."""
    a, ran = write_npz(tmp_path / "a.npz", some_images(4)), tmp_path / "ran"
    torch.save(Payload(str(ran)), tmp_path / "w.pt")
    (tmp_path / "w.pt2").write_bytes((tmp_path / "w.pt").read_bytes())
    (tmp_path / "plain.pt2").write_bytes(pickle.dumps(Payload(str(ran))))
    with zipfile.ZipFile(tmp_path / "archive.pt2", "w") as file:  # torch.export's older layout
        for name, content in (("version", "5.3"), ("serialized_state_dict.pt", (tmp_path / "w.pt").read_bytes()),
                              ("serialized_exported_program.json", "{}"), ("archive_format", "pt2")):
            file.writestr(name, content)
    for name in ("w.pt", "w.pt2", "plain.pt2", "archive.pt2"):
        assert "not a TorchScript module" in error_of(capsys, a, a, "--features", tmp_path / name)
    assert not ran.exists()


def test_bad_command_lines(tmp_path, capsys, monkeypatch):
    a = write_npz(tmp_path / "a.npz", some_images(4))
    (tmp_path / "dir.npz").mkdir()
    for argv, expected in (
            ([], "SAMPLES"), ([a], "REFERENCE is missing"), ([a, a, "--bogus"], "--bogus"),
            ([a, a, "--weight", "x"], "--weight"), ([a, a, "--num", 1], "at least 2"),
            ([a, a, "--num", "many"], "many"), ([a, a, "--guidance", 1], "together with --num"),
            ([a, a, "--seed", -1], "at least 0"),
            ([a, a, "--batch-size", 0], "at least 1"), ([a, a, "--workers", -1], "at least 0"),
            ([a, a, "--device", "tpu"], "tpu"), ([a, a, "--features", "f", "--weights", "w"], "one of them"),
            ([a, a, "--num", 10**15], "memory"), ([a, "--save-stats", tmp_path / "x.txt"], ".npz"),
            ([a, "--save-stats", tmp_path / "no" / "x.npz"], "not a directory"),
            ([a, "--save-stats", tmp_path / "dir.npz"], "file"), ([a, "", "--seed", 1], "empty")):
        assert expected in error_of(capsys, *argv), argv
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in error_of(capsys, a, a, "--device", "cuda")
    with pytest.raises(SystemExit) as leave:
        fid.main(["--help"])
    out = capsys.readouterr().out
    assert leave.value.code == 0 and "half-pixel" in out and "--guidance" in out and "is a program" in out


def test_results_are_known_to_be_writable_before_the_work(tmp_path, capsys, monkeypatch):
    a = write_npz(tmp_path / "a.npz", some_images(9))

    def read_only(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(cli.tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(fid, "open_side", None)  # the work
    assert "Read-only" in error_of(capsys, a, "--save-stats", tmp_path / "x.npz", *write_features(tmp_path))


def test_home_is_expanded(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_npz(tmp_path / "a.npz", some_images(9))
    write_features(tmp_path)
    flags = ["--features", "~/f.pt", "--workers", 0]
    run(capsys, "~/a.npz", "--save-stats", "~/x.npz", *flags)
    assert report_of(capsys, "~/a.npz", "~/x.npz", *flags)["num_reference"] == 9


def test_statistics_are_written_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    a, x = write_npz(tmp_path / "a.npz", some_images(9)), tmp_path / "x.npz"
    x.write_bytes(b"what was there")

    def full_disk(file, **arrays):
        file.write(b"some of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features.np, "savez", full_disk)
    assert "No space left" in error_of(capsys, a, "--save-stats", x, *write_features(tmp_path))
    assert x.read_bytes() == b"what was there"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "f.pt", "x.npz"]
