"""Hostile files by chance: what the fuzzer (fuzzing.py) does to a packed checkpoint, to settings and to texts.

Every mutator takes a random.Random and a folder, changes one file of it, and returns what it did in a few words.
"""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

MARKER = "code-of-the-checkpoint-ran"  # made by the hostile code and pickles below, should anybody run them
WEIGHTS, INDEX, CHECKSUMS, CONFIG = "model.safetensors", "model.safetensors.index.json", "checksums.json", "config.json"

HOSTILE_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 255, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, 1e-30, 1e308, float("nan"),
    float("inf"), -float("inf"), "", "0", "NaN", "ptq161", "../../etc/passwd", "/etc/passwd", "a\nb", "\x1b[2J", "\0",
    "\ud800", "é" * 100, "x" * 5000, [], [[]], [1], ["a", None], {}, {"a": 1}, {"__class__": "x"}, 10**4000, [0] * 2000,
]  # fmt: skip
NUMBERS: list[Callable[[Any], Any]] = [
    lambda n: n + 1, lambda n: n - 1, lambda n: -n, lambda n: n * 2, lambda n: n // 2, lambda n: n * 10**3,
    lambda n: n * 10**9, lambda n: n * 10**15, lambda n: float(n), lambda n: str(n), lambda n: [n],
]  # fmt: skip
RAW_JSON = [
    b"", b" \n", b"{", b"{}", b"[]", b"null", b"7", b'"x"', b"NaN", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 200_000,
    b'{"a":' * 200_000, b"9" * 5000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1e999}', b'{"a": "\xff"}', b"\0" * 64,
]  # fmt: skip
# Fields of config.json that make transformers import code, fetch it, or read another file.
CODE_FIELDS: list[dict[str, Any]] = [
    {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}},
    {"auto_map": {"AutoModelForCausalLM": "stranger/repository--evil.Evil"}, "model_type": "unheard-of"},
    {"attn_implementation": "stranger/kernel"}, {"_attn_implementation": "stranger/kernel"},
    {"_attn_implementation_internal": "stranger/kernel"}, {"experts_implementation": "stranger/kernel"},
    {"transformers_weights": "below/model.safetensors"}, {"transformers_weights": "adapter_model.bin"},
    {"fusion_config": {"rms_norm": "stranger/kernel"}}, {"_name_or_path": "/etc"}, {"architectures": ["evil.Evil"]},
    {"model_type": "auto"}, {"trust_remote_code": True}, {"text_config": {"auto_map": {"AutoConfig": "evil.Evil"}}},
    {"torch_dtype": "os"}, {"dtype": "__import__"}, {"dtype": {"": "float16"}}, {"gguf_file": "x.gguf"},
    {"per_layer_config": {"0": {"hidden_size": 1}}}, {"id2label": {"0": "x" * 1000}}, {"num_labels": 10**9},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e10}},
    {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": "x", "factor": -1}},
    {"rope_scaling": {"type": "linear", "factor": float("nan")}}, {"use_cache": "x"}, {"return_dict": False},
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": 10**6}, {"hidden_size": 2**40}, {"vocab_size": 2**50},
    {"head_dim": 2**40}, {"intermediate_size": 2**62}, {"max_position_embeddings": 2**60},
    {"layer_types": ["x"] * 10**5},
    {"tie_word_embeddings": "no"}, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
]  # fmt: skip
EVIL_CODE = f"open(__file__.rpartition('/')[0] + '/{MARKER}', 'w').close()\nclass Evil: pass\n"


