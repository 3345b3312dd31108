"""What the buttons of the app do, without the app."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diffusers_eqvae.demo.stages import AUTOENCODER
from diffusers_eqvae.demo.workbench import Workbench, compared, read_upload
from tests.pipelines.kinds import make_pipeline


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """With the package's own autoencoder alone."""
    return Workbench(tmp_path_factory.mktemp("app"), {"small": str(AUTOENCODER)})


@pytest.fixture
def sampler(tmp_path, tiny_autoencoder_kl, tiny_vq_model):
    make_pipeline("SiT", tiny_autoencoder_kl, tiny_vq_model).save_pretrained(tmp_path / "sit")
    return Workbench(tmp_path / "app", {"sit": str(tmp_path / "sit")}, pipeline=str(tmp_path / "sit"))


@pytest.fixture
def photograph(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "photograph.jpg"
    Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(path)
    return str(path)


def images_of(html: str) -> int:
    return html.count('src="data:image/png;base64,')


def test_a_latent_is_edited_in_every_autoencoder(bench, photograph):
    html, says = bench.edit(photograph, quarter_turns=1, resolution=32)
    assert images_of(html) == 5 and html.count(" dB</figcaption>") == 2 and '<div class="row">small</div>' in html
    assert says.startswith("Editing the latent in place of the image loses ") and says.endswith("dB with small.")
    with pytest.raises(ValueError, match="There is no second image yet; upload one"):
        bench.edit(photograph, share=0.5, resolution=32)
    with pytest.raises(ValueError, match="There is no image yet; upload one or take an example"):
        bench.edit(None, resolution=32)
    with pytest.raises(ValueError, match="multiple of the autoencoder's stride 4; got 30"):
        bench.edit(photograph, resolution=30)


def test_only_a_visible_difference_names_a_winner():
    assert compared({"a": 7.2, "b": 0.9}).endswith("7.2 dB with a and 0.9 dB with b: b follows it better.")
    assert compared({"a": 1.2, "b": 0.9}).endswith(": no visible difference.")
    assert compared({"a": -0.1}) == "Editing the latent in place of the image loses 0.0 dB with a."


def test_samples_are_drawn_by_class_and_say_what_they_cost(sampler):
    assert sampler.classes == [("otter", 0), ("swan", 1), ("class 2", 2)] and sampler.resolution == 16
    html, says = sampler.sample(
        [1, 0], 2, guidance_scale=2.0, guidance_interval=(0.0, 0.5), num_inference_steps=4, seed=0
    )
    assert images_of(html) == 4 and html.index(">swan<") < html.index(">otter<")
    assert says.startswith("4 images in ") and "; 6 evaluations of the network for each" in says
    again, _ = sampler.sample(
        [1, 0], 2, guidance_scale=2.0, guidance_interval=(0.5, 0.0), num_inference_steps=4, seed=0
    )
    assert again == html  # ends in either order
    html, says = sampler.sweep(1, [2.0, 1.0], [1.0], num_inference_steps=2, seed=0)
    assert images_of(html) == 2 and html.index("scale 1<") < html.index("scale 2<") and "4 NFE, " in html
    html, _ = sampler.cluster_samples([0, 1], num_clusters=3, seed=0, num_inference_steps=2, guidance_scale=1.0)
    assert images_of(html) == 6


def test_too_many_images_and_nothing_chosen_are_refused(sampler, bench):
    options = {"guidance_scale": 1.0, "guidance_interval": (0.0, 1.0), "num_inference_steps": 1, "seed": 0}
    with pytest.raises(ValueError, match=r"That would be 40 images; choose fewer .* at most 32"):
        sampler.sample([0] * 10, 4, **options)
    with pytest.raises(ValueError, match="Choose at least one class"):
        sampler.sample([], 4, **options)
    with pytest.raises(ValueError, match="the app was started without a pipeline"):
        bench.sample([0], 1, **options)


def test_a_sample_of_tokens_has_no_components(tmp_path, tiny_autoencoder_kl, tiny_vq_model):
    make_pipeline("MaskGIT", tiny_autoencoder_kl, tiny_vq_model).save_pretrained(tmp_path / "maskgit")
    bench = Workbench(tmp_path / "app", {"vq": str(tmp_path / "maskgit")}, pipeline=str(tmp_path / "maskgit"))
    with pytest.raises(ValueError, match="samples tokens, which have no components"):
        bench.cluster_samples([0], num_clusters=2, seed=0, num_inference_steps=2, guidance_scale=1.0)


def test_clusters_stand_beside_the_image(bench, photograph):
    html, says = bench.cluster(photograph, resolution=32, num_clusters=3)
    assert images_of(html) == 3 and "k-means" in says


def test_a_health_card_leaves_no_file_and_other_names_need_leave(bench, photograph, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra demo is not installed")
    drawn = Image.new("RGB", (1400, 900))  # drawing takes seconds
    monkeypatch.setattr("diffusers_eqvae.inspection.run.write_png", lambda path, *_: drawn.save(path))
    before = sorted(bench.folder.rglob("*"))
    card, says = bench.inspect(["small", ""], [photograph] * 2, resolution=16, num_images=2)
    assert card.size == drawn.size and "- equivariance: " in says and "**autoencoder**" in says
    assert sorted(bench.folder.rglob("*")) == before
    with pytest.raises(ValueError, match="Choose at least one autoencoder"):
        bench.inspect(["", " "], resolution=32, num_images=4)
    closed = Workbench(bench.folder / "other", {"small": str(AUTOENCODER)}, may_load=False)
    with pytest.raises(ValueError, match=r"loads no other autoencoder than small; got '/etc'\. Run it on your own"):
        closed.inspect(["/etc"], [photograph], resolution=32, num_images=4)


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind)
    return stream.getvalue()


def enormous_png() -> bytes:
    """A header that promises 300 megapixels, in a hundred bytes."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 20000, 15000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged, or not an image"),
        (b"<script>alert(1)</script>" * 40, "damaged, or not an image"),
        (encoded(NOISE, "png")[:3000], "damaged, or not an image"),
        (encoded(NOISE, "jpeg")[:600], "damaged, or not an image"),
        (enormous_png(), "damaged, or not an image"),
        (encoded(Image.new("1", (8000, 6000)), "png"), "8000x6000 px is more than the 40 million pixels"),
        (encoded(Image.new("RGB", (3, 3)), "png"), "3x3 px is smaller than 8 px"),
        (encoded(Image.new("RGB", (2000, 10)), "png"), "longer than 100 times its short side"),
        (encoded(Image.new("F", (64, 64)), "tiff"), "floating-point values have no known range"),
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "bomb", "large", "tiny", "thread", "float"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_upload_is_refused_in_a_sentence_without_a_path(tmp_path, content, said):
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as refused:
        read_upload(str(path))
    assert str(refused.value).startswith("The upload cannot be used: ") and "PNG or JPEG" in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "LA", "P", "1", "I;16"])
def test_images_of_any_usual_mode_are_taken(tmp_path, mode):
    path = tmp_path / "upload.tiff"
    grey = NOISE.convert("L") if mode == "I;16" else NOISE
    grey.convert("I" if mode == "I;16" else mode).save(path)
    assert read_upload(str(path)).mode == "RGB"


def test_what_is_transparent_lies_on_white(tmp_path):
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "upload.png")
    assert read_upload(str(tmp_path / "upload.png")).getpixel((8, 8)) == (255, 255, 255)
