"""Hugging Face folders. The oracle is transformers, which also writes the files."""

import importlib.util
import io
import json
import math
import sys
from functools import partial
from unittest.mock import Mock

import pytest
import torch

from extras import hugging_face
from model import Llama, Tokenizer
from retro_attention import RetroConfig
from sample import TextStream
from test_retro import TINY, close, command, decode, random_tokens, refused

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed (pip install -e '.[hf]')",
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}
CHAT = (
    "{% for m in messages %}<|turn|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)


def write_hugging_face(folder, kind="Llama", max_file="1GB", **config):
    """A small random model, in float64, as transformers saves it."""
    import transformers

    shape = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 300,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    make_config = getattr(transformers, f"{kind}Config")
    make_model = getattr(transformers, f"{kind}ForCausalLM")
    torch.manual_seed(0)
    model = make_model(make_config(**{**shape, **config})).double().eval()
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)
        else:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=max_file)


def write_hugging_face_tokenizer(folder):
    """256 bytes, two merges and three special tokens, with a post-processor that begins a text and
    a chat template. Returns transformers' tokenizer."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {
        c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"])
    }
    tok = tokenizers.Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<|start|>", "<|turn|>", "<|end|>"])  # 258, 259, 260
    tok.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 258)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, chat_template=CHAT, eos_token="<|end|>")
    fast.save_pretrained(folder)
    return fast


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    """Applies `change` to the dictionary of tensors in model.safetensors."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def put_head(scale, folder):
    """Adds a head beside a tied table: the table times `scale`."""

    def change(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * scale

    edit_weights(folder, change)


def spell_as_published(folder):
    """Puts rope_theta beside rope_scaling, in place of transformers 5's rope_parameters."""
    config = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))


TIED = {"tie_word_embeddings": True}


