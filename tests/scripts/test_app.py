"""pipelines/app.py: what it shows to whom, what it leaves behind, and its page in a real browser."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from PIL import Image

import eqvae_command
from diffusers_eqvae.demo.stages import AUTOENCODER
from diffusers_eqvae.sampling import app
from tests.pipelines.kinds import make_pipeline

CHROMIUM = shutil.which("chromium")
# Nothing but the page itself: a browser that also looks for updates tells nothing about the app.
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]


def test_the_package_s_autoencoder_is_shown_where_none_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # which holds no demo
    assert app.AppArguments().names == {"the package's own": str(AUTOENCODER)}
    assert app.AppArguments(pipeline="runs/sit").names == {"sit": "runs/sit"}
    both = app.AppArguments(vae="a/vae", other_vae="b/vae")
    assert both.names == {"a/vae": "a/vae", "b/vae": "b/vae"}
    with pytest.raises(ValueError, match="--other_vae is the same as --vae, x; name another, or leave it out"):
        app.AppArguments(vae="x", other_vae="x").names  # noqa: B018


def test_a_demo_that_has_run_is_shown_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("sit_eq", "autoencoder_plain", "autoencoder_eq"):
        with pytest.raises(
            ValueError, match=rf"elsewhere/{part} is missing.* eqvae demo --output_dir elsewhere makes"
        ):
            app.AppArguments(demo="elsewhere")
        for demo in ("elsewhere", "runs/demo"):
            assert app.AppArguments().pipeline is None, "a demo that has not ended"
            (tmp_path / demo / part).mkdir(parents=True)
            (tmp_path / demo / part / "run_metadata.json").touch()
    for demo, arguments in (("runs/demo", app.AppArguments()), ("elsewhere", app.AppArguments(demo="elsewhere"))):
        assert arguments.pipeline == f"{demo}/sit_eq"
        assert list(arguments.names.values()) == [f"{demo}/autoencoder_plain", f"{demo}/autoencoder_eq"]
    assert app.AppArguments(vae="x").names == {"x": "x"} and app.AppArguments(vae="x").pipeline is None
    with pytest.raises(ValueError, match=r"--demo shows .* leave it out, or --pipeline, --vae and --other_vae"):
        app.AppArguments(demo="elsewhere", vae="x")


@pytest.mark.parametrize(
    ("address", "private"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("app.example.org", False)],
)
def test_who_reaches_the_app_decides_whether_names_are_loaded(address, private):
    assert app.AppArguments(server_name=address).is_private is private


def test_the_temporary_folder_goes_whatever_ends_the_app():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        with pytest.raises(SystemExit) as stop, app.temporary_folder() as folder:
            assert Path(tempfile.gettempdir()) == folder and os.environ["GRADIO_TEMP_DIR"] == str(folder)
            os.kill(os.getpid(), number)
            time.sleep(5)
        assert stop.value.code == 128 + number and not folder.exists()
    with pytest.raises(KeyboardInterrupt), app.temporary_folder() as folder:
        raise KeyboardInterrupt
    assert not folder.exists() and Path(tempfile.gettempdir()) != folder
    assert {number: signal.getsignal(number) for number in before} == before


def test_without_gradio_one_sentence_says_what_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ['gradio>=6; extra == "app"'])
    assert eqvae_command.main(["app"]) == 1
    said = capsys.readouterr().err
    assert said == "eqvae app needs gradio: pip install 'diffusers_eqvae[app]'\n"


class Told(Exception):
    """In place of gradio's Error."""

    def __init__(self, message: str, **options: object) -> None:
        super().__init__(message)


def test_a_button_s_error_is_a_sentence_and_an_unforeseen_one_is_logged(caplog):
    def refuse() -> None:
        raise ValueError("There is no image yet.")

    gradio = type("gradio", (), {"Error": Told})
    with pytest.raises(Told, match="There is no image yet"):
        app.answering(gradio, refuse)()
    assert not caplog.records
    with pytest.raises(Told, match="failed unexpectedly; the terminal says why"):
        app.answering(gradio, lambda: {}["x"])()
    assert "KeyError" in caplog.text


@contextmanager
def running(words: list[str], folder: Path):
    """The app as its user starts it, from an empty folder; yields its address and process, and asks how it ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"TMPDIR": str(folder / "tmp"), "HOME": str(folder / "home")}
    for name in ("tmp", "home", "here"):
        (folder / name).mkdir()
    command = [sys.executable, "-m", "eqvae_command", "app", "--server_port", str(port), *words]
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, cwd=folder / "here", env=environment, stderr=log, stdout=log)
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text()
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/", process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM, (folder / "log").read_text()
        log.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_visitor_clicks_through_the_page(tmp_path, tiny_autoencoder_kl, tiny_vq_model):
    pytest.importorskip("gradio", reason="the extra app is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    make_pipeline("SiT", tiny_autoencoder_kl, tiny_vq_model).save_pretrained(tmp_path / "sit")
    (tmp_path / "bad.png").write_bytes(b"no image at all")
    Image.new("CMYK", (90, 70), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    words = ["--pipeline", str(tmp_path / "sit"), "--other_vae", str(AUTOENCODER), "--resolution", "32"]
    with running(words, tmp_path) as (address, process), playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page()
        hosts, complaints = set(), []
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "//" in request.url else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        upload = page.locator("input[type=file]").first
        upload.set_input_files(tmp_path / "red.jpg")
        page.get_by_role("button", name="Edit the latent").click()
        page.wait_for_selector("text=Editing the latent in place of the image loses")
        page.get_by_role("tab", name="Sample").click()
        page.get_by_role("button", name="Sample", exact=True).click()
        page.wait_for_selector("text=evaluations of the network for each")
        page.get_by_text("Sweep: what").click()
        page.get_by_role("button", name="Sweep", exact=True).click()
        page.wait_for_selector("text=All from one noise")
        page.get_by_role("tab", name="Clusters").click()
        page.get_by_role("button", name="Cluster samples").click()
        page.wait_for_selector("text=Clusters are groups of positions")
        page.get_by_role("tab", name="Health").click()
        page.get_by_label("Autoencoder", exact=True).fill("nowhere/at-all")
        page.get_by_role("button", name="Measure").click()
        page.wait_for_selector("text=nowhere/at-all is not an autoencoder: there is no such directory here")
        page.get_by_role("tab", name="Edit a latent").click()
        upload.set_input_files(tmp_path / "bad.png")
        page.get_by_role("button", name="Edit the latent").click()
        page.wait_for_selector("text=it is damaged, or not an image that can be read. Save it again as PNG or JPEG.")
        assert list((tmp_path / "tmp").glob("eqvae-app-*"))
        page.get_by_role("tab", name="Health").click()
        page.get_by_label("Autoencoder", exact=True).fill(str(AUTOENCODER))
        page.get_by_role("button", name="Measure").click()
        time.sleep(1)  # so that it computes, and the page is open, when the signal comes
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert time.monotonic() - started < 5
        browser.close()
    assert hosts == {address.split("/")[2]} and not complaints
    left = [path for name in ("here", "tmp") for path in (tmp_path / name).iterdir()]
    assert not [path for path in left if not path.name.startswith("torchinductor")]  # torch makes that at its import
    assert not [path for path in (tmp_path / "home").rglob("*") if "gradio" in str(path)]
