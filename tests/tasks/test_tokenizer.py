"""The tokenizer and chat template of a checkpoint folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the math extra comes with requirements/test.txt")

from nemo_apo.tasks.tokenizer import ChatSettings, ChatTokenizer

from .tiny_chat import TEXT_END, TURN_END, save_tokenizer

PLAIN = ChatSettings(
    folder=None, chat_template=None, end_token=None, system_prompt=None, enable_thinking=None
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("checkpoint"))


def chat(folder: Path, **changes: object) -> ChatTokenizer:
    return ChatTokenizer(replace(PLAIN, folder=str(folder), **changes))


def refusal(folder: Path | None, **changes: object) -> str:
    with pytest.raises(ValueError, match=r"^task\.") as error:
        chat(folder or Path("none"), **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestPrompts:
    def test_a_prompt_is_what_the_template_writes_up_to_the_answer(self, folder: Path) -> None:
        tokenizer = chat(folder, system_prompt="Be brief.")
        (tokens,) = tokenizer.encode(["1+1?"])
        assert tokenizer.decode(tokens) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
        )
        # The turn's ends are single tokens, not their characters.
        assert tokens.count(tokenizer.end_id) == 2

    def test_without_a_system_prompt_there_is_no_first_message(self, folder: Path) -> None:
        tokenizer = chat(folder)
        assert tokenizer.decode(tokenizer.encode(["1+1?"])[0]).startswith("<|im_start|>user\n1+1?")

    def test_thinking_is_handed_to_a_template_that_reads_it(self, folder: Path) -> None:
        without = chat(folder, enable_thinking=False)
        assert without.decode(without.encode(["1?"])[0]).endswith("<think>\n\n</think>\n\n")
        for value in (None, True):
            thinking = chat(folder, enable_thinking=value)
            assert thinking.decode(thinking.encode(["1?"])[0]).endswith("assistant\n")

    def test_a_template_of_ones_own(self, folder: Path, tmp_path: Path) -> None:
        file = tmp_path / "mine.jinja"
        file.write_text("{% for message in messages %}[{{ message.content }}]{% endfor %}")
        tokenizer = chat(folder, chat_template=str(file), system_prompt="S")
        assert tokenizer.decode(tokenizer.encode(["1?"])[0]) == "[S][1?]"

    def test_prompts_of_different_lengths_are_not_padded(self, folder: Path) -> None:
        tokenizer = chat(folder)
        short, long = tokenizer.encode(["1", "1+1+1+1"])
        assert len(long) == len(short) + 6
        assert tokenizer.encode([]) == []

    def test_nothing_is_put_before_what_the_template_writes(self, tmp_path: Path) -> None:
        """Some tokenizers begin every text with a token, and their templates do so, too."""
        from tokenizers import Tokenizer, processors

        file = str(save_tokenizer(tmp_path) / "tokenizer.json")
        words = Tokenizer.from_file(file)
        first = (TEXT_END, words.token_to_id(TEXT_END))
        words.post_processor = processors.TemplateProcessing(
            single=f"{TEXT_END} $A", special_tokens=[first]
        )
        words.save(file)
        tokenizer = chat(tmp_path)
        assert tokenizer._tokenizer("1")["input_ids"][0] == first[1]
        assert first[1] not in tokenizer.encode(["1"])[0]


class TestCompletions:
    def test_the_end_token_is_no_text_and_tags_are(self, folder: Path) -> None:
        tokenizer = chat(folder)
        (tokens,) = tokenizer.encode(["<think>é</think> <answer>½</answer>"])
        inside = tokenizer.decode(tokens).split("user\n")[1].split(TURN_END)[0]
        assert inside == "<think>é</think> <answer>½</answer>"
        assert tokenizer.decode([*tokens, tokenizer.end_id]) == tokenizer.decode(tokens)
        assert tokenizer.decode([tokenizer.end_id]) == ""
        assert tokenizer.decode([]) == ""

    def test_the_vocabulary_holds_every_token(self, folder: Path) -> None:
        tokenizer = chat(folder)
        words = json.loads((folder / "tokenizer.json").read_text())
        ids = [*words["model"]["vocab"].values(), *(t["id"] for t in words["added_tokens"])]
        assert tokenizer.vocab_size == max(ids) + 1

    def test_without_a_padding_token_the_end_token_pads(self, tmp_path: Path) -> None:
        save_tokenizer(tmp_path)
        settings = tmp_path / "tokenizer_config.json"
        values = json.loads(settings.read_text())
        assert values.pop("pad_token") == TEXT_END
        settings.write_text(json.dumps(values))
        tokenizer = chat(tmp_path)
        assert tokenizer.pad_id == tokenizer.end_id


class TestTheEnd:
    def test_the_chosen_end_is_named_and_so_are_the_others(self, tmp_path: Path) -> None:
        save_tokenizer(tmp_path)
        tokenizer = chat(tmp_path)
        end, text_end = tokenizer.end_id, tokenizer.pad_id
        assert tokenizer.notes() == [f"a completion ends with <|im_end|> ({end})"]
        (tmp_path / "generation_config.json").write_text(
            json.dumps({"eos_token_id": [end, text_end]})
        )
        assert chat(tmp_path).notes()[1] == (
            f"generation_config.json also lists <|endoftext|> ({text_end}), "
            "which does not end one here"
        )

    def test_an_end_that_the_template_never_writes_is_told(self, tmp_path: Path) -> None:
        """As in a base model whose tokenizer ends texts, not turns."""
        save_tokenizer(tmp_path, end=TEXT_END)
        assert "does not end the assistant's turn with <|endoftext|>" in chat(tmp_path).notes()[1]
        chosen = chat(tmp_path, end_token=TURN_END)
        assert len(chosen.notes()) == 1
        assert chosen.end_id != chat(tmp_path).end_id


class TestRefusals:
    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^task\.tokenizer=null: must be a checkpoint's"):
            ChatTokenizer(PLAIN)
        assert "there is no such folder" in refusal(tmp_path / "none")

    def test_a_folder_without_a_tokenizer(self, tmp_path: Path) -> None:
        assert "holds no tokenizer that transformers can read" in refusal(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{")
        assert "holds no tokenizer that transformers can read" in refusal(tmp_path)

    def test_code_of_a_checkpoint_is_not_run(self, tmp_path: Path) -> None:
        save_tokenizer(tmp_path)
        settings = tmp_path / "tokenizer_config.json"
        values = json.loads(settings.read_text())
        values |= {"auto_map": {"AutoTokenizer": [None, "code.Mine"]}, "tokenizer_class": "Mine"}
        settings.write_text(json.dumps(values))
        trace = tmp_path / "ran"
        (tmp_path / "code.py").write_text(f"open({str(trace)!r}, 'w')\nclass Mine: pass\n")
        refusal(tmp_path)
        assert not trace.exists()

    def test_templates(self, folder: Path, tmp_path: Path) -> None:
        save_tokenizer(tmp_path, template=None)
        assert "has no chat template of its own; name a Jinja file" in refusal(tmp_path)
        missing = str(tmp_path / "none.jinja")
        assert f"task.chat_template={missing}: cannot be read" in refusal(
            folder, chat_template=missing
        )
        plain = tmp_path / "plain.jinja"
        plain.write_text("{{ messages[0].content }}")
        message = refusal(folder, chat_template=str(plain), enable_thinking=False)
        assert message.startswith("task.enable_thinking=false: the chat template does not read it")

    def test_a_template_that_refuses_the_messages(self, folder: Path, tmp_path: Path) -> None:
        file = tmp_path / "users_only.jinja"
        file.write_text(
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
        )
        tokenizer = chat(folder, chat_template=str(file), system_prompt="S")
        with pytest.raises(ValueError, match="the chat template refuses the messages: no system"):
            tokenizer.encode(["1"])

    def test_ends(self, folder: Path, tmp_path: Path) -> None:
        save_tokenizer(tmp_path, end=None)
        assert "has no end token of its own; name one" in refusal(tmp_path)
        assert "must be a token of" in refusal(folder, end_token="<|eot|>")

    def test_damaged_generation_settings(self, tmp_path: Path) -> None:
        save_tokenizer(tmp_path)
        (tmp_path / "generation_config.json").write_text("[")
        with pytest.raises(ValueError, match=r"generation_config\.json is damaged"):
            chat(tmp_path).notes()