@needs_transformers
@pytest.mark.parametrize("kind, max_file, config, change", [
    ("Llama", "1GB", {}, None),
    ("Llama", "30KB", {"rope_parameters": LLAMA3_ROPE}, None),
    ("Llama", "1GB", {"rope_parameters": LLAMA3_ROPE}, spell_as_published),
    ("Llama", "1GB", {"head_dim": 16, "num_key_value_heads": 6, "rms_norm_eps": 1e-4}, None),
    ("Llama", "1GB", TIED, None),
    ("Llama", "1GB", TIED, partial(put_head, 1)),
    ("Llama", "1GB", TIED, partial(put_head, -2)),
    ("Qwen2", "30KB", {}, None),
    ("Qwen3", "30KB", {"head_dim": 16}, None),
])  # fmt: skip
def test_logits_equal_those_of_transformers(tmp_path, kind, max_file, config, change):
    """Guards against a RoPE layout converted twice or not at all, a lost bias, rows of stacked
    projections in the wrong order, and a wrong choice between a head and a tied table."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    write_hugging_face(tmp_path, kind, max_file, **config)
    if change is not None:
        change(tmp_path)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    tokens = random_tokens(2, 90)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or max_file == "30KB"
    save_file({"model.norm.weight": torch.ones(48)}, tmp_path / "other.safetensors")  # unused
    model = Llama.from_checkpoint(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        wanted = oracle(tokens).logits
    # transformers computes norms and angles in float32, also in a float64 model.
    assert (model(tokens) - wanted).norm() < 1e-5 * wanted.norm()
    close(decode(model, None, tokens, 40)[0], model(tokens)[:, 39:], 1e-10)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
UNKNOWN = {"rope_type": "unknown", "rope_theta": 1e4}


@needs_transformers
@pytest.mark.parametrize("change, message", [
    ({"use_sliding_window": True}, "use_sliding_window True is not supported: must be False"),
    ({"sliding_window": 64}, "sliding_window 64"),
    ({"attention_chunk_size": 64}, "attention_chunk_size 64"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types 'sliding_attention'"),
    ({"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, "per_layer_config .*rms_norm_eps"),
    ({"kv_sharing_modes": ["own", "reuse"]}, "kv_sharing_modes"),
    ({"is_causal": False}, "is_causal False"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder True"),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights 'other"),
    ({"mlp_bias": True}, "mlp_bias True"),
    ({"attention_bias": True}, "attention_bias True"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"dual_chunk_attention_config": {}}, "dual_chunk_attention_config {}"),
    ({"model_type": "mixtral"}, "not 'mixtral'"),
    ({"model_type": "unknown"}, "AutoConfig cannot be read"),
    ({"hidden_size": "wide"}, "AutoConfig cannot be read|dim must be an integer"),
    ({"rope_parameters": YARN}, "yarn.* are not supported"),
    ({"rope_parameters": UNKNOWN}, "unknown.* are not supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor.* are not supported"),
    ({"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 2.0}}, "are not supported"),
    ({"rope_parameters": {**LLAMA3_ROPE, "factor": 0}}, "rope_scaling must be .* not 0"),
    ({"rms_norm_eps": math.inf}, "norm_eps"),
    ({"head_dim": 15}, "head_dim"),
    ({"head_dim": 0}, "head_dim must be .* not 0"),
    ({"head_dim": 10**20}, "wk.weight must have n \\* 10{20} rows"),
    ({"head_dim": 4}, r"wk.weight must have shape \(8, 48\), not \(16, 48\)"),
    ({"vocab_size": 301}, r"must have shape \(301, 48\), not \(300, 48\)"),
    ({"num_hidden_layers": 3}, "layers.2.* is missing"),
    ({"num_hidden_layers": 1}, "layers.1.* is unknown"),
])  # fmt: skip
def test_unsupported_config_is_refused(tmp_path, change, message):
    """The message names the cause. Guards against a model that loads but is wrong."""
    write_hugging_face(tmp_path)
    edit(tmp_path / "config.json", **change)
    refused(lambda: Llama.from_checkpoint(tmp_path), message)


class Recorder(dict):
    """A configuration that notes which of its keys are read."""

    def __init__(self, config):
        super().__init__(config.to_dict())
        self.seen = set()

    def to_dict(self):
        return self

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)


# Reason -> keys without effect on logits.
IRRELEVANT = {
    "names the model or what made it": "_name_or_path architectures transformers_version",
    "training": "initializer_range attention_dropout",
    "classification": "id2label label2id problem_type",
    "what transformers returns or keeps": (
        "output_attentions output_hidden_states return_dict use_cache"
    ),
    "the same result in pieces": "chunk_size_feed_forward pretraining_tp",
    "the caller's choice": "dtype",
    "needs use_sliding_window": "max_window_layers",
    "padding": "pad_token_id",
    "the tokenizer's": "bos_token_id eos_token_id",
}


@needs_transformers
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_every_config_key_is_read_or_irrelevant(monkeypatch, kind):
    """Fails if transformers has a new key: read it, refuse it (`TURNED_OFF`), or list it above.
    Guards against a model that loads without an error, but is computed in another way."""
    from transformers import AutoConfig

    config = Recorder(AutoConfig.for_model(kind))
    monkeypatch.setattr(hugging_face, "from_pretrained", lambda *args: config)
    hugging_face.read_config("folder")
    irrelevant = set(" ".join(IRRELEVANT.values()).split())
    assert not irrelevant & config.seen
    assert config.keys() - config.seen - irrelevant == set()


@needs_transformers
def test_broken_safetensors_are_refused(tmp_path):
    """Truncated and foreign files, missing files and tensors: one ValueError each, naming the file
    or the tensor."""
    write_hugging_face(tmp_path, max_file="30KB")
    index = tmp_path / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    first = tmp_path / names[0]
    whole = first.read_bytes()

    def load():
        Llama.from_checkpoint(tmp_path)

    huge_header = (2**62).to_bytes(8, "little")
    for content in (whole[:-1], whole[:100], b"", huge_header, whole[:8] + b"[" + whole[9:]):
        first.write_bytes(content)
        refused(load, f"{names[0]}: not readable as safetensors")
    first.write_bytes(whole.replace(b'"F64"', b'"I64"', 1))
    refused(load, "must be floating-point, not torch.int64")
    first.unlink()
    refused(load, f"{names[0]} is missing")
    first.write_bytes((tmp_path / names[1]).read_bytes())
    refused(load, f"is in {names[1]} and in another file")
    edit(index, weight_map={"model.norm.weight": names[1], "no.such": names[1]})
    refused(load, "weights: .* is missing")
    for files in ([], [1], {"a": 1}, {"a": ["b"]}, {"a": None, "b": "c"}, None):
        edit(index, weight_map=files)
        refused(load, "index.json: must be JSON with a weight_map of file names")
    for content in (b"\xff{", b"{", b"[]", b"{}"):
        index.write_bytes(content)
        refused(load, "index.json: must be JSON with a weight_map of file names")
    index.unlink()
    refused(load, "model.safetensors is missing")


@needs_transformers
def test_panic_of_safetensors_is_refused_and_ctrl_c_is_not(tmp_path, monkeypatch):
    """A panic in Rust is no Exception, so `except Exception` would miss it."""

    class Panic(BaseException):
        pass

    write_hugging_face(tmp_path)
    load_file = Mock(side_effect=[Panic("index out of range"), KeyboardInterrupt])
    monkeypatch.setattr("safetensors.torch.load_file", load_file)
    refused(lambda: Llama.from_checkpoint(tmp_path), "as safetensors: index out of range")
    with pytest.raises(KeyboardInterrupt):
        Llama.from_checkpoint(tmp_path)


@needs_transformers
@pytest.mark.parametrize("shape", [(), (47, 48)])
def test_projection_that_is_not_whole_heads_is_refused(tmp_path, shape):
    """Before its rows are reordered, which would raise an error inside PyTorch."""
    write_hugging_face(tmp_path)
    broken = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(shape)}
    edit_weights(tmp_path, lambda weights: weights.update(broken))
    refused(lambda: Llama.from_checkpoint(tmp_path), "wq.weight must have n \\* 8 rows")


@needs_transformers
@pytest.mark.parametrize("model_type", ["unknown", "llama"])
def test_code_in_a_folder_never_runs(tmp_path, monkeypatch, capsys, model_type):
    """Guards against transformers' question on stdin: our prompt may be "y"."""
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    config = json.dumps({"model_type": model_type, "auto_map": code, "tokenizer_class": "Own"})
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "tokenizer_config.json").write_text(config)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    for kind in (Llama, Tokenizer):
        with pytest.raises(ValueError, match=str(tmp_path)):
            kind.from_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert "[y/N]" not in capsys.readouterr().out


