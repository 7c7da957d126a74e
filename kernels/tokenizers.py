"""The fast tokenizer of a model folder, refused where it is known to be a wrong one."""

import struct

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import Unigram
from tokenizers.normalizers import BertNormalizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from kernels.loading import ModelError

# transformers 5 builds DeBERTa's from the vocabulary alone (DebertaV2Tokenizer.__init__: Unigram
# with byte_fallback=False, and Replace, NFC, Strip for a normaliser), whatever spm.model or
# tokenizer.json say: the SentencePiece character map and the byte fallback are gone without a word,
# other ids in one passage of five. Text and its ids by the DeBERTa-v3 vocabulary: the character
# map, the byte fallback, white space, plain words.
DEBERTA_V3_CHECK = {
    "hello world": [12018, 447],
    "you\u2026\u00a0\u00a0you\u2026": [274, 260, 260, 260, 274, 260, 260, 260],
    "\U0001f999\ua64a": [507, 244, 163, 170, 157, 238, 157, 142],
    "\u2581This \u2581is \u2581a \u2581test \u2581.": [329, 269, 266, 1010, 323],
}


def load_tokenizer(name, config):
    """The fast tokenizer of a model folder or hub id; ModelError where it is known to be a wrong
    one."""
    if config.model_type == "deberta-v2":
        return deberta_tokenizer(name)
    # transformers 5 makes XLM-RoBERTa's of a tokenizer.json's vocabulary and character map, without
    # its other steps
    kind = PreTrainedTokenizerFast if config.model_type == "xlm-roberta" else AutoTokenizer
    tokenizer = kind.from_pretrained(name, trust_remote_code=False)
    backend = tokenizer.backend_tokenizer
    keeps_case = isinstance(backend.normalizer, BertNormalizer) and not backend.normalizer.lowercase
    if keeps_case and not has_capitals(tokenizer.get_vocab()):
        # microsoft/MiniLM-L12-H384-uncased and its like, whose files do not say lower case
        backend.normalizer = BertNormalizer(lowercase=True)
    return tokenizer


def has_capitals(words) -> bool:
    """Whether a vocabulary has words with capital letters, [CLS] and its like left out."""
    return any(word.strip("[]#").isalpha() and word != word.lower() and word[0] != "["
               for word in words)


def check_vocabulary(tokenizer, config) -> None:
    """ModelError for a vocabulary that is not the model's; transformers 5 makes up one of five
    tokens without files."""
    ids, special = tokenizer.get_vocab().values(), (tokenizer.cls_token_id, tokenizer.sep_token_id)
    if 2 * len(ids) < config.vocab_size or max(ids) >= config.vocab_size or None in special:
        raise ModelError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: {len(ids)} tokens with ids up to "
            f"{max(ids, default=0)}, cls and sep {special}; the model has {config.vocab_size}: put "
            "the model's own tokenizer files there")


def deberta_tokenizer(name):
    """DeBERTa-v2/v3's tokenizer from spm.model, or from tokenizer.json as it stands where there is
    no spm.model."""
    spm, ready = (cached_file(name, f, _raise_exceptions_for_missing_entries=False)
                  for f in ("spm.model", "tokenizer.json"))
    settings = get_tokenizer_config(name)
    for variant in ("do_lower_case", "split_by_punct"):
        if settings.get(variant):
            raise ModelError(f"{name}: {variant} in tokenizer_config.json is not supported for "
                             "DeBERTa")
    if spm:
        backend = sentencepiece_tokenizer(spm)
    elif ready:
        backend = Tokenizer.from_file(ready)
    else:
        raise ModelError(f"{name}: has neither spm.model nor tokenizer.json, DeBERTa's tokenizer "
                         "cannot be built")
    special = {f"{kind}_token": f"[{kind.upper()}]"
               for kind in ("cls", "sep", "pad", "unk", "mask")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, name_or_path=name,
        model_max_length=settings.get("model_max_length", 512),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], **special)
    check_deberta_tokenizer(tokenizer)
    return tokenizer


def check_deberta_tokenizer(tokenizer) -> None:
    """ModelError for a tokenizer over DeBERTa-v3's vocabulary that gives other ids than the model
    was trained on."""
    if tokenizer.convert_tokens_to_ids("\u2581hello") != 12018:
        return  # another vocabulary: nothing known to hold it against
    for text, ids in DEBERTA_V3_CHECK.items():
        if (given := tokenizer(text, add_special_tokens=False)["input_ids"]) != ids:
            raise ModelError(
                f"{tokenizer.name_or_path or 'the tokenizer'}: wrong DeBERTa-v3 tokenizer, "
                f"{text!r} gives {given}, not {ids} (its character map or byte fallback is lost): "
                "put the model's spm.model into the folder")


def sentencepiece_tokenizer(path) -> Tokenizer:
    """A tokenizers.Tokenizer equal to a SentencePiece unigram model with DeBERTa's [CLS] A [SEP] B
    [SEP] template."""
    with open(path, "rb") as f:
        model = list(protobuf_fields(f.read()))
    # field numbers of sentencepiece_model.proto: pieces 1 (piece 1, score 2), trainer_spec 2
    # (model_type 3, byte_fallback 35, unk_id 40), normalizer_spec 3 (precompiled_charsmap 2)
    pieces = [dict(protobuf_fields(value)) for number, value in model if number == 1]
    trainer, normalizer = (dict(protobuf_fields(dict(model).get(n, b""))) for n in (2, 3))
    if trainer.get(3, 1) != 1:
        raise ModelError(f"{path}: not a unigram SentencePiece model")
    vocab = [(p[1].decode(), struct.unpack("<f", p.get(2, bytes(4)))[0]) for p in pieces]
    tokenizer = Tokenizer(Unigram(vocab, unk_id=trainer.get(40, 0),
                                  byte_fallback=bool(trainer.get(35, 0))))
    steps = [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalizer.get(2):
        steps.insert(1, normalizers.Precompiled(normalizer[2]))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True)
                                  for t in ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")])
    return tokenizer


FIXED = {1: 8, 5: 4}  # bytes of protobuf's wire types that are no varint and have no length


def protobuf_fields(data: bytes):
    """(field number, value) of a serialised protobuf message: int for varints, bytes for everything
    else."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        else:
            size = varint() if kind == 2 else FIXED[kind]
            yield number, data[at : at + size]
            at += size
