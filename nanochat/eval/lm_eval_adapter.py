"""
Makes checkpoints available to the lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), an
optional package: pip install -c constraints.txt -e '.[lm-eval]'. Importing this module registers the model "nanochat".
As a command, it has the flags of the harness:

    python -m nanochat.eval.lm_eval_adapter --model nanochat --model_args source=base --tasks lambada_openai
    python -m nanochat.eval.lm_eval_adapter --model nanochat --model_args source=sft --tasks gsm8k --batch_size 32

model_args are source (base, mid, sft, rl), model_tag and step, as in the scripts. Prompts are plain text after BOS, for
chat models too; scripts/chat_eval.py evaluates with the chat template. Likelihoods use the prefix sharing and batching
of core.py. --batch_size is how many texts are generated at a time.
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
from nanochat.engine import Engine
from nanochat.eval.chat import truncate_prompt
from nanochat.eval.core import ITEMS_AT_A_TIME, score_items
from nanochat.eval.core_tasks import ScoredPrompt, truncate_left
from nanochat.request import Request

AUTO_BATCH_SIZE = 32  # with --batch_size auto; heuristic, not tuned

# A request of the harness: (context, continuation) as texts, tokens of the context, tokens of the continuation.
TokenizedRequest = tuple[tuple[str, str], list[int], list[int]]


@register_model("nanochat")
class NanochatLM(TemplateLM):
    def __init__(
        self,
        source: str = "base",
        model_tag: str = "",
        step: int = -1,
        device: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # upper limit of the batch size "auto"
    ) -> None:
        super().__init__()
        torch_device = hardware.pick_device(device)
        dtype = hardware.pick_dtype(torch_device)
        self.model, self.tokens, _ = checkpoint_manager.load_model(source, str(model_tag), step, torch_device, dtype)
        hardware.tune_process(torch_device)
        if str(batch_size).startswith("auto"):
            num_rows = min(AUTO_BATCH_SIZE, max_batch_size or AUTO_BATCH_SIZE)
        else:
            num_rows = int(batch_size)
        self.engine = Engine(self.model, self.tokens, num_rows)

    # ---- the interface of TemplateLM ----

    @property
    def eot_token_id(self) -> int:
        return self.tokens.bos

    def tok_encode(self, string: str, add_special_tokens: bool = True, **kwargs: Any) -> list[int]:
        ids = self.tokens.encode(string)
        return [self.tokens.bos, *ids] if add_special_tokens else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenizedRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns for each continuation its log-probability in nats and whether each token is the most likely one."""
        items = []
        for _, group in groupby(requests, key=lambda request: request[0][0]):  # the choices of one question
            prompts = []
            for _, context, continuation in group:
                tokens = [*context, *continuation]
                # The continuation has no tokens if it merged with the last token of the context: score that one.
                start = min(len(context), len(tokens) - 1)
                prompts.append(ScoredPrompt(tokens, start, len(tokens)))
            items.append(prompts)
        results = self.score(items, disable_tqdm)
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns log-probabilities of whole texts, in nats. A text longer than the context is scored in pieces."""
        pieces_by_text = []
        for request in requests:
            [text] = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            pieces = []
            windows = get_rolling_token_windows(ids, self.tokens.bos, self.model.config.sequence_len, context_len=1)
            for read, predicted in windows:
                tokens = [*read, predicted[-1]]
                pieces.append(ScoredPrompt(tokens, len(tokens) - len(predicted), len(tokens)))
            pieces_by_text.append(pieces)
        results = iter(self.score([[piece] for pieces in pieces_by_text for piece in pieces], disable_tqdm))
        totals = []
        for request, pieces in zip(requests, pieces_by_text, strict=True):
            total = math.fsum(next(results)[0] for _ in pieces)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            totals.append(total)
        return totals

    @torch.inference_mode()
    def score(self, items: Sequence[Sequence[ScoredPrompt]], disable_progress: bool) -> list[tuple[float, bool]]:
        """Scores each prompt of each item; prompts that do not fit the context are cut at the beginning."""
        max_tokens = self.model.config.sequence_len + 1  # the last token is predicted, not read
        results: list[tuple[float, bool]] = []
        with Progress(disable=disable_progress) as bar:
            task = bar.add_task("likelihoods", total=sum(len(prompts) for prompts in items))
            for first in range(0, len(items), ITEMS_AT_A_TIME):
                some_items = []
                for prompts in items[first : first + ITEMS_AT_A_TIME]:
                    some_items.append({i: truncate_left(prompt, max_tokens) for i, prompt in enumerate(prompts)})
                for prompts_by_choice, scores in zip(some_items, score_items(self.model, some_items), strict=True):
                    for choice, prompt in prompts_by_choice.items():
                        logprob = -scores[choice].loss * (prompt.stop - prompt.start)
                        results.append((logprob, scores[choice].all_most_likely))
                    bar.advance(task, len(prompts_by_choice))
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generates a text after each context, up to the first of its stop strings ("until")."""
        generated: dict[int, bytes] = {}  # by the engine's number of the request
        stops: dict[int, list[bytes]] = {}
        for i, request in enumerate(requests):
            context, settings = request.args
            options = normalize_gen_kwargs(settings)
            number = self.engine.add(self.make_request(context, options, seed=i))
            generated[number] = b""
            stops[number] = [stop.encode() for stop in options["until"] if stop]
        with Progress(disable=disable_tqdm) as bar:
            task = bar.add_task("texts", total=len(requests))
            while self.engine.is_busy:
                for number, token, completion in self.engine.step():
                    if token is None:
                        bar.advance(task)
                        continue
                    data = generated[number] + self.tokens.decode_bytes([token])
                    ends = [data.index(stop) for stop in stops[number] if stop in data]
                    generated[number] = data[: min(ends, default=None)]
                    if ends and not completion.finish:
                        self.engine.cancel(number)
                        bar.advance(task)
        texts = [text.decode("utf-8", errors="replace") for text in generated.values()]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def make_request(self, context: str, options: Mapping[str, Any], seed: int) -> Request:
        """A context that is too long is cut at the beginning; at most half of the model's context is for new text."""
        sequence_len, max_tokens = self.model.config.sequence_len, options["max_gen_toks"]
        max_prompt = sequence_len - min(max_tokens, sequence_len // 2)
        return Request(
            prompt=truncate_prompt(self.tok_encode(context), max_prompt),
            max_tokens=max_tokens,
            temperature=float(options["temperature"]) if options["do_sample"] else 0.0,
            top_k=int(options.get("top_k", 0)),
            top_p=float(options.get("top_p", 1.0)),
            seed=seed,
        )


def main() -> None:
    try:
        cli_evaluate()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
