"""GGUF files that are damaged, cut short or say what is not so: a report, never a traceback and never a hang."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.pipeline.planning.bad_input.gguf_files import HIDDEN, INNER, KV_HEADS, TENSORS, VOCAB, header_end, write
from tests.support.commands import LOOP_SECONDS, convert, headrace, limited, one, refused
from tests.support.examples import examples


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf").read_bytes()


@pytest.fixture(scope="module")
def header_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    return header_end(write(tmp_path_factory.mktemp("gguf") / "model.gguf"))


def test_the_model_that_these_tests_damage_is_sound(path: Path, tmp_path: Path) -> None:
    assert convert(write(path), tmp_path / "out", "--tp_size", KV_HEADS).code == 0


@pytest.mark.parametrize("length", [0, 1, 3, 4, 8, 16, 23, 24, 25, 40, 100, 500, 1000])
def test_a_file_cut_short_in_its_header(path: Path, sound: bytes, length: int) -> None:
    path.write_bytes(sound[:length])
    assert one(refused(path)).startswith(f"{path}: found ")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.9999])
def test_a_file_cut_short_in_its_data(path: Path, sound: bytes, header_bytes: int, share: float) -> None:
    length = header_bytes + int((len(sound) - header_bytes) * share)
    path.write_bytes(sound[:length])
    assert all(problem.startswith(f"{path}: found ") for problem in refused(path))


@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_truncation_is_refused(tmp_path: Path, sound: bytes, data: st.DataObject) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(sound[: data.draw(st.integers(0, len(sound) - 33))])  # the last tensor is padded to 32 bytes
    assert plan(path) == 2


@examples(250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_in_the_header(tmp_path: Path, sound: bytes, header_bytes: int, data: st.DataObject) -> None:
    content = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 2))):
        content[data.draw(st.integers(0, header_bytes - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    # A name or a number may well still make sense: 0 is no failure, and a traceback comes out of the call.
    assert plan(path) in (0, 2)


def plan(path: Path) -> int:
    ran = headrace("plan", "--model_dir", path, "--output_dir", path.parent / "out")
    assert ran.code == 0 or ran.err.startswith("headrace: "), ran
    return ran.code


@pytest.mark.parametrize("magic", [b"GGML", b"\0\0\0\0", b"FUGG", b"GGUf"])
def test_another_magic(path: Path, sound: bytes, magic: bytes) -> None:
    path.write_bytes(magic + sound[4:])
    problem = one(refused(path))
    assert problem.startswith(f"{path}: found ")
    assert "GGUF" in problem


@pytest.mark.parametrize("version", [0, 1, 4, 99, 2**32 - 1])
def test_another_version(path: Path, sound: bytes, version: int) -> None:
    path.write_bytes(sound[:4] + struct.pack("<I", version) + sound[8:])
    assert one(refused(path)).startswith(f"{path}: found ")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("count", [2**20, 2**32, 2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("what", ["tensors", "keys", "strings"])
def test_counts_beyond_the_file(path: Path, sound: bytes, what: str, count: int) -> None:
    at = {"tensors": 8, "keys": 16}.get(what) or array_length(sound, "tokenizer.ggml.tokens")
    path.write_bytes(sound[:at] + struct.pack("<Q", count) + sound[at + 8 :])
    assert one(refused(path)).startswith(f"{path}: found ")


@pytest.mark.parametrize("shift", range(4))
def test_an_array_of_numbers_longer_than_the_file(path: Path, shift: int) -> None:
    # Where the numbers end exactly with the file, a reader that goes on finds empty ones for ever.
    content = write(path, metadata={"general.name": "n" * shift}).read_bytes()
    at = array_length(content, "tokenizer.ggml.scores")
    path.write_bytes(content[:at] + struct.pack("<Q", 2**40) + content[at + 8 :])
    ran = limited({"RLIMIT_CPU": LOOP_SECONDS}, "plan", "--model_dir", path, "--output_dir", path.parent / "out")
    assert ran.code == 2
    assert f"{path}: found " in ran.err


def array_length(content: bytes, key: str) -> int:
    """Where a file says how many items an array has: behind its key, type 9 and the type of the items."""
    at = content.index(key.encode()) + len(key) + 8
    assert content[at : at + 8] == struct.pack("<Q", VOCAB)
    return at


def test_a_tensor_past_the_end(path: Path, sound: bytes) -> None:
    name = b"blk.1.ffn_down.weight"
    at = sound.index(name) + len(name) + 4 + 2 * 8 + 4  # axes, two lengths, the type, then the offset
    path.write_bytes(sound[:at] + struct.pack("<Q", len(sound)) + sound[at + 8 :])
    problem = one(refused(path))
    assert str(path) in problem
    assert name.decode() in problem


def tensor_header(content: bytes, name: str) -> tuple[int, int, int]:
    """Where a file says a tensor's first length, its type and its offset."""
    at = content.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    axes = struct.unpack_from("<I", content, at)[0]
    return at + 4, at + 4 + 8 * axes, at + 8 + 8 * axes


