"""Prompts and answers as tokens: the chat template where the tokenizer has one, the plain prompt otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pke_fast.errors import InputError
from pke_fast.prefix import LEAST, common

if TYPE_CHECKING:
    from pke_fast.config import PKEConfig

SHOWN = 60  # characters of a prompt in a message


@dataclass(frozen=True)
class Encoded:
    """One sequence: a prompt and an answer to it.

    Attributes:
        ids: token ids of the prompt, then of the answer.
        prompt_length: number of ids that are the prompt's; at least 1.
        held: places in the prompt, ascending and before its last, at which what comes next is supervised too.
    """

    ids: tuple[int, ...]
    prompt_length: int
    held: tuple[int, ...] = ()

    @property
    def answer_length(self) -> int:
        return len(self.ids) - self.prompt_length

    @property
    def supervised(self) -> tuple[int, ...]:
        """The places from which a supervised token is told: those held, then those before the answer's tokens."""
        return (*self.held, *range(self.prompt_length - 1, len(self.ids) - 1))

    def after(self, beginning: int) -> Encoded:
        """What is left without so many tokens, none of which is supervised."""
        held = tuple(place - beginning for place in self.held)
        return Encoded(self.ids[beginning:], self.prompt_length - beginning, held)


def shared(sequences: Sequence[Encoded]) -> tuple[int, ...]:
    """The tokens that all begin with, before any that is supervised; () where they are too few to be worth it."""
    ids = common([sequence.ids for sequence in sequences])
    ids = ids[: min((sequence.supervised[0] for sequence in sequences), default=0)]
    return ids if len(ids) >= LEAST else ()


class PromptEncoder:
    """Turns prompts and answers into token ids, the same way for locating, editing and evaluating.

    Args:
        tokenizer: a transformers tokenizer.
        config: for `system_prompt`, `suffix_system_prompt` and `max_length`.
        context: the model's longest sequence in tokens, where it has a limit.
        vocabulary: how many tokens the model knows; None: not checked.
    """

    def __init__(
        self, tokenizer: Any, config: PKEConfig, context: int | None = None, vocabulary: int | None = None
    ) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.system_prompt = config.system_prompt.strip()
        self.suffix = config.suffix_system_prompt.strip()
        self.limit = min(config.max_length, context or config.max_length)
        self.chat = bool(getattr(tokenizer, "chat_template", None))

    def text(self, prompt: str) -> str:
        """The prompt as the model reads it, up to where its answer begins."""
        prompt = f"{prompt} {self.suffix}" if self.suffix else prompt
        if not self.chat:
            return f"{self.system_prompt}\n\n{prompt}" if self.system_prompt else prompt
        user = {"role": "user", "content": prompt}
        if not self.system_prompt:
            return self._template([user])
        try:
            return self._template([{"role": "system", "content": self.system_prompt}, user])
        except InputError:  # Gemma's template, for one, knows no system role: the text goes before the prompt
            return self._template([{"role": "user", "content": f"{self.system_prompt}\n\n{prompt}"}])

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of the rendered prompt.

        Raises:
            InputError: the prompt leaves no room for an answer within `max_length` and the model's context, or has a
                token that the model doesn't know.
        """
        ids = self._tokenize(self.text(prompt))
        if len(ids) >= self.limit:
            raise InputError(
                f"a prompt is too long: {_shorten(prompt)!r}",
                expected=f"at most {self.limit - 1} tokens (the model's context, or max_length)",
                got=f"{len(ids)} tokens",
                do="shorten it, or raise max_length if the model's context allows it",
            )
        if not ids:
            raise InputError("a prompt has no tokens", expected="some text", got=repr(prompt))
        return ids

    def around(self) -> tuple[int, int]:
        """How many tokens every prompt begins and ends with: a template's, and those of the fixed prompts."""
        one, other = (self._tokenize(self.text(prompt)) for prompt in ("Hello", "Why"))  # whether or not they fit
        return len(common((one, other), least=1)), len(common((one[::-1], other[::-1]), least=1))

    def fits(self, prompt: str) -> bool:
        """Whether the rendered prompt leaves room for an answer."""
        return len(self._tokenize(self.text(prompt))) < self.limit

    def encode(self, prompt: str, answer: str, *, end: bool = False, answer_tokens: int | None = None) -> Encoded:
        """A prompt with an answer, cut to `answer_tokens` and to the room there is.

        Args:
            end: add the tokenizer's end token after an answer that wasn't cut, so that the answer is learnt to end.
        """
        head = self.prompt_ids(prompt)
        rendered = self.text(prompt)
        joined = self._tokenize(rendered + ("" if self.chat else " ") + answer.strip())
        # A tokenizer that merges across the seam would change the prompt: the answer is then tokenized alone.
        tail = joined[len(head) :] if joined[: len(head)] == head else self._answer_alone(answer.strip())
        if end and self.tokenizer.eos_token_id is not None:
            tail = [*tail, self.tokenizer.eos_token_id]
        room = self.limit - len(head)
        tail = tail[: min(room, answer_tokens or room)]
        if not tail:
            raise InputError("an answer has no tokens", expected="some text", got=repr(answer))
        return Encoded((*head, *tail), len(head))

    def _answer_alone(self, answer: str) -> list[int]:
        return list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])

    def _tokenize(self, text: str) -> list[int]:
        # A chat template writes its own special tokens; plain text wants those that the tokenizer adds by itself.
        ids = list(self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"])
        if self.vocabulary is not None and max(ids, default=0) >= self.vocabulary:
            raise InputError(
                f"the tokenizer makes tokens of {_shorten(text)!r} that the model doesn't know",
                expected=f"tokens of 0 to {self.vocabulary - 1}, as many as the model's embedding has",
                got=str(max(ids)),
                do="take the model's own tokenizer, or resize its embedding (resize_token_embeddings)",
            )
        return ids

    def _template(self, messages: list[dict[str, str]]) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except (ValueError, TemplateError) as error:
            raise InputError("the tokenizer's chat template can't be used", got=str(error)) from error


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
