"""fid.py and support/inception.py, offline and on a CPU. The claims:

- The Fréchet distance, the Inception Score, precision and recall are right.
- The Inception is pytorch-fid's; its weights are downloaded once and checked.
- However images are kept and batched, the numbers are the same; two processes give those of one; a
  network of one channel is given Pillow's luminance; the reference gets the size of the samples.
- Statistics of pytorch-fid and ADM are read, a file's own are used first, those of another network
  are refused, and an unknown resize is called unknown.
- --num scores the images of sample.py; samples that are not finite are left out and counted.
- Few images and a grey side are warned of; a mistake is one line, and nothing is written.
"""
import hashlib
import json
import warnings
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import fid
import sample
from examples import minimal_model
from support import checkpoints, cli, inception
from support.conftest import Started, fails
from support.inception import Inception, Side, measure


def some_images(n, size=4, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, size, size, 3)).astype("uint8")


def write_npz(path, images, **arrays):
    np.savez(path, images=images, **arrays)
    return path


def features(tmp_path, module=None):
    """The flags for a module's features; without one for the 48 values of an image."""
    torch.jit.script(module or torch.nn.Flatten()).save(str(tmp_path / "f.pt"))
    return ["--features", tmp_path / "f.pt", "--device", "cpu"]


@pytest.fixture
def sides(tmp_path):
    """Two sets of images and the flags of a network."""
    a = write_npz(tmp_path / "a.npz", some_images(9))
    b = write_npz(tmp_path / "b.npz", some_images(12, seed=1))
    return a, b, features(tmp_path)


def run(capsys, *argv):
    capsys.readouterr()
    fid.main([str(a) for a in argv])
    return capsys.readouterr()


def report_of(capsys, *argv):
    return json.loads(run(capsys, *argv, "--json").out)


# ----------------------------------------------------------------------------- the metrics
def test_frechet_distance_by_scipy_and_where_covariances_are_singular():
    r = np.random.RandomState(0)
    a, b = r.standard_normal((2, 16, 16))
    S1, S2, mu = a @ a.T, b @ b.T, a[0]
    expected = mu @ mu + np.trace(S1 + S2) - 2 * np.trace(scipy.linalg.sqrtm(S1 @ S2)).real
    assert fid.frechet_distance(mu, S1, 0 * mu, S2) == pytest.approx(expected)
    S = a[:, :6] @ a[:, :6].T  # of rank 6
    assert fid.frechet_distance(mu, S, mu, 4 * S) == pytest.approx(np.trace(S))


def test_inception_score_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    kl = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert abs(fid.inception_score(p.log().repeat(10, 1))[0] - kl.exp()) < 1e-12
    halves = torch.cat([1e4 * torch.eye(2).repeat(5, 1), torch.zeros(10, 2)])
    assert np.allclose(fid.inception_score(halves, splits=2), (1.5, 0.5))


class OneHot(Inception):
    """Its logits say which of ten classes an image of one pixel is."""

    def __init__(self):
        pass

    def __call__(self, images):
        return 1e4 * torch.eye(10)[images[:, 0, 0, 0].long()] + 2**-10

    def logits(self, pool):
        return pool


def test_images_sorted_by_class_are_shuffled_for_the_inception_score(monkeypatch):
    labels = np.arange(10).repeat(100).astype("uint8")
    order = np.random.RandomState(2020).permutation(1000)  # torch-fidelity's
    for most in (1000, 300):  # all count in mu, fewer elsewhere
        monkeypatch.setattr(inception, "KEPT", most)
        parts = np.split(np.arange(1000), 20)
        batches = ((part, labels[part].reshape(-1, 1, 1, 1)) for part in parts)
        found = measure(Side("sorted", None, 1000, (1, 1, 1), batches), OneHot(), "cpu")
        assert (found.pool.argmax(1).numpy() == labels[order][:most]).all() and found.num == 1000
        assert np.allclose(found.mu, 1e3 + 2**-10, rtol=1e-9, atol=0)  # summed in float64
    assert 8.5 < fid.score(OneHot(), "cpu", found)["inception_score"] < 10


