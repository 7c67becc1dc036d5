"""Logit scaling is read from the model's own forward, whatever the config calls it."""

import pytest
import torch

from ft_dist.model.anatomy.decoder import decoder_of
from ft_dist.model.anatomy.logits import LogitForm, measured_form, own_logits
from tests.families.architectures import tiny_config


def build(model_type: str, **settings: float):
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type)
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "model_type, settings, form",
    [
        ("llama", {}, LogitForm()),
        ("falcon_h1", {"lm_head_multiplier": 0.3}, LogitForm(scale=0.3)),
        ("hyperclovax", {"logits_scaling": 0.7}, LogitForm(scale=0.7)),
        ("granite", {"logits_scaling": 13.0}, LogitForm(scale=1 / 13)),
        ("cohere", {"logit_scale": 0.0625}, LogitForm(scale=0.0625)),
        ("gemma2", {"final_logit_softcapping": 30.0}, LogitForm(softcap=30.0)),
        ("recurrent_gemma", {"logits_soft_cap": 25.0}, LogitForm(softcap=25.0)),
        ("nanochat", {"final_logit_softcapping": 15.0}, LogitForm(softcap=15.0)),
    ],
)
def test_scale_and_cap_are_measured(model_type, settings, form):
    assert measured_form(build(model_type, **settings)) == form


@pytest.mark.parametrize("model_type", ["llama", "falcon_h1", "opt", "llama4_text", "modernbert-decoder"])
def test_own_logits_are_those_of_the_whole_model(model_type):
    model = build(model_type)
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(own_logits(model, hidden), model(input_ids=ids, use_cache=False).logits)


def test_a_head_with_a_layer_of_its_own_has_no_form():
    """A dense layer, an activation and a norm come before the head's matrix."""
    assert measured_form(build("modernbert-decoder")) is None


def test_an_unknown_scale_is_kept_as_measured():
    model = build("llama")
    forward = type(model).forward

    class Scaled(type(model)):
        def forward(self, *arguments, **options):
            output = forward(self, *arguments, **options)
            output.logits = output.logits * 0.3217
            return output

    model.__class__ = Scaled
    form = measured_form(model)
    assert form is not None
    assert form.softcap is None
    assert form.scale == pytest.approx(0.3217, rel=1e-6)
