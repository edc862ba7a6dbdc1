"""
Checkpoints as a model of the lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), an optional
package: pip install -c constraints.txt -e '.[lm-eval]'. Importing this module registers the model "nanochat"; run as a
command it is the harness' own command line.

    python -m nanochat.eval.lm_eval_adapter --model nanochat --model_args source=base --tasks lambada_openai
    python -m nanochat.eval.lm_eval_adapter --model nanochat --model_args source=sft --tasks gsm8k --batch_size 32

model_args are source (base, mid, sft, rl), model_tag and step, as in the scripts. Prompts are plain text after a bos,
for chat models too: their own protocol is what scripts/chat_eval.py speaks. Likelihoods come from CORE's code: requests
of about one length are a batch, what the choices of an item share is computed once. --batch_size is how many texts are
written at a time.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows
from rich.progress import Progress

from nanochat import checkpoint_manager, hardware
from nanochat.common import UserError
from nanochat.engine import Engine, Request
from nanochat.eval.core import BATCH_COLUMNS, batches, grow, score
from nanochat.eval.core_tasks import Row, cut
from nanochat.tokenizer import Tokenizer, default_dir

AUTO_BATCH = 32  # texts written at a time with --batch_size auto; arbitrary
WINDOW = 512  # items sorted by length at a time, as in CORE

Scored = tuple[tuple[str, str], list[int], list[int]]  # context and continuation as texts, context's and its tokens


@register_model("nanochat")
class NanochatLM(TemplateLM):
    def __init__(
        self,
        source: str = "base",
        model_tag: str = "",
        step: int = -1,
        device: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # the most that an automatic batch_size may be
    ) -> None:
        super().__init__()
        where = hardware.pick_device(device)
        self.tokens = Tokenizer.load(default_dir())
        self.model, _ = checkpoint_manager.load_model(
            source, str(model_tag), step, self.tokens, where, hardware.pick_dtype(where)
        )
        hardware.tune_process(where)
        is_auto = str(batch_size).startswith("auto")
        num_rows = min(AUTO_BATCH, max_batch_size or AUTO_BATCH) if is_auto else int(batch_size)
        self.engine = Engine(self.model, self.tokens, num_rows)

    # ---- what TemplateLM asks for ----

    @property
    def eot_token_id(self) -> int:
        return self.tokens.bos

    def tok_encode(self, string: str, add_special_tokens: bool = True, **kwargs: Any) -> list[int]:
        ids = self.tokens.encode(string)
        return [self.tokens.bos, *ids] if add_special_tokens else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation its log-probability, in nats, and whether each of its tokens is the likeliest."""
        items = []
        for _, group in groupby(requests, key=lambda request: request[0][0]):  # the choices of one question
            rows = []
            for _, context, continuation in group:
                # A continuation that merges into the context's last token leaves none of its own: that one counts then.
                tokens = [*context, *continuation]
                rows.append(Row(tokens, min(len(context), len(tokens) - 1), len(tokens)))
            items.append(rows)
        results = self.score(items, disable_tqdm)
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    # ---- likelihoods ----

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in nats. One longer than the context is scored in pieces."""
        items = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            pieces = get_rolling_token_windows(ids, self.tokens.bos, self.model.config.sequence_len, context_len=1)
            tokens = [([*read, predicted[-1]], len(predicted)) for read, predicted in pieces]
            items.append([Row(row, len(row) - predicted, len(row)) for row, predicted in tokens])
        results = iter(self.score([[row] for rows in items for row in rows], disable_tqdm))
        totals = [math.fsum(next(results)[0] for _ in rows) for rows in items]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @torch.inference_mode()
    def score(self, items: Sequence[Sequence[Row]], disable_progress: bool) -> list[tuple[float, bool]]:
        """Of each row of each item. Rows that do not fit the context lose their beginning."""
        context, max_columns = self.model.config.sequence_len, BATCH_COLUMNS[self.model.device.type]
        results: list[tuple[float, bool]] = []
        with Progress(disable=disable_progress) as bar:
            task = bar.add_task("likelihoods", total=sum(map(len, items)))
            for first in range(0, len(items), WINDOW):
                fitting = [[cut(row, context + 1) for row in rows] for rows in items[first : first + WINDOW]]
                window = [dict(enumerate(rows)) for rows in fitting]
                found: list[dict[int, tuple[float, bool]]] = [{} for _ in window]
                trees = [tree for item, rows in enumerate(window) for tree in grow(item, rows)]
                for batch in batches(trees, max_columns):
                    for item, choice, of_row in score(self.model, batch):
                        row = window[item][choice]
                        found[item][choice] = (-of_row.loss * (row.stop - row.start), of_row.all_likeliest)
                        bar.advance(task)
                results.extend(of_item[choice] for of_item in found for choice in sorted(of_item))
        return results

    # ---- texts ----

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of the texts that `until` names."""
        writers: dict[int, Writer] = {}  # by their number in the engine
        for i, request in enumerate(requests):
            context, settings = request.args
            options = normalize_gen_kwargs(settings)
            writer = Writer([text.encode() for text in options["until"] if text])
            writers[self.engine.add(self.request(context, options, seed=i))] = writer
        with Progress(disable=disable_tqdm) as bar:
            task = bar.add_task("texts", total=len(requests))
            while self.engine.is_busy:
                for number, token, completion in self.engine.step():
                    if token is None:
                        bar.advance(task)
                    elif writers[number].ends(self.tokens.decode_bytes([token])) and not completion.finish:
                        self.engine.cancel(number)
                        bar.advance(task)
        texts = [writer.text.decode("utf-8", errors="replace") for writer in writers.values()]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def request(self, context: str, options: Mapping[str, Any], seed: int) -> Request:
        """A context that is too long loses its beginning, and leaves half of the model's for the text at most."""
        length, max_tokens = self.model.config.sequence_len, options["max_gen_toks"]
        prompt = self.tok_encode(context)
        room = length - min(max_tokens, length // 2)
        prompt = prompt if len(prompt) <= room else [prompt[0], *prompt[len(prompt) - room + 1 :]]
        temperature = float(options["temperature"]) if options["do_sample"] else 0.0
        return Request(
            prompt, max_tokens, temperature, int(options.get("top_k", 0)), float(options.get("top_p", 1.0)), seed
        )


class Writer:
    """A text that grows until one of several texts is in it, and then ends before that."""

    def __init__(self, stops: Sequence[bytes]) -> None:
        self.stops, self.text = stops, b""

    def ends(self, more: bytes) -> bool:
        """Adds bytes; True when there is nothing to add any more."""
        self.text += more
        found = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)


def main() -> None:
    try:
        cli_evaluate()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