def test_precision_and_recall_by_brute_force(monkeypatch):
    a = torch.randint(0, 6, (41, 3)).double()  # many ties
    b = torch.randint(3, 9, (29, 3)).double()

    def share_inside(x, centres):
        exact = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
        radii = exact(centres, centres).kthvalue(4).values  # the first is the point itself
        return (exact(x, centres) <= radii).any(1).double().mean().item()

    expected = share_inside(a, b), share_inside(b, a)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    monkeypatch.setattr(fid, "BLOCK", 8)
    assert fid.precision_recall(a, b) == expected
    one = torch.rand(1, 2048).repeat(5, 1) + 1  # radius 0, yet a feature's last bit must not count
    assert fid.precision_recall(one.nextafter(one + 1), one) == (1.0, 1.0)
    assert fid.precision_recall(1.0001 * one, one) == (0.0, 0.0)


# ----------------------------------------------------------------------------- the Inception
def random_weights(shapes):
    """The same anywhere: numpy's legacy randomness, in the order of names."""
    r = np.random.RandomState(0)
    weights = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
            continue
        a = r.standard_normal(shape)
        if name.endswith(("running_var", "bn.weight")):
            a = np.exp(0.2 * a)
        else:
            a *= (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1
        weights[name] = torch.from_numpy(a.astype("float32"))
    return weights


# SHA-256 of the names and shapes in pt_inception-2015-12-05-6726825d.pth, one a line.
NAMES_AND_SHAPES = "7151cff94593b8e836fb1f91b5ae5a52927bb5290e150458690d9d5ea0523e95"
# Made once by pytorch-fid 0.3.0 (torchvision 0.28) with the weights above, of one random image of
# each size: seven features, the mean of all 2048, and three logits.
PYTORCH_FID = {
    32: ([0.00387, 5.07427, 0, 0.01583, 4.06776, 0, 0.01729], 1.314622,
         [-0.33478, 0.90587, 1.09325]),
    320: ([0.00318, 6.06326, 0, 0.02668, 4.84089, 0, 0.00649], 1.55314,
          [-0.13469, 0.86871, 1.15209]),
}


def test_the_inception_is_pytorch_fids(tmp_path, capsys, monkeypatch):
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Inception().state_dict().items()}
    listing = "\n".join(f"{name} {shape}" for name, shape in shapes.items())
    assert hashlib.sha256(listing.encode()).hexdigest() == NAMES_AND_SHAPES
    path = tmp_path / "weights.pth"
    torch.save(random_weights(shapes), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", digest)
    model = inception.load_inception(str(path))
    for size, (some, mean, logits) in PYTORCH_FID.items():
        images = np.random.RandomState(size).randint(0, 256, (1, 3, size, size)).astype("uint8")
        h = model(torch.from_numpy(images))
        assert np.allclose(h[0, [0, 320, 704, 1088, 1472, 1856, 2047]], some, atol=5e-5)
        assert abs(h.mean().item() - mean) < 5e-5
        assert np.allclose(model.logits(h)[0, [0, 500, 1007]], logits, atol=5e-5)
    a = write_npz(tmp_path / "a.npz", some_images(2))
    x = tmp_path / "x.npz"
    run(capsys, a, "--save-stats", x, "--weights", path, "--device", "cpu")
    for report in (report_of(capsys, x, x), dict(np.load(x))):
        assert "bilinear to 299x299" in str(report["resize"])
        assert report["features_sha256"] == Inception.digest


def test_weights_are_downloaded_once_and_checked(tmp_path, monkeypatch):
    source = tmp_path / "weights.pth"
    cached = tmp_path / "cache" / "farmer" / "weights.pth"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(inception, "WEIGHTS_URL", source.as_uri())
    with pytest.raises(cli.UserError, match=f"{source.as_uri()}.*weights.pth into"):  # no network
        inception.load_inception()
    torch.save({}, source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    for path in (None, str(source)):
        with pytest.raises(cli.UserError, match=f"weights.pth.*sha256 (is )?{digest}"):
            inception.load_inception(path)
    assert not cached.exists()
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", digest)
    for _ in range(2):  # the second time from the cache; strict: every name must be there
        with pytest.raises(cli.UserError, match=f"{cached}.*state_dict"):
            inception.load_inception()
        source.unlink(missing_ok=True)
    assert list(cached.parent.iterdir()) == [cached]


# ----------------------------------------------------------------------------- inputs
def test_the_same_images_give_the_same_numbers_however_they_are_kept(
        tmp_path, capsys, monkeypatch):
    images, others = some_images(31), some_images(25, seed=1) // 2
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:03d}.png")
    a, b = write_npz(tmp_path / "a.npz", images), write_npz(tmp_path / "b.npz", others)
    np.savez(tmp_path / "adm.npz", images)  # arr_0
    flags = features(tmp_path)
    load = torch.jit.load
    monkeypatch.setattr(torch.jit, "load", lambda *args, **more: warnings.warn(
        "TorchScript is old", FutureWarning, stacklevel=2) or load(*args, **more))
    with warnings.catch_warnings(action="error"):  # this is not shown
        first = run(capsys, a, *flags, b, "--json")  # REFERENCE may follow a flag
    assert "31 images 4x4" in first.err and "25 images 4x4" in first.err
    monkeypatch.undo()
    for name, size in (("folder", 7), ("adm.npz", 1)):
        argv = [tmp_path / name, b, *flags, "--json", "--batch-size", size]
        assert run(capsys, *argv).out == first.out
    report = json.loads(first.out)
    x, y = images.reshape(31, 48) / 127.5 - 1, others.reshape(25, 48) / 127.5 - 1
    expected = fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert report["fd"] == pytest.approx(expected, abs=1e-4) and "fid" not in report
    assert (report["num_samples"], report["num_reference"], report["dim"]) == (31, 25, 48)
    text = run(capsys, a, b, *flags).out
    assert text.startswith("FD ") and f"{report['precision']:.4f}" in text and "FID" not in text


def test_the_reference_gets_the_size_of_the_samples_as_training_does_it(tmp_path, capsys, sides):
    a, b, flags = sides
    photo = some_images(12, seed=1).repeat(2, 1).repeat(2, 2)  # box filters halve these
    wide = np.concatenate([photo[:, :, :4], photo, photo[:, :, :4]], 2)
    wide = write_npz(tmp_path / "wide.npz", wide)
    assert report_of(capsys, a, wide, *flags) == report_of(capsys, a, b, *flags)
    small = write_npz(tmp_path / "small.npz", some_images(9, size=2))
    fails(capsys, fid, [a, small, *flags], "--enlarge")
    run(capsys, a, small, "--enlarge", *flags)


def test_saved_statistics_stand_for_their_images_and_come_first(tmp_path, capsys, sides):
    a, b, flags = sides
    x = tmp_path / "x.npz"
    direct = report_of(capsys, a, b, *flags)
    run(capsys, b, a, "--save-stats", x, *flags)  # those of SAMPLES
    assert report_of(capsys, a, x, *flags) == direct | {"precision": None, "recall": None}
    assert abs(report_of(capsys, x, x)["fd"]) < 1e-9  # no network needed
    with np.load(x) as file:
        known = dict(file) | {"mu": file["mu"] + 1, "num": 10_000}
    both = write_npz(tmp_path / "both.npz", some_images(12, seed=1), **known)  # as ADM's batches
    mixed = report_of(capsys, a, both, *flags)
    assert mixed["fd"] > direct["fd"] + 0.1 and mixed["precision"] == direct["precision"]
    assert mixed["num_reference"] == 10_000
    foreign = dict(mu=np.zeros(2048), sigma=np.eye(2048))  # of the Inception: its images count
    foreign = write_npz(tmp_path / "foreign.npz", some_images(12, seed=1), **foreign)
    assert report_of(capsys, a, foreign, *flags) == direct


def test_statistics_of_another_network_are_refused(tmp_path, capsys, sides, monkeypatch):
    """Files as pytorch-fid and ADM save them are the Inception's if they have 2048 features."""
    monkeypatch.chdir(tmp_path)
    a, _, flags = sides
    for D in (2048, 768, 192, 48):
        np.savez(f"{D}.npz", mu=np.zeros(D, "float32"), sigma=np.eye(D, dtype="float32"))
    run(capsys, a, "--save-stats", "x.npz", *flags)
    (tmp_path / "f.pt").rename("g.pt")  # the content counts, not the name
    same = ["--features", "g.pt"]
    other = features(tmp_path, torch.nn.Sequential(torch.nn.MaxPool2d(2), torch.nn.Flatten()))
    run(capsys, a, "--save-stats", "y.npz", *other)
    for file, digest in (("2048.npz", Inception.digest), ("again.npz", Inception.digest),
                         ("192.npz", None)):
        report = report_of(capsys, file, "--save-stats", "again.npz")
        assert (report["features_sha256"], report["resize"]) == (digest, "unknown")
    for argv in (("192.npz", "192.npz"), (a, "x.npz", *same)):
        assert abs(report_of(capsys, *argv)["fd"]) < 1e-6
    for argv in ((a, "x.npz", *other), ("x.npz", "x.npz", *other), ("x.npz", "y.npz"),
                 (a, "48.npz", *same), ("192.npz", "768.npz"), ("192.npz", "2048.npz"),
                 ("192.npz", a)):  # before weights are downloaded
        line = fails(capsys, fid, argv, "different networks")
        assert "(192 values)" in line or argv[0] != "192.npz"


def test_sides_that_are_not_alike_are_warned_of_and_a_network_may_read_luminance(
        tmp_path, capsys, sides):
    a, b, _ = sides
    pool = torch.nn.AdaptiveAvgPool2d(2)  # for images of any size
    flags = features(tmp_path, torch.nn.Sequential(pool, torch.nn.Flatten()))
    grey = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in some_images(9)])
    one = write_npz(tmp_path / "one.npz", grey)
    three = write_npz(tmp_path / "three.npz", grey[..., None].repeat(3, -1))
    tall = write_npz(tmp_path / "tall.npz", some_images(9)[:, :3])  # is not square
    for *pair, words in ((a, one, f"4x4 pixels, grey in {one}"), (one, a, "--channels 1"),
                         (three, a, f"4x4 pixels, grey in {three}"), (one, three, None),
                         (tall, b, f"4x3 pixels, coloured in {tall}")):
        output = run(capsys, *pair, *flags, "--json")
        assert (json.loads(output.out)["fd"] > 0.1) == (words is not None)
        assert (words or "9 images are fewer than 12 features") in output.err
        assert ("not alike" in output.err) == (words is not None)
    image = some_images(1, size=256)
    found = 127.5 * inception.as_floats(torch.from_numpy(image).permute(0, 3, 1, 2), 1) + 127.5
    assert (found[0, 0].numpy() == np.asarray(Image.fromarray(image[0]).convert("L"))).all()
    module = torch.nn.Flatten()
    module.channels = 1
    assert abs(report_of(capsys, a, one, *features(tmp_path, module))["fd"]) < 1e-9