@needs_transformers
def test_tokenizer_equals_that_of_transformers(tmp_path):
    """Ids, chat and the tokens that end a text; names of special tokens in a text are text."""
    write_hugging_face(tmp_path, eos_token_id=7)
    oracle = write_hugging_face_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    tok = Tokenizer.from_checkpoint(tmp_path)
    for text in ("the other", "Ünïcødé 你好 🙂\r\n\t 1234  x \0", ""):
        assert tok.encode(text, bos=True) == oracle.encode(text)
        assert tok.decode(tok.encode(text)) == text
    assert tok.encode("<|end|>the", special=True) == [260, 257] != tok.encode("<|end|>the")
    assert tok.bos == 258
    assert tok.stop_tokens == [7, 8, 9, 260]
    assert tok.decode([257, 9999, 257]) == "thethe"  # an id that only the model has is no text

    said = [("system", "be"), ("user", "the?"), ("assistant", "so"), ("user", "oh")]
    wanted = "".join(f"<|turn|>{role}:{text}<|end|>" for role, text in said)
    wanted += "<|turn|>assistant:"
    assert tok.chat(said) == tok.encode(wanted, special=True)
    assert tok.decode(tok.chat(said)) == wanted
    refused(lambda: tok.chat([("usre", "hi")]), "a role must be .* not 'usre'")
    refused(lambda: tok.chat([("user", None)]), "a message must have a text")

    edit(tmp_path / "generation_config.json", eos_token_id="8")
    refused(lambda: Tokenizer.from_checkpoint(tmp_path), "eos_token_id")


@needs_transformers
def test_spaces_before_punctuation_stay(tmp_path):
    """A folder may ask for their removal, which would change a text that is already printed."""
    from transformers import AutoTokenizer

    write_hugging_face(tmp_path)
    write_hugging_face_tokenizer(tmp_path)
    key = "clean_up_tokenization_spaces"
    sure = f"{key}_for_bpe_even_though_it_will_corrupt_output"
    edit(tmp_path / "tokenizer_config.json", **{key: True, sure: True})
    tok = Tokenizer.from_checkpoint(tmp_path)
    ids = tok.encode("the end . Is n't it ?")
    assert tok.decode(ids) == "the end . Is n't it ?"
    assert AutoTokenizer.from_pretrained(tmp_path).decode(ids) == "the end. Isn't it?"


