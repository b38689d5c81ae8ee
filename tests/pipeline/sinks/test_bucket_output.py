"""Outputs in object storage, against an S3 server on this machine: the bytes of a directory, in parts that outlive a run."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec
import pytest

import pipeline.planning.rank_parts
import pipeline.tensor.store_requests
from pipeline import BadInput, WriteFailed, convert, plan, report, verify
from pipeline.sinks.hold import Holder
from pipeline.sinks.journal import Journal
from pipeline.sinks.remote import RemoteGroup
from tests.support import checkpoints
from tests.support.commands import headrace
from tests.support.directories import contents
from tests.support.s3_server import SECRET, Proxied, client, empty, objects, open_uploads, s3_server

BIG = {**checkpoints.LLAMA, "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 384, "torch_dtype": "bfloat16"}
OUT = "s3://bucket/a/far"
WAYS = pytest.mark.parametrize("cut", ["auto", "shard"])  # parts are made of the source's rows at once, or of chunks of scratch


@pytest.fixture(scope="module")
def running() -> Iterator[Proxied]:
    with s3_server() as found:
        yield found


@pytest.fixture
def server(running: Proxied) -> Iterator[Proxied]:
    """The server, empty, with nothing that goes wrong."""
    running.requests.clear()
    yield running
    running.fault = lambda *_: None
    empty()


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline.tensor.store_requests, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(pipeline.planning.rank_parts, "PART_BYTES", 100_000)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    checkpoints.write(tmp_path / "model", BIG)
    return {"model_dir": tmp_path / "model", "scheduler": "threads", "workers": 1}


def same(tmp_path: Path, options: dict[str, Any], out: str = OUT) -> None:
    """Assert that the objects are the files that a directory gets, and nothing is left over, here and there."""
    convert(output_dir=tmp_path / "near", **options)
    found = objects(out)
    assert {name: data for name, data in found.items() if name != "headrace.json"} == contents(tmp_path / "near")
    assert "headrace.json" in found
    assert open_uploads() == []
    assert not (tmp_path / ".headrace-scratch").exists(), "scratch and journal are gone"


def parts_of(server: Proxied, action: int | str, after: int) -> Callable[[str, str], int | str | None]:
    """Goes wrong with the parts that are uploaded after some."""
    return lambda method, path: action if method == "PUT" and "partNumber" in path and len(server.uploads()) > after else None


@WAYS
def test_a_bucket_gets_the_bytes_of_a_directory_in_parts(
    tmp_path: Path, server: Proxied, options: dict[str, Any], cut: str
) -> None:
    options |= {"tp_size": 2, "use_parallel_embedding": True, "scratch_after": cut}
    made = plan(output_dir=OUT, **options)
    assert ("object storage takes files in order" in made.scratch_reasons["shard"]) == (cut == "shard")
    assert bool(made.scratch) == bool(made.scratch_bytes_written) == (cut == "shard")
    assert not any(method in ("PUT", "POST") for method, _ in server.requests), "a plan writes nothing"
    assert bool(convert(output_dir=OUT, **options).scratch_bytes_written) == (cut == "shard")
    same(tmp_path, options)
    assert len(server.uploads()) > 10
    assert verify(OUT, tmp_path / "model").ok
    assert plan(output_dir=OUT, **options).up_to_date
    assert convert(output_dir=OUT, **options).up_to_date
    last = [path for method, path in server.requests if method == "PUT" and "partNumber" not in path]
    assert last[-2:] == ["/bucket/a/far/headrace.json", "/bucket/a/far/config.json"]


@WAYS
@pytest.mark.parametrize("vocabulary", [781, 9])
@pytest.mark.usefixtures("server")
def test_padding_is_zeros_that_nobody_writes(tmp_path: Path, options: dict[str, Any], cut: str, vocabulary: int) -> None:
    """Of 781 rows the last of four ranks has 193 and three of padding; of nine, padding alone."""
    checkpoints.write(tmp_path / "model", {**BIG, "vocab_size": vocabulary})
    options |= {"tp_size": 4, "use_parallel_embedding": True, "scratch_after": cut}
    made = plan(output_dir=OUT, **options)
    if cut == "shard" and vocabulary == 781:
        embedding = made.scratch[0].arrays[3, "transformer.vocab_embedding.weight"]
        assert (embedding.shape[0], embedding.chunk_shape[0]) == (196, 195)
    convert(output_dir=OUT, **options)
    same(tmp_path, options)
    assert verify(OUT, tmp_path / "model").ok


@pytest.mark.usefixtures("server")
def test_a_directory_and_a_bucket_from_one_read(tmp_path: Path, options: dict[str, Any]) -> None:
    targets = [{"output_dir": str(tmp_path / "here"), "tp_size": 2}, {"output_dir": OUT, "tp_size": 4, "dtype": "float32"}]
    convert(target=targets, **options)
    convert(output_dir=tmp_path / "alone", tp_size=2, **options)
    assert contents(tmp_path / "here") == contents(tmp_path / "alone")
    same(tmp_path, {**options, "tp_size": 4, "dtype": "float32"})


@pytest.mark.parametrize("vocabulary", [1000, 781])
@pytest.mark.usefixtures("server")
def test_scratch_in_object_storage_too(tmp_path: Path, options: dict[str, Any], vocabulary: int) -> None:
    """Chunks are put whole there: each is of one block, and padding has its own."""
    checkpoints.write(tmp_path / "model", {**BIG, "vocab_size": vocabulary})
    options |= {"tp_size": 4, "use_parallel_embedding": True}
    convert(output_dir=OUT, scratch=f"memory://{tmp_path.name}", scratch_after="shard", **options)
    same(tmp_path, options)
    assert not fsspec.filesystem("memory").find(f"/{tmp_path.name}"), "scratch is removed after success"


@pytest.mark.parametrize("fault", [500, 503, "cut"])
def test_a_store_that_is_busy_or_breaks_off_is_asked_again(
    tmp_path: Path, server: Proxied, options: dict[str, Any], fault: int | str
) -> None:
    count = iter(range(10**6))
    server.fault = lambda method, _: fault if method in ("PUT", "POST") and next(count) % 2 else None
    convert(output_dir=OUT, **options)
    same(tmp_path, options)


@pytest.mark.parametrize(("fault", "cut"), [("full", "auto"), (403, "auto"), ("full", "shard")])
def test_a_run_that_ends_goes_on_with_the_parts_that_are_there(
    tmp_path: Path, server: Proxied, options: dict[str, Any], fault: int | str, cut: str
) -> None:
    options["scratch_after"] = cut
    server.fault = parts_of(server, fault, 5)
    with pytest.raises(WriteFailed, match="no room in the bucket" if fault == "full" else "no permission") as caught:
        convert(output_dir=OUT, **options)
    assert SECRET not in str(caught.value)
    assert open_uploads() == ["a/far/rank0.safetensors"]
    assert "config.json" not in objects(OUT)
    assert "headrace.json.lock" not in objects(OUT)
    server.fault = lambda *_: None
    before = {path.rpartition("=")[2] for path in server.uploads()[:5]}
    server.requests.clear()
    assert convert(output_dir=OUT, **options).resumed_tasks > 0
    assert before.isdisjoint(path.rpartition("=")[2] for path in server.uploads())
    same(tmp_path, options)


@pytest.mark.parametrize("fault", [403, 500])
def test_a_store_that_fails_while_uploads_are_taken_up_costs_none_of_them(
    tmp_path: Path, server: Proxied, options: dict[str, Any], fault: int
) -> None:
    server.fault = parts_of(server, "full", 5)
    with pytest.raises(WriteFailed):
        convert(output_dir=OUT, **options)
    there = {path.rpartition("=")[2] for path in server.uploads()[:5]}
    server.fault = lambda method, path: fault if method == "GET" and "uploadId" in path else None
    with pytest.raises(BadInput, match="no permission" if fault == 403 else "9 times"):
        convert(output_dir=OUT, **options)
    assert open_uploads() == ["a/far/rank0.safetensors"]
    server.fault = lambda *_: None
    server.requests.clear()
    assert convert(output_dir=OUT, **options).resumed_tasks > 0
    assert there.isdisjoint(path.rpartition("=")[2] for path in server.uploads())
    same(tmp_path, options)


@WAYS
def test_a_plan_says_how_many_tasks_are_done(server: Proxied, options: dict[str, Any], cut: str) -> None:
    options |= {"scratch_after": cut, "output_dir": OUT}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    ran = headrace("plan", *words)
    assert ran.code == 0, ran
    assert ran.out.startswith("would convert in")
    server.fault = parts_of(server, "full", 5)
    with pytest.raises(WriteFailed):
        convert(**options)
    server.fault = lambda *_: None
    said = json.loads(headrace("plan", *words, "--json").out)
    assert 0 < said["done_tasks"] == convert(**options).resumed_tasks < said["tasks"]


@pytest.mark.parametrize(("first", "then"), [("auto", "shard"), ("shard", "auto")])
def test_a_run_goes_on_with_parts_that_were_made_the_other_way(
    tmp_path: Path, server: Proxied, options: dict[str, Any], first: str, then: str
) -> None:
    """Parts have the same bytes and numbers, however they are made."""
    options |= {"tp_size": 2}
    server.fault = parts_of(server, "full", 5)
    with pytest.raises(WriteFailed):
        convert(output_dir=OUT, scratch_after=first, keep_scratch=False, **options)
    server.fault = lambda *_: None
    before = set(server.uploads()[:5])
    server.requests.clear()
    assert convert(output_dir=OUT, scratch_after=then, **options).resumed_tasks > 0
    assert before.isdisjoint(server.uploads())
    assert not list((tmp_path / ".headrace-scratch").glob("*.zarr")), "the first run's cut is gone, too"
    same(tmp_path, options)


@WAYS
def test_parts_that_the_store_has_lost_are_made_again(tmp_path: Path, server: Proxied, options: dict[str, Any], cut: str) -> None:
    options["scratch_after"] = cut
    server.fault = parts_of(server, "full", 5)
    with pytest.raises(WriteFailed):
        convert(output_dir=OUT, **options)
    server.fault = lambda *_: None
    (upload,) = client().list_multipart_uploads(Bucket="bucket")["Uploads"]
    client().abort_multipart_upload(Bucket="bucket", Key=upload["Key"], UploadId=upload["UploadId"])
    convert(output_dir=OUT, **options)
    same(tmp_path, options)
    assert verify(OUT).ok


def test_a_run_that_ended_between_ranks_and_config_ends_well(tmp_path: Path, server: Proxied, options: dict[str, Any]) -> None:
    server.fault = lambda method, path: "full" if method == "PUT" and path.endswith("config.json") else None
    with pytest.raises(WriteFailed, match="no room"):
        convert(output_dir=OUT, **options)
    server.fault = lambda *_: None
    server.requests.clear()
    convert(output_dir=OUT, **options)
    assert server.uploads() == []
    same(tmp_path, options)


def test_the_source_or_the_options_change_between_two_runs(tmp_path: Path, server: Proxied, options: dict[str, Any]) -> None:
    server.fault = parts_of(server, "full", 3)
    with pytest.raises(WriteFailed):
        convert(output_dir=OUT, **options)
    server.fault = lambda *_: None
    with pytest.raises(BadInput, match="an unfinished conversion of another source or with other options"):
        convert(output_dir=OUT, tp_size=2, **options)
    convert(output_dir=OUT, tp_size=2, overwrite=True, **options)
    with pytest.raises(BadInput, match="a finished conversion of another source or with other options"):
        convert(output_dir=OUT, tp_size=4, **options)
    assert not (tmp_path / ".headrace-scratch").exists(), "that of the one that was never finished is gone, too"
    same(tmp_path, {**options, "tp_size": 2})


@pytest.mark.usefixtures("server")
def test_one_job_at_a_time(tmp_path: Path, options: dict[str, Any]) -> None:
    note = {"Bucket": "bucket", "Key": "a/far/headrace.json.lock"}
    me = Holder.me()
    for other in (Holder("another-host", "boot", 1, "-"), me):
        client().put_object(**note, Body=json.dumps(asdict(other)))
        with pytest.raises(BadInput, match=f"another job at work on it, process {other.pid} on {other.host}"):
            convert(output_dir=OUT, **options)
    refused = headrace("unlock", OUT)
    assert (refused.code, "of this machine at work on it" in refused.err) == (2, True)
    client().put_object(**note, Body=json.dumps(asdict(Holder("another-host", "boot", 1, "-"))))
    assert "held by process 1 on another-host" in headrace("unlock", OUT).out
    client().put_object(**note, Body=json.dumps(asdict(Holder(socket.gethostname(), "an earlier boot", 1, "-"))))
    convert(output_dir=OUT, **options)
    same(tmp_path, options)


def test_uploads_that_nobody_completes_are_listed_and_aborted(tmp_path: Path, server: Proxied, options: dict[str, Any]) -> None:
    server.fault = parts_of(server, "full", 3)
    with pytest.raises(WriteFailed):
        convert(output_dir=OUT, **options)
    server.fault = lambda *_: None
    (row,) = json.loads(headrace("scratch", "ls", "s3://bucket/a", "--json").out)
    assert (row["path"], row["stage"], row["bytes"]) == (f"{OUT}/rank0.safetensors", "upload", 300_000)
    refused = headrace("scratch", "rm", "s3://bucket/a", "far/rank7.safetensors")
    assert (refused.code, "no such cut" in refused.err) == (2, True)
    me = {"Bucket": "bucket", "Key": "a/far/headrace.json.lock", "Body": json.dumps(asdict(Holder("other", "b", 1, "-")))}
    client().put_object(**me)
    assert "another job at work" in headrace("scratch", "rm", "s3://bucket/a", "--all", "--yes").err
    assert "released" in headrace("unlock", OUT).out
    assert f"aborted the upload of {OUT}/rank0.safetensors" in headrace("scratch", "rm", "s3://bucket/a", "--all", "--yes").out
    assert open_uploads() == []
    convert(output_dir=OUT, **options)
    same(tmp_path, options)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("in_parts", [True, False], ids=["botocore", "obstore"])
def test_cuts_that_a_job_is_at_work_on_stay(in_parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tensor.bucket.IN_PARTS", ("s3",) if in_parts else ())
    for n, key in enumerate(("one", "two")):
        attributes = {"headrace": "scratch", "stage": "unpack", "id": f"abc{n}", "source": "m"}
        text = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes})
        client().put_object(Bucket="bucket", Key=f"cuts/{key}.zarr/zarr.json", Body=text)
        client().put_object(Bucket="bucket", Key=f"cuts/{key}.zarr/w/c/0", Body=b"chunk")
    monkeypatch.setattr("pipeline.sinks.remote.RemoteGroup._attributes", lambda cut: _said(cut.url))
    with closing(Journal(RemoteGroup("s3://bucket/cuts/two.zarr", "", "abc1", "", False, {})._journal)):
        assert "another job at work on it" in headrace("scratch", "rm", "s3://bucket/cuts", "--all", "--yes").err
    assert len(objects("s3://bucket/cuts")) == 4
    assert headrace("scratch", "rm", "s3://bucket/cuts", "--all", "--yes").code == 0
    assert objects("s3://bucket/cuts") == {}


def _said(url: str) -> dict[str, Any]:
    """The attributes of a group, whose object is asked for without fsspec's package of S3."""
    text = objects(url)["zarr.json"]
    return dict(json.loads(text)["attributes"])


