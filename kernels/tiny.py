"""`tiny`: a small cross-encoder whose weights start from the texts it will search, for machines
without a GPU.

A transformer that starts from random weights needs far more than a few minutes to discover that a
document about the query repeats its words. So the start makes that comparison possible, and
training has to learn all the rest:

- a token's vector is random, plus the sum of the random vectors of its character n-grams
  (Bojanowski et al. 2017), so that "compute" and "computes" begin close; one coordinate holds the
  token's inverse document frequency, one its side (query or document);
- in the first layer the query and the key of a token are the same vector (one orthogonal matrix):
  a token attends to itself and to its other occurrences, and the value passes on the side of what
  was attended to;
- in the last layer [CLS] attends to the rare tokens of one side per head.

Everything else is Hugging Face's random start; before training it ranks no better than chance, and
nothing of BM25 is built in.
"""

import math
import string
import zlib

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# the 33 English stop words of Lucene, which BM25 leaves out too
STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with"
)
HIDDEN, LAYERS, HEADS, INTERMEDIATE, VOCABULARY = 128, 2, 2, 128, 8192
# The last coordinates of a token's vector: its rarity, its side, the side of what it attends to.
# One is spare.
RARITY, SIDE, ATTENDED_SIDE, CONTENT = HIDDEN - 1, HIDDEN - 2, HIDDEN - 3, HIDDEN - 4


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """WordPiece trained on the texts: camelCase and snake_case split, lower case, no punctuation,
    no stop words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFKD(),
        normalizers.StripAccents(),
        normalizers.Replace(Regex(r"(?<=[a-z0-9])(?=[A-Z])"), " "),
        normalizers.Replace(Regex(r"[\W_]+"), " "),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(rf"\b({STOP_WORDS.replace(' ', '|')})\b"), " "),
    ])  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # The trainer numbers the characters in the order of a hash table that changes from run to run,
    # and breaks ties by number: naming them first makes the vocabulary a function of the texts.
    letters = list(string.ascii_lowercase + string.digits)
    first = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, min_frequency=2, show_progress=False, special_tokens=first,
        initial_alphabet=letters, limit_alphabet=len(letters)))  # fmt: skip
    trained = Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    trained.add_special_tokens(SPECIAL)
    special = [(token, trained.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    trained.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special)
    names = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL}
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names)  # fmt: skip


def build_tiny(texts: list[str], seed: int):
    """(BertForSequenceClassification, its tokenizer) for these texts; the same texts and seed, the
    same weights."""
    tokenizer = build_tokenizer(texts)
    vocabulary = len(tokenizer)
    config = BertConfig(vocab_size=vocabulary, hidden_size=HIDDEN, num_hidden_layers=LAYERS,
                        num_attention_heads=HEADS, intermediate_size=INTERMEDIATE,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=1,
                        pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config).eval()
        orthogonal = [torch.nn.init.orthogonal_(torch.empty(HIDDEN, HIDDEN)) for _ in range(3)]
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    # as integers even where there are none
    distinct = [np.unique(np.asarray(e.ids, np.int64)) for e in encodings]
    frequency = np.bincount(np.concatenate(distinct), minlength=vocabulary)
    rarity = np.log(1 + len(texts) / (1 + frequency))

    words = np.zeros((vocabulary, HIDDEN), dtype=np.float32)
    words[:, :CONTENT] = _content(tokenizer.convert_ids_to_tokens(range(vocabulary)), CONTENT, seed)
    words[:, RARITY] = (rarity - rarity.mean()) / rarity.std()
    words[: len(SPECIAL), RARITY] = 0
    with torch.no_grad():
        embeddings = model.bert.embeddings
        embeddings.word_embeddings.weight.copy_(torch.from_numpy(words))
        embeddings.token_type_embeddings.weight.zero_()
        embeddings.token_type_embeddings.weight[:, SIDE] = torch.tensor([3.0, -3.0])

        head = HIDDEN // HEADS
        attention = model.bert.encoder.layer[0].attention
        same = orthogonal[0].clone()
        same[:, CONTENT:] = 0
        # a token's score with itself is 10: e^10 against a sum of 100 others
        same *= math.sqrt(10 / math.sqrt(head))
        attention.self.query.weight.copy_(same)
        attention.self.key.weight.copy_(same)
        attention.self.value.weight.copy_(orthogonal[1])
        passed_on = torch.eye(HIDDEN)
        passed_on[RARITY, RARITY] = passed_on[SIDE, SIDE] = 0
        passed_on[ATTENDED_SIDE, SIDE] = 1
        attention.output.dense.weight.copy_(passed_on @ orthogonal[1].T)

        attention = model.bert.encoder.layer[-1].attention
        for i in range(HEADS):  # the first row of each head: a constant query meets rarity and side
            attention.self.query.bias[i * head] = math.sqrt(head)
            attention.self.key.weight[i * head] = 0
            attention.self.key.weight[i * head, RARITY] = 2.0
            attention.self.key.weight[i * head, SIDE] = 1.0 if i % 2 == 0 else -1.0
        attention.self.value.weight.copy_(orthogonal[2])
        attention.output.dense.weight.copy_(orthogonal[2].T)
    return model, tokenizer


def _content(tokens: list[str], width: int, seed: int) -> np.ndarray:
    """A vector of length sqrt(width) per token: half its own random direction, half that of its
    n-grams (3 to 5)."""
    random = np.random.default_rng(seed)
    own = random.standard_normal((len(tokens), width), dtype=np.float32)
    table = random.standard_normal((1 << 15, width), dtype=np.float32)
    shared = np.zeros_like(own)
    for row, token in zip(shared, tokens, strict=True):
        marked = (token[2:] if token.startswith("##") else "<" + token) + ">"
        grams = [marked[i : i + n] for n in (3, 4, 5) for i in range(len(marked) - n + 1)]
        distinct = dict.fromkeys(grams or [marked])
        row += table[[zlib.crc32(gram.encode()) % len(table) for gram in distinct]].sum(0)
    vectors = sum(v / np.linalg.norm(v, axis=1, keepdims=True) for v in (own, shared))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * math.sqrt(width)
