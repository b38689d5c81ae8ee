"""Checkpoints behind URLs: the bytes of the directory itself, headers alone while planning, and whatever servers do meanwhile."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

import stages.read.object_store
import stages.read.remote
import stages.read.remote_image
from pipeline import convert, inspect, plan
from pipeline.errors import BadInput, SourceChanged, WriteFailed
from pipeline.reporting.verification import verify
from stages.read.object_store import fetch_range
from tests.end_to_end.test_family_forward import CASES, build
from tests.stages.read.test_gguf import LLAMA31, factors
from tests.support import checkpoints, gguf_families, gguf_files, quantized_checkpoints
from tests.support.checkpoints import LLAMA3
from tests.support.commands import headrace
from tests.support.directories import contents
from tests.support.range_server import Served, etag_of, range_server
from tests.support.s3_server import forget_clients

BIG = {**checkpoints.LLAMA, "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024}  # some MB


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stages.read.object_store, "FIRST_PAUSE_SECONDS", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "served").mkdir()
    with range_server(tmp_path / "served") as found:
        yield found


def at(tmp_path: Path, name: str = "m", config: dict[str, Any] = BIG) -> Path:
    place = tmp_path / "served" / name
    checkpoints.write(place, config)
    return place


def both(tmp_path: Path, url: str, directory: Path, **options: Any) -> None:
    """Convert from a URL and from its directory: the same ranks."""
    convert(model_dir=url, output_dir=tmp_path / "far", scheduler="threads", **options)
    convert(model_dir=directory, output_dir=tmp_path / "near", scheduler="threads", **options)
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


def test_a_url_gives_the_bytes_of_its_directory(tmp_path: Path, served: Served) -> None:
    place = at(tmp_path)
    both(tmp_path, f"{served.url}/m", place, tp_size=2)
    assert verify(tmp_path / "far", f"{served.url}/m").ok
    provenance = json.loads((tmp_path / "far/headrace.json").read_text())
    assert provenance["source"]["path"] == f"{served.url}/m"
    # Again: up to date, without a tensor being fetched.
    before = len(served.requests)
    assert convert(model_dir=f"{served.url}/m", output_dir=tmp_path / "far", tp_size=2, scheduler="threads").up_to_date
    assert not [each for each in served.requests[before:] if each[0] == "GET" and each[1].endswith(".safetensors")]


def test_planning_reads_headers_alone_and_says_how_much(tmp_path: Path, served: Served) -> None:
    at(tmp_path)
    made = plan(model_dir=f"{served.url}/m", output_dir=tmp_path / "out")
    size = (tmp_path / "served/m/model.safetensors").stat().st_size
    fetched = sum(last + 1 - first for kind, name, first, last in served.requests if kind == "GET" and name.endswith("s"))
    assert fetched <= stages.read.remote_image.FIRST_BYTES < size
    (note,) = (note for note in made.notes if "bytes of configuration and headers" in note)
    assert f"{served.url}/m" in note
    assert inspect(f"{served.url}/m").path == f"{served.url}/m"


def test_the_image_takes_no_room(tmp_path: Path, served: Served, cache: Path) -> None:
    at(tmp_path)
    plan(model_dir=f"{served.url}/m", output_dir=tmp_path / "out")
    (image,) = cache.rglob("model.safetensors")
    assert image.stat().st_size == (tmp_path / "served/m/model.safetensors").stat().st_size
    assert image.stat().st_blocks * 512 < 100_000
    assert (cache / "headrace/remote").stat().st_mode & 0o77 == 0


def test_shards_and_packed_tensors_are_ranges_too(tmp_path: Path, served: Served) -> None:
    place = tmp_path / "served/q"
    quantized_checkpoints.write(place, quantized_checkpoints.LLAMA, quantized_checkpoints.gptq())
    both(tmp_path, f"{served.url}/q", place)


def test_a_gguf_file_behind_a_url(tmp_path: Path, served: Served) -> None:
    config = {**checkpoints.LLAMA, "hidden_size": 64}
    path = tmp_path / "served/model.gguf"
    gguf_files.write(path, config, checkpoints.values(config))
    both(tmp_path, f"{served.url}/model.gguf", path)
    with pytest.raises(BadInput, match=r"other\.gguf: found no such file"):
        plan(model_dir=f"{served.url}/other.gguf", output_dir=tmp_path / "out")


def test_rotary_factors_of_a_gguf_file_are_part_of_its_configuration(tmp_path: Path, served: Served) -> None:
    """They are tensors, which planning reads: those of Phi's long rope, and of Llama 3.1."""
    build(CASES["phi3_long"]).save_pretrained(tmp_path / "model")
    path = tmp_path / "served/model.gguf"
    gguf_families.write(path, tmp_path / "model", "F16")
    both(tmp_path, f"{served.url}/model.gguf", path)
    written = json.loads((tmp_path / "far/config.json").read_text())
    assert written["longrope_scaling_long_factors"] == [1.0 + n for n in range(8)]
    extra = {"rope_freqs.weight": factors(LLAMA3, 500000.0, 64)}
    gguf_files.write(tmp_path / "served/llama.gguf", LLAMA31, checkpoints.values(LLAMA31), extra=extra)
    made = plan(model_dir=f"{served.url}/llama.gguf", output_dir=tmp_path / "out")
    assert json.loads(made.targets[0].output.config)["rotary_scaling"] == LLAMA3


