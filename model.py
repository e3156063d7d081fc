"""A Llama in one file, decoded with RetroAttention.

Read it from the bottom up: `Llama` is the model, `Block` one layer, `Attention` the part that hands its queries, keys and
values to `retro_attention.py`. `Decoder` is one batch of sequences on its way through prefill and decode steps; `generate`
and `score` are loops over it. `Tokenizer` reads a Llama 3 `tokenizer.model` or Hugging Face's `tokenizer.json`.

Shapes stand at the end of the line that makes the tensor, in these letters: B batch, T tokens, W rows of the retrospective
window (newest last), n_head and n_kv_head heads, hs head size.

The weights keep the names and the RoPE layout of Meta's checkpoints: a rotated pair is two neighbours, (x0, x1), (x2, x3) ...
"""

import base64
import binascii
import json
import math
import pickle
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

import retro_attention
from retro_attention import RetroAttention, RetroConfig, accumulator, apply_rope, row_positions

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer


def _byte_table() -> dict[str, int]:
    """GPT-2's way to write bytes as characters, in tokenizer.json: printable ones as themselves, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_table()


def _token_bytes(token: str) -> bytes:
    return bytes(BYTE_OF[character] for character in token)


class Tokenizer:
    """Byte-level BPE on tiktoken.

    From Llama 3's `tokenizer.model`, a line "<token in base64> <rank>" for each token, with 256 special tokens after them; or
    from the `tokenizer.json` of a Hugging Face folder, with that file's split pattern and special tokens.
    """

    # Llama 3's split of a text into pieces, inside which BPE merges.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    # Llama 3.1's names for the first eleven; the rest are numbered on.
    special_names = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
    ]

    def __init__(
        self,
        ranks: dict[bytes, int],
        special: dict[str, int] | None = None,
        pattern: str = pattern,
        bos: int | None = None,
        stop_tokens: Sequence[int] | None = None,
        normalize: bool = False,
    ):
        """`ranks` of the byte-pair tokens, which are their ids; without `special`, Llama 3's special tokens follow them."""
        if special is None:
            special = {name: len(ranks) + i for i, name in enumerate(self.special_names)}
            bos = special["<|begin_of_text|>"]
            # A generation ends with the text, with a message, or with a turn.
            stop_tokens = [special[s] for s in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
        self.special, self.bos, self.stop_tokens, self.normalize = special, bos, list(stop_tokens or ()), normalize
        self.bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.vocab_size = self.bpe.n_vocab

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> "Tokenizer":
        """Reads `tokenizer.model`, or `tokenizer.json` in a Hugging Face folder. ValueError if it isn't one."""
        return cls._from_json(folder) if _is_hugging_face(folder) else cls._from_ranks(folder)

    @classmethod
    def _from_ranks(cls, folder: str | Path) -> "Tokenizer":
        path = _checkpoint_file(folder, "tokenizer.model")
        ranks = {}
        # Not tiktoken's own loader: it caches by path, and would miss that a file has changed.
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise ValueError(f"{path}: line {number} is not '<base64 token> <rank>': {line[:40]!r}") from None
        if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
            raise ValueError(f"{path}: the ranks must be 0 .. n-1 and the 256 single bytes among the tokens")
        return cls(ranks)

    @classmethod
    def _from_json(cls, folder: str | Path) -> "Tokenizer":
        """A byte-level BPE. tiktoken merges by rank where the file lists merges: the same, as long as the two orders agree."""
        file = _read_json(folder, "tokenizer.json")
        try:
            special = {token["content"]: token["id"] for token in file["added_tokens"]}
            ranks = {_token_bytes(t): i for t, i in file["model"]["vocab"].items() if t not in special}
            split, to_bytes = file["pre_tokenizer"]["pretokenizers"]
            pattern, kind = split["pattern"]["Regex"], (split["type"], to_bytes["type"], to_bytes.get("use_regex"))
            merges = [m if isinstance(m, list) else m.split(" ") for m in file["model"]["merges"]]
            merged = [ranks[_token_bytes(a + b)] for a, b in merges]
            normalizer = (file.get("normalizer") or {}).get("type")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(f"checkpoint {folder}: tokenizer.json is not a byte-level BPE") from None
        if kind != ("Split", "ByteLevel", False) or normalizer not in (None, "NFC") or merged != sorted(merged):
            raise ValueError(f"checkpoint {folder}: tokenizer.json is a BPE of another kind than Llama 3's or Qwen's")
        ids = {}  # of begin and end of text; a generation may end with several
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            if (Path(folder) / name).is_file():
                ids |= {key: value for key, value in _read_json(folder, name).items() if value is not None}
        stops = ids.get("eos_token_id")
        # Qwen names a begin-of-text token but never puts it in front of a text; Llama's post-processor, DeepSeek's options do.
        starts = json.dumps(file.get("post_processor") or {})
        bos = next((name for name, i in special.items() if i == ids.get("bos_token_id")), None)
        bos = special[bos] if bos is not None and (json.dumps(bos) in starts or ids.get("add_bos_token") is True) else None
        stops = stops if isinstance(stops, list) else [stops] * (stops is not None)
        return cls(ranks, special, pattern, bos, stops, normalize=normalizer == "NFC")

    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`; with `bos`, begin_of_text first. Special tokens' names in the text are plain text unless `special`."""
        if self.normalize:
            text = unicodedata.normalize("NFC", text)
        ids = self.bpe.encode(text, allowed_special="all") if special else self.bpe.encode_ordinary(text)
        return [self.bos] * (bos and self.bos is not None) + ids

    def chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of a conversation of (role, text), roles system, user and assistant, up to where the assistant's turn begins.

        In the format whose special tokens there are: DeepSeek-R1's (where the turn begins with <think>), Llama 3's, or ChatML
        (Qwen). A system message is to be the first; none is added. ValueError if the tokenizer has none of the three, or for
        another role.
        """
        special = self.special
        ids = [self.bos] if self.bos is not None else []
        for role, _ in messages:
            if role not in ("system", "user", "assistant"):
                raise ValueError(f"messages must be pairs of a role, system, user or assistant, and a text: not {role!r}")
        if "<｜User｜>" in special:  # before Llama's, whose special tokens the distilled models keep
            marks = {"system": "", "user": "<｜User｜>", "assistant": "<｜Assistant｜>"}
            encode = partial(self.encode, special=True)
            for role, text in messages:
                ids += encode(marks[role])
                if role == "assistant":  # what it thought is not told again
                    ids += self.encode(text.split("</think>")[-1]) + encode("<｜end▁of▁sentence｜>")
                else:
                    ids += self.encode(text)
            return ids + encode("<｜Assistant｜><think>\n")
        if "<|start_header_id|>" in special:
            start, end, turn = (special[name] for name in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
            for role, text in messages:
                ids += [start, *self.encode(role), end, *self.encode("\n\n" + text.strip()), turn]
            return [*ids, start, *self.encode("assistant"), end, *self.encode("\n\n")]
        if "<|im_start|>" in special:
            start, end = special["<|im_start|>"], special["<|im_end|>"]
            for role, text in messages:
                ids += [start, *self.encode(f"{role}\n{text}"), end, *self.encode("\n")]
            return [*ids, start, *self.encode("assistant\n")]
        raise ValueError("the tokenizer has no special tokens for a conversation: neither DeepSeek's, Llama 3's nor ChatML's")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token: a character may be spread over several. An id that only the model has (Qwen's embedding
        table is padded) has none."""
        try:
            return self.bpe.decode_single_token_bytes(token)
        except KeyError:
            return b""


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def _checkpoint_file(folder: str | Path, name: str) -> Path:
    if not Path(folder).is_dir():
        raise ValueError(f"checkpoint {folder}: no such folder")
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"checkpoint {folder}: {name} is missing")
    return path


def _read_json(folder: str | Path, name: str) -> dict:
    path = _checkpoint_file(folder, name)
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: a JSON object was expected, not {type(contents).__name__}")
    return contents


def _is_hugging_face(folder: str | Path) -> bool:
    """Hugging Face's format, unless the folder holds Meta's."""
    return (Path(folder) / "config.json").is_file() and not (Path(folder) / "params.json").is_file()


def _read_pth(folder: str | Path) -> dict[str, torch.Tensor]:
    """Meta's consolidated.00.pth."""
    path = _checkpoint_file(folder, "consolidated.00.pth")
    if (path.parent / "consolidated.01.pth").exists():
        raise ValueError(f"checkpoint {folder}: several consolidated.*.pth: models split over GPUs are not supported")
    try:
        # weights_only: a pickle could run code. mmap: a tensor is read when it is copied: no second model in memory.
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not a readable PyTorch file of weights ({type(error).__name__})") from None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(w, torch.Tensor) and w.is_floating_point() and w.layout == torch.strided
        for name, w in weights.items()
    ):
        raise ValueError(f"{path}: a dictionary of tensors was expected, names to dense floating-point numbers")
    weights.pop("rope.freqs", None)  # in Meta's older files; we compute it
    return weights


SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """One file: the header's length in 8 bytes, the header in JSON, the tensors' bytes, mapped and read when copied."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError(f"{path}: a header of {length} bytes in a file of {size}: truncated, or not safetensors")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {}
            for name, entry in header.items():
                (start, end), shape = entry["data_offsets"], tuple(entry["shape"])
                if not all(isinstance(n, int) and n >= 0 for n in (start, end, *shape)):
                    raise ValueError
                entries[name] = str(entry["dtype"]), shape, start, end
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{path}: the header is not safetensors' JSON") from None
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]
    tensors = {}
    for name, (dtype, shape, start, end) in entries.items():
        if dtype not in SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: {name} has dtype {dtype}: must be one of {', '.join(SAFETENSORS_DTYPES)}")
        dtype = SAFETENSORS_DTYPES[dtype]
        if not start <= end <= len(data) or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name} of shape {shape} lies at bytes {start} to {end} of {len(data)}: truncated?")
        raw = data[start:end]
        tensors[name] = (raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()).view(dtype).view(shape)
    return tensors


def _read_hugging_face(folder: str | Path) -> dict[str, torch.Tensor]:
    """model.safetensors of a folder, or the files that model.safetensors.index.json names, under Meta's names."""
    files, index = ["model.safetensors"], {}
    if (Path(folder) / "model.safetensors.index.json").is_file():
        index = _read_json(folder, "model.safetensors.index.json").get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
            raise ValueError(f"checkpoint {folder}: model.safetensors.index.json has no weight_map")
        files = sorted(set(index.values()))
    weights = {}
    for path in [_checkpoint_file(folder, name) for name in files]:  # all are there before one is read
        weights |= _read_safetensors(path)
    for name in index:
        if name not in weights:
            raise ValueError(f"checkpoint {folder}: the index names {name}, which {index[name]} does not hold")
    return {_meta_name(name): w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}


META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _meta_name(name: str) -> str:
    for theirs, ours in META_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _pair_neighbours(w: torch.Tensor, head_size: int) -> torch.Tensor:
    """Rows of Hugging Face's q or k projection, or its bias, in Meta's order.

    Theirs pairs element i of a head with i + hs / 2, ours with its neighbour. Attention is the same: q and k move together.
    """
    return w.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Model


@dataclass
class LlamaConfig:
    """Shape of a Llama. `ffn_dim` is the inner size of SwiGLU, `max_seq_len` the context in tokens."""

    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    vocab_size: int
    ffn_dim: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: float | None = None  # Llama 3.1's factor (8; in 3.2, 32), None before it
    tie_embeddings: bool = False  # the output head is the embedding table
    head_size: int | None = None  # dim / n_head if None
    qkv_bias: bool = False  # Qwen 2.5

    def __post_init__(self):
        for name in ("dim", "n_layer", "n_head", "n_kv_head", "vocab_size", "ffn_dim", "max_seq_len"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1, not {getattr(self, name)!r}")
        for name in ("norm_eps", "rope_theta") if self.rope_scaling is None else ("norm_eps", "rope_theta", "rope_scaling"):
            if not isinstance(getattr(self, name), (int, float)) or not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number > 0, not {getattr(self, name)!r}")
        if self.head_size is None and self.dim % self.n_head == 0:
            self.head_size = self.dim // self.n_head
        if not isinstance(self.head_size, int) or self.head_size < 2 or self.head_size % 2 or self.n_head % self.n_kv_head:
            raise ValueError(
                f"dim {self.dim} must be an even multiple of n_head {self.n_head} (or head_size given, and even), "
                f"and n_head a multiple of n_kv_head {self.n_kv_head}"
            )

    @classmethod
    def from_params(cls, params: dict, tie_embeddings: bool = False) -> "LlamaConfig":
        """From the keys of Meta's params.json. ValueError names a key that is missing or out of range."""
        for key in ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of"):
            if not isinstance(params.get(key), int) or params[key] < 1:
                raise ValueError(f"params.json: {key} must be an integer >= 1, not {params.get(key, 'missing')!r}")
        multiplier = params.get("ffn_dim_multiplier", 1)
        if not isinstance(multiplier, (int, float)) or not 0 < multiplier < math.inf:
            raise ValueError(f"params.json: ffn_dim_multiplier must be a number > 0, not {multiplier!r}")
        # Meta's rule for SwiGLU: two thirds of 4*dim, times a multiplier, rounded up to a multiple.
        ffn_dim = int(multiplier * int(8 * params["dim"] / 3))
        ffn_dim = math.ceil(ffn_dim / params["multiple_of"]) * params["multiple_of"]
        scaled = params.get("use_scaled_rope", False)
        factor = params.get("rope_scaling_factor")
        if factor is None:  # 3.1's, or that of 3.2, whose models are smaller: their files don't say it
            factor = 8.0 if params["dim"] >= 4096 else 32.0
        return cls(
            dim=params["dim"],
            n_layer=params["n_layers"],
            n_head=params["n_heads"],
            n_kv_head=params.get("n_kv_heads") or params["n_heads"],
            vocab_size=params["vocab_size"],
            ffn_dim=ffn_dim,
            max_seq_len=params.get("max_seq_len", 131_072 if scaled else 8_192),
            norm_eps=params.get("norm_eps", 1e-5),
            rope_theta=params.get("rope_theta", 500_000.0),
            rope_scaling=factor if scaled else None,
            tie_embeddings=tie_embeddings,
        )

    @classmethod
    def from_hugging_face(cls, config: dict) -> "LlamaConfig":
        """From the keys of config.json (Llama, Qwen 2 and 2.5). ValueError names what is missing or not supported."""
        # What we don't do, and the one value of each key that doesn't ask for it.
        for key, wanted in (
            ("hidden_act", "silu"),
            ("use_sliding_window", False),
            ("mlp_bias", False),
            ("attention_bias", False),
            ("dual_chunk_attention_config", None),
        ):
            if config.get(key, wanted) != wanted:
                raise ValueError(f"config.json: {key} {config[key]!r} is not supported: must be {wanted!r}")
        if config.get("quantization_config") is not None:
            raise ValueError("config.json: quantization_config: quantised weights are not supported")
        if config.get("model_type") not in ("llama", "qwen2"):
            raise ValueError(f"config.json: model_type must be llama or qwen2, not {config.get('model_type')!r}")
        needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size", "rms_norm_eps")
        for key in (*needed, "max_position_embeddings"):
            if key not in config:
                raise ValueError(f"config.json: {key} is missing")
        rope_theta, rope_scaling = _read_rope(config)
        return cls(
            dim=config["hidden_size"],
            n_layer=config["num_hidden_layers"],
            n_head=config["num_attention_heads"],
            n_kv_head=config.get("num_key_value_heads") or config["num_attention_heads"],
            vocab_size=config["vocab_size"],
            ffn_dim=config["intermediate_size"],
            max_seq_len=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_embeddings=config.get("tie_word_embeddings", False),
            head_size=config.get("head_dim"),
            qkv_bias=config["model_type"] == "qwen2",
        )


def _read_rope(config: dict) -> tuple[float, float | None]:
    """rope_theta and rope_scaling out of config.json."""
    # rope_theta beside rope_scaling in published checkpoints, rope_parameters as transformers 5 writes them
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope {rope!r} is not supported: must be an object")
    rope = {"rope_theta": config.get("rope_theta"), **rope}
    kind = rope.get("rope_type", rope.get("type", "default"))
    llama3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    if kind not in ("default", "llama3") or kind == "llama3" and any(rope.get(key) != n for key, n in llama3.items()):
        raise ValueError(f"config.json: rope {rope} is not supported: rope_type must be default, or llama3 with {llama3}")
    return rope["rope_theta"], rope.get("factor", 0) if kind == "llama3" else None  # 0 is refused: it must be there


def read_checkpoint(folder: str | Path) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    """A folder's configuration, and its weights as memory maps under Meta's names; q and k as the files have them."""
    if Path(folder).is_dir() and not any((Path(folder) / name).is_file() for name in ("params.json", "config.json")):
        raise ValueError(f"checkpoint {folder}: neither params.json (Meta's format) nor config.json (Hugging Face's) is in it")
    if not _is_hugging_face(folder):
        params, weights = _read_json(folder, "params.json"), _read_pth(folder)
        return LlamaConfig.from_params(params, tie_embeddings="output.weight" not in weights), weights
    config, weights = LlamaConfig.from_hugging_face(_read_json(folder, "config.json")), _read_hugging_face(folder)
    if config.tie_embeddings:
        weights.pop("output.weight", None)  # the embedding table once more, in some files
    return config, weights


def rope_table(config: LlamaConfig, device: torch.device | str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position and pair, (max_seq_len, hs / 2) each; with Llama 3.1's scaling if the config has it.

    In float32, as the published models were trained, unless the model is in float64.
    """
    dtype = accumulator(dtype)
    pairs = torch.arange(0, config.head_size, 2, device=device).to(dtype)
    freqs = 1.0 / config.rope_theta ** (pairs / config.head_size)  # (hs / 2,) radians a token
    if config.rope_scaling is not None:
        # Wavelengths that fit four times into the 8,192 tokens of pre-training stay; those that don't fit once are
        # stretched by the factor; in between, a blend.
        turns = 8192 * freqs / (2 * math.pi)
        keep = ((turns - 1) / (4 - 1)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / config.rope_scaling
    angles = torch.outer(torch.arange(config.max_seq_len, device=device).to(dtype), freqs)  # (max_seq_len, hs / 2)
    return angles.cos(), angles.sin()


@torch.inference_mode(False)  # or a model could no longer be trained afterwards
def side_by_side(*maps: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of linear maps with the same input, one below the other, so that one product does them all.

    The maps' own parameters become views of them: same names, same numbers, no memory.
    """
    joint = []
    for kind in ("weight", "bias"):
        own = [getattr(m, kind) for m in maps]
        joint.append(None if own[0] is None else torch.cat([p.data for p in own]))
        for p, part in zip(own, () if own[0] is None else joint[-1].split([len(p) for p in own]), strict=False):
            p.data = part
    return tuple(joint)


class Attention(nn.Module):
    """Projects to queries, keys and values, and attends; in prefill and decode RetroAttention keeps the cache. `Block` applies
    `wo`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.hs = config.n_head, config.n_kv_head, config.head_size
        self.wq = nn.Linear(config.dim, config.n_head * self.hs, bias=config.qkv_bias)
        self.wk = nn.Linear(config.dim, config.n_kv_head * self.hs, bias=config.qkv_bias)
        self.wv = nn.Linear(config.dim, config.n_kv_head * self.hs, bias=config.qkv_bias)
        self.wo = nn.Linear(config.n_head * self.hs, config.dim, bias=False)
        self.wqkv = None  # side by side, for decode steps

    def forward(self, x, cos, sin, retro: RetroAttention | None = None, t: torch.Tensor | None = None):
        """x (B, T, dim): dense without `retro`; the prompt's prefill with `retro`; a decode step at position `t` with both.

        -> the heads' outputs (B, T, n_head * hs), before `wo`.
        """
        B, T, _ = x.shape  # T is W in a decode step
        maps = (self.wq, self.wk, self.wv)
        if t is None:
            q, k, v = (m(x) for m in maps)
        else:
            q, k, v = F.linear(x, *self.wqkv).split([m.out_features for m in maps], dim=-1)
        q = q.view(B, T, self.n_head, self.hs)
        k = k.view(B, T, self.n_kv_head, self.hs)
        v = v.view(B, T, self.n_kv_head, self.hs)
        if t is not None:
            o = retro.decode(q, k, v, cos, sin, t)  # (B, W, n_head, hs)
        else:
            q, k = apply_rope(q, cos[:T], sin[:T]), apply_rope(k, cos[:T], sin[:T])
            o = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
            ).transpose(1, 2)  # (B, T, n_head, hs)
            if retro is not None:
                retro.prefill(q, k, v)
        return o.reshape(B, T, -1)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w13 = None  # side by side, for decode steps

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each preceded by a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.packed = None  # where the weights lay when they were put side by side

    def forward(self, x, cos, sin, retro=None):
        """(B, T, dim) -> (B, T, dim), dense; with `retro` the prefill of a prompt."""
        x = x + self.attention.wo(self.attention(self.attention_norm(x), cos, sin, retro))
        # A long prompt goes through in pieces, or the feed-forward's inner values would take most of the memory.
        parts = [part + self.feed_forward(self.ffn_norm(part)) for part in x.split(8192, dim=1)]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def step(self, x, cos, sin, retro, t):
        """The same for the W rows of a decode step at position `t`, in few kernels: (B, W, dim) -> x, changed in place."""
        ops, flat = retro.ops, x.flatten(0, 1)  # (B * W, dim)
        o = self.attention(ops.rms_norm(x, self.attention_norm.weight, self.attention_norm.eps), cos, sin, retro, t)
        flat.addmm_(o.flatten(0, 1), self.attention.wo.weight.T)  # a product that adds to what is there
        y = ops.rms_norm(flat, self.ffn_norm.weight, self.ffn_norm.eps)
        y = ops.swiglu(F.linear(y, *self.feed_forward.w13))  # (B * W, ffn_dim)
        flat.addmm_(y, self.feed_forward.w2.weight.T)
        return x

    def pack(self):
        """Readies the layer for decode steps; again where the weights have been moved, cast or replaced since."""
        a, f = self.attention, self.feed_forward
        qkv, halves = (a.wq, a.wk, a.wv), (f.w1, f.w3)
        places = lambda: [p.data_ptr() for m in qkv + halves for p in m.parameters()]  # noqa: E731
        if self.packed != places():
            a.wqkv, f.w13 = side_by_side(*qkv), side_by_side(*halves)
            self.packed = places()


class Llama(nn.Module):
    """Decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.set_rope()

    def set_rope(self):
        """Tables of cos and sin on the device and for the dtype of the weights: call it after moving or casting the model."""
        weight = self.norm.weight
        self.rope = rope_table(self.config, weight.device, weight.dtype)

    def hidden(self, idx, cos, sin, retro=None, t=None):
        """(B, T) ids -> (B, T, dim) before the final norm. With `retro`, a list of one RetroAttention a layer, it is a prompt's
        prefill; with `t` as well, a decode step, whose W rows end at position t."""
        x = self.tok_embeddings(idx)  # (B, T, dim)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, retro and retro[i]) if t is None else layer.step(x, cos, sin, retro[i], t)
        return x

    def logits(self, x):
        """(..., dim) -> (..., vocab)."""
        head = self.tok_embeddings if self.config.tie_embeddings else self.output
        return F.linear(self.norm(x), head.weight)  # (..., vocab)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """(B, T) ids -> (B, T, vocab) logits: dense, no cache, differentiable."""
        if not 1 <= idx.shape[1] <= self.config.max_seq_len:
            raise ValueError(f"{idx.shape[1]} tokens: must be between 1 and the context of {self.config.max_seq_len}")
        return self.logits(self.hidden(idx, *self.rope))

    @classmethod
    @torch.inference_mode(False)  # a tensor made in inference mode could not be laid side by side with others later
    def from_checkpoint(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_seq_len: int | None = None,
    ) -> "Llama":
        """Loads Meta's format (`params.json`, `consolidated.00.pth`) or Hugging Face's (`config.json`, `*.safetensors`).

        `max_seq_len` replaces the checkpoint's context. Strict: ValueError names what is missing, foreign or misshapen.
        """
        config, weights = read_checkpoint(folder)
        if max_seq_len is not None:
            config = replace(config, max_seq_len=max_seq_len)
        with torch.device("meta"):  # no memory and no random numbers for weights that are overwritten
            model = cls(config)
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        found = {name: tuple(w.shape) for name, w in weights.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(
                    f"checkpoint {folder}: {name} should have shape {expected.get(name, 'none: unknown name')}, "
                    f"the file has {found.get(name, 'no such tensor')}"
                )
        model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        parameters, theirs = dict(model.named_parameters()), _is_hugging_face(folder)
        for name in list(weights):  # in the files' order, dropping each: a file's memory map goes with its last tensor
            w = weights.pop(name)
            if theirs and name.endswith(("wq.weight", "wk.weight", "wq.bias", "wk.bias")):
                w = _pair_neighbours(w, config.head_size)
            parameters[name].copy_(w)
        model.set_rope()
        return model

    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        retro: RetroConfig | None = RetroConfig(),
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_tokens: Sequence[int] = (),
    ) -> torch.Tensor:
        """Continues (B, T) ids by up to `max_new_tokens` -> (B, T + n); `retro=None` attends densely, temperature 0 is greedy.

        n is less where the context ends or every sequence has met a stop token; one that ended before the others is filled
        with the first of `stop_tokens`. Same seed, same text. ValueError names a value that is out of range.
        """
        B, T = idx.shape
        decoder = Decoder(self, B, retro, max_seq_len=min(T + max(1, max_new_tokens), self.config.max_seq_len))
        new = decoder.stream(idx, max_new_tokens, temperature, top_k, top_p, seed, stop_tokens)
        return torch.cat([idx, torch.stack(list(new), dim=1)], dim=1)

    def score(self, idx: torch.Tensor, prompt_len: int, retro: RetroConfig | None = RetroConfig()) -> torch.Tensor:
        """Log-probabilities of tokens prompt_len .. T-1 of (B, T) ids, fed one by one through the decode path.

        -> (B, T - prompt_len) float32. ValueError unless 1 <= prompt_len < T.
        """
        B, T = idx.shape
        if not 1 <= prompt_len < T:
            raise ValueError(f"prompt_len must be between 1 and {T - 1}, not {prompt_len}")
        decoder = Decoder(self, B, retro, max_seq_len=T)
        logits, logps = decoder.prefill(idx[:, :prompt_len]), []
        for i in range(prompt_len, T):
            logps.append(logits.float().log_softmax(dim=-1).gather(1, idx[:, i, None]))  # (B, 1)
            if i < T - 1:
                logits = decoder.step(idx[:, i])
        return torch.cat(logps, dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


class Decoder:
    """One batch of sequences on its way: token ids, the position of the newest, and each layer's RetroAttention.

    `prefill` a prompt, then `step` with each next token; both return the logits of the token that follows. Without a prompt the
    first step is the text's first token. The model's weights must stay where they are while a decoder lives; their GPU becomes
    the current one.
    """

    def __init__(self, model: Llama, batch_size: int, retro: RetroConfig | None = None, max_seq_len: int | None = None):
        config, weight = model.config, model.norm.weight
        if max_seq_len is None:
            max_seq_len = config.max_seq_len
        if not 1 <= max_seq_len <= config.max_seq_len:
            raise ValueError(f"max_seq_len must be between 1 and the context of {config.max_seq_len}, not {max_seq_len}")
        if retro is None:
            retro = RetroConfig(window=1, dense_layers=config.n_layer)
        if retro.dense_layers > config.n_layer:
            raise ValueError(
                f"dense_layers must be between 0 and the model's {config.n_layer} layers, not {retro.dense_layers}"
            )
        if weight.is_cuda:
            torch.cuda.set_device(weight.device)  # Triton launches on the current device
        self.model, self.retro, self.max_seq_len = model, retro, max_seq_len
        for layer in model.layers:
            layer.pack()
        self.layers = [
            RetroAttention(
                retro,
                dense=i < retro.dense_layers,
                batch_size=batch_size,
                n_head=config.n_head,
                n_kv_head=config.n_kv_head,
                head_size=config.head_size,
                max_seq_len=max_seq_len,
                device=weight.device,
                dtype=weight.dtype,
            )
            for i in range(config.n_layer)
        ]
        self.tokens = torch.zeros(batch_size, max_seq_len, dtype=torch.long, device=weight.device)  # (B, max_seq_len)
        self.t = torch.full((), -1, dtype=torch.long, device=weight.device)  # position of the newest token ...
        self.position = -1  # ... and the same number on the host
        # On a GPU a step is hundreds of small kernels. As a CUDA graph they are launched at once; its input is `token`, its
        # output `logits`. The reference reads the position while it runs, so it cannot be captured.
        self.captures = weight.is_cuda and all(layer.ops is not retro_attention for layer in self.layers)
        self.graph, self.compiled = None, False
        self.token = torch.zeros(batch_size, dtype=torch.long, device=weight.device)  # (B,) the newest token
        self.logits = None  # (B, vocab)

    @torch.inference_mode()
    def prefill(self, idx: torch.Tensor) -> torch.Tensor:
        """(B, T) prompt -> (B, vocab). ValueError if it is empty, longer than the context, or another number of texts, or if
        the logits are not finite."""
        T = idx.shape[1]
        if len(idx) != len(self.tokens):
            raise ValueError(f"the prompt has {len(idx)} texts: must be {len(self.tokens)}, as the decoder was made for")
        if not 1 <= T <= self.max_seq_len:
            raise ValueError(f"the prompt has {T} tokens: must be between 1 and the context of {self.max_seq_len}")
        self.tokens[:, :T] = idx
        self.t.fill_(T - 1)
        self.position = T - 1
        x = self.model.hidden(idx, *self.model.rope, self.layers)  # (B, T, dim)
        logits = self.model.logits(x[:, -1])
        if not logits.isfinite().all():
            raise ValueError(f"the model's logits are not finite: its weights are broken, or too large for {logits.dtype}")
        return logits

    @torch.inference_mode()
    def step(self, token: torch.Tensor) -> torch.Tensor:
        """(B,) the token that follows the newest -> (B, vocab). IndexError past the end of the cache."""
        if self.position + 1 >= self.max_seq_len:
            raise IndexError(f"position {self.position + 1} is past the end of the cache of {self.max_seq_len} tokens")
        assert token.shape == self.token.shape, f"one token a sequence: {tuple(self.token.shape)}, not {tuple(token.shape)}"
        self.token.copy_(token)
        self.position += 1
        watched = any(layer.hook is not None for layer in self.layers)  # a hook runs on the host
        if not self.captures or watched or not self.compiled:
            self.compiled = True  # the first step compiles the kernels, which a capture cannot do
            return self._step()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._step()
        self.graph.replay()
        return self.logits.clone()  # the next replay overwrites them

    def _step(self) -> torch.Tensor:
        """Through Triton nothing in here waits for the device, and no shape depends on the position."""
        W = self.retro.window
        self.t += 1
        self.tokens.index_copy_(1, self.t.view(1), self.token[:, None])
        # The past rows start from their token ids again. Before the text starts there are none: any id will do.
        rows = row_positions(self.t, W).clamp(min=0)  # (W,)
        x = self.model.hidden(self.tokens[:, rows], *self.model.rope, self.layers, self.t)  # (B, W, dim)
        return self.model.logits(x[:, -1])

    def stream(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_tokens: Sequence[int] = (),
    ) -> Iterator[torch.Tensor]:
        """An iterator over the (B,) next tokens; arguments and errors as in `Llama.generate`."""
        if not 1 <= idx.shape[1] < self.max_seq_len:
            raise ValueError(
                f"the prompt has {idx.shape[1]} tokens: must be between 1 and {self.max_seq_len - 1}, one less than the context"
            )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, not {max_new_tokens}")
        if not (temperature == 0 or 1e-6 <= temperature < math.inf):  # below, logits / temperature overflow
            raise ValueError(f"temperature must be 0 or a finite number >= 1e-6, not {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be >= 1, not {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {top_p}")
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2**63 - 1, not {seed}")
        generator = torch.Generator(device=idx.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        sample = partial(sample_token, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        # The checks are above and the loop is apart, so that a mistake shows at the call and not at the first token.
        return self._stream(idx, min(max_new_tokens, self.max_seq_len - idx.shape[1]), sample, stop_tokens)

    def _stream(self, idx, n, sample, stop_tokens):
        stops = torch.tensor(stop_tokens, dtype=torch.long, device=idx.device)
        ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)  # (B,)
        token = None
        for _ in range(n):
            token = sample(self.prefill(idx) if token is None else self.step(token))  # (B,)
            if len(stops):
                token = torch.where(ended, stops[0], token)
                ended |= torch.isin(token, stops)
            yield token
            if len(stops) and ended.all():
                return


def sample_token(logits, temperature, top_k, top_p, generator) -> torch.Tensor:
    """(B, vocab) logits -> (B,) ids; temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, ids = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)  # (B, vocab), likeliest first
    if top_k is not None:
        probs[:, top_k:] = 0
    if top_p is not None:
        # The smallest set of likeliest tokens that holds top_p: a token stays if those before it hold less.
        probs[:, 1:][(probs.cumsum(dim=-1) - probs >= top_p)[:, 1:]] = 0
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator)).squeeze(1)
