"""Ways to damage files, each drawn from a seeded random: bytes of any file, values of JSON, headers, archives and pickles."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import xxhash

WORDS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 64, 10**6, 2**31, 2**63, 10**99, -(10**99), 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        "",
        "x",
        "float16",
        "bfloat16",
        "float32",
        "\x1b[31m\n",
        "../../x",
        "/etc/passwd",
        "\ud800",
        "[/b]",
        "a" * 5_000,
        "16",
        "None",
    ),
)
NESTED: tuple[Any, ...] = ([], {}, [[]], [None], [1, 2], {"": {}}, {"a": [{}]}, [float("nan")], ["re:("], [[[[[]]]]])
# Keys that configurations may have, and values that some of them take.
KEYS = (
    "tie_word_embeddings",
    "head_dim",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "dtype",
)
KEYS += ("num_local_experts", "quantization_config", "architectures", "partial_rotary_factor", "layer_types", "text_config", "sym")
KEYS += (
    "bits",
    "group_size",
    "desc_act",
    "modules_to_not_convert",
    "ignore",
    "config_groups",
    "rope_theta",
    "use_cache",
    "weight_map",
)
PLAUSIBLE: tuple[Any, ...] = (
    {"rope_type": "linear", "factor": 2.0},
    {"type": "dynamic", "factor": 2.0},
    {"rope_type": "default"},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_theta": 5000.0},
    ["MistralForCausalLM"],
    ["Qwen2ForCausalLM"],
    ["LlamaForCausalLM", "x"],
    ["lm_head"],
    {"quant_method": "gptq", "bits": 4, "group_size": 64},
    *(8, 16, 32, 128, 500000, 1e-4),
)
DEEP = "[" * 3_000 + "]" * 3_000
CANARY = "CANARY"  # made by whatever runs the code of a pickle


def mutated_bytes(data: bytes, random: Random, head: int = 0) -> bytes:
    """One to three changes; most are in the first or last `head` bytes, where a file says what it is."""
    for _ in range(random.choice((1, 1, 2, 3))):
        data = _mutated_once(data, random, min(head, len(data)))
    return data


def _mutated_once(data: bytes, random: Random, head: int) -> bytes:
    at = random.randrange(len(data) + 1)
    if head and random.random() < 0.8:
        at = random.choice((random.randrange(head), len(data) - 1 - random.randrange(head)))
    count = random.choice((1, 1, 2, 4, 8, 32, 1000))
    change = random.randrange(10)
    if change == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
    if change == 1:
        return data[:at] + random.randbytes(count) + data[at + count :]
    if change == 2:
        return data[:at] + random.randbytes(count) + data[at:]
    if change == 3:
        return data[:at] + data[at + count :]
    if change == 4:
        return data[:at]
    if change == 5:
        return data[:at] + data[at : at + count] * 2 + data[at + count :]
    if change == 6:
        return data[:at] + bytes(len(data[at : at + count])) + data[at + count :]
    if change == 7:
        other = random.randrange(len(data) + 1)
        return data[:at] + data[other : other + count] + data[at + count :]
    if change == 8:
        return data + random.choice((bytes(count), data[:count], random.randbytes(count)))
    form, word = random.choice(("<B", "<H", "<I", "<Q", ">I")), random.choice(WORDS)
    packed = struct.pack(form, word % (1 << 8 * struct.calcsize(form)))
    return data[:at] + packed + data[at + len(packed) :]


def mutated_value(value: Any, random: Random) -> Any:
    """A JSON value with one node of it changed, taken away, renamed, doubled or exchanged."""
    value = json.loads(json.dumps(value))
    nodes = [(value, key) for key in _keys(value)]
    for holder, key in nodes:
        nodes += [(holder[key], inner) for inner in _keys(holder[key])]
    if not nodes:
        return random.choice((*SCALARS, *NESTED))
    # Those of the top first: a header has thousands of nodes below.
    holder, key = random.choice(nodes)
    old, change = holder[key], random.randrange(10)
    number = isinstance(old, int | float) and not isinstance(old, bool)
    if change <= 1 and number:
        holder[key] = random.choice((old + 1, old - 1, old * 2, -old, old // 2, old + random.randrange(1000), float(old), str(old)))
    elif change == 2:
        del holder[key]
    elif change == 3 and isinstance(holder, dict):
        holder[random.choice((key.upper(), f"{key}x", key[1:], "\x1b[2J", "x" * 3_000))] = holder.pop(key)
    elif change == 4:
        other, there = random.choice(nodes)
        if there in (other if isinstance(other, dict) else range(len(other))):
            holder[key], other[there] = json.loads(json.dumps(other[there])), json.loads(json.dumps(old))
    elif change == 5:
        holder[key] = random.choice(NESTED)
    elif change == 6 and isinstance(holder, list):
        holder.append(old)
    elif change == 7:
        holder[key] = random.choice(PLAUSIBLE)
    elif change >= 8 and isinstance(value, dict):
        (holder if isinstance(holder, dict) else value)[random.choice(KEYS)] = random.choice(
            (*SCALARS, *NESTED, *PLAUSIBLE, *PLAUSIBLE)
        )
    else:
        holder[key] = random.choice(SCALARS)
    return value


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []


def mutated_json(data: bytes, random: Random) -> bytes:
    """The text of a JSON file with values changed, or bytes, or more than any file has."""
    change = random.randrange(12)
    if change == 0:
        return mutated_bytes(data, random)
    if change == 1:
        return random.choice((b"", b"\0" * 100, b"[]", b"null", b"{", DEEP.encode(), b'{"a":' * 200, b"9" * 500, b"\xff\xfe{}"))
    text = data.decode()
    if change == 2:  # a key twice: the last counts for a reader that takes both
        return (
            text.rstrip()[:-1] + f', "{random.choice(list(json.loads(text)))}": {json.dumps(random.choice(SCALARS))}' + "}"
        ).encode()
    value = json.loads(text)
    for _ in range(random.choice((1, 1, 1, 2))):
        value = mutated_value(value, random)
    return json.dumps(value).encode()


def mutated_safetensors(data: bytes, random: Random) -> bytes:
    """A file with its bytes changed, its length of the header, or its header's values, with the length that belongs to these."""
    length = int.from_bytes(data[:8], "little")
    change = random.randrange(6)
    if change >= 4:
        header = json.dumps(_exchanged(json.loads(data[8 : 8 + length]), random)).encode()
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    if change == 0:
        return mutated_bytes(data, random, head=8 + length)
    if change == 1:
        word = random.choice((length + 1, length - 1, length * 2, 0, *WORDS))
        return struct.pack("<Q", word % 2**64) + data[8:]
    header = mutated_json(data[8 : 8 + length], random)
    header += b" " * random.choice((0, -len(header) % 8, 1))
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _exchanged(header: dict[str, Any], random: Random) -> dict[str, Any]:
    """A header that is sound in itself: a tensor of another type or shape, or two that have changed places, names or types."""
    names = [name for name in header if name != "__metadata__"]
    one, change = random.choice(names), random.randrange(5)
    alike = [name for name in names if header[name]["shape"] == header[one]["shape"] and name != one]
    other = random.choice(alike or names)
    if change == 0:
        header[one]["dtype"] = random.choice(("BF16", "F16", "I16", "U16", "F32", "F8_E4M3", "BOOL", "F4", "C64", "f16"))
    elif change == 1:
        header[one]["shape"] = random.choice((header[one]["shape"][::-1], [1, *header[one]["shape"]], [-1], [2**40, 2**40], []))
    elif change == 2:
        header[one], header[other] = header[other], header[one]
    elif change == 3:
        header[one]["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], header[one]["data_offsets"]
    else:
        for name in names:
            header[name]["dtype"] = "BF16"
    return header


def mutated_archive(data: bytes, random: Random) -> bytes:
    """A zip archive of torch.save with its bytes changed, its pickle, or its records' names, sizes and order."""
    change = random.randrange(5)
    if change == 0:
        return mutated_bytes(data, random, head=2000)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (index,) = (name for name in records if name.endswith("data.pkl"))
    kind = zipfile.ZIP_STORED
    if change == 1:
        records[index] = random.choice(hostile_pickles())
    elif change == 2:
        name = random.choice(list(records))
        move = random.randrange(5)
        if move == 0:
            del records[name]
        elif move == 1:
            records[random.choice((f"../{name}", f"/{name}", f"{name}x", "archive/code/x.py", "constants.pkl"))] = records.pop(name)
        elif move == 2:
            records[name] = records[name][: len(records[name]) // 2]
        elif move == 3:
            other = random.choice(list(records))
            records[name], records[other] = records[other], records[name]
        else:
            kind = zipfile.ZIP_DEFLATED
    else:
        records[index] = mutated_pickle(records[index], random)
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w", kind) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return result.getvalue()


def mutated_legacy(data: bytes, random: Random) -> bytes:
    """A file of PyTorch before 1.6 with its bytes changed, most of them in its pickles, or another pickle in their place."""
    if random.random() < 0.15:
        return random.choice(hostile_pickles()) + data
    return mutated_bytes(data, random, head=4000)


def mutated_pickle(data: bytes, random: Random) -> bytes:
    """A pickle with bytes changed, one of its names or numbers, or code put before its end."""
    change = random.randrange(6)
    if change == 0:
        return data[:-1] + random.choice(hostile_pickles())[2:-1] + random.choice((b"0", b"")) + b"."
    if change == 1:
        names = (
            b"torch\nHalfStorage",
            b"torch\nFloatStorage",
            b"torch\nBFloat16Storage",
            b"collections\nOrderedDict",
            b"posix\nsystem",
        )
        return data.replace(random.choice(names[:4]), random.choice(names))
    if change == 2:
        return data.replace(
            random.choice((b"weight", b"q_proj", b"layers", b"storage", b"cpu")), random.choice((b"weighs", b"k_proj", b"cuda:0"))
        )
    return mutated_bytes(data, random)


class _Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def hostile_pickles() -> list[bytes]:
    """Pickles that make the canary in the current directory when they are loaded by Python, or take its memory or its time."""
    import os

    calls = [
        _Call(os.system, f"touch {CANARY}"),
        _Call(exec, f"open('{CANARY}', 'w')"),
        _Call(open, CANARY, "w"),
        _Call(os.mkdir, CANARY),
    ]
    made = [pickle.dumps({"model.norm.weight": call}, protocol) for call in calls for protocol in (2, 4)]
    nested = b"\x80\x02}" + b"(" * 100 + b")" + b"\x85" * 90 + b"K\x01s."
    return [
        *made,
        b"\x80\x02cos\nsystem\n(X\x0c\x00\x00\x00touch CANARYtR.",
        b"(S'touch CANARY'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch CANARY'\no.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.",
        b"\x80\x02\x8b" + struct.pack("<I", 2**31 - 1) + b"\xff.",
        b"\x80\x02]" + b"(]" * 3_000 + b"e" * 3_000 + b".",
        nested,
    ]


def mutated_gguf(data: bytes, random: Random, header: int) -> bytes:
    """A GGUF file with its bytes changed, most of them in its header, or a number there."""
    if random.random() < 0.5:
        at, (form, size) = random.randrange(4, header), random.choice((("<I", 4), ("<Q", 8)))
        old = struct.unpack_from(form, data.ljust(at + 8, b"\0"), at)[0]
        word = random.choice((old + 1, old - 1, old * 2, old + 32, *WORDS)) % (1 << 8 * size)
        return data[:at] + struct.pack(form, word) + data[at + size :]
    changed = mutated_bytes(data[:header], random) if random.random() < 0.7 else data[:header]
    return changed + data[header:] if changed != data[:header] else mutated_bytes(data, random, head=header)


def mutated_journal(data: bytes, random: Random) -> bytes:
    """A journal with its bytes changed, or with lines that have the right checksum and say nothing sensible.

    None claims work that was not done: whoever writes right lines in an output's directory can write its ranks, too.
    """
    if random.random() < 0.6:
        return mutated_bytes(data, random)
    lines = data.splitlines()
    number = random.randrange(len(lines))
    value = json.loads(lines[number].partition(b" ")[2])
    key = random.choice(list(value))
    if random.random() < 0.3:
        del value[key]
    else:
        value[key] = random.choice((*SCALARS, *NESTED[:5], ["x"], [-1], [[1]], [["x", 0, 0, 0]], [[0, 0, 0]], [[99, 0, 1, "x"]]))
    text = random.choice((json.dumps(value), json.dumps(value), DEEP, json.dumps([value]))).encode()
    lines[number] = xxhash.xxh3_64_hexdigest(text).encode() + b" " + text
    return b"\n".join(lines) + b"\n"


def mutated_toml(data: bytes, random: Random) -> bytes:
    """A job file with bytes, words or lines of it changed."""
    lines = data.decode().splitlines()
    number, change = random.randrange(len(lines)), random.randrange(6)
    key = lines[number].partition(" = ")[0]
    values = (
        "0",
        "-1",
        "3",
        "1e400",
        "nan",
        "[]",
        "{}",
        '""',
        '"x"',
        "true",
        "9" * 200,
        "1979-05-27",
        "[[[[1]]]]",
        '"\\u001b[2J"',
        "[" * 200 + "]" * 200,
    )
    if change == 0:
        return mutated_bytes(data, random)
    if change == 1:
        lines.append(random.choice(lines))
    elif change == 2:
        del lines[number]
    elif change == 3:
        lines.append(f"{'.'.join('a' * random.choice((2, 100, 5_000)))} = 1")
    elif change == 4:
        names = ("tp_size", "dtype", "quantization", "workers", "memory_limit", "engine", "target", "x")
        lines.append(f"{random.choice(names)} = {random.choice(values)}")
    else:
        lines[number] = f"{key} = {random.choice(values)}"
    return "\n".join(lines).encode()