# ----------------------------------------------------------------------------- samples of a model
@pytest.fixture
def run_folder(tmp_path):
    """A run of a model that cannot draw class 2: those samples are not finite."""
    sampling = minimal_model.Sampling(temperature=0.5)
    config = minimal_model.Config(image_size=4, num_classes=5, sampling=sampling)
    model = checkpoints.build("examples.minimal_model", config)
    model.mean.data[:] = torch.linspace(-0.5, 0.5, 6)[:, None, None, None]
    model.mean.data[2] = torch.nan
    checkpoints.save(tmp_path / "ckpt.pt", model)
    write_npz(tmp_path / "b.npz", some_images(13))
    return tmp_path


def test_samples_are_those_of_sample_py_less_those_not_finite(run_folder, capsys):
    a, b = run_folder / "a.npz", run_folder / "b.npz"
    flags = features(run_folder)
    draw = [run_folder, "--num", 24, "--seed", 7, "--device", "cpu"]
    output = run(capsys, *draw, b, "--batch-size", 2, *flags, "--json")
    sample.main([str(a) for a in (*draw, "--out", a)])
    got, same = json.loads(output.out), report_of(capsys, a, b, *flags)
    assert {name: got[name] for name in same} == same
    assert got["not_finite"] == 5 and got["num_samples"] == 19 and "5 of 24" in output.err
    assert got["sampling"] == {"temperature": 0.5}  # the checkpoint's


