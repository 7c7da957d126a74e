"""A language model of Hugging Face, asked for text and for the logits of single words."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
)

from kernels.loading import ModelError, from_hub, quiet


class LanguageModel:
    """A causal or seq2seq language model in eval mode, with its tokenizer.

    Args:
        name: folder or hub id.
        dtype: auto (bfloat16 on a CUDA device that has it), float32 or bfloat16.
        device: auto (CUDA where there is one), cpu or cuda.

    Attributes: name, model, tokenizer; seq2seq; context, the tokens that the model takes, prompt
    and answer together.

    Raises:
        ModelError: it is not to be had, its files lack weights, or it fails when it is run.
    """

    def __init__(self, name: str, dtype: str = "auto", device: str = "auto") -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            on_cuda = torch.device(device).type == "cuda"
            dtype = "bfloat16" if on_cuda and torch.cuda.is_bf16_supported() else "float32"
        self.name = name
        with from_hub(name), quiet():
            config = AutoConfig.from_pretrained(name)
            self.seq2seq = config.is_encoder_decoder
            # left: the last token of every row in one column
            side = "right" if self.seq2seq else "left"
            self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side=side)
            self.tokenizer.model_max_length = int(self.tokenizer.model_max_length)
            kind = AutoModelForSeq2SeqLM if self.seq2seq else AutoModelForCausalLM
            self.model, report = kind.from_pretrained(name, dtype=getattr(torch, dtype),
                                                      output_loading_info=True)
            if lost := sorted(report["missing_keys"]):  # Hugging Face would go on with random ones
                raise ModelError(f"{name}: its files lack {len(lost)} weights "
                                 f"({', '.join(lost[:3])}); fetch it again")
            self.model.to(device).eval()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # T5 has relative positions: its tokenizer's limit counts
        limit = self.tokenizer.model_max_length
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.context = min(positions or limit, limit)

    def chat(self, messages: list[dict[str, str]]) -> str:
        """The prompt of a conversation by the tokenizer's chat template, up to where the answer
        begins.

        Templates that know no system role (Gemma, older Mistral) get it at the head of the first
        user message.
        """
        if not self.tokenizer.chat_template:
            raise ModelError(f"{self.name}: its tokenizer has no chat template; an "
                             "instruction-tuned model is needed")
        how = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
        with from_hub(self.name):
            try:
                return self.tokenizer.apply_chat_template(messages, **how)
            except TemplateError:
                system, user, *more = messages
                first = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
                return self.tokenizer.apply_chat_template([first, *more], **how)

    def complete(self, prompts: list[list[int]], new_tokens: int) -> list[tuple[str, int, bool]]:
        """(text, tokens, whether it was cut off at new_tokens) of the greedy answer to each prompt,
        all in one batch."""
        stop = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        how = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=stop,
                               pad_token_id=self.tokenizer.pad_token_id)
        with from_hub(self.name, "run: "), torch.inference_mode():
            batch = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
            out = self.model.generate(**batch.to(self.model.device), generation_config=how)
        stops, answers = set(stop if isinstance(stop, list) else [stop]), []
        for row in out[:, batch["input_ids"].shape[1] :].tolist():
            end = next((i for i, token in enumerate(row) if token in stops), None)
            text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
            answers.append((text, len(row) if end is None else end + 1, end is None))
        return answers

    def first_logits(self, prompts: list[list[int]], tokens: list[int]) -> np.ndarray:
        """float32 [prompts, tokens]: the logits of `tokens` as the first of each answer; prompts of
        unequal length are padded."""
        with from_hub(self.name, "run: "), torch.inference_mode():
            batch = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
            batch = batch.to(self.model.device)
            if self.seq2seq:
                start = torch.full((len(prompts), 1), self.model.config.decoder_start_token_id,
                                   device=self.model.device)
                out = self.model(**batch, decoder_input_ids=start)
            else:
                positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
                out = self.model(**batch, position_ids=positions, logits_to_keep=1, use_cache=False)
            return out.logits[:, -1, tokens].float().cpu().numpy()


class LocalModel:
    """Answers by transformers, greedy: the windows that wait, of different queries, in one batch.

    Passages are shortened together, as RankGPT does, until prompt and answer fit the context.

    Args:
        conversation: (query, passages, words kept of a passage) -> messages.
        capacity: windows in a batch. passage_words: the most of them.
        answer_tokens: the longest answer; None for what the order of `most_passages` takes.

    Raises:
        ModelError: a seq2seq model; from start(), a window beyond the context.
    """

    def __init__(self, llm: LanguageModel,
                 conversation: Callable[[str, list[str], int], list[dict]], *, capacity: int,
                 passage_words: int, answer_tokens: int | None, most_passages: int) -> None:
        if llm.seq2seq:
            raise ModelError(f"{llm.name}: a seq2seq model; listwise needs a causal one (pointwise "
                             "takes both)")
        self.llm, self.conversation, self.words = llm, conversation, passage_words
        self.capacity, self.waiting = capacity, []
        ideal = " > ".join(f"[{i + 1}]" for i in range(most_passages))
        spared = len(llm.tokenizer.encode(ideal, add_special_tokens=False)) + 8
        self.new_tokens = answer_tokens or spared

    def start(self, qid: str, query: str, passages: list[str]) -> None:
        """Puts a window into the next batch."""
        words = self.words
        ids = self._prompt(query, passages, words)
        while (beyond := len(ids) + self.new_tokens - self.llm.context) > 0:
            if words <= 1:
                raise ModelError(f"query {qid!r}: {len(passages)} passages of one word and the "
                                 f"answer are {beyond} tokens more than the context of "
                                 f"{self.llm.context}; lower --window")
            words = max(1, words - max(1, beyond // (len(passages) * 4)))
            ids = self._prompt(query, passages, words)
        self.waiting.append((qid, ids, words < self.words))

    def _prompt(self, query: str, passages: list[str], words: int) -> list[int]:
        text = self.llm.chat(self.conversation(query, passages, words))
        return self.llm.tokenizer(text, add_special_tokens=False)["input_ids"]

    def finished(self) -> list[tuple[str, dict]]:
        """(qid, answer) of every window that waits."""
        answers = self.llm.complete([ids for _, ids, _ in self.waiting], self.new_tokens)
        results = []
        for (qid, ids, shortened), (text, tokens, cut) in zip(self.waiting, answers, strict=True):
            results.append((qid, {"text": text, "cut": cut, "shortened": shortened,
                                  "prompt_tokens": len(ids), "answer_tokens": tokens}))
        self.waiting = []
        return results

    def stop(self) -> list[tuple[str, dict]]:
        """Answers that were under way when the work was broken off."""
        return []