def changed(content: bytes, at: int, kind: str, value: int) -> bytes:
    """The content with a number of this kind (as struct has it) put at a place."""
    return content[:at] + struct.pack(f"<{kind}", value) + content[at + struct.calcsize(kind) :]


@pytest.mark.parametrize(
    ("move", "fault"),
    [
        (-32, "inside token_embd.weight"),
        (32, "32 bytes of no tensor behind token_embd.weight"),
        (1, "no multiple of 32"),
        (-16, "no multiple of 32"),
    ],
)
def test_a_tensor_somewhere_else_than_behind_the_one_before(path: Path, sound: bytes, move: int, fault: str) -> None:
    _, _, at = tensor_header(sound, "output_norm.weight")
    path.write_bytes(changed(sound, at, "Q", struct.unpack_from("<Q", sound, at)[0] + move))
    problem = one(refused(path))
    assert problem.startswith(f"{path}: found output_norm.weight at byte ")
    assert fault in problem


def test_two_tensors_in_one_place(path: Path, sound: bytes) -> None:
    first, second = (tensor_header(sound, f"blk.{n}.attn_q.weight")[2] for n in (0, 1))
    path.write_bytes(changed(sound, second, "Q", struct.unpack_from("<Q", sound, first)[0]))
    assert "inside blk.0.attn_q.weight" in one(refused(path))


def test_two_tensors_whose_places_are_exchanged_still_tile_the_file(path: Path, sound: bytes, tmp_path: Path) -> None:
    """Order in the header is no matter: llama.cpp writes it in that of the data, other tools need not."""
    first, second = (tensor_header(sound, f"blk.{n}.attn_q.weight")[2] for n in (0, 1))
    offsets = [struct.unpack_from("<Q", sound, at)[0] for at in (first, second)]
    path.write_bytes(changed(changed(sound, first, "Q", offsets[1]), second, "Q", offsets[0]))
    assert convert(path, tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("number", "fault"), [(0, "inside"), (28, "inside"), (8, "of no tensor behind"), (24, "of no tensor behind")]
)
def test_a_type_that_contradicts_the_offsets(path: Path, sound: bytes, number: int, fault: str) -> None:
    """F32, F64, Q8_0 and I8 in the place of F16: what follows begins too soon or too late."""
    _, at, _ = tensor_header(sound, "blk.0.attn_q.weight")
    path.write_bytes(changed(sound, at, "I", number))
    assert fault in one(refused(path))


def test_a_shape_that_contradicts_the_offsets(path: Path, sound: bytes) -> None:
    at, _, _ = tensor_header(sound, "blk.0.attn_q.weight")
    path.write_bytes(changed(sound, at, "Q", HIDDEN * 2))
    assert "inside blk.0.attn_q.weight" in one(refused(path))


def test_rows_that_are_no_whole_blocks(path: Path, sound: bytes) -> None:
    _, at, _ = tensor_header(sound, "blk.0.attn_q.weight")
    path.write_bytes(changed(sound, at, "I", int(gguf.GGMLQuantizationType.Q4_K)))
    problem = one(refused(path))
    assert f"blk.0.attn_q.weight with rows of {HIDDEN} values, where Q4_K has blocks of 256" in problem


@pytest.mark.parametrize("extra", [1, 32, 4096])
def test_bytes_behind_the_last_tensor(path: Path, sound: bytes, extra: int) -> None:
    path.write_bytes(sound + bytes(extra))
    assert f"{extra:,} bytes of no tensor behind " in one(refused(path))


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_another_alignment_is_followed(path: Path, tmp_path: Path, alignment: int) -> None:
    write(path, metadata={"general.alignment": alignment})
    assert convert(path, tmp_path / "out").code == 0


def test_an_alignment_that_the_tensors_do_not_have(path: Path) -> None:
    content = write(path, metadata={"general.alignment": 4096}).read_bytes()
    at = content.index(b"general.alignment") + len("general.alignment") + 4
    path.write_bytes(changed(content, at, "I", 8192))
    assert one(refused(path)).startswith(f"{path}: found ")


