"""The text of an assistant's turn as it stands behind its prompt, and whether the two fit."""

from collections.abc import Mapping

from opd.data.chat import Message, render_chat
from opd.data.columns import sequence
from opd.data.reading import PromptReader, RenderedPrompt

_MOST_REPEATED = 200
"""How many characters at the end of a prompt are compared with the beginning of an answer."""
_NOT_CONTENT = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")
"""Fields of an answer that a chat template alone makes text of."""


def answer_text(
    place: str, reader: PromptReader, prompt: RenderedPrompt, answer: Message
) -> tuple[str, bool]:
    """(the assistant's turn behind ``prompt`` as text, whether it fits the end of the prompt).

    The text is what the chat template continues the prompt with. Where the template leaves some of
    the turn out (the reasoning), or renders a prompt otherwise than the start of the whole
    conversation, it is the message's content without tags that the prompt ends with already
    (<think>). ValueError for a turn without content, such as a tool call, that is not rendered
    behind the prompt.
    """
    content = answer["content"]
    if prompt.turns is None:
        if dropped := [name for name in _NOT_CONTENT if answer.get(name)]:
            raise ValueError(
                f"{place}: found {dropped[0]} in the completion of a prompt of plain text, which has "
                "no chat template that renders it; set data.chat=true, or write it into the content"
            )
        return content, True
    whole = render_chat(
        reader.tokenizer,
        [*prompt.turns, answer],
        prompt.options,
        place=place,
        add_generation_prompt=False,
    )
    own = _without_repeated_tags(prompt.text, content)
    continued = whole.removeprefix(prompt.text)
    if continued != whole and _packed(own) in _packed(continued):
        return continued, all(_packed(text) in _packed(continued) for text in _fields(answer))
    if not content.strip():
        raise ValueError(
            f"{place}: the assistant's last turn has no content to learn from; write it, or "
            "remove the row"
        )
    return own, own != content


def _without_repeated_tags(prompt: str, content: str) -> str:
    """``content`` without the longest run of tags that it begins with and ``prompt`` ends with."""
    begin = content.lstrip()
    tail = prompt[-_MOST_REPEATED:]
    for at, char in enumerate(tail):
        tags = tail[at:].rstrip()
        if char == "<" and tags.endswith(">") and begin.startswith(tags):
            return begin.removeprefix(tags).removeprefix(tail[at:].removeprefix(tags))
    return content


def thinking_fits(prompt: str, completion: str) -> bool:
    """Whether a <think> block is opened and closed once by the end of ``prompt`` and ``completion``."""
    end = prompt.rstrip()
    if _without_repeated_tags(prompt, completion) != completion:
        return False
    if end.endswith("<think>"):
        return "</think>" in completion
    return not (end.endswith("</think>") and completion.lstrip().startswith("<think>"))


def _fields(answer: Message) -> list[str]:
    """Texts of an answer's other fields, its reasoning and the tools that it calls."""
    calls = [call for call in sequence(answer.get("tool_calls")) or [] if isinstance(call, Mapping)]
    functions = [call.get("function", call) for call in calls]
    names = [function.get("name") for function in functions if isinstance(function, Mapping)]
    texts = [answer.get("reasoning_content"), answer.get("reasoning"), *names]
    return [text for text in texts if isinstance(text, str)]


def _packed(text: str) -> str:
    """Text without white space, which templates add and remove around a message."""
    return "".join(text.split())
