"""A run's pairs scored by a bi-encoder's cosine: a teacher that saw more than the labels did.

    python results/bi_encoder.py MODEL DATASET RUN OUT           the cosine alone
    python results/bi_encoder.py MODEL DATASET RUN OUT --mean    its mean with the scores of RUN, on
                                                                 whose mean and deviation it is put

all-MiniLM-L6-v2 learned from 1.17 billion pairs, questions with their answers among them. As a
cross-encoder it starts without most of that: it was the mean of its tokens that learned it, never
its [CLS].

Needs `pip install sentence-transformers`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

from data import command  # noqa: E402
from data.runs import Columns, read_run, run_tag, write_run  # noqa: E402
from data.texts import Texts  # noqa: E402
from teacher import read_documents  # noqa: E402


def cosines(model: SentenceTransformer, texts: Texts, run: dict) -> np.ndarray:
    """float64 [rows]: the cosine of each query and document of the run, in its order."""
    found = read_documents(texts, run, list(run), skip_missing=False)
    row = {docid: i for i, docid in enumerate(found)}
    documents = encoded(model, list(found.values()))
    queries = encoded(model, [texts.queries[qid] for qid in run])
    values = [documents[[row[d] for d in ranked]] @ query
              for query, ranked in zip(queries, run.values(), strict=True)]
    return np.concatenate(values)


def encoded(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    """float64 [texts, dim] of length one."""
    vectors = model.encode(texts, batch_size=128, show_progress_bar=False).astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def mean_of(scores: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """The mean of the scores and of the cosine put on their mean and deviation."""
    standard = (cosine - cosine.mean()) / cosine.std()
    return (scores + scores.mean() + scores.std() * standard) / 2


def main() -> int:
    parser = command.Parser(description=__doc__.partition("\n")[0])
    for name in ("model", "dataset", "run", "out"):
        parser.add_argument(name)
    parser.add_argument("--mean", action="store_true", help="with the run's own scores")
    args = parser.parse_args()
    run = read_run(args.run)
    values = cosines(SentenceTransformer(args.model), Texts(args.dataset), run)
    if args.mean:
        values = mean_of(Columns.of(run).values, values)
    write_run(args.out, Columns.of(run)._replace(values=values).nested(), run_tag(args.model))
    return 0


if __name__ == "__main__":
    sys.exit(command.guarded(main))
