"""From a checked body and its headers to the requests that an engine understands.

Owns defaults, tokenizing and templates; knows neither the engine nor the shape of answers.
"""

import asyncio
import itertools
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from headway.config import SloClass
from headway.core.request import Request
from headway.grammar.calls import MARKS, Reading
from headway.models.chat_template import RESERVED, ChatTemplateError
from headway.models.infill import Infill
from headway.models.tokenizer import LONG_CHARACTERS, ModelText
from headway.server.checks import Checks
from headway.server.errors import ApiError, bad_request
from headway.server.formats import Asked, asked_format, is_formatted
from headway.server.messages import plain
from headway.server.responses import ResponsesBody
from headway.server.sampling import samples, sampling_of
from headway.server.schema import (
    MAX_CHOICES,
    MAX_SCORES,
    MAX_TOKENIZED,
    Body,
    ChatBody,
    CompletionBody,
    TokenizeBody,
)
from headway.server.terms import terms_of
from headway.server.tools import ToolUse, tool_use

DEFAULT_COMPLETION_TOKENS = 16
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_serial = itertools.count()
Encode = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Ask:
    """One call, understood. `requests[p * d + i]` is sample i of prompt p, if d are drawn of each, of which the best
    `num_answers` are shown; if all of them are, the place of a request is the choice's index.

    `echoes` are the prompts as text, where they are to stand before their answers. Of logprobs, `num_logprobs` and
    `num_prompt_logprobs` are shown; None: none. `own_stop_ids` end an answer without being named in it.
    Where it may call tools, `calls` says how to read it.
    """

    id: str
    model: str
    requests: tuple[Request, ...]
    num_prompts: int
    stops: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool = False
    num_answers: int = 1
    echoes: tuple[str, ...] = ()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    own_stop_ids: frozenset[int] = frozenset()
    calls: Reading | None = None

    @property
    def num_drawn(self) -> int:
        """Answers to each prompt, shown or not."""
        return len(self.requests) // self.num_prompts

    @property
    def scores_prompts(self) -> bool:
        return self.requests[0].sampling.num_prompt_logprobs is not None

    def echo_of(self, place: int) -> str | None:
        """What is to stand before the answer of this request, if anything."""
        return self.echoes[place // self.num_drawn] if self.echoes else None


def request_id(headers: Mapping[str, str]) -> str:
    """The caller's X-Request-Id if it is a decent one, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)


class Intake:
    """Turns bodies into asks for one model."""

    def __init__(self, text: ModelText, served_names: tuple[str, ...], classes: tuple[SloClass, ...] = ()) -> None:
        self._text = text
        self._infill: Infill | None = None
        self._infill_is_known = False
        self._names = served_names
        self._checks = Checks(text.tokenizer)
        marks = {mark: text.tokenizer.token_id(mark) for mark in MARKS}
        self._mark_tokens = text.tokenizer.added_tokens | {m: token for m, token in marks.items() if token is not None}
        self._classes = {one.name: one for one in classes}

    async def completion(
        self, body: CompletionBody, headers: Mapping[str, str], call_id: str, arrival: float, max_model_len: int
    ) -> Ask:
        """Raises ApiError 400 or 404."""
        model = self.check_model(body.model)
        given = body.prompts
        num_choices = len(given) * body.num_samples
        if not 0 < num_choices <= MAX_CHOICES:
            raise bad_request(
                f"`prompt` times `n` (or `best_of`) must make 1 to {MAX_CHOICES} answers, not {num_choices}.", "prompt"
            )
        asked = await asyncio.to_thread(asked_format, body) if is_formatted(body) else None
        if asked is not None:
            await self._checks.approve(asked)
        infill = await self._infill_for(body, given)
        special = body.add_special_tokens is not False
        suffix = body.suffix or ""
        ends: tuple[int, ...] = ()
        encode: Encode = partial(self._text.tokenizer.encode, add_special_tokens=special)
        if infill is not None:
            ends = infill.end_ids
            encode = partial(infill.prompt, suffix=suffix, add_special_tokens=special)
        inline = sum(len(prompt) + len(suffix) for prompt in given) <= LONG_CHARACTERS
        prompts = []
        for prompt in given:
            if isinstance(prompt, str):
                ids = await self._encode(prompt, max_model_len, "prompt", encode, inline=inline, beside=len(suffix))
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
            self._default_tokens(DEFAULT_COMPLETION_TOKENS) if body.max_tokens is None else body.max_tokens,
            asked=asked,
            ends=ends,
            echoes=tuple(map(self._as_text, given)) if body.echo else (),
        )

    async def _infill_for(self, body: CompletionBody, given: Sequence[str | list[int]]) -> Infill | None:
        """How the model is asked for what stands before the suffix; None if there is none."""
        if not body.suffix:
            return None
        if not all(isinstance(prompt, str) for prompt in given):
            raise bad_request("With a `suffix`, give the `prompt` as text: the model's marks go around it.", "prompt")
        if not self._infill_is_known:
            self._infill = await asyncio.to_thread(Infill.of, self._text.tokenizer)
            self._infill_is_known = True
        if self._infill is None:
            raise bad_request(
                "This model cannot fill in the middle, its vocabulary has no sentinels for that: leave `suffix` out.",
                "suffix",
                "unsupported_parameter",
            )
        return self._infill

    def _as_text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._text.tokenizer.decode(prompt, skip_special_tokens=False)

    async def chat(
        self,
        body: ChatBody,
        headers: Mapping[str, str],
        call_id: str,
        arrival: float,
        max_model_len: int,
        prefix: str = "chatcmpl-",
    ) -> Ask:
        """Raises ApiError 400 or 404."""
        model = self.check_model(body.model)
        use, rendered = await asyncio.to_thread(self._understand, body)
        if use.asked is not None:
            await self._checks.approve(use.asked, use.parts)
        inline = len(rendered) <= LONG_CHARACTERS
        special = bool(body.add_special_tokens)  # templates bring their own
        encode = partial(self._text.tokenizer.encode, add_special_tokens=special)
        ids = await self._encode(rendered, max_model_len, "messages", encode, inline=inline)
        prompt = self._check_prompt(ids, max_model_len, "messages")
        said = body.max_completion_tokens or body.max_tokens
        max_tokens = said or self._default_tokens(max_model_len - len(prompt))
        name = f"{prefix}{call_id}"
        ask = self._ask(name, model, body, headers, arrival, [prompt], max_tokens, asked=use.asked)
        if use.reading is None:
            return ask
        return replace(ask, calls=use.reading, skip_special_tokens=False)  # marks may be special ones

    def _understand(self, body: ChatBody) -> tuple[ToolUse, str]:
        """Which tools it may use, and the prompt."""
        template = self._text.chat_template
        use = tool_use(
            body.tools or [],
            body.tool_choice,
            several=body.parallel_tool_calls is not False,
            template="" if template is None else template.source,
            tokens=self._mark_tokens,
            answer=asked_format(body),
        )
        return use, self._render(body, use.told)

    async def response(
        self, body: ResponsesBody, headers: Mapping[str, str], call_id: str, arrival: float, max_model_len: int
    ) -> Ask:
        """Raises ApiError 400 or 404."""
        chat = body.as_chat()
        try:
            return await self.chat(chat, headers, call_id, arrival, max_model_len, "resp_")
        except ApiError as error:
            param = error.param or ""
            if param == "messages":  # its name in a chat
                error.param = "input"
            elif param.startswith("response_format"):
                error.param = "text.format"
            raise

    async def tokens_of(self, body: TokenizeBody) -> tuple[int, ...]:
        """The ids of a text or a rendered conversation. Raises ApiError 400."""
        if body.messages is None:
            text, special = body.prompt or "", body.add_special_tokens is not False
        else:
            chat = ChatBody(messages=body.messages, chat_template_kwargs=body.chat_template_kwargs)
            text, special = await asyncio.to_thread(self._render, chat), bool(body.add_special_tokens)
        if len(text) > MAX_TOKENIZED:
            raise bad_request(f"The conversation has over {MAX_TOKENIZED} characters: send it in parts.", "messages")
        encode = partial(self._text.tokenizer.encode, add_special_tokens=special)
        return encode(text) if len(text) <= LONG_CHARACTERS else await asyncio.to_thread(encode, text)

    def check_model(self, name: str | None) -> str:
        """The name under which it is served. Raises ApiError 404."""
        if not name:
            return self._names[0]
        if name not in self._names:
            served = ", ".join(self._names)
            raise ApiError(
                404, "model_not_found", f"The model {name[:100]!r} is not served here: {served} is.", param="model"
            )
        return name

    def _render(self, body: ChatBody, tools: Sequence[Mapping[str, Any]] = ()) -> str:
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
            return template.render([plain(message) for message in body.messages], arguments, tools)
        except ChatTemplateError as error:
            raise bad_request(str(error), "messages", "chat_template_error") from error

    async def _encode(
        self, text: str, max_model_len: int, param: str, encode: Encode, *, inline: bool, beside: int = 0
    ) -> tuple[int, ...]:
        """`inline`: in the event loop, since for little text a thread costs more than it saves. `beside`: so many other
        characters are encoded with it."""
        if inline:
            return encode(text)
        longest = await asyncio.to_thread(lambda: self._text.tokenizer.longest_token)
        at_least = (len(text) + beside) // longest
        if at_least >= max_model_len:  # no need to tokenize megabytes to know that
            raise _too_long(f"at least {at_least}", max_model_len, param)
        return await asyncio.to_thread(encode, text)

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
        *,
        asked: Asked | None = None,
        ends: tuple[int, ...] = (),
        echoes: tuple[str, ...] = (),
    ) -> Ask:
        min_tokens = body.min_tokens or 0
        if min_tokens > max_tokens:
            raise bad_request(f"`min_tokens` {min_tokens} is more than max_tokens {max_tokens}.", "min_tokens")
        terms = terms_of(body, headers, self._classes)
        own_stop_ids = () if body.ignore_eos else (*self._text.tokenizer.eos_ids, *ends)
        stop_ids = tuple(dict.fromkeys((*own_stop_ids, *(body.stop_token_ids or ()))))
        self._check_scores(body, prompts)
        sampling = sampling_of(body, self._text, None if asked is None else asked.constraint)
        # engines know a request by an id of our own: callers may send the same X-Request-Id twice
        call = next(_serial)
        requests = tuple(
            Request(
                id=f"{public_id}/{call}.{index}",
                prompt=prompt,
                max_tokens=max_tokens,
                arrival=arrival,
                slo=terms.slo,
                sampling=replace(sampling, seed=seed),
                stop_ids=stop_ids,
                min_tokens=min_tokens,
                priority=terms.priority,
                tenant=terms.tenant,
                slo_class=terms.slo_class,
                cache_salt=body.cache_salt or "",
            )
            for index, (prompt, seed) in enumerate(samples(prompts, body.num_samples, body.seed))
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
            continuous_usage=bool(body.stream_options and body.stream_options.continuous_usage_stats),
            num_answers=body.n or 1,
            echoes=echoes,
            num_logprobs=body.num_logprobs,
            num_prompt_logprobs=body.prompt_logprobs,
            own_stop_ids=frozenset(own_stop_ids),
        )

    def _check_scores(self, body: Body, prompts: list[tuple[int, ...]]) -> None:
        """What is told of every token of a prompt is made, sent and held at once: not without limit."""
        if body.num_prompt_logprobs is None:
            return
        num_scores = sum(map(len, prompts)) * body.num_samples * (body.num_prompt_logprobs + 1)
        if num_scores > MAX_SCORES:
            param = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
            raise bad_request(
                f"The tokens of the prompts times their logprobs make {num_scores}, more than {MAX_SCORES}: "
                f"ask for fewer `{param}`, or send the prompts one by one.",
                param,
            )


def _too_long(num_tokens: str, max_model_len: int, param: str) -> ApiError:
    return bad_request(
        f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains {num_tokens} "
        "input tokens. Please shorten it so that at least one token of an answer fits.",
        param,
        "context_length_exceeded",
    )
