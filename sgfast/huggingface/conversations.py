"""Checks of chats and instructions, the examples of a tokenizer wrapper, and their conversion to lists of messages.

Errors name the place and the type of a wrong value. They never show a text, because texts may be private.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sgfast.ops.validation import did_you_mean

TRANSFORMED_ROLES = ("system", "user")
RESPONSE_ROLE = "assistant"
_ROLES = (*TRANSFORMED_ROLES, RESPONSE_ROLE)
_INSTRUCTION_KEYS = ("instruction", "system_prompt", "context", "response")


class Message(NamedTuple):
    """Message of a chat."""

    role: str
    content: str


def chat_conversations(examples: Any) -> list[list[Message]]:
    """Check one chat or a list of chats, each a list of messages."""
    if not is_list(examples):
        raise TypeError(
            "examples must be a list of messages, for example [{'role': 'user', 'content': 'Hello'}]; "
            f"got {described(examples)}"
        )
    if not examples:
        raise ValueError("examples must hold at least one example; got none")
    chats = examples if is_list(examples[0]) else [examples]
    return [_chat(chat, f"example {index}") for index, chat in enumerate(chats)]


def instruction_conversations(examples: Any) -> list[list[Message]]:
    """Check one instruction or a list of them, and write them as chats."""
    if isinstance(examples, Mapping):
        examples = [examples]
    if not is_list(examples):
        raise TypeError(f"examples must be a list of dictionaries, or one dictionary; got {described(examples)}")
    if not examples:
        raise ValueError("examples must hold at least one example; got none")
    return [instruction_messages(example, f"example {index}") for index, example in enumerate(examples)]


def _chat(chat: Any, where: str) -> list[Message]:
    if not is_list(chat):
        raise TypeError(f"{where} must be a list of messages; got {described(chat)}")
    if not chat:
        raise ValueError(f"{where} must hold at least one message; got none")
    return [checked_message(message, f"{where}, message {index}") for index, message in enumerate(chat)]


def checked_message(message: Any, where: str) -> Message:
    """Check a dictionary of role and content, and return it as a `Message`."""
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} must be a dictionary of role and content; got {described(message)}")
    _check_keys(message, ("role", "content"), where)
    if message["role"] not in _ROLES:
        suggestion = did_you_mean(message["role"], _ROLES)
        raise ValueError(f"{where}: role must be one of {', '.join(_ROLES)}; got {message['role']!r}{suggestion}")
    return Message(message["role"], message["content"])


def instruction_messages(example: Any, where: str) -> list[Message]:
    """Check an instruction and return it as a chat. Messages that would be empty are left out."""
    if not isinstance(example, Mapping):
        raise TypeError(f"{where} must be a dictionary of {', '.join(_INSTRUCTION_KEYS)}; got {described(example)}")
    _check_keys(example, _INSTRUCTION_KEYS, where)
    instruction, system_prompt, context, response = (example[key] for key in _INSTRUCTION_KEYS)
    messages = [Message("user", f"{instruction}\n\n{context}" if context else instruction)]
    if system_prompt:
        messages.insert(0, Message("system", system_prompt))
    if response:
        messages.append(Message(RESPONSE_ROLE, response))
    return messages


def _check_keys(mapping: Mapping[Any, Any], keys: Sequence[str], where: str) -> None:
    """Check that a mapping has exactly these keys, and strings as their values."""
    missing = [key for key in keys if key not in mapping]
    if missing:
        raise ValueError(f"{where} needs the keys {', '.join(keys)}; missing: {', '.join(missing)}")
    unknown = [repr(key) for key in mapping if key not in keys]
    if unknown:
        raise ValueError(f"{where} takes the keys {', '.join(keys)} only; got also {', '.join(unknown)}")
    for key in keys:
        if not isinstance(mapping[key], str):
            raise TypeError(f"{where}: {key} must be a string; got {described(mapping[key])}")


def is_list(value: Any) -> bool:
    """Return whether a value is a list or another sequence, but not a string."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def described(value: Any) -> str:
    """Return the name of a value's type and, for a list, the names of its items' types."""
    if not is_list(value):
        return type(value).__name__
    inside = sorted({type(item).__name__ for item in value})
    return f"{type(value).__name__} of {', '.join(inside) or 'nothing'}"