def write_sentencepiece_tokenizer(folder):
    """Pieces as in SentencePiece's models: a space is U+2581, also in front of a text, where
    decoding drops it; unknown characters are spelt in bytes."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "b", "\u2581a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("\u2581", "a")]
    tok = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tok.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>").save_pretrained(folder)


@needs_transformers
@pytest.mark.parametrize("prompt", ["a b", "a\u00e9", "a" * 20, "b "])
def test_text_after_a_prompt_keeps_its_spaces(tmp_path, prompt):
    """Guards against decoding each token by itself, which loses the space before "a", and turns a
    character of several bytes into several U+FFFD."""
    write_hugging_face(tmp_path)
    write_sentencepiece_tokenizer(tmp_path)
    tok = Tokenizer.from_checkpoint(tmp_path)
    more = " a b\u4f60\U0001f642 a"
    ids = tok.encode(prompt)
    new = tok.encode(prompt + more)[len(ids) :]
    assert ids + new == tok.encode(prompt + more)
    assert tok.decode(new[:1]) == "a"  # the space is lost
    assert len(new) == 11  # 7 of them are bytes
    stream = TextStream(tok, ids)
    parts = [stream.add(token) for token in new]
    assert parts[0] == " a"
    assert "".join(parts) == stream.text == more
    assert "\ufffd" not in stream.text and stream.flush() == ""


@needs_transformers
def test_chat_templates(tmp_path):
    """Uses ChatML if a folder has its tokens and no template. Reports why a template refuses."""
    write_hugging_face(tmp_path)
    oracle = write_hugging_face_tokenizer(tmp_path)
    said = [("system", "be"), ("user", "the?")]
    oracle.chat_template = None
    oracle.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    oracle.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    tok = Tokenizer.from_checkpoint(tmp_path)
    assert tok.decode(tok.chat(said)) == (
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nthe?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tok.encode("<|im_end|>", special=True)[0] in tok.stop_tokens

    oracle.chat_template = "{{ raise_exception('no chat here') }}"
    oracle.save_pretrained(tmp_path)
    tok = Tokenizer.from_checkpoint(tmp_path)
    refused(lambda: tok.chat(said), "chat template: no chat here")
    (tmp_path / "tokenizer.json").write_text("{")
    refused(lambda: Tokenizer.from_checkpoint(tmp_path), "AutoTokenizer cannot be read")


@needs_transformers
def test_sample_reads_a_hugging_face_folder(capsys, tmp_path):
    """The text is that of the ids, in whole characters, even if several tokens make one."""
    write_hugging_face(tmp_path)
    write_hugging_face_tokenizer(tmp_path)
    args = f"--checkpoint {tmp_path} --prompt the --max_new_tokens 60 --temperature 3"
    code, text, _ = command(capsys, args)
    model = Llama.from_checkpoint(tmp_path)
    tok = Tokenizer.from_checkpoint(tmp_path)
    retro = RetroConfig(page_size=8, min_tokens=16, dense_layers=0)
    prompt = torch.tensor([tok.encode("the", bos=True)])
    options = {"top_p": 0.95, "seed": 1337, "stop_tokens": tok.stop_tokens}
    ids = model.generate(prompt, 60, retro, 3.0, **options)[0, 1:].tolist()
    assert code == 0
    assert text == tok.decode([i for i in ids if i not in tok.stop_tokens]) + "\n"
    assert len(text) > 20
    assert "\ufffd" in text  # random bytes are not UTF-8: each is shown, and none is held back
    assert command(capsys, args + " --chat")[0] == 0


@pytest.mark.parametrize("missing, message", [
    ("transformers", r"needs more packages: pip install -e '\.\[hf\]'"),
    ("extras.hugging_face", "needs extras/hugging_face.py, which is missing"),
])  # fmt: skip
def test_missing_packages_and_missing_extras_are_named(
    capsys, tmp_path, monkeypatch, missing, message
):
    """One line, from the model, the tokenizer and the command; Meta's format needs neither."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, missing, None)
    for kind in (Llama, Tokenizer):
        with pytest.raises(ValueError, match=message):
            kind.from_checkpoint(tmp_path)
    code, out, error = command(capsys, f"--checkpoint {tmp_path}")
    assert code == 2 and not out and error.count("\n") == 1
    assert Tokenizer.from_checkpoint(TINY).encode("the")
