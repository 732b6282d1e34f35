"""The tokenizer and chat template of a checkpoint folder, through transformers, local files only.

Code that comes with a checkpoint is never run. transformers is imported when a tokenizer is loaded,
not before.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GENERATION_CONFIG = "generation_config.json"
# Stands for an answer when the end of a turn is looked for in what a template makes.
_PROBE = "probe"
_EXAMPLE = "such as task.tokenizer=/models/Qwen3-1.7B"


@dataclass(frozen=True)
class ChatSettings:
    """How a problem becomes a prompt.

    Attributes:
        folder: of the checkpoint, with the tokenizer's files.
        chat_template: a Jinja file in place of the checkpoint's template; None takes that.
        end_token: text of the token that ends a completion; None is the tokenizer's.
        system_prompt: the first message; None is none.
        enable_thinking: handed to the template; None leaves it out.
    """

    folder: str | None
    chat_template: str | None
    end_token: str | None
    system_prompt: str | None
    enable_thinking: bool | None


class ChatTokenizer:
    """Prompts and completions to token ids and back.

    Args:
        settings: folder, template and end token.

    Raises:
        ValueError: naming key, value and rule, for a folder without a tokenizer, a tokenizer
            without a chat template or end token, or a missing library.
    """

    def __init__(self, settings: ChatSettings) -> None:
        self._settings = settings
        self._folder = tokenizer_folder(settings.folder)
        self._tokenizer = _loaded(self._folder)
        self._template = self._read_template()
        self.end_id = self._find_end()
        pad_id = self._tokenizer.pad_token_id
        self.pad_id: int = self.end_id if pad_id is None else pad_id
        self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1

    def encode(self, problems: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts that end where the answer begins.

        Raises:
            ValueError: if the template refuses the messages.
        """
        if not problems:
            return []
        texts = self._render([self._messages(problem) for problem in problems], is_open=True)
        # The template has written what belongs at the beginning.
        encoded = self._tokenizer(list(texts), add_special_tokens=False)
        return [list(tokens) for tokens in encoded["input_ids"]]

    def decode(self, completion: Sequence[int]) -> str:
        """The text of a completion without its end token; other special tokens are kept."""
        tokens = list(completion)
        if tokens and tokens[-1] == self.end_id:
            tokens.pop()
        return self._tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def notes(self) -> list[str]:
        """What a person should know of the end of a completion, a line each."""
        name = self._tokenizer.convert_ids_to_tokens(self.end_id)
        lines = [f"a completion ends with {name} ({self.end_id})"]
        others = [token for token in _listed_ends(self._folder) if token != self.end_id]
        if others:
            names = ", ".join(f"{self._tokenizer.convert_ids_to_tokens(t)} ({t})" for t in others)
            lines.append(f"{_GENERATION_CONFIG} also lists {names}, which does not end one here")
        if name not in self._turn_end():
            lines.append(
                f"the chat template does not end the assistant's turn with {name}: set "
                "task.end_token to the token that it ends with"
            )
        return lines

    def _messages(self, problem: str) -> list[dict[str, str]]:
        system = self._settings.system_prompt
        first = [] if system is None else [{"role": "system", "content": system}]
        return [*first, {"role": "user", "content": problem}]

    def _turn_end(self) -> str:
        """What the template writes after an answer."""
        answered = [*self._messages(_PROBE), {"role": "assistant", "content": _PROBE}]
        return self._render([answered], is_open=False)[0].rpartition(_PROBE)[2]

    def _render(self, conversations: list[list[dict[str, str]]], is_open: bool) -> list[str]:
        from jinja2 import TemplateError

        thinking = self._settings.enable_thinking
        try:
            return self._tokenizer.apply_chat_template(
                conversations,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=is_open,
                **({} if thinking is None else {"enable_thinking": thinking}),
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from None

    def _read_template(self) -> str:
        path = self._settings.chat_template
        if path is None:
            template = self._tokenizer.chat_template
            if not isinstance(template, str):
                raise ValueError(
                    f"task.chat_template=null: the tokenizer of {self._folder} has no chat "
                    "template of its own; name a Jinja file"
                )
        else:
            try:
                template = Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"task.chat_template={path}: cannot be read: {error}") from None
        thinking = self._settings.enable_thinking
        if thinking is not None and "enable_thinking" not in template:
            raise ValueError(
                f"task.enable_thinking={str(thinking).lower()}: the chat template does not read it;"
                " must be null"
            )
        return template

    def _find_end(self) -> int:
        token = self._settings.end_token
        if token is None:
            if self._tokenizer.eos_token_id is None:
                raise ValueError(
                    f"task.end_token=null: the tokenizer of {self._folder} has no end token of its "
                    "own; name one, such as task.end_token='<|im_end|>'"
                )
            return self._tokenizer.eos_token_id
        if token not in self._tokenizer.get_vocab():
            raise ValueError(f"task.end_token={token}: must be a token of {self._folder}")
        return self._tokenizer.convert_tokens_to_ids(token)


def tokenizer_folder(folder: str | None) -> Path:
    """The folder, which exists.

    Raises:
        ValueError: naming key, value and rule.
    """
    if folder is None:
        raise ValueError(f"task.tokenizer=null: must be a checkpoint's folder, {_EXAMPLE}")
    if not Path(folder).is_dir():
        raise ValueError(f"task.tokenizer={folder}: there is no such folder")
    return Path(folder)


def _loaded(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as missing:
        raise ValueError(f"task.tokenizer: {missing}: pip install 'nemo_apo[math]'") from None
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    # Whatever a broken file makes the library raise.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"task.tokenizer={folder}: holds no tokenizer that transformers can read: {reason[0]}"
        ) from None


def _listed_ends(folder: Path) -> list[int]:
    """End tokens of the checkpoint's generation settings, where it has them."""
    path = folder / _GENERATION_CONFIG
    if not path.is_file():
        return []
    try:
        ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id", [])
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        raise ValueError(f"task.tokenizer={folder}: {_GENERATION_CONFIG} is damaged") from None
    return ends if isinstance(ends, list) else [ends]
