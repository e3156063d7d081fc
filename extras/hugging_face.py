"""Hugging Face folders of Llama, Qwen 2, 2.5 and 3: configuration, weights and tokenizer.

`model.py` imports this file if a checkpoint's folder has a `config.json`. Nothing here imports
`model.py`: `read_checkpoint` returns plain dictionaries. It needs transformers and safetensors:
pip install -e '.[hf]'

Two things differ from Meta's format. The tensors have other names (`META_NAMES`). And RoPE rotates
element i of a head together with element i + hs / 2, while Meta pairs neighbours: the rows of the
q and k projections are reordered here (`pair_neighbours`).
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from model import check_message
from retro_attention import need


def read_checkpoint(folder: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Arguments of `model.LlamaConfig`, and the weights as `model.Llama.from_weights` takes them:
    Meta's names, Meta's order of RoPE pairs. All but the reordered tensors are memory maps.

    Raises ValueError if a file is missing or broken, or a feature is not supported.
    """
    config = read_config(folder)
    weights = read_safetensors(folder)
    if "output.weight" in weights:
        # A head in the files is used, whatever config.json says, as in transformers.
        config["tie_embeddings"] = False
    hs = config["head_size"]
    for name, w in weights.items():
        if re.search(r"\.(wq|wk|q_norm|k_norm)\.(weight|bias)$", name):  # has RoPE pairs
            fits = w.ndim > 0 and len(w) % hs == 0
            shape = tuple(w.shape)
            need(fits, f"checkpoint {folder}: {name} must have n * {hs} rows, not {shape}")
            weights[name] = pair_neighbours(w, hs)
    return config, weights


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turns any error inside into a ValueError that starts with `what`; broken files raise
    anything, even Rust panics, which are no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what}: {reason[:300]}") from None


def from_pretrained(kind: str, folder: str | Path):
    """transformers' AutoConfig, AutoTokenizer or GenerationConfig of a folder.

    Raises ValueError if transformers is missing or too old, or cannot read the folder.
    """
    try:
        import transformers  # safetensors comes with it
    except ImportError:
        reason = "Hugging Face's format needs more packages: pip install -e '.[hf]'"
        raise ValueError(f"checkpoint {folder}: {reason}") from None
    version = transformers.__version__
    need(int(version.split(".")[0]) >= 5, f"transformers must be 5 or newer, not {version}")
    transformers.logging.set_verbosity_error()
    load = getattr(transformers, kind).from_pretrained
    with one_line(f"checkpoint {folder}: {kind} cannot be read"):
        # Without a value for trust_remote_code, transformers asks on stdin whether it may run the
        # folder's own Python code.
        return load(folder, local_files_only=True, trust_remote_code=False)


# --------------------------------------------------------------------------------------------------
# Configuration

# Unsupported features: each key of config.json with the value that turns it off. transformers reads
# some of them for every model, though the configurations of Llama and Qwen don't list them.
TURNED_OFF = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,
    "is_causal": True,
    "is_encoder_decoder": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "attention_chunk_size": None,
    "dual_chunk_attention_config": None,
    "kv_sharing_modes": None,
    "per_layer_config": None,
    "quantization_config": None,
    "transformers_weights": None,  # other files than model.safetensors
}
# The only form of Llama 3.1's scaling that `model.rope_table` computes, with any factor.
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}


