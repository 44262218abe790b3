"""vLLM servers as a model of lm-eval: token ids both ways, so that a server needs no tokenizer.

Only :mod:`nemo_paced.evaluation.lm_eval_tasks` imports this module, once lm-eval is known to be
installed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import postprocess_generated_text

from nemo_paced.data.chat import ChatTemplate
from nemo_paced.serving.engine import SERVED_NAME
from nemo_paced.serving.vllm_engine import COMPLETIONS

FAILED = (aiohttp.ClientError, asyncio.TimeoutError)  # errors of a request after all its retries
MAX_TRIES = 5


class ServedModel(LocalCompletionsAPI):
    """lm-eval's ``local-completions`` on servers of one model, which take turns.

    A text that a task wants to end at a string goes on to its token limit or to EOS, and is cut
    here.

    Args:
        hf_dir: for its tokenizer.
        stop_token_ids: tokens that end an answer.
        max_length: of prompt and answer, tokens; longer prompts lose their beginning.
        num_concurrent: requests in flight.
        timeout_s: of a request, seconds.
        chat: what makes a prompt of a chat, special tokens included; ``None``: prompts are no
            chats.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        api_key: str,
        *,
        hf_dir: Path,
        max_length: int,
        num_concurrent: int,
        timeout_s: float,
        stop_token_ids: Sequence[int],
        chat: ChatTemplate | None,
    ) -> None:
        super().__init__(
            model=SERVED_NAME,
            base_url=[f"{endpoint}{COMPLETIONS.path}" for endpoint in endpoints],
            header={"Authorization": f"Bearer {api_key}"},
            tokenizer=str(hf_dir),
            tokenizer_backend="huggingface",
            max_length=max_length,
            num_concurrent=max(2, num_concurrent),  # 1 takes another path, which reads proxies
            max_retries=MAX_TRIES,
            timeout=round(timeout_s),
        )
        # BOS as the model was trained with; lm-eval's own transformers model does so too
        self.add_bos_token = chat is None and self.tokenizer("").input_ids != []
        self._stop_token_ids = list(stop_token_ids)
        self._chat = chat
        self._until: list[str] = []

    @property
    def base_url(self) -> str:
        """URL of the server whose turn it is: the next one at each reading."""
        return next(self._urls)

    @base_url.setter
    def base_url(self, urls: Sequence[str]) -> None:
        self._urls = itertools.cycle(urls)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Text of a chat, with the system turn and the variables of the run's template."""
        assert self._chat is not None, "asked for by evaluation.lm_eval.apply_chat_template alone"
        return self._chat.of_turns(chat_history, add_generation_prompt=add_generation_prompt)

    def _create_payload(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        payload = super()._create_payload(*args, **kwargs)
        if "stop" in payload:
            self._until = payload.pop("stop")  # the same for all requests in flight: see Collator
            payload["stop_token_ids"] = self._stop_token_ids
        return payload | {
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "detokenize": False,
        }

    def parse_generations(self, outputs: Any, **kwargs: Any) -> list[str]:
        """Texts of the servers' answers, cut at the strings that the task ends them at."""
        outputs = outputs if isinstance(outputs, list) else [outputs]
        choices = [c for out in outputs for c in sorted(out["choices"], key=lambda c: c["index"])]
        texts = self.tokenizer.batch_decode(
            [choice["token_ids"] for choice in choices], skip_special_tokens=True
        )
        return [postprocess_generated_text(text, self._until, None) for text in texts]