def test_any_part_of_a_gguf_model_behind_a_url_is_the_whole(tmp_path: Path, served: Served) -> None:
    gguf_files.write(tmp_path / "served/model.gguf", checkpoints.LLAMA, checkpoints.values(checkpoints.LLAMA), parts=3)
    names = [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    both(tmp_path, f"{served.url}/{names[1]}", tmp_path / "served" / names[0])
    (tmp_path / "served" / names[2]).unlink()
    with pytest.raises(BadInput, match=rf"{names[2]}: found no such file"):
        plan(model_dir=f"{served.url}/{names[0]}", output_dir=tmp_path / "out")


@pytest.mark.parametrize("faults", [[500, 503, 500], ["cut"], [503, "cut", 500]])
def test_servers_that_are_busy_or_break_off_are_asked_again(tmp_path: Path, served: Served, faults: list[int | str]) -> None:
    place = at(tmp_path)
    plan(model_dir=f"{served.url}/m", output_dir=tmp_path / "far")
    served.faults = faults
    both(tmp_path, f"{served.url}/m", place)
    assert served.faults == []


def test_a_server_that_stays_broken_ends_the_run_resumably(tmp_path: Path, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    place = at(tmp_path)
    monkeypatch.setattr(stages.read.object_store, "ATTEMPTS", 2)
    plan(model_dir=f"{served.url}/m", output_dir=tmp_path / "far")
    served.faults = ["cut"] * 500
    with pytest.raises(WriteFailed, match="2 times"):
        convert(model_dir=f"{served.url}/m", output_dir=tmp_path / "far", scheduler="threads")
    served.faults = []
    both(tmp_path, f"{served.url}/m", place)


def test_an_object_that_is_written_anew_ends_the_run_and_nothing_is_left(tmp_path: Path, served: Served) -> None:
    place = at(tmp_path)
    real = stages.read.remote.fetch_range
    other = tmp_path / "other"
    checkpoints.write(other, BIG, seed=1)

    def changing(url: str, name: str, start: int, end: int, etag: str) -> Any:
        if name.endswith(".safetensors") and start > 1 << 20:
            with contextlib.suppress(FileNotFoundError):
                (other / name).replace(place / name)
        return real(url, name, start, end, etag)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.read.remote, "fetch_range", changing)
        with pytest.raises(SourceChanged, match="another object than the one that was opened"):
            convert(model_dir=f"{served.url}/m", output_dir=tmp_path / "far", scheduler="threads")
    assert not (tmp_path / "far/config.json").exists()
    assert list(tmp_path.glob("far/*")) == []
    both(tmp_path, f"{served.url}/m", place)


def test_a_server_without_etags_is_read_and_said_to_be(tmp_path: Path, served: Served) -> None:
    served.etags = False
    place = at(tmp_path)
    made = plan(model_dir=f"{served.url}/m", output_dir=tmp_path / "out")
    assert any("gives no ETags" in note for note in made.notes)
    both(tmp_path, f"{served.url}/m", place)


def test_a_server_with_weak_etags_is_read_and_its_changes_seen(tmp_path: Path, served: Served) -> None:
    served.weak = True
    place = at(tmp_path)
    both(tmp_path, f"{served.url}/m", place)
    file, url = place / "model.safetensors", f"{served.url}/m"
    etag = f"W/{etag_of(file)}"
    assert bytes(fetch_range(url, file.name, 2, 9, etag)) == file.read_bytes()[2:9]
    file.write_bytes(file.read_bytes())
    with pytest.raises(SourceChanged, match="another object than the one that was opened"):
        fetch_range(url, file.name, 2, 9, etag)


def test_models_beside_each_other_have_images_of_their_own(tmp_path: Path, served: Served, cache: Path) -> None:
    """Two processes may open them at the same time."""
    for name in ("a.gguf", "b.gguf"):
        gguf_files.write(tmp_path / "served" / name, checkpoints.LLAMA, checkpoints.values(checkpoints.LLAMA))
    for name in ("a.gguf", "b.gguf"):
        inspect(f"{served.url}/{name}")
    assert sorted(path.name for path in cache.rglob("*.gguf")) == ["a.gguf", "b.gguf"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/m", "one of s3, gs, az, http, https, hf"),
        ("https://me:secret@host/m", "a URL with a secret in it"),
        ("https://host/m?X-Amz-Signature=secret", "a URL with a secret in it"),
    ],
)
def test_urls_that_are_not_read_are_refused_without_their_secrets(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        plan(model_dir=url, output_dir=tmp_path / "out")
    assert said in str(caught.value)
    assert "secret@" not in str(caught.value)
    assert "Signature" not in str(caught.value)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a"]}, []])
def test_an_index_that_places_nothing_is_named(tmp_path: Path, served: Served, index: object) -> None:
    (at(tmp_path) / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=r"model.safetensors.index.json: found no weight_map"):
        inspect(f"{served.url}/m")


def test_an_index_that_is_larger_than_any_is_not_fetched(tmp_path: Path, served: Served) -> None:
    with (at(tmp_path) / "model.safetensors.index.json").open("wb") as file:
        file.truncate(stages.read.remote_image.SMALL_BYTES + 1)
    with pytest.raises(BadInput, match=r"model.safetensors.index.json: found 67,108,865 bytes; expected at most 67,108,864"):
        inspect(f"{served.url}/m")
    assert ("GET", "model.safetensors.index.json") not in {each[:2] for each in served.requests}


def test_a_model_that_is_written_anew_between_two_runs_is_another_though_no_time_is_told(tmp_path: Path, served: Served) -> None:
    """Of the same size, with the same header: its ETags alone differ."""
    served.times = False
    place = at(tmp_path)
    options: dict[str, Any] = {"model_dir": f"{served.url}/m", "output_dir": tmp_path / "out", "scheduler": "threads"}
    convert(**options)
    assert convert(**options).up_to_date
    checkpoints.write(place, BIG, seed=1)
    with pytest.raises(BadInput, match="a finished conversion"):
        convert(**options)


def test_what_is_not_there_or_not_read_by_ranges_is_named(tmp_path: Path, served: Served) -> None:
    with pytest.raises(BadInput, match=r"model\.safetensors: found no such file"):
        plan(model_dir=f"{served.url}/none", output_dir=tmp_path / "out")
    place = at(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "../../etc/passwd"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="no such file"):
        plan(model_dir=f"{served.url}/m", output_dir=tmp_path / "out")
    with pytest.raises(BadInput, match="hf://"):
        plan(model_dir=f"{served.url}/m", output_dir=tmp_path / "out", revision="main")


def test_the_hub_by_a_commit_and_with_its_token(tmp_path: Path, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    place = at(tmp_path, "org/name/resolve/c0ffee")
    served.token = "hf_secret"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    info = type("Info", (), {"sha": "c0ffee"})
    asked = lambda _self, name, timeout, **_: info if name == "org/name" and timeout else None  # noqa: E731
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", asked)
    stages.read.object_store._store.cache_clear()
    both(tmp_path, "hf://org/name@main", place)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "served" not in path.parts)
    assert b"hf_secret" not in written


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of an S3 server on this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": "a-secret-key", "AWS_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        urlopen(Request(f"http://{host}:{port}/bucket", method="PUT")).close()
        forget_clients()
        yield "s3://bucket"
    forget_clients()
    server.stop()


def put(url: str, directory: Path) -> str:
    import obstore
    from obstore.store import S3Store

    store = S3Store.from_url(url, client_options={"allow_http": True})
    for path in directory.iterdir():
        obstore.put(store, path.name, path.read_bytes())
    return url


@pytest.mark.nightly
def test_a_bucket_of_s3(tmp_path: Path, bucket: str) -> None:
    place = at(tmp_path)
    url = put(f"{bucket}/models/m", place)
    both(tmp_path, url, place, tp_size=2)
    ran = headrace("convert", "--model_dir", url, "--output_dir", tmp_path / "cli", "--tp_size", 2)
    assert ran.code == 0, ran.err
    assert contents(tmp_path / "cli") == contents(tmp_path / "near")
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"a-secret-key" not in written + ran.out.encode() + ran.err.encode()
    with pytest.raises(BadInput, match="found nothing; expected a checkpoint"):
        plan(model_dir=f"{bucket}/nowhere", output_dir=tmp_path / "out")


def test_the_text_of_a_model_of_several_inputs(tmp_path: Path, served: Served) -> None:
    place, text = tmp_path / "served" / "m", {key: value for key, value in BIG.items() if key != "architectures"}
    config = {"architectures": ["LlavaForConditionalGeneration"], "torch_dtype": "float16", "text_config": text}
    tensors = {f"language_model.{name}": values for name, values in checkpoints.values(BIG).items()}
    checkpoints.save(place, config, {**tensors, "vision_tower.weight": tensors["language_model.model.norm.weight"]})
    both(tmp_path, f"{served.url}/m", place)