class _Evil:
    """Unpickled, it makes the marker in the current folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (MARKER, "w"))


class _Pairs(dict[str, Any]):
    """An object that json writes with one of its keys twice."""

    def items(self) -> Any:
        pairs = list(super().items())
        return [*pairs, (pairs[0][0], None)] if pairs else pairs


def edit_json(rng: Random, file: Path) -> str:
    """Change one place of a JSON file, found by a walk from the root so that short branches are as likely as long."""
    content = json.loads(file.read_bytes())
    node, path = content, []
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        path.append(key)
        inner = node[key]
        if not (isinstance(inner, dict | list) and inner) or rng.random() < 0.25:
            break
        node = inner
    if not path:
        file.write_text(json.dumps(rng.choice(HOSTILE_VALUES)))
        return "another root"
    said = _edit_node(rng, content, node, path[-1])
    file.write_text(json.dumps(content))
    return f"{'/'.join(map(str, path))}: {said}"


def _edit_node(rng: Random, content: Any, node: Any, key: Any) -> str:
    old = node[key]
    match rng.randrange(6):
        case 0:
            del node[key]
            return "deleted"
        case 1 if isinstance(node, dict):
            node[rng.choice([f"{key}x", key.upper(), "", "model.layers.9.x.weight", "self", "__class__"])] = node.pop(
                key
            )
            return "renamed"
        case 2 if isinstance(old, int | float) and not isinstance(old, bool):
            change = rng.randrange(len(NUMBERS))
            node[key] = NUMBERS[change](old)
            return f"number {str(node[key])[:40]}"
        case 3:
            other = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node[key], node[other] = node[other], old
            return f"exchanged with {other}"
        case 4 if isinstance(node, dict):
            doubled = _Pairs({key: rng.choice([old, *HOSTILE_VALUES]), **node})
            node.clear()
            node["doubled"] = doubled
            return "put one level down, with a key twice"
    node[key] = rng.choice(HOSTILE_VALUES)
    return f"{node[key]!r}"[:40]


def duplicate_key(rng: Random, file: Path) -> str:
    """Repeat one key of the top level, with another value in front of or behind the first."""
    content = json.loads(file.read_bytes())
    key, value = rng.choice(list(content)), rng.choice([v for v in HOSTILE_VALUES if v != 10**4000])
    text = json.dumps(content)
    pair = f"{json.dumps(key)}: {json.dumps(value)}"
    file.write_text(f"{{{pair}, {text[1:]}" if rng.random() < 0.5 else f"{text[:-1]}, {pair}}}")
    return f"{key} twice"


def raw_json(rng: Random, file: Path) -> str:
    """Bytes that no JSON writer makes."""
    content = rng.choice(RAW_JSON)
    file.write_bytes(content)
    return f"holds {content[:20]!r} ({len(content)} bytes)"


def add_fields(rng: Random, file: Path) -> str:
    """Fields that would run code or ask for absurd sizes."""
    content, fields = json.loads(file.read_bytes()), rng.choice(CODE_FIELDS)
    (file.parent / "evil.py").write_text(EVIL_CODE)
    file.write_text(json.dumps(content | fields))
    return f"{fields}"[:80]


def flip_bits(rng: Random, file: Path) -> str:
    """One to eight bits, for safetensors as often in the header as in the data."""
    content = bytearray(file.read_bytes())
    end = len(content)
    if file.suffix == ".safetensors" and rng.random() < 0.5:
        end = min(end, 8 + int.from_bytes(content[:8], "little"))
    places = [rng.randrange(end) for _ in range(rng.choice([1, 1, 1, 8]))]
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"bits flipped at {places}"


def cut(rng: Random, file: Path) -> str:
    """A truncation, an insertion, a removal or an overwriting of some bytes."""
    content = file.read_bytes()
    place, count = rng.randrange(len(content)), rng.choice([1, 2, 8, 100])
    kind = rng.randrange(5)
    changed = [
        content[:place], content[:place] + rng.randbytes(count) + content[place:],
        content[:place] + content[place + count :],
        content[:place] + rng.randbytes(count) + content[place + count :], content + rng.randbytes(count),
    ][kind]  # fmt: skip
    file.write_bytes(changed)
    return f"{['cut', 'inserted', 'removed', 'overwritten', 'appended'][kind]} at {place} ({count})"


def replace_file(rng: Random, file: Path) -> str:
    """Something else in the place of a file: nothing, a link, a pipe, a folder, another file's content."""
    others = sorted(other for other in file.parent.iterdir() if other != file and other.is_file())
    content = file.read_bytes()
    outside = file.parent.parent / "outside"
    file.unlink()
    match kind := rng.randrange(8):
        case 0:
            return "deleted"
        case 1:
            outside.write_bytes(content)
            file.symlink_to(outside)
        case 2:
            file.symlink_to(file)
        case 3:
            os.mkfifo(file)
        case 4:
            file.mkdir()
        case 5:
            file.write_bytes(rng.choice(others).read_bytes())
        case 6:
            file.write_bytes(pickle.dumps(_Evil()))
        case 7:
            file.symlink_to(rng.choice(["/dev/zero", "/etc/hostname", rng.choice(others).name]))
    return f"replaced ({['', 'link outside', 'link to itself', 'pipe', 'folder', 'other', 'pickle', 'link'][kind]})"


def add_file(rng: Random, folder: Path) -> str:
    """A file that does not belong there: adapters, pickles, code."""
    sound = folder / CHECKSUMS if (folder / CHECKSUMS).exists() else folder / CONFIG
    name = rng.choice([
        "adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "model.safetensors",
        "extra.safetensors",
        "training_args.bin", "modeling_evil.py", "custom_generate/generate.py", "chat_template.jinja", "a\nb.json",
        "model.safetensors.index.json", "added_tokens.json", "special_tokens_map.json", "generation_config.json",
        "vocab.json", "merges.txt", "tokenizer.model", "chat_template.json", "processor_config.json",
    ])  # fmt: skip
    content = rng.choice([
        b"", b"{}", b"[]", pickle.dumps(_Evil()), EVIL_CODE.encode(), sound.read_bytes(), rng.randbytes(50),
        b'{"base_model_name_or_path": "stranger/model", "peft_type": "LORA"}',
        b"{% for i in range(10**9) %}{% endfor %}",
        b'{"weight_map": {"a": "../x.safetensors"}}',
    ])  # fmt: skip
    if (folder / name).exists() and not (folder / name).is_file():
        raise OSError("an earlier change left a pipe or a folder there")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return f"added with {content[:20]!r}"


