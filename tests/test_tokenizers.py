"""The real tokenizers: published ids, every backbone's pair format, a wrong DeBERTa-v3 refused."""

import base64
import json
import os
import shutil
from pathlib import Path

import pytest
import transformers as hf
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from kernels.encoder import CrossEncoder
from kernels.loading import ModelError
from kernels.tokenizers import check_deberta_tokenizer, load_tokenizer

DATA = Path(os.environ.get("SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TOKENIZERS = DATA / "tokenizers"
pytestmark = pytest.mark.skipif(not TOKENIZERS.is_dir(),
                                reason="the real tokenizers are not here (SHARED_DATA)")

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
        "num_labels": 1}
CONFIGS = {
    "bert-uncased": hf.BertConfig(**TINY),
    "roberta-base": hf.RobertaConfig(**TINY, type_vocab_size=1, vocab_size=50265,
                                     max_position_embeddings=514),
    "deberta-v3": hf.DebertaV2Config(**TINY, vocab_size=128100, relative_attention=True,
                                     position_buckets=256, pos_att_type="p2c|c2p",
                                     share_att_key=True, position_biased_input=False),
    "modernbert": hf.ModernBertConfig(**TINY),
}  # fmt: skip
TEXTS = ["what is a lobster roll?", "Ｆull-width ①ﬁne naïve café 東京", "",
         "tabs\tand\nlines  and   spaces ", "llama \U0001f999 €4 ▁under <s> [SEP] </s>", "x" * 200,
         "The price was 1,234.5 USD in 2019."]  # fmt: skip


def golden(name):
    with open(TOKENIZERS / "golden" / f"{name}.json", encoding="utf-8") as f:
        return [(case["input"], case["ids"]) for case in json.load(f)["datasets"]]


@pytest.fixture(scope="module")
def tokenizers():
    return {name: load_tokenizer(str(TOKENIZERS / name), CONFIGS[name]) for name in CONFIGS}


def model_of(config):
    return hf.AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("name", ["bert-uncased", "roberta-base", "deberta-v3"])
def test_published_ids(tokenizers, name):
    cases = golden(name)
    assert len(cases) == 37
    wrong = [text for text, ids in cases if tokenizers[name](text)["input_ids"] != ids]
    if name == "bert-uncased":
        # "100,000\ua64a\U0001f999 alpacas": the list splits "000" off the letter and the emoji;
        # WordPiece cannot (no punctuation, no space between), and the tokenizer.json published with
        # all-MiniLM-L6-v2 does not either.
        wrong = [text for text in wrong if "000\ua64a\U0001f999" not in text]
    assert wrong == []


@pytest.mark.parametrize("name", CONFIGS)
def test_pairs_from_ids_equal_the_tokenizers_own(tokenizers, name):
    """Texts tokenised once per side and joined from ids: the tokenizer's own pairs, types too."""
    encoder = CrossEncoder(model_of(CONFIGS[name]), tokenizers[name])
    ids = encoder.tokenize(TEXTS, None)
    for i, query in enumerate(TEXTS):
        for j, document in enumerate(TEXTS):
            packed = encoder.pack([ids[i]], [ids[j]])
            # in a batch of one: a lone pair with an empty document is taken for a single text
            own = {key: value[0] for key, value in tokenizers[name]([query], [document]).items()}
            assert packed.input_ids.tolist() == own["input_ids"], (query, document)
            if name == "bert-uncased":
                assert packed.token_types.tolist() == own["token_type_ids"]
            else:
                assert not packed.token_types.any()
            first = 2 if name == "roberta-base" else 0
            assert packed.positions.tolist() == list(range(first, first + len(own["input_ids"])))
            assert encoder.pair_length(len(ids[i]), len(ids[j])) == len(own["input_ids"])


def test_deberta_from_the_sentencepiece_model_alone(tokenizers, tmp_path):
    """microsoft/deberta-v3-* carry spm.model and no tokenizer.json."""
    shutil.copy(TOKENIZERS / "deberta-v3" / "spm.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    tokenizer = load_tokenizer(str(tmp_path), CONFIGS["deberta-v3"])
    file = TOKENIZERS / "deberta-v3" / "tokenizer.json"
    ready = hf.PreTrainedTokenizerFast(tokenizer_file=str(file))
    for text, _ in golden("deberta-v3"):
        ids = tokenizer(text)["input_ids"]
        assert ids == ready(text)["input_ids"]
        back, same = (t.decode(ids, skip_special_tokens=True) for t in (tokenizer, ready))
        assert back == same
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id, len(tokenizer)) == (128000, 0, 128001)


def test_deberta_survives_saving(tokenizers, tmp_path):
    encoder = CrossEncoder(model_of(CONFIGS["deberta-v3"]), tokenizers["deberta-v3"])
    encoder.save_pretrained(tmp_path)
    own = CrossEncoder.from_pretrained(tmp_path).tokenizer
    peers = hf.AutoTokenizer.from_pretrained(tmp_path)
    for text, ids in golden("deberta-v3"):
        assert own(text)["input_ids"] == ids and peers(text)["input_ids"] == ids


def test_a_wrong_deberta_tokenizer_is_refused(tmp_path):
    shutil.copy(TOKENIZERS / "deberta-v3" / "tokenizer.json", tmp_path)
    # transformers 5: without character map and byte fallback
    wrong = hf.DebertaV2Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="spm.model"):
        check_deberta_tokenizer(wrong)
    with pytest.raises(ModelError, match="spm.model"):
        CrossEncoder(model_of(CONFIGS["deberta-v3"]), wrong)
    wrong.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="spm.model"):
        load_tokenizer(str(tmp_path), CONFIGS["deberta-v3"])
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="neither spm.model nor tokenizer.json"):
        load_tokenizer(str(tmp_path), CONFIGS["deberta-v3"])


