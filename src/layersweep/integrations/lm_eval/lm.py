"""What lm-eval calls a model: text in, numbers and text out, under one arm.

Tokens are those of lm-eval's HF backend: transformers' tokenizer, lm-eval's own way to split a
context from its continuation and a text into windows, and the same cuts where a text is too long.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from layersweep.errors import Fallback, GateError, InputError
from layersweep.integrations.lm_eval.generation import Context, sampling_of
from layersweep.integrations.lm_eval.harness import Harness
from layersweep.integrations.lm_eval.scoring import EXACT_CACHE, HarnessArm, harness_arms
from layersweep.sweep.model import load


class LayersweepLM(TemplateLM):
    """One arm of a harness. Whichever arm is asked first, all of them are computed."""

    def __init__(self, harness: Harness, arm: HarnessArm) -> None:
        super().__init__()
        self.harness, self.arm = harness, arm
        self.tokenizer = harness.tokenizer
        self._place = harness.arms.index(arm)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or the end token of a model that has
        none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        return self.harness.max_length

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Special tokens are parsed, and added unless the text begins with the first of them."""
        if add_special_tokens is None:
            first = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not has_bos_prefix(string, first)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return scores

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self.harness.scores([(context, after) for _, context, after in requests])
        self._check()
        return [scores[self._place] for scores in found]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Each text in windows of `max_length`, each token predicted once; see scoring.py."""
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
                )
            ]
            for request in requests
        ]
        pairs = [window for of_text in windows for window in of_text]
        found = iter(self.harness.scores(pairs, rolling=True))
        self._check()
        return [sum(next(found)[self._place][0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        eos: str = self.tokenizer.decode(self.eot_token_id)
        contexts = [
            Context(tuple(self._encode_context(text)), sampling_of(kwargs, eos))
            for text, kwargs in (request.args for request in requests)
        ]
        found = self.harness.answers(contexts)
        self._check()
        return [
            postprocess_generated_text(
                self.tokenizer.decode(tokens[self._place], skip_special_tokens=True),
                list(context.sampling.stop), None,
            )
            for context, tokens in zip(contexts, found, strict=True)
        ]  # fmt: skip

    def _encode_context(self, text: str) -> list[int]:
        """As lm-eval's HF backend encodes batches: here the first special token is BOS alone. An
        empty context, which that backend cannot continue, is what stands before a text."""
        plain = has_bos_prefix(text, self.tokenizer.bos_token)
        ids = self.tok_encode(text, add_special_tokens=not plain)
        return ids or [self.prefix_token_id]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A template that refuses the chat gets it without its system messages, as in lm-eval's HF
        backend; that is said once."""
        try:
            return self._render(chat_history, add_generation_prompt)
        except TemplateError as error:
            rest = [one for one in chat_history if one["role"] != "system"]
            if len(rest) == len(chat_history):
                raise InputError(
                    f"--apply-chat-template: found a chat that the template refuses ({error})",
                    hint="leave it out, or see the task's messages",
                ) from error
            self.harness.say_once(
                Fallback("chat template", "system messages", "the chat without them", str(error))
            )
            return self._render(rest, add_generation_prompt)

    def _render(self, chat: list[dict[str, str]], add_generation_prompt: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return text

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's results file says of the model."""
        model = self.harness.model
        return {
            "model_dtype": str(model.compute.dtype).removeprefix("torch."),
            "model_weights": model.checkpoint.weights_kind,
            "model_fingerprint": model.checkpoint.fingerprint,
            "kv": self.arm.whole.name,
            "kv_growing": self.arm.growing.name,
        }

    def _check(self) -> None:
        """Raises GateError if this arm gave something that is not finite."""
        why = self.harness.ill.get(self.arm)
        if why is not None:
            raise GateError(
                f"lm-eval: {self.arm.name} gives {why}",
                hint="try --dtype bfloat16 or float32, or leave the arm out",
            )


@register_model("layersweep")
class PretrainedLM(LayersweepLM):
    """`lm_eval --model layersweep --model_args pretrained=DIR,kv=K3V2`: one arm of one model."""

    def __init__(
        self, pretrained: str = "demo", kv: str = "exact", revision: str | None = None,
        vram: str = "auto", ram: str = "auto", device: str = "auto", dtype: str = "auto",
        weights: str = "auto", router_dtype: str = "float32", max_length: int | None = None,
        batch_size: int | str | None = None, max_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        """Options as those of `layersweep lm-eval`. lm-eval hands batch sizes to every model; a
        sweep takes all requests at once, whatever they say. Raises InputError for several arms."""
        arms = harness_arms(kv) or [EXACT_CACHE]
        if len(arms) > 1:
            raise InputError(
                f"kv={kv}: found {len(arms)} arms, needed one for lm-eval's own command",
                hint="`layersweep lm-eval --kv A,B` measures them in one sweep",
            )
        model = load(
            pretrained, revision=revision, vram=vram, ram=ram, device=device, dtype=dtype,
            weights=weights, router_dtype=router_dtype,
        )  # fmt: skip
        super().__init__(Harness.of(model, arms, max_length), arms[0])