# safetensors


def read_safetensors(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data, as they are."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def write_safetensors(file: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    """Header and data, unchecked."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(rng: Random, file: Path) -> str:
    """One entry of a safetensors header: dtype, shape, offsets, name, or JSON of any kind."""
    header, data = read_safetensors(file)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    begin, end = entry["data_offsets"]
    match kind := rng.randrange(12):
        case 0:
            entry["dtype"] = rng.choice(
                ["U8", "I8", "BOOL", "F16", "BF16", "I16", "F32", "I32", "F64", "F8_E4M3", "F4", "X", 3]
            )
        case 1:
            shape = entry["shape"]
            entry["shape"] = rng.choice([
                shape[::-1], [*shape, 1], [1, *shape], [int(end - begin)], [], [0], [-1], [2**63], [2**32, 2**32],
                [2**62, 0], shape[:-1], [float(n) for n in shape], "32", None,
            ])  # fmt: skip
        case 2:
            entry["data_offsets"] = rng.choice([
                [0, end], [begin, end + 1], [begin - 1, end], [end, begin], [0, 2**62], [-1, end - begin - 1],
                [2**63, 2**64],
                [begin + 8, end + 8], [begin], [begin, end, end], ["0", "1"], None, [float(begin), float(end)],
            ])  # fmt: skip
        case 3:
            entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], entry["data_offsets"]
        case 4:
            header[name], header[other] = header[other], entry
        case 5:
            renamed = [f"{name}x", f"x.{name}", name.upper(), "", "a\nb", f"{name}\0", "lm_head.weight",
            name.replace("weight", "gamma"),
                       name.replace("0", "1"), name.replace("model.", ""), "__metadata__",
                       f"_orig_mod.{name}"]  # fmt: skip
            header[rng.choice(renamed)] = header.pop(name)
        case 6:
            del header[name]
        case 7:
            header[name] = rng.choice(HOSTILE_VALUES)
        case 8:
            header["__metadata__"] = rng.choice([*HOSTILE_VALUES, {"format": "tf"}, {"format": "flax"}, {"format": 3}])
        case 9:
            header[f"{name}.extra"] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}
        case 10:
            text = json.dumps(header)
            twice = json.dumps(header[other])
            write_safetensors(file, f"{text[:-1]}, {json.dumps(name)}: {twice}}}".encode(), data)
            return f"header: {name} twice, as {other}"
        case 11:
            write_safetensors(
                file, rng.choice([b"[" * 100_000, b"null", b'{"a":' * 50_000, b"{}", b"\xff" * 9, b""]), data
            )
            return "another header"
    write_safetensors(file, header, data)
    return f"header kind {kind} of {name} ({other})"


def edit_tensor(rng: Random, file: Path) -> str:
    """The data of one tensor: extremes, zeros, noise, or that of another of its size."""
    header, data = read_safetensors(file)
    entries = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    name = rng.choice(list(entries))
    begin, end = entries[name]
    size = end - begin
    twins = [place for place in entries.values() if place[1] - place[0] == size]
    first, last = rng.choice(twins)
    fills = [
        b"\xff" * size, bytes(size), rng.randbytes(size), (b"\x00\x7c" * size)[:size], (b"\x01\x7e" * size)[:size],
        (b"\xff\x7b" * size)[:size], data[first:last], data[begin:end][::-1],
    ]  # fmt: skip
    kind = rng.randrange(len(fills))
    write_safetensors(file, header, data[:begin] + fills[kind] + data[end:])
    return f"data of {name} filled ({kind})"


def edit_length(rng: Random, file: Path) -> str:
    """The eight bytes in front of a safetensors header."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    wrong = rng.choice([0, 1, length - 1, length + 1, length + 8, len(content), 2**27, 2**32, 2**63, 2**64 - 1])
    file.write_bytes(struct.pack("<Q", wrong) + content[8:])
    return f"header length {wrong}"


def swap_shards(rng: Random, folder: Path) -> str:
    """Two weight files exchanged, one copied over another, or a tensor sent to another file by the index."""
    first, second = rng.sample(sorted(folder.glob("*.safetensors")), 2)
    match kind := rng.randrange(5):
        case 0:
            content = first.read_bytes()
            first.write_bytes(second.read_bytes())
            second.write_bytes(content)
        case 1:
            first.write_bytes(second.read_bytes())
        case 2:
            first.rename(folder / "renamed.safetensors")
        case 3:
            (folder / WEIGHTS).write_bytes(first.read_bytes())
        case 4:
            index = json.loads((folder / INDEX).read_bytes())
            name = rng.choice(list(index["weight_map"]))
            index["weight_map"][name] = rng.choice([
                second.name, first.name, f"../{folder.name}/{first.name}", str(first.absolute()), "none.safetensors",
                f"./{first.name}", "below/x.safetensors", "pytorch_model.bin", "", "..", 3, None, [first.name],
            ])  # fmt: skip
            (folder / INDEX).write_text(json.dumps(index))
    return f"shards, kind {kind}, {first.name} {second.name}"
