"""Loaded by `swift sft --external_plugins`: ChatML whose last turn ends at its end token."""

from swift.template import TemplateMeta, register_template

register_template(
    TemplateMeta(
        "benchmark",
        prefix=[],
        prompt=["<|im_start|>user\n{{QUERY}}<|im_end|>\n<|im_start|>assistant\n"],
        chat_sep=["<|im_end|>\n"],
        suffix=["<|im_end|>"],
        system_prefix=["<|im_start|>system\n{{SYSTEM}}<|im_end|>\n"],
        auto_add_bos=False,
    )
)