@pytest.mark.parametrize("alignment", [0, 3, 48])
def test_an_alignment_that_is_no_power_of_two(path: Path, alignment: int) -> None:
    write(path, metadata={"general.alignment": alignment})
    problem = one(refused(path))
    assert "alignment" in problem
    assert "power of" in problem


@pytest.mark.parametrize("alignment", [1 << 21, 1 << 31])
def test_an_alignment_that_is_larger_than_any(path: Path, alignment: int) -> None:
    """As much is made room for, also where there are no tensors."""
    content = write(path, metadata={"general.alignment": 32}).read_bytes()
    at = content.index(b"general.alignment") + len("general.alignment") + 4
    for data in (content, changed(content, 8, "Q", 0)):  # the number of tensors
        path.write_bytes(changed(data, at, "I", alignment))
        assert f"general.alignment {alignment:,}, more than 1,048,576" in one(refused(path))


def test_text_that_is_not_utf8(path: Path, sound: bytes) -> None:
    path.write_bytes(sound.replace(b"a small model", b"a \xff\xfe\xfd\xfc\xfb model"))
    assert plan(path) in (0, 2)


def test_a_file_of_the_other_byte_order(path: Path) -> None:
    # Its values must not be taken for those of this one's.
    write(path, endian=gguf.GGUFEndian.BIG)
    assert one(refused(path)).startswith(f"{path}: found ")


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_any_missing_tensor(path: Path, name: str) -> None:
    write(path, without=(name,))
    if name == "output.weight":  # tied
        assert convert(path, path.parent / "out").code == 0
    else:
        assert one(refused(path)).startswith(f"{name}: found no such tensor")


@pytest.mark.parametrize("name", ["blk.2.ffn_up.weight", "blk.0.attn_q_norm.weight", "blk.0.attn_k.bias", "v.patch_embd.weight"])
def test_a_tensor_that_nothing_consumes(path: Path, name: str) -> None:
    write(path, tensors={name: np.zeros((INNER, HIDDEN) if "ffn" in name else (32,), np.float32)})
    assert one(refused(path)).startswith(f"{name}: found a tensor that ")


def test_a_shape_that_contradicts_the_metadata(path: Path) -> None:
    write(path, tensors={"blk.0.ffn_up.weight": np.zeros((INNER, 32), np.float16)})
    assert one(refused(path)).startswith(f"blk.0.ffn_up.weight: found shape [{INNER}, 32]; expected [{INNER}, {HIDDEN}]")