def read_config(folder: str | Path) -> dict:
    """Arguments of `model.LlamaConfig` from config.json.

    Raises ValueError if the model needs an unsupported feature.
    """
    config = from_pretrained("AutoConfig", folder).to_dict()
    kind = config["model_type"]
    known = kind in ("llama", "qwen2", "qwen3")
    need(known, f"checkpoint {folder}: model_type must be llama, qwen2 or qwen3, not {kind!r}")
    for key, off in TURNED_OFF.items():
        x = config.get(key, off)
        need(x == off, f"checkpoint {folder}: {key} {x!r} is not supported: must be {off!r}")
    for x in config.get("layer_types") or ():
        full = x == "full_attention"
        need(
            full, f"checkpoint {folder}: layer_types {x!r} is not supported: must be full_attention"
        )
    theta, factor = read_rope(folder, config["rope_parameters"])
    hs = config.get("head_dim")
    if hs is None:
        hs = config["hidden_size"] // config["num_attention_heads"]
    even = isinstance(hs, int) and hs >= 2 and hs % 2 == 0
    need(even, f"checkpoint {folder}: head_dim must be an even integer >= 2, not {hs!r}")
    return {
        "dim": config["hidden_size"],
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_kv_head": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
        "ffn_dim": config["intermediate_size"],
        "max_seq_len": config["max_position_embeddings"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": theta,
        "rope_scaling": factor,
        "tie_embeddings": config["tie_word_embeddings"],
        "head_size": hs,
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
    }


def read_rope(folder: str | Path, parameters: dict) -> tuple[float | None, float | None]:
    """RoPE's base, and the factor of Llama 3.1's scaling or None. Raises ValueError if the
    parameters ask for another scaling."""
    rest = dict(parameters)
    rest.pop("type", None)  # the older name of rope_type
    theta = rest.pop("rope_theta", None)
    factor = None
    if rest.get("rope_type") == "llama3":
        factor = rest.pop("factor", None) or 0  # a missing factor becomes 0: refused later
    known = rest in ({"rope_type": "default"}, LLAMA3)
    need(known, f"checkpoint {folder}: rope_parameters {parameters} are not supported")
    return theta, factor


# --------------------------------------------------------------------------------------------------
# Weights

META_NAMES = {
    "model.": "",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "self_attn": "attention",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "mlp": "feed_forward",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def meta_name(name: str) -> str:
    for theirs, metas in META_NAMES.items():
        name = name.replace(theirs, metas)
    return name


def read_safetensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of model.safetensors, or of the files that model.safetensors.index.json names,
    as memory maps under Meta's names. Raises ValueError if a file is missing or broken."""
    from safetensors.torch import load_file

    weights = {}
    for path in safetensors_files(folder):
        with one_line(f"{path}: not readable as safetensors"):
            found = load_file(path)
        twice = sorted(found.keys() & weights.keys())
        also = f"is in {path.name} and in another file that the index names"
        need(not twice, f"checkpoint {folder}: {twice[:1]} {also}")
        weights |= found
    # Older files hold RoPE's frequencies, which we compute.
    kept = [name for name in weights if not name.endswith("rotary_emb.inv_freq")]
    return {meta_name(name): weights[name] for name in kept}


def safetensors_files(folder: str | Path) -> list[Path]:
    """The files that hold the weights. Raises ValueError unless all of them exist."""
    paths = [Path(folder) / "model.safetensors"]
    index = Path(folder) / "model.safetensors.index.json"
    if index.is_file():
        data = index.read_bytes()
        with one_line(f"{index}: must be JSON with a weight_map of file names"):
            names = sorted(set(json.loads(data.decode("utf-8-sig"))["weight_map"].values()))
            paths = [Path(folder) / name for name in names]
    for path in paths:
        need(path.is_file(), f"checkpoint {folder}: {path.name} is missing")
    return paths


def pair_neighbours(w: torch.Tensor, head_size: int) -> torch.Tensor:
    """The rows of a q or k projection, its bias, or its heads' norm, in Meta's order.

    w (heads * hs, ...): in each head, row i + hs / 2 moves next to row i. Attention stays the same
    because q and k are reordered alike.
    """
    return w.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


# --------------------------------------------------------------------------------------------------
# Tokenizer

# For a checkpoint that has ChatML's tokens and no template. (Jinja drops a newline at the end.)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant{{ '\n' }}"
)


class Tokenizer:
    """transformers' tokenizer of a folder, and its chat template, with the methods of
    `model.Tokenizer`."""

    def __init__(self, folder: str | Path):
        """Raises ValueError if the folder's files cannot be read."""
        self.folder = folder
        self.tokenizer = from_pretrained("AutoTokenizer", folder)
        if self.tokenizer.chat_template is None and "<|im_end|>" in self.tokenizer.get_vocab():
            self.tokenizer.chat_template = CHATML
        self.bos = next(iter(self.encode("", bos=True)), None)
        self.stop_tokens = self.find_stop_tokens()

    def find_stop_tokens(self) -> list[int]:
        """Every id that one of the folder's files names as the end of a text or of a turn."""
        ends = [self.tokenizer.eos_token_id, *self.end_of_turn()]
        files = {"AutoConfig": "config.json", "GenerationConfig": "generation_config.json"}
        for kind, file in files.items():
            if (Path(self.folder) / file).is_file():
                end = from_pretrained(kind, self.folder).eos_token_id
                ends += end if isinstance(end, list) else [end]
        ends = [end for end in ends if end is not None]
        for end in ends:
            fits = type(end) is int and 0 <= end < 2**63
            reason = f"eos_token_id must be an id or a list of ids, not {end!r}"
            need(fits, f"checkpoint {self.folder}: {reason}")
        return sorted(set(ends))

    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`; with `bos`, also those that the tokenizer puts around a text. Names of
        special tokens in the text are plain text unless `special`."""
        with one_line(f"checkpoint {self.folder}: its tokenizer fails"):
            return self.tokenizer.encode(
                text, add_special_tokens=bos, split_special_tokens=not special
            )

    def chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of a conversation by the checkpoint's template, up to where the assistant's turn
        begins. Messages and roles are as in `model.Tokenizer.chat`.

        Raises ValueError for another role or no text, or if the template refuses the conversation.
        """
        return self.render(messages, add_generation_prompt=True)

    def render(self, messages: Sequence[tuple[str, str]], **options) -> list[int] | str:
        turns = []
        for role, text in messages:
            check_message(role, text)
            turns.append({"role": role, "content": text})
        with one_line(f"checkpoint {self.folder}: chat template"):  # it may raise its own errors
            return self.tokenizer.apply_chat_template(turns, return_dict=False, **options)

    def end_of_turn(self) -> list[int]:
        """The special token that the chat template puts after an assistant's turn, if any."""
        try:
            text = self.render([("user", "u"), ("assistant", "END")], tokenize=False)
        except ValueError:
            return []  # `chat` raises the error again
        first = self.encode(text.rpartition("END")[2], special=True)[:1]
        return [i for i in first if i in self.tokenizer.added_tokens_decoder]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
