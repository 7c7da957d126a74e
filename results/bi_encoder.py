"""A run's pairs scored by a bi-encoder's cosine: a teacher that saw more than the labels did.

    python results/bi_encoder.py MODEL DATASET RUN OUT           the cosine alone
    python results/bi_encoder.py MODEL DATASET RUN OUT --mean    its mean with the scores of RUN, on
                                                                 whose mean and deviation it is put

all-MiniLM-L6-v2 learned from 1.17 billion pairs, questions with their answers among them. As a
cross-encoder it starts without most of that: it was the mean of its tokens that learned it, never
its [CLS].

Needs `pip install sentence-transformers`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

from data.runs import Columns, read_run, run_tag, write_run  # noqa: E402
from data.texts import Texts  # noqa: E402


def cosines(model: SentenceTransformer, texts: Texts, run: dict) -> np.ndarray:
    """float64 [rows]: the cosine of each query and document of the run, in its order."""
    docids = list({docid: None for ranked in run.values() for docid in ranked})
    found, row = texts.documents(docids), {docid: i for i, docid in enumerate(docids)}
    documents = encoded(model, [found[docid] for docid in docids])
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("model", "dataset", "run", "out"):
        parser.add_argument(name)
    parser.add_argument("--mean", action="store_true", help="with the run's own scores")
    args = parser.parse_args()
    run = read_run(args.run)
    values = cosines(SentenceTransformer(args.model), Texts(args.dataset), run)
    if args.mean:
        values = mean_of(Columns.of(run).values, values)
    rows = iter(values.tolist())
    write_run(args.out, {qid: {docid: next(rows) for docid in ranked}
                         for qid, ranked in run.items()}, run_tag(args.model))


if __name__ == "__main__":
    main()