def test_floats_of_vectors_are_given_to_a_network_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latents.py").write_text(
        "import numpy as np\n"
        "from examples import minimal_model\n"
        "from examples.minimal_model import PRESETS, TRAINING, Config, Sampling\n"
        "from support.data import Images\n\n"
        "class Model(minimal_model.Model):\n"
        "    def sample(self, labels, options=None, generators=None):\n"
        "        x = super().sample(labels[:, 0].long(), options, generators)\n"
        "        return x + labels[:, :, None, None]\n\n"
        "def open_images(source):\n"
        "    return Images(source, np.load(source)) if source.endswith('.npy') else None\n")
    real = 9 * np.random.RandomState(0).standard_normal((80, 2, 2, 4)).astype("float32")
    np.save("real.npy", real)
    model = checkpoints.build("latents", minimal_model.Config(image_size=2, channels=4))
    model.floats = True
    conditions = torch.eye(4)[:3]  # labels are vectors
    checkpoints.save("latents.pt", model, conditions=conditions)
    draw = ["latents.pt", "--num", 70, "--device", "cpu"]
    report = report_of(capsys, *draw, "real.npy", *features(tmp_path))
    sample.main([str(a) for a in (*draw, "--out", "x.npz")])
    with np.load("x.npz") as made:
        assert (made["arr_1"][:4] == conditions[[0, 1, 2, 0]].numpy()).all()
        x, y = made["arr_0"].reshape(70, 16), real.reshape(80, 16)
    expected = fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert report["fd"] == pytest.approx(expected, rel=1e-4) and expected > 500
    with pytest.raises(cli.UserError, match="--features"):
        Inception.forward(None, torch.zeros(1, 3, 2, 2))