@pytest.mark.usefixtures("server")
def test_what_others_wrote_is_left_alone(options: dict[str, Any]) -> None:
    client().put_object(Bucket="bucket", Key="a/far/notes.txt", Body=b"mine")
    with pytest.raises(BadInput, match=r"objects that headrace did not write \(notes.txt\)"):
        convert(output_dir=OUT, **options)
    assert objects(OUT) == {"notes.txt": b"mine"}
    with pytest.raises(BadInput, match="no such bucket"):
        convert(output_dir="s3://nobody/a", **options)
    client().put_object(Bucket="bucket", Key="a/ranks/rank0.safetensors", Body=b"theirs")
    with pytest.raises(BadInput, match="a checkpoint that headrace did not write; expected a new or empty prefix"):
        convert(output_dir="s3://bucket/a/ranks", **options)
    assert objects("s3://bucket/a/ranks") == {"rank0.safetensors": b"theirs"}
    uploading = client().create_multipart_upload(Bucket="bucket", Key="c/out/large.bin")
    convert(output_dir="s3://bucket/c/out", **options)
    convert(output_dir="s3://bucket/c/out", **options, tp_size=2, overwrite=True)
    assert open_uploads() == ["c/out/large.bin"]
    with pytest.raises(BadInput, match=r"a place inside the output s3://bucket/c/out"):
        convert(output_dir="s3://bucket/c/out/inside", **options)
    client().abort_multipart_upload(Bucket="bucket", Key="c/out/large.bin", UploadId=uploading["UploadId"])
    with pytest.raises(BadInput, match="outputs beside one another"):
        convert(target=[{"output_dir": "s3://bucket/b"}, {"output_dir": "s3://bucket/b/c"}], **options)


