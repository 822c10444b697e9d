"""The bodies that clients send, decoded and checked once. Behind this module the types prove validity.

Fields that nobody knows are accepted, because clients send extras. Fields that are known and would constrain the
answer, but are not supported yet, are refused: an answer that ignores a constraint is worse than none.
"""

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from headway.server.errors import ApiError, bad_request
from headway.server.formats import ResponseFormat, StructuredOutputs
from headway.server.messages import Message, check_messages
from headway.server.tools import Tool, ToolChoice, check_tools

MAX_CHOICES = 256  # prompts x n of one call
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_IDS = 1024  # entries of logit_bias, stop_token_ids
MAX_LOGPROBS = 20
MAX_SAMPLES = 128  # of one prompt
MAX_SCORES = 2**18  # logprobs of one call, its prompts' tokens times the candidates for each
MAX_TOKENIZED = 2**20  # characters of one call to /tokenize
MAX_DETOKENIZED = 2**18  # ids of one call to /detokenize

Penalty = Annotated[float, Meta(ge=-2, le=2)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Milliseconds = Annotated[float, Meta(gt=0, le=1e9)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # usage so far in every chunk; needs include_usage


class Targets(msgspec.Struct, forbid_unknown_fields=True):
    """Milliseconds: arrival to first token, between two tokens, arrival to last token; and a class for the rest."""

    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None
    total_ms: Milliseconds | None = None
    class_name: str | None = msgspec.field(default=None, name="class")


class Body(msgspec.Struct, kw_only=True):
    """What every kind of generation may ask for. None is: not said."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None  # less would overflow a logit
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_IDS)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_IDS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    priority: Int64 | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    slo: Targets | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @property
    def num_logprobs(self) -> int | None:
        """None: no logprobs. k: of the chosen token and the k best. Each body has its own fields for it."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the tokens of the prompt."""
        return self.prompt_logprobs

    @property
    def num_samples(self) -> int:
        """How many answers are drawn for each prompt, whether or not all of them are shown."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(Body, kw_only=True):
    """POST /v1/completions. With a `suffix`, what stands between it and the prompt is asked for."""

    prompt: str | list[str | TokenId | list[TokenId]]
    suffix: str | None = None
    echo: bool | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in asked if number is not None), default=None)

    @property
    def num_samples(self) -> int:
        return max(self.n or 1, self.best_of or 1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt, as text or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = {type(part) for part in self.prompt}
        if kinds == {int}:
            return [[part for part in self.prompt if isinstance(part, int)]]
        if not kinds:
            raise bad_request("The prompt is empty: give at least one token.", "prompt", "empty_prompt")
        if len(kinds) != 1:
            raise bad_request(
                "`prompt` must be a string, a list of strings, a list of ids or a list of those.", "prompt"
            )
        return [part for part in self.prompt if not isinstance(part, int)]


class ChatBody(Body, kw_only=True):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Meta(min_length=1)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """POST /tokenize: a text, or a conversation as the model's template renders it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """POST /detokenize"""

    model: str | None = None
    tokens: Annotated[list[TokenId], Meta(max_length=MAX_DETOKENIZED)]


B = TypeVar("B", bound=msgspec.Struct)

# name -> values that ask for nothing, besides empty ones; where a body has a field of that name, it is understood
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": (),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (),
    "custom_logit_processor": (),
    "documents": (),
    "ebnf": (),
    "echo": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "json_schema": (),
    "logits_processors": (),
    "modalities": (["text"],),
    "no_stop_trim": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "regex": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (),
    "return_tokens_as_token_ids": (),
    "stop_regex": (),
    "structural_tag": (),
    "structured_outputs": (),
    "suffix": (),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (),
    "web_search_options": (),
}
_ASK_EVEN_IF_EMPTY = {"add_generation_prompt": False, "prompt_logprobs": 0}
_AT = re.compile(r" - at `\$\.?(.*)`$")


def decode(content: bytes, kind: type[B]) -> B:
    """The body as a `kind`. Raises ApiError 400 that names the field."""
    try:
        fields = msgspec.json.decode(content)
    except msgspec.ValidationError as error:  # before any type is asked for, only numbers can be at fault
        raise bad_request("A number in the body is out of range: none here needs more than 64 bits.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"The body is not JSON: {_brief(error)}.", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise bad_request("The body must be a JSON object.", code="invalid_json")
    _refuse_unsupported(fields, frozenset(kind.__struct_fields__))
    try:
        body = msgspec.convert(fields, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise _invalid(error) from error
    if isinstance(body, Body):
        _check(body)
    elif isinstance(body, TokenizeBody):
        _check_tokenize(body)
    return body


def _refuse_unsupported(fields: dict[str, Any], understood: frozenset[str]) -> None:
    for name, asking in _ASK_EVEN_IF_EMPTY.items():
        if name not in understood and fields.get(name) == asking:
            raise _unsupported(name)
    for name, neutral in _UNSUPPORTED.items():
        value = fields.get(name)
        if name in understood or not value or value in neutral:
            continue
        raise _unsupported(name)


def _unsupported(name: str) -> ApiError:
    return bad_request(
        f"`{name}` is not supported yet: leave it out, since the answer would not follow it.",
        name,
        "unsupported_parameter",
    )


def _check(body: Body) -> None:
    """What no single field's type can say."""
    stops = body.stops
    if len(stops) > MAX_STOPS:
        raise bad_request(f"`stop` may hold at most {MAX_STOPS} strings, not {len(stops)}.", "stop")
    if any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise bad_request(f"Every string of `stop` must have 1 to {MAX_STOP_CHARACTERS} characters.", "stop")
    if body.stream_options is not None and not body.stream:
        raise bad_request("`stream_options` needs `stream` to be true.", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise bad_request("`prompt_logprobs` are not sent in a stream: leave `stream` out.", "prompt_logprobs")
    if body.temperature == 0 and (body.n or 1) > 1:
        raise bad_request("At `temperature` 0 all answers are the same: `n` must be 1.", "n")
    if isinstance(body, CompletionBody):
        _check_completion(body)
    if isinstance(body, ChatBody):
        if body.top_logprobs and not body.logprobs:
            raise bad_request("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")
        check_messages(body.messages)
        if body.tools is None and body.tool_choice not in (None, "none"):
            raise bad_request("`tool_choice` needs `tools`: give some, or leave it out.", "tool_choice")
        check_tools(body.tools or [], body.tool_choice)


def _check_completion(body: CompletionBody) -> None:
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise bad_request("`max_tokens` must be at least 1, unless `echo` asks for the prompt itself.", "max_tokens")
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise bad_request(f"`best_of` {body.best_of} is less than `n` {body.n}: draw at least as many.", "best_of")
    if body.temperature == 0 and body.num_samples > 1:
        raise bad_request("At `temperature` 0 all answers are the same: `best_of` must be 1.", "best_of")
    if body.best_of is not None and body.best_of > (body.n or 1) and body.stream:
        raise bad_request(
            "Which answers are the best is known at their end: leave `best_of` or `stream` out.", "best_of"
        )
    if body.suffix and body.echo:
        raise bad_request("`echo` shows a prompt that the answer goes on from: leave it or `suffix` out.", "echo")


def _check_tokenize(body: TokenizeBody) -> None:
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("Give either `prompt`, a text, or `messages`, a conversation.", "prompt")
    if body.messages is not None:
        check_messages(body.messages)
    elif len(body.prompt or "") > MAX_TOKENIZED:
        raise bad_request(f"`prompt` may have at most {MAX_TOKENIZED} characters: send it in parts.", "prompt")


def _invalid(error: Exception) -> ApiError:
    """msgspec's complaint, with the field's name where a client looks for it."""
    text = _brief(error)
    place = _AT.search(text)
    param = place.group(1) if place else None
    what = _AT.sub("", text)
    missing = re.search(r"missing required field `(\w+)`", what)
    if missing:
        param = f"{param}.{missing.group(1)}" if param else missing.group(1)
        return bad_request(f"`{param}` is missing.", param, "missing_field")
    what = what[:1].lower() + what[1:]
    return bad_request(f"`{param}` is not valid: {what}." if param else f"The body is not valid: {what}.", param)


def _brief(error: Exception) -> str:
    return str(error).partition("\n")[0][:300].rstrip(".")