def test_two_processes_give_the_report_of_one(run_folder, capsys):
    """torchrun shares the images, an odd number; process 0 prints the report."""
    argv = [run_folder, run_folder / "b.npz", "-n", 13, *features(run_folder), "--json",
            "--batch-size", 3, "--temperature", 0.75]
    several = Started(run_folder / "output", "fid.py", *argv, ranks=2).end()
    one = report_of(capsys, *argv)
    assert [json.loads(line) for line in several[0].splitlines() if line.startswith("{")] == [one]
    assert not any(line.startswith("{") for line in several[1].splitlines())
    assert one["not_finite"] == 3 and one["sampling"] == {"temperature": 0.75}


# ----------------------------------------------------------------------------- errors
@pytest.mark.parametrize("argv, expected", [
    ("good.npz", "REFERENCE is missing"),
    ("good.npz good.npz --num 1", "at least 2"),
    ("good.npz good.npz --guidance 1", "together with --num"),
    ("good.npz good.npz --weights w", "not allowed with"),
    ("good.npz --save-stats no/x.npz", "--save-stats"),
    ("good.npz good.npz --num 4", "good.npz"),
    ("good.npz broken.npz --save-stats x.npz", "broken.npz"),
    ("good.npz floats.npz --save-stats x.npz", "uint8"),
    ("one.npz good.npz --save-stats x.npz", "one.npz: got 1 images, expected at least 2"),
    ("mixed good.npz", "mixed"),
    ("run good.npz", "give --num"),
    ("run good.npz --num 4 --denoise 0.1", "--denoise"),
    ("good.npz shapes.npz", "shapes.npz"),
    ("good.npz infinite.npz", "infinite.npz"),
])
def test_a_mistake_is_one_line(argv, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_npz("good.npz", some_images(9))
    write_npz("one.npz", some_images(1))
    write_npz("floats.npz", np.zeros((9, 4, 4, 3), "float32"))
    (tmp_path / "mixed").mkdir()
    for width in (4, 6):
        Image.new("RGB", (width, 5)).save(f"mixed/{width}.png")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing else")
    np.savez("shapes.npz", mu=np.zeros(8), sigma=np.eye(3))
    np.savez("infinite.npz", mu=np.zeros(8), sigma=np.full((8, 8), np.inf))
    (tmp_path / "run").mkdir()
    module = checkpoints.model_file("farmer")
    model = checkpoints.build("farmer", module.PRESETS["tiny"])
    checkpoints.save("run/ckpt.pt", model, training=dict(noise="uniform"))
    flags = features(tmp_path)
    before = sorted(tmp_path.iterdir())
    fails(capsys, fid, [*argv.split(), *flags], expected)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("module, expected", [
    (torch.nn.Threshold(0.0, torch.nan), "returned (9, 3, 4, 4)"),
    (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Threshold(0.0, torch.nan)), "not finite"),
    (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 2)), "cannot be multiplied"),
    (None, "torch.jit.script"),
])
def test_a_feature_network_that_fails_is_one_line(module, expected, tmp_path, capsys, sides):
    flags = features(tmp_path, module)
    if module is None:
        torch.save({"w": torch.zeros(1)}, tmp_path / "f.pt")
    fails(capsys, fid, [*sides[:2], *flags], expected, "f.pt")