@pytest.mark.parametrize("kind", ["I8", "I32", "I64", "Q8_1"])
def test_types_that_are_no_weights_or_have_no_dequantizer(path: Path, kind: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    plain = {"I8": np.int8, "I32": np.int32, "I64": np.int64}.get(kind)
    values = np.zeros((INNER, HIDDEN), plain) if plain else np.zeros((INNER, HIDDEN // block * size), np.uint8)
    write(path, tensors={"blk.0.ffn_up.weight": values}, kinds=None if plain else {"blk.0.ffn_up.weight": kind})
    report = refused(path)
    assert any(problem.startswith("blk.0.ffn_up.weight: ") and kind in problem for problem in report)


REQUIRED = ["context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"]


@pytest.mark.parametrize("key", [*REQUIRED, "attention.layer_norm_rms_epsilon"])
def test_a_missing_key(path: Path, key: str) -> None:
    write(path, without=(f"llama.{key}",))
    problem = one(refused(path))
    assert problem.startswith(f"{path}: ")
    assert f"{key}: found nothing" in problem or f"{key} or " in problem or f"or {key}: found nothing" in problem


WRONG: list[tuple[str, Any]] = [
    ("llama.embedding_length", "64"),
    ("llama.embedding_length", 0),
    ("llama.embedding_length", float("inf")),
    ("llama.embedding_length", float("nan")),
    ("llama.block_count", [2, 2]),
    ("llama.attention.head_count_kv", [2, 2]),
    ("llama.attention.head_count", 0),
    ("llama.attention.layer_norm_rms_epsilon", "small"),
    ("llama.rope.freq_base", "large"),
    ("llama.rope.scaling.type", "yarn"),
    ("llama.rope.scaling.type", "linear"),  # without its factor
    ("llama.expert_count", 4),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=str)
def test_metadata_of_another_type_or_out_of_range(path: Path, key: str, value: Any) -> None:
    write(path, metadata={key: value})
    assert all(": found " in problem for problem in refused(path))


def test_a_vocabulary_that_is_no_list(path: Path) -> None:
    write(path, metadata={"tokenizer.ggml.tokens": "abc"}, without=("llama.vocab_size",))
    assert str(path) in refused(path)[0]


@pytest.mark.parametrize("factors", [np.zeros(8), np.zeros(0), np.full(8, np.nan), np.full(8, -1.0), np.arange(8.0)], ids=str)
def test_rope_factors_that_are_not_llama3s(path: Path, factors: np.ndarray) -> None:
    write(path, tensors={"rope_freqs.weight": factors.astype(np.float32)})
    assert "rope_freqs.weight: found " in one(refused(path))


@pytest.mark.parametrize("name", ["rope_freqs.weight", "rope_factors_short.weight"])
def test_rope_factors_that_are_packed(path: Path, name: str) -> None:
    """They would be passed over with the name that packed weights are given."""
    write(path, tensors={name: np.zeros(34, np.uint8)}, kinds={name: "Q8_0"})
    assert f"{name}: found type Q8_0; expected an unpacked type" in one(refused(path))


@pytest.mark.parametrize("architecture", ["gpt2", "llama4", ""])
def test_an_unknown_architecture_lists_those_known(path: Path, architecture: str) -> None:
    write(path, architecture=architecture)
    problem = one(refused(path))
    assert problem.startswith(f"{path}: architecture: found {architecture or 'none'}")
    assert "llama" in problem


def test_a_missing_part_of_a_split_model(tmp_path: Path) -> None:
    write(tmp_path / "m-00001-of-00003.gguf")
    problem = one(refused(tmp_path / "m-00001-of-00003.gguf"))
    assert f"{tmp_path / 'm-*'}: found 1 of 3 parts; there is no m-00002-of-00003.gguf, m-00003-of-00003.gguf" in problem


def test_two_models_in_one_directory(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / "models" / name)
    problem = one(refused(tmp_path / "models"))
    assert "a.gguf, b.gguf" in problem


def test_the_same_tensor_in_two_parts(tmp_path: Path) -> None:
    for n in (1, 2):
        write(tmp_path / f"m-0000{n}-of-00002.gguf")
    problems = refused(tmp_path / "m-00001-of-00002.gguf")
    assert sum("the tensor again in m-00002-of-00002.gguf" in problem for problem in problems) == min(len(TENSORS), 20)


@pytest.mark.parametrize("kind", ["F16", "F32", "Q4_0", "Q8_0"])
def test_a_tensor_again_in_another_type(tmp_path: Path, kind: str) -> None:
    """Both would be the weight of one module, under parameters of their own."""
    name = "blk.0.attn_k.weight"
    write(tmp_path / "m-00001-of-00002.gguf", **typed(name, "Q4_0"))
    write(tmp_path / "m-00002-of-00002.gguf", without=tuple(TENSORS.keys() - {name}), **typed(name, kind))
    assert one(refused(tmp_path)).startswith(f"{name}: found the tensor again in m-00002-of-00002.gguf; expected one home")


def test_a_plain_tensor_under_the_name_of_a_packed_one(path: Path) -> None:
    name = "blk.0.attn_k.gguf_Q4_0"
    write(path, tensors={name: np.zeros((HIDDEN // 2, HIDDEN), np.float32)})
    assert f"{name}: found type F32 under the name of packed weights; expected a name of llama.cpp's" in one(refused(path))


@pytest.mark.parametrize("said", [len(TENSORS) + 1, len(TENSORS) - 1, 0, "many"])
def test_parts_with_another_number_of_tensors_than_they_say(tmp_path: Path, said: Any) -> None:
    for n in (1, 2):
        half = {name for place, name in enumerate(TENSORS) if place % 2 == n % 2}
        write(tmp_path / f"m-0000{n}-of-00002.gguf", without=tuple(half), metadata={"split.tensors.count": said})
    subject = f"{tmp_path / 'm-00001-of-00002.gguf'}: split.tensors.count"
    assert one(refused(tmp_path)).startswith(f"{subject}: found {said!r}; expected {len(TENSORS)}, as all parts have together")


def test_parts_with_as_many_tensors_as_they_say(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for n in (1, 2):
        half = {name for place, name in enumerate(TENSORS) if place % 2 == n % 2}
        write(tmp_path / f"model/m-0000{n}-of-00002.gguf", without=tuple(half), metadata={"split.tensors.count": len(TENSORS)})
    assert convert(tmp_path / "model", tmp_path / "out").code == 0


def typed(name: str, kind: str) -> dict[str, Any]:
    """The options of `write` for a tensor of zeros of a type."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    plain = {"F16": np.float16, "F32": np.float32}.get(kind)
    rows, columns = TENSORS[name]
    values = np.zeros((rows, columns), plain) if plain else np.zeros((rows, columns // block * size), np.uint8)
    return {"tensors": {name: values}, "kinds": None if plain else {name: kind}}
