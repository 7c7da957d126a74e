"""What a language model is asked about relevance, word by word as published, and how its order of
passages is read."""

from __future__ import annotations

import re
from collections.abc import Callable

# -------------------------------------------------------------------------------- lists of passages

RANKLLM = ("You are RankLLM, an intelligent assistant that can rank passages based on their "
           "relevancy to the query")
RANKLLM_TASK = (
    "I will provide you with {n} passages, each indicated by a numerical identifier []. "
    "Rank the passages based on their relevance to the search query: {query}.\n"
    "{passages}"
    "Search Query: {query}.\n"
    "Rank the {n} passages above based on their relevance to the search query. All the passages "
    "should be included and listed using identifiers, in descending order of relevance. The output "
    "format should be [] > [], e.g., [2] > [1], Answer concisely and directly and only respond "
    "with the ranking results, do not say any word or explain."
)

RANKGPT = ("You are RankGPT, an intelligent assistant that can rank passages based on their "
           "relevancy to the query.")
RANKGPT_TASK = (
    "I will provide you with {n} passages, each indicated by number identifier []. \n"
    "Rank the passages based on their relevance to query: {query}."
)
RANKGPT_QUESTION = (
    "Search Query: {query}. \n"
    "Rank the {n} passages above based on their relevance to the search query. The passages should "
    "be listed in descending order using identifiers. The most relevant passages should be listed "
    "first. The output format should be [] > [], e.g., [1] > [2]. Only response the ranking "
    "results, do not say any word or explain."
)


def rankzephyr(query: str, passages: list[str]) -> list[dict[str, str]]:
    """RankZephyr's conversation (Pradeep et al. 2023; rank_llm's rank_zephyr template): one turn.

    Its passages and query hold no identifiers of their own: [7] becomes (7).
    """
    query, *passages = (re.sub(r"\[([0-9]+)\]", r"(\1)", text) for text in (query, *passages))
    lines = "".join(f"[{i}] {passage}\n" for i, passage in enumerate(passages, 1))
    task = RANKLLM_TASK.format(n=len(passages), query=query, passages=lines)
    return _turns(("system", RANKLLM), ("user", task))


def rankgpt(query: str, passages: list[str]) -> list[dict[str, str]]:
    """RankGPT's conversation (Sun et al. 2023): each passage a turn of its own, which the assistant
    acknowledges."""
    shown = []
    for i, passage in enumerate(passages, 1):
        shown += [("user", f"[{i}] {passage}"), ("assistant", f"Received passage [{i}].")]
    return _turns(
        ("system", RANKGPT),
        ("user", RANKGPT_TASK.format(n=len(passages), query=query)),
        ("assistant", "Okay, please provide the passages."),
        *shown,
        ("user", RANKGPT_QUESTION.format(n=len(passages), query=query)),
    )


def _turns(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


PROMPTS = {"rankzephyr": rankzephyr, "rankgpt": rankgpt}


def conversation(prompt: str, query: str, passages: list[str], words: int) -> list[dict[str, str]]:
    """The messages that ask for the order of `passages`, each cut to its first `words` words."""
    return PROMPTS[prompt](query, [" ".join(passage.split()[:words]) for passage in passages])


def parse_permutation(text: str, n: int) -> tuple[list[int], list[str]]:
    """(order of 0..n-1, what was wrong with the answer) of `[3] > [1] > ...`, repaired as RankGPT
    repairs it.

    Every run of digits is an identifier; the first occurrence counts; those out of 1..n are
    dropped; those missing follow in their old order. What a reasoning model thought (up to
    </think>) is not part of its answer.
    """
    text = text.rpartition("</think>")[2]
    found = [int(digits) if len(digits) < 10 else 0 for digits in re.findall(r"[0-9]+", text)]
    order = list(dict.fromkeys(i - 1 for i in found if 1 <= i <= n))
    wrong = []
    if not re.fullmatch(r"\s*\[[0-9]+\](\s*>\s*\[[0-9]+\])*\s*", text):
        wrong.append("malformed")
    if len(set(found)) < len(found):
        wrong.append("repeated")
    if any(not 1 <= i <= n for i in found):
        wrong.append("out of range")
    if len(order) < n:
        wrong.append("missing")
    seen = set(order)
    return order + [i for i in range(n) if i not in seen], wrong


# ------------------------------------------------------------------------- one document, yes or no

JUDGE = ("Judge whether the Document meets the requirements based on the Query and the Instruct "
         'provided. Note that the answer can only be "yes" or "no".')
MARK = "\x00"  # stands for the document while a template is cut in two


def around_document(template: str, query: str, instruction: str,
                    chat: Callable[[list[dict[str, str]]], str]) -> tuple[str, str]:
    """What stands before and behind the document in a prompt whose answer is yes or no.

    Args:
        template: `monot5` (Nogueira et al. 2020; its answers are true and false), `qwen3`
            (Qwen3-Reranker, ChatML as on its model card) or `chat`, the words of qwen3 through the
            model's own template.
        instruction: the task, in the words of qwen3.
        chat: messages -> prompt, by the model's own template.
    """
    if template == "monot5":
        return f"Query: {query} Document: ", " Relevant:"
    task = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: "
    if template == "qwen3":
        return (f"<|im_start|>system\n{JUDGE}<|im_end|>\n<|im_start|>user\n{task}",
                "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    text = chat(_turns(("system", JUDGE), ("user", task + MARK)))
    before, _, behind = text.rpartition(MARK)
    return before, behind