def test_xlm_roberta_is_read_as_its_file_stands(tmp_path):
    """Of a tokenizer.json transformers 5 takes vocabulary and character map alone. Here the
    published layout over DeBERTa's pieces and map."""
    with open(TOKENIZERS / "deberta-v3" / "tokenizer.json", encoding="utf-8") as f:
        deberta = json.load(f)
    steps = deberta["normalizer"]["normalizers"]
    (char_map,) = [n["precompiled_charsmap"] for n in steps if n["type"] == "Precompiled"]
    pieces = [(piece, float(score)) for piece, score in deberta["model"]["vocab"][4:2000]]
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = [*((token, 0.0) for token in special[:4]), *pieces, ("<mask>", 0.0)]
    own = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    own.normalizer = normalizers.Sequence([normalizers.Precompiled(base64.b64decode(char_map)),
                                           normalizers.Strip(left=False, right=True),
                                           normalizers.Replace(Regex(" {2,}"), "\u2581")])
    own.pre_tokenizer = pre_tokenizers.Metaspace()
    own.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    own.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )  # fmt: skip
    own.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 512,
                "bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>",
                "unk_token": "<unk>", "pad_token": "<pad>"}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = hf.XLMRobertaConfig(**TINY, vocab_size=2001, type_vocab_size=1,
                                 max_position_embeddings=514)
    encoder = CrossEncoder(model_of(config), load_tokenizer(tmp_path, config))
    encoder.save_pretrained(tmp_path / "saved")
    again = CrossEncoder.from_pretrained(tmp_path / "saved").tokenizer
    peers = hf.AutoTokenizer.from_pretrained(tmp_path / "saved")
    texts = [*TEXTS, "next\u0085line"]  # white space that is not in the map
    ids = encoder.tokenize(texts, None)
    for i, query in enumerate(texts):
        for j, document in enumerate(texts):
            expected = own.encode(query, document).ids
            assert encoder.pack([ids[i]], [ids[j]]).input_ids.tolist() == expected
            for other in (again, peers):
                assert other([query], [document])["input_ids"] == [expected]


def test_an_uncased_vocabulary_is_lower_cased(tokenizers, tmp_path):
    """MiniLM: over a vocabulary without capitals, files that keep them make [UNK] of every name."""
    shutil.copy(TOKENIZERS / "bert-uncased" / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "do_lower_case": false}')
    text = "Paris Météo IS Nice"
    assert 100 in hf.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]  # [UNK]
    forced = load_tokenizer(str(tmp_path), CONFIGS["bert-uncased"])
    assert forced(text)["input_ids"] == tokenizers["bert-uncased"](text)["input_ids"]
    with open(tmp_path / "vocab.txt", "a", encoding="utf-8") as f:
        f.write("Paris\n")
    cased = load_tokenizer(str(tmp_path), CONFIGS["bert-uncased"])
    assert 30522 in cased("Paris")["input_ids"]  # a vocabulary with capitals stays as its files say


def test_limits_baked_into_the_file_do_not_cut(tokenizers):
    tokenizer = load_tokenizer(str(TOKENIZERS / "bert-uncased"), CONFIGS["bert-uncased"])
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=300)
    encoder = CrossEncoder(model_of(CONFIGS["bert-uncased"]), tokenizer)
    ids = encoder.tokenize(["one two three four five six seven eight", "one"], 6)
    assert [len(i) for i in ids] == [6, 1] and encoder.truncated == 1
