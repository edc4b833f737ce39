"""How a question and an answer become tokens: the model's chat template, or a plain one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEMPLATE = "Question: {q}\nAnswer: {a}"
_QUESTION, _ANSWER = "{q}", "{a}"


class Encoded(NamedTuple):
    """A question and an answer as tokens.

    Attributes:
        ids: All tokens, the question's and the answer's.
        start: Which of them is the first of the answer, at least 1.
    """

    ids: list[int]
    start: int


class Prompts:
    """Turns questions into prompts, and questions with answers into token sequences."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        """Choose the template: the one given, else the tokenizer's own for chats, else a plain one.

        Args:
            tokenizer: The model's tokenizer; it is not changed.
            template: Text with ``{q}`` for the question and, at its end, ``{a}`` for the answer.

        Raises:
            UsageError: The template is of another form.
        """
        self._tokenizer = tokenizer
        self._chat = template is None and bool(tokenizer.chat_template)
        self.template = "chat" if self._chat else template or DEFAULT_TEMPLATE
        before, _, rest = self.template.partition(_QUESTION)
        between, _, after = rest.partition(_ANSWER)
        whole = before + _QUESTION + between + _ANSWER
        if not self._chat and (after or whole != self.template or _ANSWER in before):
            raise UsageError(
                f"the template {self.template!r} cannot be used",
                remedy=f"write one with {_QUESTION} in it and {_ANSWER} at its end",
            )
        self._before, self._between = before, between

    def prompt(self, question: str) -> list[int]:
        """Return the tokens after which the model is to answer."""
        return self._tokens(self._prompt(question))

    def answered(self, question: str, answer: str) -> Encoded:
        """Return the tokens of a question and an answer, with the token that ends a text.

        The last one is part of the answer, as in the evaluations of TOFU and OpenUnlearning:
        a model that knows the answer knows where it ends. The answer begins where the tokens
        of the prompt and of both differ: a tokenizer may draw a space into the first word.
        """
        prompt = self.prompt(question)
        ids = self._tokens(self._whole(question, answer))
        if (end := self._tokenizer.eos_token_id) is not None:
            ids.append(end)
        both = zip(prompt, ids, strict=False)
        common = next((at for at, (one, two) in enumerate(both) if one != two), len(prompt))
        # Nothing predicts the first token of a text.
        return Encoded(ids, max(1, min(common, len(ids) - 1)))

    def _prompt(self, question: str) -> str:
        if not self._chat:
            # The space before an answer belongs to its first word.
            return f"{self._before}{question}{self._between}".rstrip(" ")
        return self._render([("user", question)], generation=True)

    def _whole(self, question: str, answer: str) -> str:
        if not self._chat:
            return f"{self._before}{question}{self._between}{answer}"
        prompt, answer = self._prompt(question), answer.strip()
        chat = self._render([("user", question), ("assistant", answer)], generation=False)
        opening = prompt.rstrip()
        at = chat.find(answer, len(opening))
        # What the template closes with is cut off: the token that ends a text is added to all.
        # One that does not continue its own prompt (it may open a train of thought) is not used.
        return chat[: at + len(answer)] if at >= 0 and chat.startswith(opening) else prompt + answer

    def _render(self, turns: list[tuple[str, str]], *, generation: bool) -> str:
        conversation = [{"role": role, "content": content} for role, content in turns]
        text: str = self._tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=generation
        )
        return text

    def _tokens(self, text: str) -> list[int]:
        # A chat template writes the special tokens itself.
        ids: list[int] = list(self._tokenizer(text, add_special_tokens=not self._chat)["input_ids"])
        end = self._tokenizer.eos_token_id
        # Some tokenizers end every text, a prompt too.
        if not self._chat and end is not None and len(ids) > 1 and ids[-1] == end:
            ids.pop()
        return ids
