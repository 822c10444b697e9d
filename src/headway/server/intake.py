"""From a checked body and its headers to the requests that an engine understands.

Owns defaults, tokenizing and templates; knows neither the engine nor the shape of answers.
"""

import asyncio
import itertools
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from headway.config import SloClass
from headway.core.request import Request, Sampling
from headway.models.chat_template import RESERVED, ChatTemplateError
from headway.models.tokenizer import LONG_CHARACTERS, ModelText
from headway.server.errors import ApiError, bad_request
from headway.server.schema import MAX_CHOICES, Body, ChatBody, CompletionBody, Message
from headway.server.terms import terms_of

DEFAULT_COMPLETION_TOKENS = 16
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Ask:
    """One call, understood. `requests[p * n + i]` is sample i of prompt p, and its place is the choice's index."""

    id: str
    model: str
    requests: tuple[Request, ...]
    num_prompts: int
    stops: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    stream: bool
    include_usage: bool


def request_id(headers: Mapping[str, str]) -> str:
    """The caller's X-Request-Id if it is a decent one, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)


class Intake:
    """Turns bodies into asks for one model."""

    def __init__(self, text: ModelText, served_names: tuple[str, ...], classes: tuple[SloClass, ...] = ()) -> None:
        self._text = text
        self._names = served_names
        self._classes = {one.name: one for one in classes}

    async def completion(
        self, body: CompletionBody, headers: Mapping[str, str], call_id: str, arrival: float, max_model_len: int
    ) -> Ask:
        """Raises ApiError 400 or 404."""
        model = self._check_model(body.model)
        given = body.prompts
        num_choices = len(given) * (body.n or 1)
        if not 0 < num_choices <= MAX_CHOICES:
            raise bad_request(f"`prompt` times `n` must make 1 to {MAX_CHOICES} answers, not {num_choices}.", "prompt")
        inline = sum(len(prompt) for prompt in given) <= LONG_CHARACTERS
        prompts = []
        for prompt in given:
            if isinstance(prompt, str):
                special = body.add_special_tokens is not False
                ids = await self._encode(prompt, max_model_len, "prompt", inline=inline, add_special_tokens=special)
            else:
                ids = tuple(prompt)
            prompts.append(self._check_prompt(ids, max_model_len, "prompt"))
        return self._ask(
            f"cmpl-{call_id}",
            model,
            body,
            headers,
            arrival,
            prompts,
            body.max_tokens or self._default_tokens(DEFAULT_COMPLETION_TOKENS),
        )

    async def chat(
        self, body: ChatBody, headers: Mapping[str, str], call_id: str, arrival: float, max_model_len: int
    ) -> Ask:
        """Raises ApiError 400 or 404."""
        model = self._check_model(body.model)
        rendered = await asyncio.to_thread(self._render, body)
        inline = len(rendered) <= LONG_CHARACTERS
        special = bool(body.add_special_tokens)  # templates bring their own
        ids = await self._encode(rendered, max_model_len, "messages", inline=inline, add_special_tokens=special)
        prompt = self._check_prompt(ids, max_model_len, "messages")
        asked = body.max_completion_tokens or body.max_tokens
        max_tokens = asked or self._default_tokens(max_model_len - len(prompt))
        return self._ask(f"chatcmpl-{call_id}", model, body, headers, arrival, [prompt], max_tokens)

    def _check_model(self, name: str | None) -> str:
        if not name:
            return self._names[0]
        if name not in self._names:
            served = ", ".join(self._names)
            raise ApiError(
                404, "model_not_found", f"The model {name[:100]!r} is not served here: {served} is.", param="model"
            )
        return name

    def _render(self, body: ChatBody) -> str:
        template = self._text.chat_template
        if template is None:
            raise bad_request(
                "This model has no chat template: use /v1/completions, or start the server with --chat-template.",
                "messages",
                "no_chat_template",
            )
        arguments = body.chat_template_kwargs or {}
        reserved = sorted(RESERVED.intersection(arguments))
        if reserved:
            raise bad_request(f"`chat_template_kwargs` may not set {reserved[0]}.", "chat_template_kwargs")
        try:
            return template.render([_plain(message) for message in body.messages], arguments)
        except ChatTemplateError as error:
            raise bad_request(str(error), "messages", "chat_template_error") from error

    async def _encode(
        self, text: str, max_model_len: int, param: str, *, inline: bool, add_special_tokens: bool
    ) -> tuple[int, ...]:
        """`inline`: in the event loop, since for little text a thread costs more than it saves."""
        tokenizer = self._text.tokenizer
        if inline:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        at_least = len(text) // await asyncio.to_thread(lambda: tokenizer.longest_token)
        if at_least >= max_model_len:  # no need to tokenize megabytes to know that
            raise _too_long(f"at least {at_least}", max_model_len, param)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)

    def _check_prompt(self, ids: tuple[int, ...], max_model_len: int, param: str) -> tuple[int, ...]:
        if not ids:
            raise bad_request("The prompt is empty: give at least one token.", param, "empty_prompt")
        if len(ids) >= max_model_len:
            raise _too_long(str(len(ids)), max_model_len, param)
        vocab_size = self._text.tokenizer.vocab_size
        if max(ids) >= vocab_size:
            raise bad_request(f"Token id {max(ids)} is not in the vocabulary of {vocab_size}.", param)
        return ids

    def _default_tokens(self, otherwise: int) -> int:
        return int(self._text.sampling_defaults.get("max_new_tokens", otherwise))

    def _ask(
        self,
        public_id: str,
        model: str,
        body: Body,
        headers: Mapping[str, str],
        arrival: float,
        prompts: list[tuple[int, ...]],
        max_tokens: int,
    ) -> Ask:
        min_tokens = body.min_tokens or 0
        if min_tokens > max_tokens:
            raise bad_request(f"`min_tokens` {min_tokens} is more than max_tokens {max_tokens}.", "min_tokens")
        terms = terms_of(body, headers, self._classes)
        eos_ids = () if body.ignore_eos else self._text.tokenizer.eos_ids
        stop_ids = tuple(dict.fromkeys((*eos_ids, *(body.stop_token_ids or ()))))
        # engines know a request by an id of our own: callers may send the same X-Request-Id twice
        call = next(_serial)
        requests = tuple(
            Request(
                id=f"{public_id}/{call}.{index}",
                prompt=prompt,
                max_tokens=max_tokens,
                arrival=arrival,
                slo=terms.slo,
                sampling=self._sampling(body, seed),
                stop_ids=stop_ids,
                min_tokens=min_tokens,
                priority=terms.priority,
                tenant=terms.tenant,
                slo_class=terms.slo_class,
                cache_salt=body.cache_salt or "",
            )
            for index, (prompt, seed) in enumerate(_samples(prompts, body.n or 1, body.seed))
        )
        return Ask(
            id=public_id,
            model=model,
            requests=requests,
            num_prompts=len(prompts),
            stops=body.stops,
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            stream=bool(body.stream),
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
        )

    def _sampling(self, body: Body, seed: int) -> Sampling:
        defaults = self._text.sampling_defaults

        def chosen(said: float | None, name: str, otherwise: float) -> float:
            return defaults.get(name, otherwise) if said is None else said

        return Sampling(
            temperature=float(chosen(body.temperature, "temperature", 1.0)),
            top_p=float(chosen(body.top_p, "top_p", 1.0)),
            top_k=max(0, int(chosen(body.top_k, "top_k", 0))),
            min_p=float(chosen(body.min_p, "min_p", 0.0)),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=float(chosen(body.repetition_penalty, "repetition_penalty", 1.0)),
            logit_bias=self._bias(body),
            seed=seed,
            num_logprobs=body.num_logprobs,
        )

    def _bias(self, body: Body) -> tuple[tuple[int, float], ...]:
        vocab_size = self._text.tokenizer.vocab_size
        bias = []
        for key, value in (body.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
                raise bad_request(
                    f"`logit_bias` has the key {key[:20]!r}, which is no token id below {vocab_size}.", "logit_bias"
                )
            bias.append((int(key), value))
        return tuple(bias)


def _samples(prompts: list[tuple[int, ...]], n: int, seed: int | None) -> Iterator[tuple[tuple[int, ...], int]]:
    """Prompts with a seed each. Sample k has the seed `seed` + k, so a prompt gets the same answers among others as
    by itself; without a seed all of them differ."""
    for prompt in prompts:
        for sample in range(n):
            yield prompt, secrets.randbits(63) if seed is None else (seed + sample) % 2**63


def _plain(message: Message) -> dict[str, str]:
    """A message as templates expect it. They know the developer by an older name."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text or "" for part in content)
    plain = {"role": "system" if message.role == "developer" else message.role, "content": content or ""}
    return plain if message.name is None else plain | {"name": message.name}


def _too_long(num_tokens: str, max_model_len: int, param: str) -> ApiError:
    return bad_request(
        f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains {num_tokens} "
        "input tokens. Please shorten it so that at least one token of an answer fits.",
        param,
        "context_length_exceeded",
    )