@pytest.mark.parametrize(
    "url", ["s3://me:hidden@bucket/a", "s3://bucket/a?X-Amz-Signature=hidden", "ftp://hidden/a", "s3://hidden", "https://hidden/a"]
)
def test_urls_of_no_place_for_outputs_are_refused_without_their_secrets(options: dict[str, Any], url: str) -> None:
    with pytest.raises(BadInput, match="output_dir") as caught:
        convert(output_dir=url, **options)
    assert "hidden" not in str(caught.value)


def test_an_engine_is_built_of_a_directory(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="a checkpoint in object storage; expected one in a directory"):
        plan(output_dir=OUT, engine={}, **options)


def test_a_stream_where_a_store_keeps_no_parts(
    tmp_path: Path, server: Proxied, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at Google's and Microsoft's stores, by the same library; what a run did not send whole is sent anew."""
    monkeypatch.setattr("pipeline.tensor.bucket.IN_PARTS", ())
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
    options |= {"tp_size": 2, "use_parallel_embedding": True}
    server.fault = lambda method, path: 403 if method == "PUT" and "rank1" in path else None
    with pytest.raises(WriteFailed):
        convert(output_dir=OUT, **options)
    server.fault = lambda *_: None
    server.requests.clear()
    convert(output_dir=OUT, **options)
    assert not [path for path in server.uploads() if "rank0" in path], "a rank that is whole is not sent again"
    assert {name: data for name, data in objects(OUT).items() if name != "headrace.json"} == _near(tmp_path, options)
    monkeypatch.undo()
    assert not (tmp_path / ".headrace-scratch").exists()


def _near(tmp_path: Path, options: dict[str, Any]) -> dict[str, bytes]:
    convert(output_dir=tmp_path / "near", **options)
    return contents(tmp_path / "near")


def test_no_secret_is_written_anywhere(tmp_path: Path, server: Proxied, options: dict[str, Any]) -> None:
    server.fault = parts_of(server, "full", 3)
    arguments = ("convert", "--model_dir", options["model_dir"], "--output_dir", OUT, "--log_format", "json")
    failed = headrace(*arguments)
    assert failed.code == 3
    left = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    server.fault = lambda *_: None
    done = headrace(*arguments)
    assert done.code == 0, done.err
    planned = headrace("plan", *arguments[1:5], "--json")
    page = report(OUT, options["model_dir"]).page
    assert page == tmp_path / "far.report.html"
    said = "".join([failed.out, failed.err, done.out, done.err, planned.out, planned.err, page.read_text()])
    written = b"".join(objects(OUT).values()) + left + said.encode()
    assert SECRET.encode() not in written
    assert b"an-id" not in written
