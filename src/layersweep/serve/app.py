"""The endpoints: bodies in, requests to the engine, replies out."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from layersweep.errors import InputError, LayersweepError
from layersweep.generate.request import Request, Sampling, Steps
from layersweep.kv.arms import Arm
from layersweep.problems import show
from layersweep.serve.answer import ChatStyle, CompletionStyle, Speller, Style, Words
from layersweep.serve.engine import Engine
from layersweep.serve.guard import Guard, Limits
from layersweep.serve.metrics import CONTENT_TYPE, Metrics
from layersweep.serve.refusal import Refusal, refusal_of, refusal_of_body
from layersweep.serve.reply import Reply
from layersweep.serve.schema import Body, ChatBody, ChatMessage, CompletionBody
from layersweep.text.bos import resolve_bos
from layersweep.text.chat import Message
from layersweep.text.tokenizer import TextTokenizer

Ids = tuple[int, ...]
OPENAI = Sampling(do_sample=True, top_k=0)  # its defaults: all tokens, at temperature 1
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Offer:
    """What is served. `arms`: those a request may name, the first is the default; `longest`: tokens
    of prompt and answer together; `sampling`: where a request does not say; `key`: of the API, None
    for none."""

    name: str
    tokenizer: TextTokenizer
    arms: tuple[Arm, ...]
    longest: int
    sampling: Sampling = OPENAI
    limits: Limits = field(default_factory=Limits)
    key: str | None = None

    def arm(self, name: str | None) -> Arm:
        """By its resolved name or as the server's user wrote it."""
        if name is None:
            return self.arms[0]
        for arm in self.arms:
            if name.lower() in (arm.name.lower(), arm.requested.lower()):
                return arm
        offered = ", ".join(arm.name for arm in self.arms)
        raise Refusal(400, f"kv: found {show(name)}, needed one of {offered}", param="kv")


class Service:
    """What is served, the engine behind it, and whether it is still open."""

    def __init__(
        self, offer: Offer, steps: Steps, say: Callable[[str], None],
        weight_bytes: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        self.offer, self.say, self.weight_bytes = offer, say, weight_bytes
        self.metrics = Metrics()
        self.engine = Engine(steps, self.metrics, max_waiting=offer.limits.max_waiting)
        self.stopping = False

    def app(self) -> Guard:
        """The ASGI application."""
        return Guard(
            _endpoints(self), self.offer.limits, self.metrics, key=self.offer.key,
            stopping=lambda: self.stopping,
        )  # fmt: skip

    def reply(self, body: Body, prompts: Sequence[Ids], most: Sequence[int], style: Style) -> Reply:
        """Queue the sequences of a request. `most`: new tokens, a number for each prompt."""
        arm, own = self.offer.arm(body.kv), self.offer.sampling
        name = f"{style.prefix}-{secrets.token_hex(8)}"
        requests = [
            Request(
                f"{name}.{at}.{choice}",
                ids,
                body.sampling(own, most[at], choice),
                arm,
                style.continues,
            )
            for at, ids in enumerate(prompts)
            for choice in range(body.n)
        ]
        words = Words(self.offer.tokenizer, body.top)
        return Reply(
            self.engine, self.engine.submit(requests),
            Speller(style, name, self.offer.name, words),
            n=body.n, stream=body.stream, usage=body.stream_options.include_usage, say=self.say,
        )  # fmt: skip

    def check_model(self, name: str) -> None:
        if name != self.offer.name:
            raise Refusal(
                404, f"model: found {show(name)}, needed {self.offer.name!r}, which is served here",
                param="model", code="model_not_found",
            )  # fmt: skip


def _endpoints(service: Service) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    offer = service.offer

    @app.post("/v1/completions")
    async def completions(body: CompletionBody) -> Response:
        service.check_model(body.model)
        service.engine.check_room(len(body.prompt) * body.n)  # before the work of tokenizing
        prompts = [await _in_thread(prompt_ids, offer.tokenizer, one) for one in body.prompt]
        return service.reply(body, prompts, [body.max_tokens] * len(prompts), CompletionStyle())

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody) -> Response:
        service.check_model(body.model)
        service.engine.check_room(body.n)
        ids = await _in_thread(chat_ids, offer.tokenizer, body.messages)
        most = body.max_completion_tokens or body.max_tokens or max(1, offer.longest - len(ids))
        return service.reply(body, [ids], [most], ChatStyle())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(offer)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(offer)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}  # the guard answers 503 once the server stops

    @app.get("/metrics")
    async def metrics() -> Response:
        engine = service.engine
        text = service.metrics.text(
            running=engine.running, waiting=engine.waiting, weight_bytes=service.weight_bytes()
        )
        return Response(text, media_type=CONTENT_TYPE)

    @app.exception_handler(Refusal)
    async def refused(request: HttpRequest, refusal: Refusal) -> Response:
        return _error(refusal)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: HttpRequest, error: RequestValidationError) -> Response:
        return _error(refusal_of_body(error.errors()))

    @app.exception_handler(HTTPException)
    async def failed(request: HttpRequest, error: HTTPException) -> Response:
        return _error(
            Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        )

    return app


def prompt_ids(tokenizer: TextTokenizer, prompt: str | list[int]) -> Ids:
    """Token ids as they are; of a text with BOS where the tokenizer's default call puts it."""
    if not isinstance(prompt, str):
        return tuple(prompt)
    bos = resolve_bos(tokenizer, "auto")
    return (*([] if bos is None else [bos]), *tokenizer.encode(prompt))


def chat_ids(tokenizer: TextTokenizer, messages: Sequence[ChatMessage]) -> Ids:
    """Through the template, to where the answer starts. Special tokens in a message stay text."""
    if not messages:
        raise InputError("messages: found none, needed one or more", hint="say something as user")
    for place, message in enumerate(messages):
        if message.role not in ROLES:
            raise InputError(
                f"messages.{place}.role: found {show(message.role)}, needed {', '.join(ROLES)}"
            )
    return tuple(tokenizer.encode_messages([Message(one.role, one.text) for one in messages]))


async def _in_thread(call: Callable[..., Ids], *arguments: object) -> Ids:
    """Templates and long texts take a while. What they refuse becomes a status."""
    try:
        return await asyncio.to_thread(call, *arguments)
    except LayersweepError as error:
        raise refusal_of(error) from error


def _model(offer: Offer) -> dict[str, Any]:
    """OpenAI's object, and the caches that a request may name."""
    return {
        "id": offer.name,
        "object": "model",
        "created": 0,
        "owned_by": "layersweep",
        "max_model_len": offer.longest,
        "kv": [arm.name for arm in offer.arms],
    }


def _error(refusal: Refusal) -> Response:
    return Response(refusal.body, refusal.status, refusal.headers, media_type="application/json")
