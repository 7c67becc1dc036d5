"""Components that torchtune's config imports: a tokenizer with the template of all sides, a constant learning rate.

Runs in torchtune's environment, not in ours.
"""

from typing import Any

from torch.optim.lr_scheduler import LambdaLR


class ChatTokenizer:
    """`tokens` and `mask` (True: no label) of a conversation; the assistant's answers and their end tokens have
    labels."""

    def __init__(self, path: str, max_seq_len: int) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(path)
        self.max_seq_len = max_seq_len
        self.pad_id = 0
        self.eos_id = self._tokenizer.token_to_id("<|im_end|>")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def __call__(self, sample: dict[str, Any], inference: bool = False) -> dict[str, Any]:
        tokens: list[int] = []
        mask: list[bool] = []
        for message in sample.pop("messages"):
            spoken = self.encode(f"{message.text_content}<|im_end|>")
            head = self.encode(("\n" if tokens else "") + f"<|im_start|>{message.role}\n")
            tokens += [*head, *spoken]
            mask += [True] * len(head) + [message.role != "assistant"] * len(spoken)
        return sample | {"tokens": tokens, "mask": mask}


def chat_tokenizer(path: str, max_seq_len: int) -> ChatTokenizer:
    return ChatTokenizer(path, max_seq_len)


def constant_rate(optimizer: Any, num_training_steps: int, last_epoch: int = -1) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1.0, last_epoch)
