"""Refuses what cannot be followed before it is admitted: constraints, checked where they can do no harm."""

import asyncio

from headway.grammar.check import Checker, CheckerBusy
from headway.grammar.frames import Vocabulary
from headway.grammar.limits import ConstraintError
from headway.grammar.notation import MISSING, is_available
from headway.models.tokenizer import Tokenizer
from headway.server.errors import bad_request, not_ready
from headway.server.formats import Asked, invalid


class Checks:
    """Of one model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._checker = Checker(lambda: Vocabulary(tokenizer.source, tokenizer.vocab_size, tokenizer.eos_ids))

    async def approve(self, asked: Asked, parts: list[Asked] | None = None) -> None:
        """Return if it can be followed. Raises ApiError 400 that names the field, or that of the part at fault; 503
        if too many wait for this."""
        if not is_available():
            raise bad_request(MISSING, asked.param, "unsupported_parameter")
        try:
            await self._check(asked)
        except ConstraintError as error:
            for part in parts or ():
                await self._approve_part(part)
            raise invalid(error, asked.param) from error

    async def _approve_part(self, part: Asked) -> None:
        try:
            await self._check(part)
        except ConstraintError as error:
            raise invalid(error, part.param) from error

    async def _check(self, asked: Asked) -> None:
        try:
            await asyncio.wrap_future(self._checker.check(asked.constraint))
        except CheckerBusy as error:
            raise not_ready("checker_busy", "Too many constraints wait to be checked: try again soon.") from error
